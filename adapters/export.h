/* A version's files as a stream of bytes: a tar of the two as they were uploaded, or the one GGUF file.
 *
 * They are read piece by piece. An export holds the files open, so the version may be replaced or deleted
 * meanwhile. One caller at a time; every call blocks. */
#ifndef ADAPTERS_EXPORT_H
#define ADAPTERS_EXPORT_H

#include "adapters/registry.h"

struct export;
struct strbuf;

/* version as registry_lease. On ST_OK the caller owes one export_close. ST_NOT_FOUND, ST_INVALID, ST_IO. */
NODISCARD enum status export_open(struct registry *r, const char *tenant, const char *name,
                                  const char *version, struct export **out, struct error *err);
/* Appends the next bytes, about bytes_wanted of them; none is the end. */
NODISCARD enum status export_read(struct export *e, size_t bytes_wanted, struct strbuf *out,
                                  struct error *err);
void export_close(struct export *e);

const char *export_version(const struct export *e);
const char *export_type(const struct export *e);      /* media type */
const char *export_extension(const struct export *e); /* "tar" or "gguf" */

#endif

/* What an adapter's files hold, for people: `medley adapter inspect`. */
#ifndef ADAPTERS_INSPECT_H
#define ADAPTERS_INSPECT_H

#include "base/status.h"

struct strbuf;

/* path: a folder with the two files, an archive of them, or a safetensors file with adapter_config.json
 * beside it. Appends some lines of text. Everything is checked but the fit to a base model; errors as
 * of an upload. */
NODISCARD enum status adapter_inspect(const char *path, struct strbuf *out, struct error *err);

#endif

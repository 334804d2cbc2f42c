/* What survives a restart: adapters and versions in SQLite, their files by content.
 *
 *   data/medley.db            adapters, versions
 *   data/blobs/ab/abcdef...   files, named by their BLAKE2b-256 hash
 *   data/staging/             uploads in progress; emptied at open
 *   data/lock                 held by the process that has the folder open
 *
 * 1. A version is in the database only after its files are in blobs/, whole and synced: after a crash
 *    at any moment the database is the old one or the new one, and every version it names is complete.
 * 2. A file of blobs/ that no version names is removed: after the deletion that orphaned it, or at open.
 *
 * Thread-safe; calls take turns. */
#ifndef ADAPTERS_STORE_H
#define ADAPTERS_STORE_H

#include "adapters/hash.h"
#include "adapters/view.h"
#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

struct store;
struct strbuf;

/* ST_BUSY: another process has the folder open. ST_UNSUPPORTED: a later program wrote it. */
NODISCARD enum status store_open(const char *data_dir, struct store **out, struct error *err);
void store_close(struct store *s);

/* One version, as written at publishing. */
struct version_record {
    char version[ADAPTER_VERSION_HEX + 1]; /* the head of `hash` */
    char hash[HASH_HEX_SIZE];
    char config_blob[HASH_HEX_SIZE], tensors_blob[HASH_HEX_SIZE];
    char base[17];   /* fingerprint of the model it was checked against */
    int64_t created; /* unix seconds */
    size_t bytes;    /* of its files */
    char format[32];
    char targets[256];
    int rank, experts, top_k, sites;
    size_t parameters;
};

/* Calls `visit` for every version of every adapter: by tenant and name, oldest first. A status from visit
 * ends it and is returned. */
NODISCARD enum status store_visit(struct store *s,
                                  enum status (*visit)(void *ctx, const char *tenant, const char *name,
                                                       const struct version_record *v, bool current),
                                  void *ctx, struct error *err);

/* Moves the two files into blobs/ under the record's hashes, then makes the record the current version of
 * (tenant, name), new or not. Durable on ST_OK; ST_NO_SPACE, ST_IO leave what was. The files may be gone
 * either way. */
NODISCARD enum status store_publish(struct store *s, const char *tenant, const char *name,
                                    const struct version_record *v, const char *config_path,
                                    const char *tensors_path, struct error *err);

/* Forgets an adapter with all its versions, and appends the hashes of their files to `files`, each with
 * its NUL. ST_NOT_FOUND. */
NODISCARD enum status store_delete(struct store *s, const char *tenant, const char *name,
                                   struct strbuf *files, struct error *err);
/* Removes those of the files that no version names. */
void store_collect(struct store *s, const struct strbuf *files);

/* A malloc'd path the caller frees; NULL when out of memory. */
char *store_blob_path(const struct store *s, const char *hash);
/* A new empty folder in staging/; malloc'd path. */
NODISCARD enum status store_stage(struct store *s, char **path_out, struct error *err);

/* Removes a file or a folder with all in it; what is not there is fine. */
void remove_all(const char *path);

#endif

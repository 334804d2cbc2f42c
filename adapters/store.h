/* What survives a restart: adapters and versions in SQLite, their files by content.
 *
 *   data/medley.db            adapters, versions
 *   data/blobs/ab/abcdef...   files, named by their BLAKE2b-256 hash
 *   data/staging/             uploads in progress; emptied at open
 *   data/lock                 held by the process that has the folder open
 *
 * 1. A version is in the database only after its files are in blobs/, whole and synced: after a crash
 *    at any moment the database is the old one or the new one, and every version it names is complete.
 *    Each call below is one transaction.
 * 2. An adapter's versions are in the order in which they were made current: the last one is.
 * 3. A file of blobs/ that no version names is removed: after the deletion that orphaned it, or at open.
 *
 * Thread-safe; calls take turns. */
#ifndef ADAPTERS_STORE_H
#define ADAPTERS_STORE_H

#include "adapters/hash.h"
#include "adapters/view.h"
#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

#define ADAPTER_DESCRIPTION_MAX 1024 /* bytes */

struct store;
struct strbuf;

/* ST_BUSY: another process has the folder open. ST_UNSUPPORTED: a later program wrote it. */
NODISCARD enum status store_open(const char *data_dir, struct store **out, struct error *err);
void store_close(struct store *s);

enum version_source { VERSION_UPLOAD, VERSION_ROLLBACK, VERSION_TRAIN, VERSION_SOURCE_COUNT };

/* What an adapter's owner may change without a new version. */
struct adapter_settings {
    char description[ADAPTER_DESCRIPTION_MAX + 1]; /* UTF-8 */
    bool pinned;                                   /* its current version stays in memory */
    int keep_versions;                             /* the last so many; 0: as the registry says */
};

struct adapter_record {
    const char *tenant, *name;
    int64_t number; /* unique for ever, the same as long as the adapter exists */
    struct adapter_settings settings;
};

/* One version. */
struct version_record {
    char version[ADAPTER_VERSION_HEX + 1]; /* the head of `hash` */
    char hash[HASH_HEX_SIZE];
    char config_blob[HASH_HEX_SIZE], tensors_blob[HASH_HEX_SIZE];
    char base[17];              /* fingerprint of the model it was checked against */
    int64_t created;            /* unix seconds */
    int64_t published;          /* when it was last made current */
    enum version_source source; /* by what */
    size_t bytes;               /* of its files */
    char format[32];
    char targets[256];
    int rank, experts, top_k, sites;
    size_t parameters;
};

/* Calls `visit` for every version of every adapter: by tenant and name, the current version last. A status
 * from visit ends it and is returned. */
NODISCARD enum status store_visit(struct store *s,
                                  enum status (*visit)(void *ctx, const struct adapter_record *a,
                                                       const struct version_record *v),
                                  void *ctx, struct error *err);

/* In the calls below, `orphans` gets the hashes of the files of the versions that went, each with its NUL:
 * for store_collect, once nobody looks for them any more. */

/* Makes a file's bytes durable: for store_publish, whose callers wait for each other, ahead of it. */
NODISCARD enum status store_sync(const char *path, struct error *err);

/* Moves the two files, the tensors after store_sync, into blobs/ under the record's hashes, then makes the
 * record the current version of (tenant, name), new or not, and forgets all but its last `keep` versions (0:
 * none). *number_out is the adapter's. Durable on ST_OK; ST_NO_SPACE, ST_IO leave what was. The files may be
 * gone either way. */
NODISCARD enum status store_publish(struct store *s, const char *tenant, const char *name,
                                    const struct version_record *v, const char *config_path,
                                    const char *tensors_path, int keep, int64_t *number_out,
                                    struct strbuf *orphans, struct error *err);

/* Makes a version that is there the current one. ST_NOT_FOUND. */
NODISCARD enum status store_make_current(struct store *s, const char *tenant, const char *name,
                                         const struct version_record *v, struct error *err);

/* Writes an adapter's settings, then forgets all but its last `keep` versions (0: none). */
NODISCARD enum status store_set(struct store *s, const char *tenant, const char *name,
                                const struct adapter_settings *settings, int keep, struct strbuf *orphans,
                                struct error *err);

/* Forgets an adapter with all its versions. ST_NOT_FOUND. */
NODISCARD enum status store_delete(struct store *s, const char *tenant, const char *name,
                                   struct strbuf *orphans, struct error *err);
/* Removes those of the files that no version names. */
void store_collect(struct store *s, const struct strbuf *orphans);

/* A malloc'd path the caller frees; NULL when out of memory. */
char *store_blob_path(const struct store *s, const char *hash);
/* A new empty folder in staging/; malloc'd path. */
NODISCARD enum status store_stage(struct store *s, char **path_out, struct error *err);

/* Removes a file or a folder with all in it; what is not there is fine. */
void remove_all(const char *path);

#endif

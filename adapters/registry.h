/* Which adapters there are, which version of each is current, and who is using what.
 *
 * A version is immutable and identified by the hash of its files. Publishing changes what the next lease
 * returns, never what a holder sees. Everything survives a restart: metadata in SQLite, files
 * content-addressed under the data folder (see store.h).
 *
 * Thread-safe. Calls marked (blocks) touch disks or pack weights: never call them from the event
 * loop or the engine thread. */
#ifndef ADAPTERS_REGISTRY_H
#define ADAPTERS_REGISTRY_H

#include "adapters/reader.h"
#include "adapters/store.h"
#include "adapters/view.h"
#include "base/status.h"
#include "kernels/device.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct registry;

struct registry_config {
    const char *data_dir;
    struct device *device; /* packs the sites; not owned */
    struct adapter_base base;
    char base_fingerprint[17];
    /* Budget for packed adapters and for those being loaded, which count by their files until they are
     * packed. Those under lease or pinned may exceed it, and the one load that is under way alone. 0: 1 GiB
     */
    size_t resident_bytes;
    size_t upload_bytes_max; /* 0: 1 GiB */
    int keep_versions;       /* of an adapter that says nothing else; 0: all */
    int lr_width_max;        /* engine's lr_width: an adapter wider than this is refused. 0: any width */
};

NODISCARD enum status registry_open(const struct registry_config *config, struct registry **out,
                                    struct error *err); /* blocks */
/* All leases must have been released. */
void registry_close(struct registry *r);

bool adapter_name_valid(const char *name);

/* An upload: a private folder under staging, made at open, removed at close unless it was published. */
struct upload;
NODISCARD enum status upload_open(struct registry *r, struct upload **out, struct error *err); /* blocks */
/* The folder, for files written by the caller: either the two files of the native format, or one `body` of
 * any accepted kind (tar, gzip or zstd of it, zip). */
const char *upload_path(const struct upload *u);
/* What is said of the version it becomes; VERSION_UPLOAD unless set. */
void upload_set_source(struct upload *u, enum version_source source);
void upload_close(struct upload *u);

/* Copies: what they say may change at once. */
struct version_info {
    struct version_record record;
    bool current, resident;
    int leases;
};

struct adapter_info {
    char name[ADAPTER_NAME_MAX + 1];
    int64_t number; /* unique for ever, the same as long as the adapter exists */
    struct adapter_settings settings;
    int version_count;
    struct version_info
        *versions; /* the current one, then the one before it, ...; owned: adapter_info_release */
};
void adapter_info_release(struct adapter_info *i);

/* A version may be named by its public name, its full hash, or any head of that which no other version of
 * the adapter has. An *expected* version is the current one that the caller saw, by its public name or full
 * hash: where another is current, nothing is done, ST_CONFLICT. NULL: any. */

struct put_result {
    bool created;   /* the name is new */
    bool unchanged; /* it is the current version already */
    char version[ADAPTER_VERSION_HEX + 1];
};
/* Reads, checks, packs, stores and publishes what the upload's folder holds, and forgets the oldest versions
 * beyond those to keep. Bytes of a version that the adapter has and that is in memory only make it current
 * again. expected_version "" means: the name must be new; it is not asked for where the bytes are the current
 * version's already, so that a repeated call answers alike. The new version is resident on return if the
 * budget has room for it alone. (blocks) ST_INVALID: the name; ST_BAD_FORMAT, ST_REJECTED, ST_UNSUPPORTED,
 * ST_TOO_LARGE: the files. Any failure leaves everything as it was. */
NODISCARD enum status registry_put(struct registry *r, const char *tenant, const char *name, struct upload *u,
                                   const char *expected_version, struct put_result *out, struct error *err);

/* ST_NOT_FOUND where there is no such adapter for the tenant. (blocks) */
NODISCARD enum status registry_get(struct registry *r, const char *tenant, const char *name,
                                   struct adapter_info *out, struct error *err);
/* All of a tenant's adapters by name; malloc'd array the caller frees after releasing each. (blocks) */
NODISCARD enum status registry_list(struct registry *r, const char *tenant, struct adapter_info **out,
                                    size_t *count_out, struct error *err);
/* Makes an earlier version the current one again. ST_NOT_FOUND, ST_INVALID, ST_CONFLICT. (blocks) */
NODISCARD enum status registry_rollback(struct registry *r, const char *tenant, const char *name,
                                        const char *version, const char *expected_version,
                                        struct put_result *out, struct error *err);

struct adapter_change {
    const char *description;  /* NULL: as it was; at most ADAPTER_DESCRIPTION_MAX bytes, else ST_INVALID */
    const bool *pinned;       /* NULL: as it was */
    const int *keep_versions; /* NULL: as it was; what is beyond goes at once */
};
NODISCARD enum status registry_change(struct registry *r, const char *tenant, const char *name,
                                      const struct adapter_change *change, struct error *err); /* blocks */

/* Forgets the name and all versions, and removes the files that no other version shares: leases in flight
 * need them no more and stay valid. (blocks) */
NODISCARD enum status registry_delete(struct registry *r, const char *tenant, const char *name,
                                      const char *expected_version, struct error *err);

/* The two files of a version, open for reading: whatever happens to it, they stay whole. */
struct version_files {
    int config_fd, tensors_fd; /* the caller closes them */
    struct version_record record;
};
NODISCARD enum status registry_open_files(struct registry *r, const char *tenant, const char *name,
                                          const char *version, struct version_files *out,
                                          struct error *err); /* blocks */

/* The name of the adapter with that number. Without waiting; ST_NOT_FOUND. */
NODISCARD enum status registry_name(struct registry *r, const char *tenant, int64_t number,
                                    char out[ADAPTER_NAME_MAX + 1]);

/* One hold on one version, until lease_release. */
struct lease;
/* version NULL or "": the current one. Without waiting: ST_BUSY where it must be loaded first (then call
 * registry_lease from a worker), ST_NOT_FOUND, ST_INVALID. */
NODISCARD enum status registry_try_lease(struct registry *r, const char *tenant, const char *name,
                                         const char *version, struct lease **out);
/* Loads it if need be, evicting idle ones over the budget. (blocks) */
NODISCARD enum status registry_lease(struct registry *r, const char *tenant, const char *name,
                                     const char *version, struct lease **out, struct error *err);
/* Loads one pinned adapter that was never loaded since registry_open. False: there is none left. To be called
 * until then, so that pinned adapters are in memory before anybody asks for them. Failures are logged.
 * (blocks) */
bool registry_load_pinned(struct registry *r);
const struct adapter_view *lease_view(const struct lease *l);
void lease_release(struct lease *l); /* any thread, never blocks long; NULL is fine */

struct registry_stats {
    size_t adapters, versions, resident, resident_bytes, leases;
    uint64_t loads, evictions;
};
void registry_stats(struct registry *r, struct registry_stats *out);

#endif

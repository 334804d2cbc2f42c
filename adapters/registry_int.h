/* The registry's state, shared by registry.c (names, answers), publish.c (changes) and residency.c (leases,
 * memory). */
#ifndef ADAPTERS_REGISTRY_INT_H
#define ADAPTERS_REGISTRY_INT_H

#include "adapters/registry.h"
#include "adapters/store.h"
#include "adapters/version.h"
#include "base/file.h"

#include <pthread.h>

/* Lives until no adapter lists it and nobody holds it. */
struct version {
    struct version_record record;  /* immutable, but for `published` and `source`, under `lock` */
    struct adapter_view view;      /* immutable while anybody holds the version */
    struct packed_adapter *packed; /* NULL: not resident */
    bool loading;                  /* somebody is reading and packing it */
    bool preloaded;                /* registry_load_pinned has tried it */
    struct named_adapter *adapter; /* that lists it; NULL: deleted */
    int holds;                     /* leases, and calls that load it or wait for it */
    int leases;
    struct version *more_recent, *less_recent; /* in use, among the resident */
};

struct named_adapter {
    char *tenant;
    char name[ADAPTER_NAME_MAX + 1];
    int64_t number;
    struct adapter_settings settings;
    struct version **versions; /* in the order in which they were made current */
    size_t version_count;      /* at least one, once the adapter is in the table */
};

struct registry {
    struct registry_config config;
    struct store *store;

    /* Held by one put, rollback, change or delete at a time from its last check to the end; taken before
     * `lock`. */
    pthread_mutex_t publish;

    /* Guards all that follows. Never held over a disk access, a wait or packing. */
    pthread_mutex_t lock;
    pthread_cond_t loaded;           /* a load has ended, or the next in turn may begin */
    struct named_adapter **adapters; /* sorted by tenant, then name */
    size_t adapter_count, adapter_capacity;
    struct version *most_recent, *least_recent; /* all resident versions, by last use */
    size_t resident_count, resident_bytes, lease_count;
    uint64_t loads, evictions;
    /* Under way: reading and packing, for a lease or for an upload. Each has a ticket, and they begin in the
     * order of these. */
    size_t loading_count, loading_bytes;
    uint64_t load_ticket_next, load_ticket_turn;

    /* Frees what nobody holds any more, so that a release on the engine's thread does not. */
    pthread_t janitor;
    pthread_cond_t retire;
    struct packed_adapter *retired;
    bool closing;
};

/* --- registry.c: the table of names; the caller holds `lock` --- */

/* Index of the adapter, or of where it would stand. */
size_t adapter_index(const struct registry *r, const char *tenant, const char *name, bool *found);
/* Not yet in the table. NULL when out of memory. */
struct named_adapter *adapter_new(const char *tenant, const char *name);
void adapter_free(struct named_adapter *a);
struct version *version_new(const char *tenant, const char *name, const struct version_record *record);
/* Room for one more adapter and one more version of `a`, so that adding them cannot fail. */
bool tables_reserve(struct registry *r, struct named_adapter *a);
void adapter_insert(struct registry *r, struct named_adapter *a);
/* Makes v, which is new, the current version. */
void adapter_append(struct named_adapter *a, struct version *v);
void adapter_remove(struct registry *r, size_t index);
/* Whether text is a head, of at least digits_min digits, of the version's hash. */
bool version_has_head(const struct version *v, const char *text, size_t digits_min);

/* NULL where there is none. */
struct named_adapter *registry_find(struct registry *r, const char *tenant, const char *name);
struct version *adapter_current(const struct named_adapter *a);
/* The sentence for a failure to find what was named. */
void version_error(struct registry *r, enum status st, const char *tenant, const char *name,
                   const char *version, struct error *err);
/* The version that `text` names: "" or NULL the current one, else the head of its hash. ST_NOT_FOUND;
 * ST_INVALID where it is the head of several. */
NODISCARD enum status adapter_version(const struct named_adapter *a, const char *text, struct version **out);

/* --- residency.c --- */

NODISCARD enum status residency_open(struct registry *r, struct error *err);
void residency_close(struct registry *r); /* frees all that was retired */

/* Checks and packs an adapter's files. */
NODISCARD enum status registry_pack(struct registry *r, const struct file_map *config,
                                    const struct file_map *tensors, struct version_record *info,
                                    struct packed_adapter **out, struct error *err);

/* The caller holds `lock` in those up to load_end. Makes a version resident with `packed`, which is
 * moved, unless it already is; then evicts over the budget. */
void version_install(struct registry *r, struct version *v, struct packed_adapter *packed);
/* Evicts what is over the budget, loads under way included. */
void budget_keep(struct registry *r);
/* Marks a resident version as the one used last. */
void version_touch(struct registry *r, struct version *v);

/* What is about to be loaded from files of so many bytes counts against the budget from load_begin to
 * load_end. Waits, letting `lock` go, until it fits beside what is in memory and what is loading, or until
 * nothing else is loading: at most one load at a time goes beyond the budget. First come, first served, so
 * that many small ones do not keep a big one waiting. Never called with `publish` held. */
void load_begin(struct registry *r, size_t bytes);
void load_end(struct registry *r, size_t bytes);

/* Loads the adapter's current version where it is pinned and not in memory; a failure is logged. The caller
 * holds neither `publish` nor `lock`. */
void adapter_load_pinned(struct registry *r, const char *tenant, const char *name);
/* Its adapter lists it no more. Frees it once nobody holds it. */
void version_unlist(struct registry *r, struct version *v);
/* Puts packed weights (NULL is fine) on the janitor's list. */
void packed_retire(struct registry *r, struct packed_adapter *packed);

#endif

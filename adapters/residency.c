/* Leases, and which versions are in memory. */
#include "adapters/registry_int.h"
#include "base/log.h"
#include "base/memory.h"

#include <stdlib.h>
#include <string.h>

struct lease {
    struct registry *registry;
    struct version *version;
};

/* --- the janitor --- */

static void *janitor_main(void *arg)
{
    struct registry *r = arg;
    pthread_mutex_lock(&r->lock);
    while (r->retired || !r->closing) {
        struct packed_adapter *list = r->retired;
        r->retired = NULL;
        if (!list) {
            pthread_cond_wait(&r->retire, &r->lock);
            continue;
        }
        pthread_mutex_unlock(&r->lock);
        for (struct packed_adapter *next; list; list = next) {
            next = list->next;
            packed_adapter_free(list);
        }
        pthread_mutex_lock(&r->lock);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

enum status residency_open(struct registry *r, struct error *err)
{
    if (pthread_create(&r->janitor, NULL, janitor_main, r))
        return error_set(err, ST_NOMEM, "cannot start the registry's thread");
    return ST_OK;
}

void residency_close(struct registry *r)
{
    pthread_mutex_lock(&r->lock);
    r->closing = true;
    pthread_cond_signal(&r->retire);
    pthread_mutex_unlock(&r->lock);
    pthread_join(r->janitor, NULL);
}

void packed_retire(struct registry *r, struct packed_adapter *packed)
{
    if (!packed) return;
    packed->next = r->retired;
    r->retired = packed;
    pthread_cond_signal(&r->retire);
}

/* --- the resident, by last use --- */

static void recent_remove(struct registry *r, struct version *v)
{
    *(v->more_recent ? &v->more_recent->less_recent : &r->most_recent) = v->less_recent;
    *(v->less_recent ? &v->less_recent->more_recent : &r->least_recent) = v->more_recent;
    v->more_recent = v->less_recent = NULL;
}

static void recent_add(struct registry *r, struct version *v)
{
    v->less_recent = r->most_recent;
    *(r->most_recent ? &r->most_recent->more_recent : &r->least_recent) = v;
    r->most_recent = v;
}

static void version_evict(struct registry *r, struct version *v)
{
    if (!v->packed) return;
    recent_remove(r, v);
    r->resident_count--;
    r->resident_bytes -= v->packed->bytes;
    packed_retire(r, v->packed);
    v->packed = NULL;
    v->view.lr = (struct lr_adapter){0};
}

static bool version_pinned(const struct version *v)
{
    return v->adapter && v->adapter->settings.pinned && v == adapter_current(v->adapter);
}

static bool budget_has_room(const struct registry *r, size_t bytes)
{
    return size_add(size_add(r->resident_bytes, r->loading_bytes), bytes) <= r->config.resident_bytes;
}

/* Evicts until so many bytes more would fit, or nothing is left that may go. */
static void budget_make_room(struct registry *r, size_t bytes)
{
    struct version *v = r->least_recent;
    while (v && !budget_has_room(r, bytes)) {
        struct version *next = v->more_recent;
        if (v->holds == 0 && !version_pinned(v)) {
            version_evict(r, v);
            r->evictions++;
        }
        v = next;
    }
}

void budget_keep(struct registry *r) { budget_make_room(r, 0); }

void version_touch(struct registry *r, struct version *v)
{
    if (!v->packed) return;
    recent_remove(r, v);
    recent_add(r, v);
}

void version_install(struct registry *r, struct version *v, struct packed_adapter *packed)
{
    if (v->packed) { /* two uploads of the same bytes */
        packed_retire(r, packed);
        return;
    }
    v->packed = packed;
    v->view.lr = packed->lr;
    recent_add(r, v);
    r->resident_count++;
    r->resident_bytes += packed->bytes;
    r->loads++;
    budget_keep(r);
}

static void version_collect(struct registry *r, struct version *v)
{
    if (v->holds || v->adapter) return;
    version_evict(r, v);
    free(v);
}

void version_unlist(struct registry *r, struct version *v)
{
    v->adapter = NULL;
    version_collect(r, v);
}

static void version_unhold(struct registry *r, struct version *v)
{
    v->holds--;
    version_collect(r, v);
    budget_keep(r);
}

/* --- loading --- */

static bool load_may_begin(struct registry *r, size_t bytes)
{
    budget_make_room(r, bytes);
    return r->loading_count == 0 || budget_has_room(r, bytes);
}

void load_begin(struct registry *r, size_t bytes)
{
    uint64_t ticket = r->load_ticket_next++;
    while (ticket != r->load_ticket_turn || !load_may_begin(r, bytes))
        pthread_cond_wait(&r->loaded, &r->lock);
    r->load_ticket_turn++;
    r->loading_count++;
    r->loading_bytes += bytes;
    pthread_cond_broadcast(&r->loaded);
}

void load_end(struct registry *r, size_t bytes)
{
    r->loading_count--;
    r->loading_bytes -= bytes;
    pthread_cond_broadcast(&r->loaded);
}

enum status registry_pack(struct registry *r, const struct file_map *config, const struct file_map *tensors,
                          struct version_record *info, struct packed_adapter **out, struct error *err)
{
    struct adapter_bundle *b = NULL;
    enum status st =
        adapter_read(config->data, config->size, tensors->data, tensors->size, &r->config.base, &b, err);
    if (st) return st;
    if (r->config.lr_width_max > 0 && b->lr_width > (size_t)r->config.lr_width_max) {
        st = error_set(
            err, ST_REJECTED,
            "the adapter needs a width of %zu (the sum of experts * (rank + 1) over projections that share "
            "an input); this server allows %d",
            b->lr_width, r->config.lr_width_max);
        goto done;
    }
    memcpy(info->format, b->format, sizeof info->format);
    memcpy(info->targets, b->targets, sizeof info->targets);
    info->rank = b->rank_max;
    info->experts = b->experts_max;
    info->top_k = b->top_k;
    info->sites = b->site_count;
    info->parameters = b->parameters;
    st = adapter_pack(b, r->config.device, out, err);
done:
    adapter_bundle_free(b);
    return st;
}

static enum status blob_map(struct registry *r, const char *hash, struct file_map *out, struct error *err)
{
    char *path = store_blob_path(r->store, hash);
    if (!path) return error_set(err, ST_NOMEM, "out of memory");
    struct error inner = {0};
    enum status st = file_map(path, out, &inner);
    bool damaged = !st && !hash_matches(out->data, out->size, hash);
    if (damaged || st == ST_NOT_FOUND)
        st = error_set(err, ST_IO, "the adapter's stored file %s is %s: upload it again", hash,
                       damaged ? "damaged" : "missing");
    else if (st)
        error_set(err, st, "%s", inner.message);
    free(path);
    return st;
}

static enum status version_load(struct registry *r, const struct version *v, struct packed_adapter **out,
                                struct error *err)
{
    struct file_map config = {0}, tensors = {0};
    struct version_record info; /* known already */
    enum status st = blob_map(r, v->record.config_blob, &config, err);
    if (!st) st = blob_map(r, v->record.tensors_blob, &tensors, err);
    if (!st) st = registry_pack(r, &config, &tensors, &info, out, err);
    file_unmap(&config);
    file_unmap(&tensors);
    return st;
}

/* Makes a held version resident: loads it, or waits for whoever does. Called and left with `lock`
 * held, which is let go meanwhile. */
static enum status version_make_resident(struct registry *r, struct version *v, struct error *err)
{
    enum status st = ST_OK;
    while (!v->packed && !st) {
        if (v->loading) {
            pthread_cond_wait(&r->loaded, &r->lock);
            continue;
        }
        struct packed_adapter *packed = NULL;
        v->loading = true;
        load_begin(r, v->record.bytes);
        pthread_mutex_unlock(&r->lock);
        st = version_load(r, v, &packed, err);
        pthread_mutex_lock(&r->lock);
        v->loading = false;
        load_end(r, v->record.bytes);
        if (!st) version_install(r, v, packed);
        if (st && !v->adapter)
            st = error_set(err, ST_NOT_FOUND, "the adapter '%s' was deleted", v->view.name);
    }
    return st;
}

/* --- leases --- */

static enum status version_find(struct registry *r, const char *tenant, const char *name, const char *version,
                                struct version **out)
{
    struct named_adapter *a = registry_find(r, tenant, name);
    return a ? adapter_version(a, version, out) : ST_NOT_FOUND;
}

static struct lease *lease_new(struct registry *r, struct version *v)
{
    struct lease *l = malloc(sizeof *l);
    if (!l) return NULL;
    *l = (struct lease){.registry = r, .version = v};
    v->holds++;
    v->leases++;
    r->lease_count++;
    version_touch(r, v);
    return l;
}

enum status registry_try_lease(struct registry *r, const char *tenant, const char *name, const char *version,
                               struct lease **out)
{
    pthread_mutex_lock(&r->lock);
    struct version *v;
    struct lease *l = NULL;
    enum status st = version_find(r, tenant, name, version, &v);
    if (!st && !v->packed) st = ST_BUSY;
    if (!st && !(l = lease_new(r, v))) st = ST_NOMEM;
    if (!st) *out = l;
    pthread_mutex_unlock(&r->lock);
    return st;
}

enum status registry_lease(struct registry *r, const char *tenant, const char *name, const char *version,
                           struct lease **out, struct error *err)
{
    struct version *v;
    pthread_mutex_lock(&r->lock);
    enum status st = version_find(r, tenant, name, version, &v);
    if (st) {
        version_error(r, st, tenant, name, version, err);
        goto done;
    }
    v->holds++;
    st = version_make_resident(r, v, err);
    if (!st) {
        struct lease *l = lease_new(r, v);
        if (l)
            *out = l;
        else
            st = error_set(err, ST_NOMEM, "out of memory");
    }
    version_unhold(r, v);
done:
    pthread_mutex_unlock(&r->lock);
    return st;
}

const struct adapter_view *lease_view(const struct lease *l) { return &l->version->view; }

void lease_release(struct lease *l)
{
    if (!l) return;
    struct registry *r = l->registry;
    pthread_mutex_lock(&r->lock);
    l->version->leases--;
    r->lease_count--;
    version_unhold(r, l->version);
    pthread_mutex_unlock(&r->lock);
    free(l);
}

/* --- the pinned --- */

/* Loads v, an adapter's current version. The caller holds `lock`, which is let go meanwhile. */
static void pinned_load(struct registry *r, struct version *v)
{
    struct error err = {0};
    v->preloaded = true;
    v->holds++;
    if (version_make_resident(r, v, &err) && v->adapter)
        log_warn("the pinned adapter '%s' cannot be loaded: %s", v->view.name, err.message);
    version_unhold(r, v);
}

bool registry_load_pinned(struct registry *r)
{
    bool found = false;
    pthread_mutex_lock(&r->lock);
    for (size_t i = 0; i < r->adapter_count && !found; i++) {
        struct version *v = adapter_current(r->adapters[i]);
        found = version_pinned(v) && !v->packed && !v->preloaded;
        if (found) pinned_load(r, v);
    }
    pthread_mutex_unlock(&r->lock);
    return found;
}

void adapter_load_pinned(struct registry *r, const char *tenant, const char *name)
{
    pthread_mutex_lock(&r->lock);
    const struct named_adapter *a = registry_find(r, tenant, name);
    struct version *v = a ? adapter_current(a) : NULL;
    if (v && version_pinned(v) && !v->packed) pinned_load(r, v);
    pthread_mutex_unlock(&r->lock);
}

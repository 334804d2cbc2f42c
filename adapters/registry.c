#include "adapters/registry.h"

#include "adapters/package.h"
#include "adapters/registry_int.h"
#include "base/log.h"
#include "base/strbuf.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BYTES_DEFAULT ((size_t)1 << 30)

struct upload {
    char *path; /* owned */
};

bool adapter_name_valid(const char *name)
{
    static const char first[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    if (!name || !*name || !strchr(first, *name)) return false;
    size_t n = strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-");
    return name[n] == '\0' && n <= ADAPTER_NAME_MAX;
}

static enum status no_memory(struct error *err) { return error_set(err, ST_NOMEM, "out of memory"); }

/* --- the table of names --- */

/* Index of the adapter, or of where it would stand. */
static size_t adapter_index(const struct registry *r, const char *tenant, const char *name, bool *found)
{
    size_t low = 0, high = r->adapter_count;
    *found = false;
    while (low < high && !*found) {
        size_t middle = low + (high - low) / 2;
        int order = strcmp(tenant, r->adapters[middle]->tenant);
        if (!order) order = strcmp(name, r->adapters[middle]->name);
        if (order > 0)
            low = middle + 1;
        else
            high = middle;
        if (!order) {
            *found = true;
            low = middle;
        }
    }
    return low;
}

struct named_adapter *registry_find(struct registry *r, const char *tenant, const char *name)
{
    bool found;
    size_t i = adapter_index(r, tenant, name, &found);
    return found ? r->adapters[i] : NULL;
}

static void adapter_free(struct named_adapter *a)
{
    if (!a) return;
    free(a->tenant);
    free(a->versions);
    free(a);
}

static struct named_adapter *adapter_new(const char *tenant, const char *name)
{
    struct named_adapter *a = calloc(1, sizeof *a);
    if (!a) return NULL;
    a->tenant = strdup(tenant);
    snprintf(a->name, sizeof a->name, "%s", name);
    if (a->tenant) return a;
    adapter_free(a);
    return NULL;
}

static struct version *version_new(const char *tenant, const char *name, const struct version_record *record)
{
    struct version *v = calloc(1, sizeof *v);
    if (!v) return NULL;
    v->record = *record;
    v->listed = true;
    snprintf(v->view.name, sizeof v->view.name, "%s", name);
    memcpy(v->view.version, record->version, sizeof v->view.version);
    if (hash_key(tenant, name, record->hash, &v->view.key) == ST_OK) return v;
    free(v);
    return NULL;
}

/* Room for one more adapter and one more version of `a`, so that adding them cannot fail. */
static bool tables_reserve(struct registry *r, struct named_adapter *a)
{
    if (r->adapter_count == r->adapter_capacity) {
        size_t capacity = r->adapter_capacity ? 2 * r->adapter_capacity : 64;
        struct named_adapter **grown = realloc(r->adapters, capacity * sizeof *grown);
        if (!grown) return false;
        r->adapters = grown;
        r->adapter_capacity = capacity;
    }
    struct version **grown = realloc(a->versions, (a->version_count + 1) * sizeof *grown);
    if (grown) a->versions = grown;
    return grown;
}

static void adapter_insert(struct registry *r, struct named_adapter *a)
{
    bool found;
    size_t i = adapter_index(r, a->tenant, a->name, &found);
    memmove(r->adapters + i + 1, r->adapters + i, (r->adapter_count - i) * sizeof *r->adapters);
    r->adapters[i] = a;
    r->adapter_count++;
}

static struct version *version_by_hash(const struct named_adapter *a, const char *hash)
{
    for (size_t i = 0; i < a->version_count; i++)
        if (strcmp(a->versions[i]->record.hash, hash) == 0) return a->versions[i];
    return NULL;
}

/* --- opening and closing --- */

/* A row of the store, in order of tenants and names. */
static enum status row_take(void *ctx, const char *tenant, const char *name,
                            const struct version_record *record, bool current)
{
    struct registry *r = ctx;
    struct named_adapter *a = registry_find(r, tenant, name), *fresh = NULL;
    struct version *v = version_new(tenant, name, record);
    if (!a) a = fresh = adapter_new(tenant, name);
    if (!v || !a || !tables_reserve(r, a)) {
        free(v);
        adapter_free(fresh);
        return ST_NOMEM;
    }
    if (fresh) adapter_insert(r, a);
    a->versions[a->version_count++] = v;
    if (current || !a->current) a->current = v;
    return ST_OK;
}

static void warn_of_another_base(const struct registry *r)
{
    size_t count = 0;
    for (size_t i = 0; i < r->adapter_count; i++)
        count += strcmp(r->adapters[i]->current->record.base, r->config.base_fingerprint) != 0;
    if (count)
        log_warn("%zu of %zu adapters were uploaded for another base model; one that does not fit is refused "
                 "when used",
                 count, r->adapter_count);
}

enum status registry_open(const struct registry_config *config, struct registry **out, struct error *err)
{
    struct registry *r = calloc(1, sizeof *r);
    if (!r) return no_memory(err);
    r->config = *config;
    r->config.data_dir = NULL; /* the store has its own copy */
    if (!r->config.resident_bytes) r->config.resident_bytes = BYTES_DEFAULT;
    if (!r->config.upload_bytes_max) r->config.upload_bytes_max = BYTES_DEFAULT;
    pthread_mutex_init(&r->publish, NULL);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->loaded, NULL);
    pthread_cond_init(&r->retire, NULL);

    enum status st = residency_open(r, err);
    if (st) {
        free(r);
        return st;
    }
    st = store_open(config->data_dir, &r->store, err);
    if (!st) st = store_visit(r->store, row_take, r, err);
    if (st == ST_NOMEM) no_memory(err);
    if (st) {
        registry_close(r);
        return st;
    }
    warn_of_another_base(r);
    *out = r;
    return ST_OK;
}

/* Takes an adapter out of the table; the caller holds `lock`. */
static void adapter_remove(struct registry *r, size_t i)
{
    struct named_adapter *a = r->adapters[i];
    r->adapter_count--;
    memmove(r->adapters + i, r->adapters + i + 1, (r->adapter_count - i) * sizeof *r->adapters);
    for (size_t k = 0; k < a->version_count; k++) version_unlist(r, a->versions[k]);
    adapter_free(a);
}

void registry_close(struct registry *r)
{
    if (!r) return;
    pthread_mutex_lock(&r->lock);
    CHECK(r->lease_count == 0);
    while (r->adapter_count) adapter_remove(r, r->adapter_count - 1);
    pthread_mutex_unlock(&r->lock);
    residency_close(r);
    store_close(r->store);
    pthread_mutex_destroy(&r->publish);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->loaded);
    pthread_cond_destroy(&r->retire);
    free(r->adapters);
    free(r);
}

/* --- uploads --- */

enum status upload_open(struct registry *r, struct upload **out, struct error *err)
{
    struct upload *u = calloc(1, sizeof *u);
    if (!u) return no_memory(err);
    enum status st = store_stage(r->store, &u->path, err);
    if (st) {
        free(u);
        return st;
    }
    *out = u;
    return ST_OK;
}

const char *upload_path(const struct upload *u) { return u->path; }

void upload_close(struct upload *u)
{
    if (!u) return;
    remove_all(u->path);
    free(u->path);
    free(u);
}

/* --- publishing --- */

/* One registry_put under way. */
struct put {
    struct registry *registry;
    const char *tenant, *name;
    const char *expected; /* may be NULL */
    struct package files;
    struct version_record record;
    struct packed_adapter *packed; /* owned until it is installed */
};

static enum status conflict(const struct put *p, const struct named_adapter *a, struct error *err)
{
    if (!a)
        return error_set(err, ST_CONFLICT, "there is no adapter '%s', but version '%.64s' was expected",
                         p->name, p->expected);
    if (!*p->expected)
        return error_set(err, ST_CONFLICT, "the adapter '%s' exists already (version %s)", p->name,
                         a->current->record.version);
    return error_set(err, ST_CONFLICT, "the current version of '%s' is %s, not the expected '%.64s'", p->name,
                     a->current->record.version, p->expected);
}

/* ST_OK with *unchanged where these bytes are current already, or where they may be published. */
static enum status put_check(const struct put *p, bool *unchanged, struct error *err)
{
    pthread_mutex_lock(&p->registry->lock);
    struct named_adapter *a = registry_find(p->registry, p->tenant, p->name);
    const char *current = a ? a->current->record.version : "";
    enum status st = ST_OK;
    *unchanged = a && strcmp(a->current->record.hash, p->record.hash) == 0;
    if (!*unchanged && p->expected && strcmp(p->expected, current) != 0) st = conflict(p, a, err);
    pthread_mutex_unlock(&p->registry->lock);
    return st;
}

static enum status put_identify(struct put *p, struct error *err)
{
    struct version_record *v = &p->record;
    enum status st = hash_bytes(p->files.config.data, p->files.config.size, v->config_blob);
    if (!st) st = hash_bytes(p->files.tensors.data, p->files.tensors.size, v->tensors_blob);
    if (!st) st = hash_version(v->config_blob, v->tensors_blob, v->hash);
    if (st) return error_set(err, st, "cannot hash the adapter");
    memcpy(v->version, v->hash, ADAPTER_VERSION_HEX);
    memcpy(v->base, p->registry->config.base_fingerprint, sizeof v->base);
    v->created = (int64_t)time(NULL);
    v->bytes = p->files.config.size + p->files.tensors.size;
    return ST_OK;
}

/* Publishes on disk, then in memory, which cannot fail. The caller holds `publish`, so nobody else
 * changes the table of names. */
static enum status put_publish(struct put *p, struct put_result *result, struct error *err)
{
    struct registry *r = p->registry;
    enum status st = ST_NOMEM;
    pthread_mutex_lock(&r->lock);
    struct named_adapter *a = registry_find(r, p->tenant, p->name), *fresh = NULL;
    struct version *old = a ? version_by_hash(a, p->record.hash) : NULL;
    struct version *v = old ? old : version_new(p->tenant, p->name, &p->record);
    if (!a) a = fresh = adapter_new(p->tenant, p->name);
    bool ready = a && v && tables_reserve(r, a);
    pthread_mutex_unlock(&r->lock);

    if (ready)
        st = store_publish(r->store, p->tenant, p->name, &p->record, p->files.config_path,
                           p->files.tensors_path, err);
    else
        no_memory(err);
    if (st) {
        if (!old) free(v);
        adapter_free(fresh);
        return st;
    }
    pthread_mutex_lock(&r->lock);
    if (fresh) adapter_insert(r, a);
    if (!old) a->versions[a->version_count++] = v;
    a->current = v;
    version_install(r, v, p->packed);
    p->packed = NULL;
    pthread_mutex_unlock(&r->lock);
    result->created = fresh != NULL;
    return ST_OK;
}

static enum status put_run(struct put *p, struct upload *u, struct put_result *result, struct error *err)
{
    struct registry *r = p->registry;
    enum status st = package_open(u->path, r->config.upload_bytes_max, &p->files, err);
    if (!st) st = put_identify(p, err);
    if (!st) st = put_check(p, &result->unchanged, err);
    if (st) return st;
    memcpy(result->version, p->record.version, sizeof result->version);
    if (result->unchanged) return ST_OK;

    st = registry_pack(r, &p->files.config, &p->files.tensors, &p->record, &p->packed, err);
    if (st) return st;
    pthread_mutex_lock(&r->publish);
    st = put_check(p, &result->unchanged, err); /* others may have published meanwhile */
    if (!st && !result->unchanged) st = put_publish(p, result, err);
    pthread_mutex_unlock(&r->publish);
    return st;
}

enum status registry_put(struct registry *r, const char *tenant, const char *name, struct upload *u,
                         const char *expected_version, struct put_result *out, struct error *err)
{
    if (!adapter_name_valid(name))
        return error_set(
            err, ST_INVALID,
            "'%.140s' is not an adapter's name: 1 to %d of letters, digits, '.', '_' and '-', the first a "
            "letter or a digit",
            name ? name : "", ADAPTER_NAME_MAX);
    struct put p = {.registry = r, .tenant = tenant, .name = name, .expected = expected_version};
    struct put_result result = {0};
    enum status st = put_run(&p, u, &result, err);
    packed_adapter_free(p.packed);
    package_close(&p.files);
    if (!st) *out = result;
    return st;
}

enum status registry_delete(struct registry *r, const char *tenant, const char *name, struct error *err)
{
    struct strbuf files = {0};
    pthread_mutex_lock(&r->publish);
    enum status st = store_delete(r->store, tenant, name, &files, err);
    if (!st) {
        bool found;
        pthread_mutex_lock(&r->lock);
        size_t i = adapter_index(r, tenant, name, &found);
        if (found) adapter_remove(r, i);
        pthread_mutex_unlock(&r->lock);
        /* Only now: as long as a lease finds the name, it must find the files. */
        store_collect(r->store, &files);
    }
    pthread_mutex_unlock(&r->publish);
    strbuf_release(&files);
    return st;
}

/* --- answers --- */

void adapter_info_release(struct adapter_info *i)
{
    free(i->versions);
    i->versions = NULL;
    i->version_count = 0;
}

static enum status info_fill(const struct named_adapter *a, struct adapter_info *out)
{
    const struct version_record *c = &a->current->record;
    struct adapter_info info = {
        .rank = c->rank,
        .experts = c->experts,
        .top_k = c->top_k,
        .sites = c->sites,
        .parameters = c->parameters,
        .version_count = (int)a->version_count,
        .versions = calloc(a->version_count, sizeof *info.versions),
    };
    if (!info.versions) return ST_NOMEM;
    memcpy(info.name, a->name, sizeof info.name);
    memcpy(info.format, c->format, sizeof info.format);
    memcpy(info.targets, c->targets, sizeof info.targets);
    for (size_t i = 0; i < a->version_count; i++) {
        const struct version *v = a->versions[a->version_count - 1 - i];
        struct version_info *vi = &info.versions[i];
        memcpy(vi->version, v->record.version, sizeof vi->version);
        memcpy(vi->hash, v->record.hash, sizeof vi->hash);
        vi->created = v->record.created;
        vi->bytes = v->record.bytes;
        vi->current = v == a->current;
        vi->resident = v->packed;
        vi->leases = v->leases;
    }
    *out = info;
    return ST_OK;
}

enum status registry_get(struct registry *r, const char *tenant, const char *name, struct adapter_info *out,
                         struct error *err)
{
    pthread_mutex_lock(&r->lock);
    const struct named_adapter *a = registry_find(r, tenant, name);
    enum status st =
        !a ? error_set(err, ST_NOT_FOUND, "there is no adapter '%.140s'", name) : info_fill(a, out);
    pthread_mutex_unlock(&r->lock);
    return st == ST_NOMEM ? no_memory(err) : st;
}

enum status registry_list(struct registry *r, const char *tenant, struct adapter_info **out,
                          size_t *count_out, struct error *err)
{
    bool found;
    size_t count = 0;
    enum status st = ST_OK;
    pthread_mutex_lock(&r->lock);
    size_t first = adapter_index(r, tenant, "", &found), end = first;
    while (end < r->adapter_count && strcmp(r->adapters[end]->tenant, tenant) == 0) end++;
    struct adapter_info *list = calloc(end - first + 1, sizeof *list);
    if (!list) st = ST_NOMEM;
    for (; !st && first + count < end; count++) st = info_fill(r->adapters[first + count], &list[count]);
    pthread_mutex_unlock(&r->lock);
    if (st) {
        for (size_t i = 0; list && i < count; i++) adapter_info_release(&list[i]);
        free(list);
        return no_memory(err);
    }
    *out = list;
    *count_out = count;
    return ST_OK;
}

void registry_stats(struct registry *r, struct registry_stats *out)
{
    pthread_mutex_lock(&r->lock);
    struct registry_stats s = {
        .adapters = r->adapter_count,
        .resident = r->resident_count,
        .resident_bytes = r->resident_bytes,
        .leases = r->lease_count,
        .loads = r->loads,
        .evictions = r->evictions,
    };
    for (size_t i = 0; i < r->adapter_count; i++) s.versions += r->adapters[i]->version_count;
    pthread_mutex_unlock(&r->lock);
    *out = s;
}

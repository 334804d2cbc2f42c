#include "adapters/registry.h"

#include "adapters/registry_int.h"
#include "base/log.h"
#include "base/strbuf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BYTES_DEFAULT ((size_t)1 << 30)

bool adapter_name_valid(const char *name)
{
    static const char first[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    if (!name || !*name || !strchr(first, *name)) return false;
    size_t n = strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-");
    return name[n] == '\0' && n <= ADAPTER_NAME_MAX;
}

static enum status no_memory(struct error *err) { return error_set(err, ST_NOMEM, "out of memory"); }

/* --- the table of names --- */

size_t adapter_index(const struct registry *r, const char *tenant, const char *name, bool *found)
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

struct version *adapter_current(const struct named_adapter *a) { return a->versions[a->version_count - 1]; }

bool version_has_head(const struct version *v, const char *text, size_t digits_min)
{
    size_t n = strlen(text);
    return n >= digits_min && strncmp(v->record.hash, text, n) == 0;
}

enum status adapter_version(const struct named_adapter *a, const char *text, struct version **out)
{
    struct version *found = adapter_current(a);
    size_t count = 1;
    if (text && *text) {
        count = 0;
        for (size_t i = 0; i < a->version_count; i++) {
            if (!version_has_head(a->versions[i], text, 1)) continue;
            found = a->versions[i];
            count++;
        }
    }
    if (count != 1) return count ? ST_INVALID : ST_NOT_FOUND;
    *out = found;
    return ST_OK;
}

void version_error(struct registry *r, enum status st, const char *tenant, const char *name,
                   const char *version, struct error *err)
{
    if (st == ST_INVALID)
        error_set(err, st, "'%.64s' begins several versions of the adapter '%s': give more of its digits",
                  version, name);
    else if (registry_find(r, tenant, name))
        error_set(err, st, "the adapter '%s' has no version '%.64s'", name, version);
    else
        error_set(err, st, "there is no adapter '%.140s'", name);
}

void adapter_free(struct named_adapter *a)
{
    if (!a) return;
    free(a->tenant);
    free(a->versions);
    free(a);
}

struct named_adapter *adapter_new(const char *tenant, const char *name)
{
    struct named_adapter *a = calloc(1, sizeof *a);
    if (!a) return NULL;
    a->tenant = strdup(tenant);
    snprintf(a->name, sizeof a->name, "%s", name);
    if (a->tenant) return a;
    adapter_free(a);
    return NULL;
}

struct version *version_new(const char *tenant, const char *name, const struct version_record *record)
{
    struct version *v = calloc(1, sizeof *v);
    if (!v) return NULL;
    v->record = *record;
    snprintf(v->view.name, sizeof v->view.name, "%s", name);
    memcpy(v->view.version, record->version, sizeof v->view.version);
    if (hash_key(tenant, name, record->hash, &v->view.key) == ST_OK) return v;
    free(v);
    return NULL;
}

bool tables_reserve(struct registry *r, struct named_adapter *a)
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

void adapter_insert(struct registry *r, struct named_adapter *a)
{
    bool found;
    size_t i = adapter_index(r, a->tenant, a->name, &found);
    memmove(r->adapters + i + 1, r->adapters + i, (r->adapter_count - i) * sizeof *r->adapters);
    r->adapters[i] = a;
    r->adapter_count++;
}

void adapter_append(struct named_adapter *a, struct version *v)
{
    v->adapter = a;
    a->versions[a->version_count++] = v;
}

/* --- opening and closing --- */

/* A row of the store, in order of tenants and names. */
static enum status row_take(void *ctx, const struct adapter_record *row, const struct version_record *record)
{
    struct registry *r = ctx;
    struct named_adapter *a = registry_find(r, row->tenant, row->name), *fresh = NULL;
    struct version *v = version_new(row->tenant, row->name, record);
    if (!a) a = fresh = adapter_new(row->tenant, row->name);
    if (!v || !a || !tables_reserve(r, a)) {
        free(v);
        adapter_free(fresh);
        return ST_NOMEM;
    }
    if (fresh) adapter_insert(r, a);
    a->number = row->number;
    a->settings = row->settings;
    adapter_append(a, v);
    return ST_OK;
}

static void warn_of_another_base(const struct registry *r)
{
    size_t count = 0;
    for (size_t i = 0; i < r->adapter_count; i++)
        count += strcmp(adapter_current(r->adapters[i])->record.base, r->config.base_fingerprint) != 0;
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
void adapter_remove(struct registry *r, size_t i)
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

/* --- files --- */

static enum status blob_open(struct registry *r, const char *hash, int *fd_out, struct error *err)
{
    char *path = store_blob_path(r->store, hash);
    if (!path) return no_memory(err);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    enum status st = fd < 0 ? file_error(err, "open", path) : ST_OK;
    free(path);
    if (!st) *fd_out = fd;
    return st;
}

enum status registry_open_files(struct registry *r, const char *tenant, const char *name, const char *version,
                                struct version_files *out, struct error *err)
{
    struct version_files f = {.config_fd = -1, .tensors_fd = -1};
    struct version *v;
    pthread_mutex_lock(&r->publish); /* nobody removes the files meanwhile */
    pthread_mutex_lock(&r->lock);
    struct named_adapter *a = registry_find(r, tenant, name);
    enum status st = a ? adapter_version(a, version, &v) : ST_NOT_FOUND;
    if (st)
        version_error(r, st, tenant, name, version, err);
    else
        f.record = v->record;
    pthread_mutex_unlock(&r->lock);
    if (!st) st = blob_open(r, f.record.config_blob, &f.config_fd, err);
    if (!st) st = blob_open(r, f.record.tensors_blob, &f.tensors_fd, err);
    pthread_mutex_unlock(&r->publish);
    if (st && f.config_fd >= 0) close(f.config_fd);
    if (!st) *out = f;
    return st;
}

/* --- answers --- */

enum status registry_name(struct registry *r, const char *tenant, int64_t number,
                          char out[ADAPTER_NAME_MAX + 1])
{
    bool found = false;
    pthread_mutex_lock(&r->lock);
    for (size_t i = 0; i < r->adapter_count && !found; i++) {
        const struct named_adapter *a = r->adapters[i];
        found = a->number == number && strcmp(a->tenant, tenant) == 0;
        if (found) memcpy(out, a->name, sizeof a->name);
    }
    pthread_mutex_unlock(&r->lock);
    return found ? ST_OK : ST_NOT_FOUND;
}

void adapter_info_release(struct adapter_info *i)
{
    free(i->versions);
    i->versions = NULL;
    i->version_count = 0;
}

static enum status info_fill(const struct named_adapter *a, struct adapter_info *out)
{
    struct adapter_info info = {
        .number = a->number,
        .settings = a->settings,
        .version_count = (int)a->version_count,
        .versions = calloc(a->version_count, sizeof *info.versions),
    };
    if (!info.versions) return ST_NOMEM;
    memcpy(info.name, a->name, sizeof info.name);
    for (size_t i = 0; i < a->version_count; i++) {
        const struct version *v = a->versions[a->version_count - 1 - i];
        info.versions[i] =
            (struct version_info){v->record, .current = i == 0, .resident = v->packed, .leases = v->leases};
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

/* Uploads, and all that changes an adapter: publishing, going back, settings, deletion. Each is checked in
 * memory, then done on disk, then in memory, where it cannot fail any more. */
#include "adapters/package.h"
#include "adapters/registry_int.h"
#include "base/strbuf.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct upload {
    char *path; /* owned */
    enum version_source source;
};

static enum status no_memory(struct error *err) { return error_set(err, ST_NOMEM, "out of memory"); }

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

void upload_set_source(struct upload *u, enum version_source source) { u->source = source; }

void upload_close(struct upload *u)
{
    if (!u) return;
    remove_all(u->path);
    free(u->path);
    free(u);
}

/* --- versions of an adapter --- */

static struct version *version_by_hash(const struct named_adapter *a, const char *hash)
{
    for (size_t i = 0; i < a->version_count; i++)
        if (strcmp(a->versions[i]->record.hash, hash) == 0) return a->versions[i];
    return NULL;
}

/* Makes one of its versions the current one. */
static void adapter_make_current(struct named_adapter *a, struct version *v)
{
    size_t i = 0;
    while (a->versions[i] != v) i++;
    memmove(a->versions + i, a->versions + i + 1, (a->version_count - i - 1) * sizeof *a->versions);
    a->versions[a->version_count - 1] = v;
}

/* How many versions the settings keep; 0: all. */
static int keep_count(const struct registry *r, const struct adapter_settings *settings)
{
    return settings->keep_versions ? settings->keep_versions : r->config.keep_versions;
}

/* Forgets all but the last `keep` versions (0: none), as the store has done. */
static void adapter_prune(struct registry *r, struct named_adapter *a, int keep)
{
    if (keep <= 0 || a->version_count <= (size_t)keep) return;
    size_t count = a->version_count - (size_t)keep;
    for (size_t i = 0; i < count; i++) version_unlist(r, a->versions[i]);
    memmove(a->versions, a->versions + count, (size_t)keep * sizeof *a->versions);
    a->version_count = (size_t)keep;
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
    bool loading;                  /* load_end is owed */
};

/* Compare-and-set: ST_OK where the adapter's current version (a NULL: none) is the expected one. The caller
 * holds `lock`. */
static enum status check_expected(const struct named_adapter *a, const char *name, const char *expected,
                                  struct error *err)
{
    if (!expected) return ST_OK;
    if (!a)
        return *expected
                   ? error_set(err, ST_CONFLICT, "there is no adapter '%s', but version '%.64s' was expected",
                               name, expected)
                   : ST_OK;
    if (version_has_head(adapter_current(a), expected, ADAPTER_VERSION_HEX)) return ST_OK;
    const char *version = adapter_current(a)->record.version;
    if (!*expected)
        return error_set(err, ST_CONFLICT, "the adapter '%s' exists already (version %s)", name, version);
    return error_set(err, ST_CONFLICT, "the current version of '%s' is %s, not the expected '%.64s'", name,
                     version, expected);
}

/* ST_OK with *unchanged where these bytes are current already, or where they may be published. */
static enum status put_check(const struct put *p, bool *unchanged, struct error *err)
{
    pthread_mutex_lock(&p->registry->lock);
    struct named_adapter *a = registry_find(p->registry, p->tenant, p->name);
    *unchanged = a && strcmp(adapter_current(a)->record.hash, p->record.hash) == 0;
    enum status st = *unchanged ? ST_OK : check_expected(a, p->name, p->expected, err);
    pthread_mutex_unlock(&p->registry->lock);
    return st;
}

static enum status put_identify(struct put *p, struct error *err)
{
    struct version_record *v = &p->record;
    hash_bytes(p->files.config.data, p->files.config.size, v->config_blob);
    hash_bytes(p->files.tensors.data, p->files.tensors.size, v->tensors_blob);
    enum status st = hash_version(v->config_blob, v->tensors_blob, v->hash);
    if (st) return error_set(err, st, "cannot hash the adapter");
    memcpy(v->version, v->hash, ADAPTER_VERSION_HEX);
    memcpy(v->base, p->registry->config.base_fingerprint, sizeof v->base);
    v->created = v->published = (int64_t)time(NULL);
    v->bytes = p->files.config.size + p->files.tensors.size;
    return ST_OK;
}

/* What a put needs in memory, made before the disk changes, so that nothing can fail after. */
struct put_place {
    struct named_adapter *adapter, *fresh; /* fresh: owned, the adapter where it is new */
    struct version *version, *made;        /* made: owned, the version where it is new */
};

static bool put_place_make(struct put *p, struct put_place *out)
{
    struct registry *r = p->registry;
    struct put_place n = {0};
    pthread_mutex_lock(&r->lock);
    n.adapter = registry_find(r, p->tenant, p->name);
    n.version = n.adapter ? version_by_hash(n.adapter, p->record.hash) : NULL;
    if (!n.version) n.version = n.made = version_new(p->tenant, p->name, &p->record);
    if (!n.adapter) n.adapter = n.fresh = adapter_new(p->tenant, p->name);
    bool ready = n.adapter && n.version && tables_reserve(r, n.adapter);
    pthread_mutex_unlock(&r->lock);
    *out = n;
    return ready;
}

/* The caller holds `lock`. */
static void put_load_end(struct put *p)
{
    if (p->loading) load_end(p->registry, p->record.bytes);
    p->loading = false;
}

/* Publishes on disk, then in memory, which cannot fail. The caller holds `publish`, so nobody else
 * changes the table of names. */
static enum status put_publish(struct put *p, struct put_result *result, struct error *err)
{
    struct registry *r = p->registry;
    struct strbuf orphans = {0};
    struct put_place n;
    int64_t number;
    bool ready = put_place_make(p, &n);
    int keep = ready ? keep_count(r, &n.adapter->settings) : 0;
    enum status st = ready ? store_publish(r->store, p->tenant, p->name, &p->record, p->files.config_path,
                                           p->files.tensors_path, keep, &number, &orphans, err)
                           : no_memory(err);
    if (st) {
        free(n.made);
        adapter_free(n.fresh);
        goto done;
    }
    pthread_mutex_lock(&r->lock);
    if (n.fresh) adapter_insert(r, n.fresh);
    n.adapter->number = number;
    if (n.made)
        adapter_append(n.adapter, n.made);
    else
        adapter_make_current(n.adapter, n.version);
    n.version->record.published = p->record.published;
    n.version->record.source = p->record.source;
    adapter_prune(r, n.adapter, keep);
    put_load_end(p);
    version_install(r, n.version, p->packed);
    p->packed = NULL;
    pthread_mutex_unlock(&r->lock);
    store_collect(r->store, &orphans);
    result->created = n.fresh != NULL;
done:
    strbuf_release(&orphans);
    return st;
}

/* Makes a version that is listed and not the current one current again. The caller holds `publish`. */
static enum status version_republish(struct registry *r, const char *tenant, struct version *v,
                                     enum version_source source, struct error *err)
{
    struct version_record record = v->record;
    record.published = (int64_t)time(NULL);
    record.source = source;
    enum status st = store_make_current(r->store, tenant, v->view.name, &record, err);
    if (st) return st;
    pthread_mutex_lock(&r->lock);
    adapter_make_current(v->adapter, v);
    v->record.published = record.published;
    v->record.source = record.source;
    version_touch(r, v);
    budget_keep(r); /* where the adapter is pinned, its former version is no more */
    pthread_mutex_unlock(&r->lock);
    return ST_OK;
}

/* The adapter's version of these bytes, if it is in memory: whoever uploads it again changes an order, so
 * nothing is packed or stored. NULL: none, or there are more versions than are to be kept. The caller holds
 * `publish`. */
static struct version *put_known(struct put *p)
{
    pthread_mutex_lock(&p->registry->lock);
    struct named_adapter *a = registry_find(p->registry, p->tenant, p->name);
    struct version *v = a ? version_by_hash(a, p->record.hash) : NULL;
    int keep = v ? keep_count(p->registry, &a->settings) : 0;
    if (v && (!v->packed || (keep && a->version_count > (size_t)keep))) v = NULL;
    pthread_mutex_unlock(&p->registry->lock);
    return v;
}

/* *done: nothing was left to do but this. */
static enum status put_again(struct put *p, struct put_result *result, bool *done, struct error *err)
{
    pthread_mutex_lock(&p->registry->publish);
    enum status st = put_check(p, &result->unchanged, err);
    struct version *known = st || result->unchanged ? NULL : put_known(p);
    if (known) st = version_republish(p->registry, p->tenant, known, VERSION_UPLOAD, err);
    pthread_mutex_unlock(&p->registry->publish);
    *done = known || result->unchanged;
    return st;
}

static enum status put_new(struct put *p, struct put_result *result, struct error *err)
{
    struct registry *r = p->registry;
    pthread_mutex_lock(&r->lock);
    load_begin(r, p->record.bytes);
    p->loading = true;
    pthread_mutex_unlock(&r->lock);
    enum status st = registry_pack(r, &p->files.config, &p->files.tensors, &p->record, &p->packed, err);
    if (!st) st = store_sync(p->files.tensors_path, err);
    if (!st) {
        pthread_mutex_lock(&r->publish);
        st = put_check(p, &result->unchanged, err); /* others may have published meanwhile */
        if (!st && !result->unchanged) st = put_publish(p, result, err);
        pthread_mutex_unlock(&r->publish);
    }
    pthread_mutex_lock(&r->lock);
    put_load_end(p); /* where nothing was installed */
    pthread_mutex_unlock(&r->lock);
    return st;
}

static enum status put_run(struct put *p, struct upload *u, struct put_result *result, struct error *err)
{
    bool done;
    enum status st = package_open(u->path, p->registry->config.upload_bytes_max, &p->files, err);
    if (!st) st = put_identify(p, err);
    if (!st) st = put_again(p, result, &done, err);
    if (!st && !done) st = put_new(p, result, err);
    if (!st) memcpy(result->version, p->record.version, sizeof result->version);
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
    p.record.source = u->source;
    struct put_result result = {0};
    enum status st = put_run(&p, u, &result, err);
    packed_adapter_free(p.packed);
    package_close(&p.files);
    if (!st) *out = result;
    return st;
}

/* --- changes without new files --- */

/* The version to go back to, as it will be recorded. */
static enum status rollback_check(struct registry *r, const char *tenant, const char *name,
                                  const char *version, const char *expected, struct version **target,
                                  bool *unchanged, struct error *err)
{
    pthread_mutex_lock(&r->lock);
    struct named_adapter *a = registry_find(r, tenant, name);
    enum status st = a ? adapter_version(a, version, target) : ST_NOT_FOUND;
    if (st)
        version_error(r, st, tenant, name, version, err);
    else if (!(*unchanged = *target == adapter_current(a)))
        st = check_expected(a, name, expected, err);
    pthread_mutex_unlock(&r->lock);
    return st;
}

enum status registry_rollback(struct registry *r, const char *tenant, const char *name, const char *version,
                              const char *expected_version, struct put_result *out, struct error *err)
{
    struct put_result result = {0};
    struct version *v; /* stays listed while `publish` is held */
    pthread_mutex_lock(&r->publish);
    enum status st = rollback_check(r, tenant, name, version, expected_version, &v, &result.unchanged, err);
    if (!st) memcpy(result.version, v->record.version, sizeof result.version);
    if (!st && !result.unchanged) st = version_republish(r, tenant, v, VERSION_ROLLBACK, err);
    pthread_mutex_unlock(&r->publish);
    if (st) return st;
    adapter_load_pinned(r, tenant, name);
    *out = result;
    return ST_OK;
}

/* An adapter's settings with a change made to them. */
static enum status change_make(struct registry *r, const char *tenant, const char *name,
                               const struct adapter_change *change, struct adapter_settings *out,
                               struct error *err)
{
    pthread_mutex_lock(&r->lock);
    const struct named_adapter *a = registry_find(r, tenant, name);
    if (a) *out = a->settings;
    pthread_mutex_unlock(&r->lock);
    if (!a) return error_set(err, ST_NOT_FOUND, "there is no adapter '%.140s'", name);
    if (change->description && strlen(change->description) > ADAPTER_DESCRIPTION_MAX)
        return error_set(err, ST_INVALID, "'description' may have at most %d bytes", ADAPTER_DESCRIPTION_MAX);
    if (change->description) snprintf(out->description, sizeof out->description, "%s", change->description);
    if (change->pinned) out->pinned = *change->pinned;
    if (change->keep_versions) out->keep_versions = *change->keep_versions;
    return ST_OK;
}

enum status registry_change(struct registry *r, const char *tenant, const char *name,
                            const struct adapter_change *change, struct error *err)
{
    struct adapter_settings settings;
    struct strbuf orphans = {0};
    pthread_mutex_lock(&r->publish);
    enum status st = change_make(r, tenant, name, change, &settings, err);
    int keep = st || !change->keep_versions ? 0 : keep_count(r, &settings);
    if (!st) st = store_set(r->store, tenant, name, &settings, keep, &orphans, err);
    if (!st) {
        pthread_mutex_lock(&r->lock);
        struct named_adapter *a = registry_find(r, tenant, name);
        a->settings = settings;
        adapter_prune(r, a, keep);
        budget_keep(r);
        pthread_mutex_unlock(&r->lock);
        store_collect(r->store, &orphans);
    }
    pthread_mutex_unlock(&r->publish);
    strbuf_release(&orphans);
    if (!st) adapter_load_pinned(r, tenant, name);
    return st;
}

enum status registry_delete(struct registry *r, const char *tenant, const char *name,
                            const char *expected_version, struct error *err)
{
    struct strbuf orphans = {0};
    bool found;
    pthread_mutex_lock(&r->publish);
    pthread_mutex_lock(&r->lock);
    size_t i = adapter_index(r, tenant, name, &found); /* only who holds `publish` moves it */
    enum status st = found ? check_expected(r->adapters[i], name, expected_version, err)
                           : error_set(err, ST_NOT_FOUND, "there is no adapter '%.140s'", name);
    pthread_mutex_unlock(&r->lock);
    if (!st) st = store_delete(r->store, tenant, name, &orphans, err);
    if (!st) {
        pthread_mutex_lock(&r->lock);
        adapter_remove(r, i);
        pthread_mutex_unlock(&r->lock);
        /* Only now: as long as a lease finds the name, it must find the files. */
        store_collect(r->store, &orphans);
    }
    pthread_mutex_unlock(&r->publish);
    strbuf_release(&orphans);
    return st;
}

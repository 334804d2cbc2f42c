/* Lists of models and adapters, and changes without new files: each one task over the registry. */
#include "server/adapters.h"

#include "api/response.h"
#include "server/handlers.h"

#include <stdlib.h>
#include <string.h>

bool condition_take(const struct exchange *x, struct condition *out, struct api_error *err)
{
    const char *match = exchange_header(x, "If-Match"), *query = exchange_query(x, "expected_version");
    const char *text = match ? match : query;
    size_t n = text ? strlen(text) : 0;
    struct condition c = {.given = text};
    if (n >= 2 && text[0] == '"' && text[n - 1] == '"') {
        text++;
        n -= 2;
    }
    if ((match && query) || n >= sizeof c.version || (match && (!n || !strcmp(match, "*")))) {
        api_error_set(err, 400, "invalid_value", "expected_version",
                      "expected version: send one of If-Match: \"version\" or ?expected_version=version");
        return false;
    }
    if (text) memcpy(c.version, text, n);
    *out = c;
    return true;
}

const char *condition_version(const struct condition *c) { return c->given ? c->version : NULL; }

static void lookup_release(struct call *c) { adapter_request_release(&((struct lookup *)c)->request); }

/* kind NULL: no body. */
static void start(struct exchange *x, const enum adapter_request_kind *kind, void (*work)(struct call *))
{
    struct api_error err = {0};
    size_t size = 0;
    struct lookup *l = calloc(1, sizeof *l);
    if (!l) api_error_from(&err, ST_NOMEM, NULL, NULL);
    const char *body = kind ? exchange_body(x, &size) : NULL;
    if (!l || !condition_take(x, &l->condition, &err) ||
        (kind && !adapter_request_parse(*kind, body, size, &l->request, &err))) {
        free(l);
        exchange_reply_error(x, &err);
        return;
    }
    snprintf(l->name, sizeof l->name, "%s", exchange_param(x));
    l->call.work = work;
    l->call.release = lookup_release;
    call_start(x, &l->call);
}

void lookup_start(struct exchange *x, void (*work)(struct call *)) { start(x, NULL, work); }

void lookup_start_with(struct exchange *x, enum adapter_request_kind kind, void (*work)(struct call *))
{
    start(x, &kind, work);
}

static struct lookup *lookup_of(struct call *c) { return (struct lookup *)c; }
static const char *name_of(const struct call *c) { return ((const struct lookup *)c)->name; }

bool adapter_name_check(const struct service *s, const char *name, struct api_error *err)
{
    if (!adapter_name_valid(name))
        api_error_set(err, 400, "invalid_value", "name",
                      "'%.40s' is no adapter name: 1 to %d letters, digits, '.', '_' "
                      "and '-', the first a letter or digit",
                      name, ADAPTER_NAME_MAX);
    else if (!strcmp(name, s->config->model_name))
        api_error_set(err, 400, "invalid_value", "name", "'%s' is the base model's name", name);
    return !err->http;
}

void adapter_not_found(struct api_error *err, const char *name, const char *param)
{
    api_error_set(err, 404, "model_not_found", param, "there is no adapter '%.128s'", name);
}

void adapter_put_failed(struct api_error *err, enum status st, const struct error *cause)
{
    api_error_from(err, st, cause, NULL);
    if (st == ST_BAD_FORMAT || st == ST_UNSUPPORTED) {
        err->http = 422;
        err->code = "adapter_rejected";
    }
}

bool lookup_failed(struct lookup *l, enum status st, const struct error *cause)
{
    if (st) api_error_from(&l->call.error, st, cause, st == ST_NOT_FOUND ? "name" : NULL);
    if (st == ST_NOT_FOUND) l->call.error.code = "model_not_found";
    return st != ST_OK;
}

static bool call_failed(struct call *c, enum status st, const struct error *cause)
{
    return lookup_failed(lookup_of(c), st, cause);
}

static const char *const source_names[VERSION_SOURCE_COUNT] = {
    [VERSION_UPLOAD] = "upload", [VERSION_ROLLBACK] = "rollback", [VERSION_TRAIN] = "train"};

static struct adapter_version_entry version_entry(const struct version_info *v)
{
    const struct version_record *r = &v->record;
    return (struct adapter_version_entry){
        .version = r->version,
        .hash = r->hash,
        .source = source_names[r->source],
        .created = r->created,
        .published = r->published,
        .bytes = r->bytes,
        .current = v->current,
        .resident = v->resident,
        .leases = v->leases,
    };
}

void adapter_info_write(struct strbuf *out, const struct adapter_info *info)
{
    size_t count = (size_t)info->version_count;
    struct adapter_version_entry *versions = calloc(count, sizeof *versions);
    if (!versions) {
        out->failed = true;
        return;
    }
    for (size_t i = 0; i < count; i++) versions[i] = version_entry(&info->versions[i]);
    const struct version_record *current = &info->versions[0].record;
    struct adapter_entry entry = {
        .name = info->name,
        .number = info->number,
        .description = info->settings.description,
        .pinned = info->settings.pinned,
        .keep_versions = info->settings.keep_versions,
        .format = current->format,
        .targets = current->targets,
        .rank = current->rank,
        .experts = current->experts,
        .top_k = current->top_k,
        .sites = current->sites,
        .parameters = current->parameters,
        .versions = versions,
        .version_count = count,
    };
    adapter_write(out, &entry);
    free(versions);
}

static struct model_entry model_of(const struct service *s, const struct adapter_info *info)
{
    return (struct model_entry){.id = info->name,
                                .parent = s->config->model_name,
                                .created = info->versions[0].record.created,
                                .context_length = engine_shape(s->engine)->context_length};
}

static struct model_entry base_model(const struct service *s)
{
    return (struct model_entry){.id = s->config->model_name,
                                .created = s->started,
                                .context_length = engine_shape(s->engine)->context_length};
}

/* Calls write for each adapter between the list's brackets; `first` is whether none was written yet. */
static void list_adapters(struct call *c, bool first,
                          void (*write)(struct strbuf *, const struct service *, const struct adapter_info *))
{
    struct adapter_info *infos;
    size_t count;
    struct error cause = {0};
    if (call_failed(c, registry_list(c->service->registry, TENANT, &infos, &count, &cause), &cause)) return;
    for (size_t i = 0; i < count; i++) {
        list_separate(&c->body, first && i == 0);
        write(&c->body, c->service, &infos[i]);
        adapter_info_release(&infos[i]);
    }
    free(infos);
    list_end(&c->body);
}

static void write_as_model(struct strbuf *out, const struct service *s, const struct adapter_info *info)
{
    struct model_entry m = model_of(s, info);
    model_write(out, &m);
}

static void write_as_adapter(struct strbuf *out, const struct service *s, const struct adapter_info *info)
{
    (void)s;
    adapter_info_write(out, info);
}

static void work_models(struct call *c)
{
    struct model_entry base = base_model(c->service);
    list_begin(&c->body);
    model_write(&c->body, &base);
    list_adapters(c, false, write_as_model);
}

static void work_adapters(struct call *c)
{
    list_begin(&c->body);
    list_adapters(c, true, write_as_adapter);
}

static void get_one(struct call *c,
                    void (*write)(struct strbuf *, const struct service *, const struct adapter_info *))
{
    struct adapter_info info;
    struct error cause = {0};
    if (call_failed(c, registry_get(c->service->registry, TENANT, name_of(c), &info, &cause), &cause)) return;
    write(&c->body, c->service, &info);
    memcpy(c->version, info.versions[0].record.version, sizeof c->version);
    adapter_info_release(&info);
}

void lookup_answer_info(struct lookup *l) { get_one(&l->call, write_as_adapter); }

static void work_model(struct call *c)
{
    if (strcmp(name_of(c), c->service->config->model_name) != 0) {
        get_one(c, write_as_model);
        return;
    }
    struct model_entry base = base_model(c->service);
    model_write(&c->body, &base);
}

static void work_adapter(struct call *c) { get_one(c, write_as_adapter); }

static void work_delete(struct call *c)
{
    struct error cause = {0};
    enum status st = registry_delete(c->service->registry, TENANT, name_of(c),
                                     condition_version(&lookup_of(c)->condition), &cause);
    if (call_failed(c, st, &cause)) return;
    strbuf_printf(&c->body, "{\"name\": \"%s\", \"object\": \"adapter\", \"deleted\": true}", name_of(c));
}

static void work_rollback(struct call *c)
{
    struct lookup *l = lookup_of(c);
    const char *expected = condition_version(&l->condition);
    struct put_result result;
    struct error cause = {0};
    if (!expected) expected = l->request.expected_version;
    enum status st = registry_rollback(c->service->registry, TENANT, l->name, l->request.version, expected,
                                       &result, &cause);
    if (!call_failed(c, st, &cause)) lookup_answer_info(l);
}

static void work_change(struct call *c)
{
    struct lookup *l = lookup_of(c);
    const struct adapter_request *r = &l->request;
    struct adapter_change change = {r->description, r->has_pinned ? &r->pinned : NULL,
                                    r->has_keep_versions ? &r->keep_versions : NULL};
    struct error cause = {0};
    enum status st = registry_change(c->service->registry, TENANT, l->name, &change, &cause);
    if (!call_failed(c, st, &cause)) lookup_answer_info(l);
}

void models_get(struct exchange *x) { lookup_start(x, work_models); }
void model_get(struct exchange *x) { lookup_start(x, work_model); }
void adapters_get(struct exchange *x) { lookup_start(x, work_adapters); }
void adapter_get(struct exchange *x) { lookup_start(x, work_adapter); }
void adapter_delete(struct exchange *x) { lookup_start(x, work_delete); }
void adapter_rollback(struct exchange *x) { lookup_start_with(x, ADAPTER_ROLLBACK, work_rollback); }
void adapter_change(struct exchange *x) { lookup_start_with(x, ADAPTER_CHANGE, work_change); }

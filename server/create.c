/* POST /v1/adapters: a new adapter that nothing has trained, a no-op until something does. */
#include "server/handlers.h"
#include "server/training.h"
#include "training/publish.h"

#include <stdlib.h>
#include <string.h>

struct create {
    struct call call;
    struct fresh_request request;
    struct fresh_adapter shape;
};

void fresh_default(const struct service *s, struct fresh_adapter *out)
{
    *out = (struct fresh_adapter){.rank = s->config->rank_max < 8 ? s->config->rank_max : 8,
                                  .experts = 1,
                                  .top_k = 1,
                                  .rule = GATE_TOPK};
    out->alpha = 2.0f * (float)out->rank;
    for (int p = 0; p < PROJ_COUNT; p++) out->target[p] = true;
}

enum status adapter_create(struct service *s, const char *name, const struct fresh_adapter *shape,
                           struct put_result *out, struct error *err)
{
    struct adapter_bundle *b = NULL;
    enum status st = bundle_fresh(shape, &s->base, &b, err);
    if (!st) st = bundle_publish(s->registry, TENANT, name, b, &s->base, "", out, err);
    if (b) adapter_bundle_free(b);
    return st;
}

static void set_description(struct create *c, struct api_error *err)
{
    struct adapter_change change = {.description = c->request.description};
    struct error cause = {0};
    if (!change.description) return;
    enum status st = registry_change(c->call.service->registry, TENANT, c->request.name, &change, &cause);
    if (st) api_error_from(err, st, &cause, "description");
}

static void work_create(struct call *call)
{
    struct create *c = (struct create *)call;
    const char *name = c->request.name;
    struct put_result result;
    struct adapter_info info;
    struct error cause = {0};
    enum status st = adapter_create(call->service, name, &c->shape, &result, &cause);
    if (st == ST_CONFLICT)
        api_error_set(&call->error, 409, "version_conflict", "name", "there is an adapter '%s' already",
                      name);
    else if (st)
        adapter_put_failed(&call->error, st, &cause);
    if (!call->error.http) set_description(c, &call->error);
    if (call->error.http) return;
    st = registry_get(call->service->registry, TENANT, name, &info, &cause);
    if (st) {
        api_error_from(&call->error, st, &cause, NULL);
        return;
    }
    adapter_info_write(&call->body, &info);
    adapter_info_release(&info);
    memcpy(call->version, result.version, sizeof call->version);
    if (result.created) call->status = 201;
}

static void release(struct call *call) { fresh_request_release(&((struct create *)call)->request); }

static bool take_target(const char *name, struct fresh_adapter *shape)
{
    for (int p = 0; p < PROJ_COUNT; p++)
        if (!strcmp(name, projection_name((enum projection)p))) return shape->target[p] = true;
    return false;
}

static bool take_targets(const struct fresh_request *r, struct fresh_adapter *shape, struct api_error *err)
{
    if (!r->target_count) return true;
    memset(shape->target, 0, sizeof shape->target);
    for (size_t i = 0; i < r->target_count; i++) {
        if (take_target(r->targets[i], shape)) continue;
        api_error_set(
            err, 400, "invalid_value", "target_modules",
            "'target_modules': '%.40s' is none of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and "
            "down_proj",
            r->targets[i]);
        return false;
    }
    return true;
}

static bool take_shape(const struct service *s, const struct fresh_request *r, struct fresh_adapter *shape,
                       struct api_error *err)
{
    fresh_default(s, shape);
    shape->rank = r->rank;
    shape->experts = r->experts;
    shape->top_k = r->top_k;
    shape->alpha = (float)r->alpha;
    shape->rslora = r->rslora;
    shape->seed = r->seed;
    if (!strcmp(r->gate, "dense")) shape->rule = GATE_DENSE;
    if (!strcmp(r->gate, "topk_raw")) shape->rule = GATE_TOPK_RAW;
    if (r->description && strlen(r->description) > ADAPTER_DESCRIPTION_MAX) {
        api_error_set(err, 400, "invalid_value", "description", "'description' must have at most %d bytes",
                      ADAPTER_DESCRIPTION_MAX);
        return false;
    }
    return take_targets(r, shape, err);
}

void adapters_post(struct exchange *x)
{
    const struct service *s = service_of(x);
    struct fresh_limits limits = {s->config->rank_max, s->config->experts_max};
    struct api_error err = {0};
    size_t size;
    const char *body = exchange_body(x, &size);
    struct create *c = calloc(1, sizeof *c);
    if (!c) api_error_from(&err, ST_NOMEM, NULL, NULL);
    if (c && fresh_request_parse(body, size, &limits, &c->request, &err) &&
        adapter_name_check(s, c->request.name, &err) && take_shape(s, &c->request, &c->shape, &err)) {
        c->call.work = work_create;
        c->call.release = release;
        call_start(x, &c->call);
        return;
    }
    if (c) fresh_request_release(&c->request);
    free(c);
    exchange_reply_error(x, &err);
}

/* GET /v1/adapters/{name}/routing: who its experts are chosen by, in training and in serving.
 *
 * Serving is counted by the device, for each version as long as it is in memory. */
#include "server/handlers.h"
#include "server/training.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

struct usage_writer {
    struct strbuf *out;
    struct device *device;
    bool any;
    uint64_t chosen[LR_EXPERTS_MAX];
    double gate[LR_EXPERTS_MAX];
};

static bool has_router(const struct lr_site *s) { return s && s->rule != GATE_NONE && s->rule != GATE_FFN; }

static void write_site(struct usage_writer *w, int layer, const char *projection, const struct lr_site *s)
{
    struct lr_usage usage = {.chosen = w->chosen, .gate = w->gate};
    if (!has_router(s)) return;
    w->device->ops->lr_site_usage(w->device, s, &usage);
    double rows = usage.rows ? (double)usage.rows : 1;
    strbuf_printf(w->out,
                  "%s{\"layer\": %d, \"projection\": \"%s\", \"top_k\": %d, \"rows\": %" PRIu64
                  ", \"share\": [",
                  w->any ? ", " : "", layer, projection, s->top_k, usage.rows);
    for (int e = 0; e < s->experts; e++)
        strbuf_printf(w->out, "%s%.4g", e ? ", " : "", (double)w->chosen[e] / rows);
    strbuf_puts(w->out, "], \"gate\": [");
    for (int e = 0; e < s->experts; e++) strbuf_printf(w->out, "%s%.4g", e ? ", " : "", w->gate[e] / rows);
    strbuf_puts(w->out, "]}");
    w->any = true;
}

static void write_serving(struct strbuf *out, struct device *device, const struct lr_adapter *a)
{
    struct usage_writer *w = calloc(1, sizeof *w);
    if (!w) {
        out->failed = true;
        return;
    }
    w->out = out;
    w->device = device;
    strbuf_puts(out, "{\"sites\": [");
    for (int layer = 0; layer < a->layers; layer++) {
        for (int p = 0; p < PROJ_COUNT; p++)
            write_site(w, layer, projection_name((enum projection)p), a->sites[layer * PROJ_COUNT + p]);
        if (a->ffn) write_site(w, layer, "ffn", a->ffn[layer]);
    }
    strbuf_puts(out, "]}");
    free(w);
}

/* Of the version in memory; null where it is not. */
static void serving(struct call *c, const char *name, const char *version)
{
    struct lease *lease = NULL;
    if (registry_try_lease(c->service->registry, TENANT, name, version, &lease)) {
        strbuf_puts(&c->body, "null");
        return;
    }
    write_serving(&c->body, c->service->device, &lease_view(lease)->lr);
    lease_release(lease);
}

/* Whatever trained the adapter last, in this process. */
static void training(struct call *c, const char *name)
{
    struct train_routing routing;
    struct error cause = {0};
    enum status st = ST_NOT_FOUND;
    if (c->service->training) st = jobs_adapter_routing(c->service->training, TENANT, name, &routing, &cause);
    if (st && st != ST_NOT_FOUND) training_failed(&c->error, st, &cause, "name");
    if (st) {
        strbuf_puts(&c->body, "null");
        return;
    }
    train_routing_write(&routing, &c->body);
    train_routing_release(&routing);
}

static void work_routing(struct call *c)
{
    struct lookup *l = (struct lookup *)c;
    struct adapter_info info;
    struct error cause = {0};
    if (lookup_failed(l, registry_get(c->service->registry, TENANT, l->name, &info, &cause), &cause)) return;
    const char *version = info.versions[0].record.version;
    strbuf_printf(&c->body,
                  "{\"object\": \"adapter.routing\", \"name\": \"%s\", \"version\": \"%s\", \"serving\": ",
                  info.name, version);
    serving(c, info.name, version);
    strbuf_puts(&c->body, ", \"training\": ");
    training(c, info.name);
    strbuf_putc(&c->body, '}');
    adapter_info_release(&info);
}

void adapter_routing(struct exchange *x) { lookup_start(x, work_routing); }

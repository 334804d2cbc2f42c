#include "training/routing.h"

#include "adapters/reader.h"
#include "base/json.h"
#include "base/memory.h"

#include <math.h>
#include <string.h>

enum { CHOSEN, GATE, PROBABILITY, PARTS };

/* One step: for each site after the other PARTS * experts sums over its rows. */
struct routing_step {
    int64_t step, rows;
    double balance, contrast, similarity, cohesion;
    float *sums; /* owned */
};

struct routing_log {
    size_t site_count, sums;
    struct train_site_routing *site; /* without their arrays */
    int64_t count; /* steps added; the ring's place of the next is count % TRAIN_ROUTING_STEPS */
    struct routing_step ring[TRAIN_ROUTING_STEPS];
};

/* --- the ring --- */

static enum status build(struct routing_log *l, const struct params *p)
{
    l->site = memory_zalloc((size_t)p->routed_count + 1, sizeof *l->site);
    if (!l->site) return ST_NOMEM;
    for (int i = 0; i < p->site_count; i++) {
        const struct train_site *s = &p->site[i];
        if (s->routed < 0) continue;
        l->site[s->routed] = (struct train_site_routing){
            .layer = s->layer, .projection = s->projection, .experts = s->experts, .top_k = s->top_k};
        l->site_count++;
        l->sums += PARTS * (size_t)s->experts;
    }
    for (int i = 0; i < TRAIN_ROUTING_STEPS; i++) {
        l->ring[i].sums = memory_zalloc(l->sums + 1, sizeof *l->ring[i].sums);
        if (!l->ring[i].sums) return ST_NOMEM;
    }
    return ST_OK;
}

enum status routing_log_open(const struct params *p, struct routing_log **out)
{
    struct routing_log *l = memory_zalloc(1, sizeof *l);
    enum status st = l ? build(l, p) : ST_NOMEM;
    if (st)
        routing_log_close(l);
    else
        *out = l;
    return st;
}

void routing_log_close(struct routing_log *l)
{
    if (!l) return;
    for (int i = 0; i < TRAIN_ROUTING_STEPS; i++) memory_free(l->ring[i].sums);
    memory_free(l->site);
    memory_free(l);
}

void routing_log_add(struct routing_log *l, int64_t step, const struct objective_result *r)
{
    struct routing_step *s = &l->ring[l->count++ % TRAIN_ROUTING_STEPS];
    float *at = s->sums;
    s->step = step;
    s->rows = r->rows;
    s->balance = r->balance;
    s->contrast = r->contrast;
    s->similarity = r->similarity;
    s->cohesion = r->cohesion;
    for (size_t i = 0; i < l->site_count; i++) {
        size_t n = (size_t)l->site[i].experts;
        const float *const part[PARTS] = {r->routing[i].chosen, r->routing[i].gate,
                                          r->routing[i].probability};
        for (int k = 0; k < PARTS; k++, at += n) memcpy(at, part[k], n * sizeof *at);
    }
}

/* --- means --- */

static enum status sites_alloc(const struct routing_log *l, struct train_routing *out)
{
    out->sites = memory_zalloc(l->site_count + 1, sizeof *out->sites);
    if (!out->sites) return ST_NOMEM;
    for (size_t i = 0; i < l->site_count; i++, out->site_count++) {
        struct train_site_routing *s = &out->sites[i];
        *s = l->site[i];
        s->share = memory_zalloc(PARTS * (size_t)s->experts, sizeof *s->share);
        if (!s->share) return ST_NOMEM;
        s->gate = s->share + s->experts;
        s->probability = s->gate + s->experts;
    }
    return ST_OK;
}

enum status routing_log_read(const struct routing_log *l, struct train_routing *out)
{
    struct train_routing r = {0};
    double rows = 0;
    if (l->count == 0) return ST_NOT_FOUND;
    enum status st = sites_alloc(l, &r);
    if (st) {
        train_routing_release(&r);
        return st;
    }
    r.steps = l->count < TRAIN_ROUTING_STEPS ? l->count : TRAIN_ROUTING_STEPS;
    for (int64_t k = 0; k < r.steps; k++) {
        const struct routing_step *s = &l->ring[k];
        const float *at = s->sums;
        if (s->step > r.step) r.step = s->step;
        rows += (double)s->rows;
        r.balance += s->balance / (double)r.steps;
        r.contrast += s->contrast / (double)r.steps;
        r.similarity += s->similarity / (double)r.steps;
        r.cohesion += s->cohesion / (double)r.steps;
        for (size_t i = 0; i < r.site_count; i++)
            for (int e = 0; e < PARTS * r.sites[i].experts; e++) r.sites[i].share[e] += (double)*at++;
    }
    for (size_t i = 0; i < r.site_count; i++)
        for (int e = 0; e < PARTS * r.sites[i].experts; e++) r.sites[i].share[e] /= rows;
    *out = r;
    return ST_OK;
}

void train_routing_release(struct train_routing *r)
{
    for (size_t i = 0; i < r->site_count; i++)
        memory_free(r->sites[i].share); /* gate and probability with it */
    memory_free(r->sites);
    *r = (struct train_routing){0};
}

/* --- writing --- */

static void write_numbers(struct strbuf *out, const char *key, const double *x, int n)
{
    strbuf_printf(out, ",\"%s\":[", key);
    for (int i = 0; i < n; i++) strbuf_printf(out, "%s%.4g", i ? "," : "", x[i]);
    strbuf_putc(out, ']');
}

static void write_number(struct strbuf *out, const char *key, double x)
{
    strbuf_printf(out, ",\"%s\":", key);
    json_write_f64(out, x);
}

void train_routing_write(const struct train_routing *r, struct strbuf *out)
{
    strbuf_printf(out, "{\"step\":%lld,\"steps\":%lld", (long long)r->step, (long long)r->steps);
    write_number(out, "balance", r->balance);
    write_number(out, "contrast", r->contrast);
    write_number(out, "similarity", r->similarity);
    write_number(out, "cohesion", r->cohesion);
    strbuf_puts(out, ",\"sites\":[");
    for (size_t i = 0; i < r->site_count; i++) {
        const struct train_site_routing *s = &r->sites[i];
        strbuf_printf(out, "%s{\"layer\":%d,\"projection\":\"%s\",\"top_k\":%d", i ? "," : "", s->layer,
                      projection_name(s->projection), s->top_k);
        write_numbers(out, "share", s->share, s->experts);
        write_numbers(out, "gate", s->gate, s->experts);
        write_numbers(out, "probability", s->probability, s->experts);
        strbuf_putc(out, '}');
    }
    strbuf_puts(out, "]}");
}

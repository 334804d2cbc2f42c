#include "training/params.h"

#include "base/memory.h"
#include "training/source.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- from a bundle --- */

static const char *untrainable(const struct lr_site_source *s)
{
    if (s->rule == GATE_FFN) return "is routed with its whole FFN (MixLoRA)";
    if (s->rule > GATE_TOPK_RAW) return "chooses experts by a threshold";
    if (s->base_gain) return "is DoRA";
    if (s->bias) return "has a bias on B";
    if (s->shared_a) return "has one A for all experts";
    return NULL;
}

static enum status bundle_check(const struct adapter_bundle *b, struct error *err)
{
    for (int i = 0; i < b->layers * PROJ_COUNT; i++) {
        const char *why = b->sites[i] ? untrainable(b->sites[i]) : NULL;
        if (why)
            return error_set(
                err, ST_UNSUPPORTED,
                "the adapter cannot be trained: %s of layer %d %s; LoRA and MoELoRA with dense or "
                "top-k gates can",
                projection_name((enum projection)(i % PROJ_COUNT)), i / PROJ_COUNT, why);
    }
    return ST_OK;
}

static size_t router_floats(const struct train_site *s)
{
    return s->routed < 0 ? 0 : (size_t)s->experts * s->d_in;
}

static size_t stacked(const struct train_site *s) { return (size_t)s->experts * (size_t)s->rank; }

/* Describes a site and takes room in the vector for it. */
static void site_place(struct params *p, const struct lr_site_source *src, int place)
{
    struct train_site *s = &p->site[p->site_count++];
    p->place[place] = s;
    *s = (struct train_site){.layer = place / PROJ_COUNT,
                             .projection = (enum projection)(place % PROJ_COUNT),
                             .experts = src->experts,
                             .rank = src->rank,
                             .top_k = src->top_k,
                             .rule = src->rule,
                             .temperature = src->temperature,
                             .routed = src->rule == GATE_NONE ? -1 : p->routed_count++,
                             .d_in = src->d_in,
                             .d_out = src->d_out};
    s->router = p->count;
    s->a = s->router + router_floats(s);
    s->bt = s->a + stacked(s) * s->d_in;
    p->count = s->bt + stacked(s) * s->d_out;
}

/* The site's values as they stand in the vector; out begins at its router. */
static void site_decode(const struct train_site *s, const struct lr_site_source *src, float *row, float *out)
{
    size_t rank = (size_t)s->rank, elem = dtype_block_bytes(src->type);
    if (src->router) dtype_decode(src->router_type, src->router, out, router_floats(s));
    float *a = out + (s->a - s->router), *bt = out + (s->bt - s->router);
    for (size_t e = 0; e < (size_t)s->experts; e++) {
        dtype_decode(src->type, src->a[e], a + e * rank * s->d_in, rank * s->d_in);
        for (size_t o = 0; o < s->d_out; o++) {
            dtype_decode(src->type, (const char *)src->b[e] + o * rank * elem, row, rank);
            for (size_t j = 0; j < rank; j++) bt[(e * rank + j) * s->d_out + o] = row[j];
        }
    }
}

static enum status scale_write(struct params *p, struct train_site *s, const struct lr_site_source *src)
{
    size_t bytes = (size_t)s->experts * sizeof *s->scale;
    s->scale_host = malloc(bytes);
    s->scale = p->device->ops->alloc(p->device, bytes);
    if (!s->scale_host || !s->scale) return ST_NOMEM;
    memcpy(s->scale_host, src->scale, bytes);
    p->device->ops->write(p->device, s->scale, src->scale, bytes);
    return ST_OK;
}

static enum status values_write(struct params *p, const struct adapter_bundle *b)
{
    size_t most = 0;
    for (int i = 0; i < p->site_count; i++) {
        const struct train_site *s = &p->site[i];
        size_t n = s->bt + stacked(s) * s->d_out - s->router;
        if (n > most) most = n;
    }
    float *values = malloc(most * sizeof *values), *row = malloc(LR_RANK_MAX * sizeof *row);
    enum status st = values && row ? ST_OK : ST_NOMEM;
    for (int i = 0; i < p->site_count && !st; i++) {
        struct train_site *s = &p->site[i];
        const struct lr_site_source *src = b->sites[s->layer * PROJ_COUNT + (int)s->projection];
        site_decode(s, src, row, values);
        size_t n = s->bt + stacked(s) * s->d_out - s->router;
        p->device->ops->write(p->device, p->value + s->router, values, n * sizeof *values);
        st = scale_write(p, s, src);
    }
    free(values);
    free(row);
    return st;
}

static enum status vectors_alloc(struct params *p)
{
    float **const vector[] = {&p->value, &p->grad, &p->m, &p->v};
    for (size_t i = 0; i < sizeof vector / sizeof *vector; i++) {
        *vector[i] = p->device->ops->alloc(p->device, size_mul(p->count, sizeof(float)));
        if (!*vector[i]) return ST_NOMEM;
    }
    return ST_OK;
}

static enum status params_build(struct params *p, const struct adapter_bundle *b)
{
    p->site = calloc((size_t)b->site_count + 1, sizeof *p->site);
    p->place = calloc((size_t)b->layers * PROJ_COUNT, sizeof(struct train_site *));
    if (!p->site || !p->place) return ST_NOMEM;
    for (int i = 0; i < b->layers * PROJ_COUNT; i++)
        if (b->sites[i]) site_place(p, b->sites[i], i);
    enum status st = vectors_alloc(p);
    return st ? st : values_write(p, b);
}

enum status params_open(struct device *d, const struct adapter_bundle *b, struct params **out,
                        struct error *err)
{
    enum status st = bundle_check(b, err);
    if (st) return st;
    struct params *p = calloc(1, sizeof *p);
    if (!p) return error_set(err, ST_NOMEM, "out of memory");
    p->device = d;
    p->layers = b->layers;
    st = params_build(p, b);
    if (st) {
        params_close(p);
        return error_set(err, st, "%s: no memory for %zu parameters and what their training needs", d->name,
                         b->parameters);
    }
    *out = p;
    return ST_OK;
}

void params_close(struct params *p)
{
    if (!p) return;
    struct device *d = p->device;
    for (int i = 0; i < p->site_count; i++) {
        if (p->site[i].scale) d->ops->free(d, p->site[i].scale);
        free(p->site[i].scale_host);
    }
    float *const vector[] = {p->value, p->grad, p->m, p->v};
    for (size_t i = 0; i < sizeof vector / sizeof *vector; i++)
        if (vector[i]) d->ops->free(d, vector[i]);
    free(p->site);
    free(p->place);
    free(p);
}

/* --- to a bundle --- */

static void encode(enum dtype type, float v, void *out)
{
    uint16_t half = type == DTYPE_BF16 ? f32_to_bf16(v) : f32_to_f16(v);
    if (type == DTYPE_F32)
        memcpy(out, &v, sizeof v);
    else
        memcpy(out, &half, sizeof half);
}

static void encode_all(enum dtype type, const float *v, size_t n, char *out)
{
    size_t elem = dtype_block_bytes(type);
    for (size_t i = 0; i < n; i++) encode(type, v[i], out + i * elem);
}

/* values begin at the site's router. */
static void source_fill(const struct lr_site_source *s, const struct train_site *site, const float *values)
{
    size_t rank = (size_t)s->rank, elem = dtype_block_bytes(s->type);
    const float *a = values + (site->a - site->router), *bt = values + (site->bt - site->router);
    memcpy((void *)s->scale, site->scale_host, (size_t)s->experts * sizeof *s->scale);
    if (s->router) encode_all(s->router_type, values, router_floats(site), (char *)s->router);
    for (size_t e = 0; e < (size_t)s->experts; e++) {
        encode_all(s->type, a + e * rank * s->d_in, rank * s->d_in, (char *)s->a[e]);
        char *b = (char *)s->b[e];
        for (size_t o = 0; o < s->d_out; o++)
            for (size_t j = 0; j < rank; j++, b += elem)
                encode(s->type, bt[(e * rank + j) * s->d_out + o], b);
    }
}

static enum status site_bundle(const struct params *p, const struct train_site *site, enum dtype type,
                               struct adapter_bundle *b)
{
    /* Routers stay in full precision: they are small, and rounding one would choose other experts. */
    struct lr_site_source shape = {.experts = site->experts,
                                   .rank = site->rank,
                                   .top_k = site->top_k,
                                   .d_in = site->d_in,
                                   .d_out = site->d_out,
                                   .rule = site->rule,
                                   .temperature = site->temperature,
                                   .type = type,
                                   .router_type = DTYPE_F32};
    size_t n = site->bt + stacked(site) * site->d_out - site->router;
    struct lr_site_source *s = source_new(b, &shape);
    float *values = malloc(n * sizeof *values);
    if (s && values) {
        p->device->ops->read(p->device, values, p->value + site->router, n * sizeof *values);
        source_fill(s, site, values);
        b->sites[site->layer * PROJ_COUNT + (int)site->projection] = s;
        b->site_count++;
        b->parameters += n;
    }
    free(values);
    return s && values ? ST_OK : ST_NOMEM;
}

enum status params_bundle(const struct params *p, const struct adapter_base *base, enum dtype type,
                          struct adapter_bundle **out, struct error *err)
{
    struct adapter_bundle *b = bundle_new(base);
    enum status st = b ? ST_OK : ST_NOMEM;
    for (int i = 0; i < p->site_count && !st; i++) st = site_bundle(p, &p->site[i], type, b);
    if (st) {
        adapter_bundle_free(b);
        return error_set(err, st, "out of memory");
    }
    *out = b;
    return ST_OK;
}

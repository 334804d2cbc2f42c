#include "training/params.h"
#include "training/random.h"
#include "training/source.h"

#include <math.h>

static void site_randomise(const struct lr_site_source *s, uint64_t seed)
{
    uint64_t state = random_hash(seed);
    float bound = 1 / sqrtf((float)s->d_in), *router = (float *)s->router;
    for (size_t i = 0; router && i < (size_t)s->experts * s->d_in; i++)
        router[i] = (float)(0.02 * random_normal(&state));
    for (int e = 0; e < s->experts; e++) {
        float *a = (float *)s->a[e];
        for (size_t i = 0; i < (size_t)s->rank * s->d_in; i++)
            a[i] = (float)(2 * random_unit(&state) - 1) * bound;
    }
}

static enum status site_make(const struct fresh_adapter *f, const struct adapter_base *base, int place,
                             struct adapter_bundle *b)
{
    int p = place % PROJ_COUNT;
    struct lr_site_source shape = {.experts = f->experts,
                                   .rank = f->rank,
                                   .top_k = f->experts == 1 ? 1 : f->top_k,
                                   .rule = f->experts == 1 ? GATE_NONE : f->rule,
                                   .temperature = 1,
                                   .d_in = base->d_in[p],
                                   .d_out = base->d_out[p],
                                   .type = DTYPE_F32,
                                   .router_type = DTYPE_F32};
    struct lr_site_source *s = source_new(b, &shape);
    if (!s) return ST_NOMEM;
    float scale = f->alpha / (f->rslora ? sqrtf((float)f->rank) : (float)f->rank);
    for (int e = 0; e < f->experts; e++) ((float *)s->scale)[e] = scale;
    site_randomise(s, random_hash(f->seed) + (uint64_t)place);
    b->sites[place] = s;
    b->site_count++;
    return ST_OK;
}

enum status bundle_fresh(const struct fresh_adapter *f, const struct adapter_base *base,
                         struct adapter_bundle **out, struct error *err)
{
    struct adapter_bundle *b = bundle_new(base);
    enum status st = b ? ST_OK : ST_NOMEM;
    for (int place = 0; place < base->layers * PROJ_COUNT && !st; place++)
        if (f->target[place % PROJ_COUNT]) st = site_make(f, base, place, b);
    if (st) {
        adapter_bundle_free(b);
        return error_set(err, st, "out of memory");
    }
    *out = b;
    return ST_OK;
}

#include "tests/support/random_adapter.h"

#include "tests/support/random.h"

#include <math.h>
#include <stdlib.h>

static float *random_matrix(struct test_random *r, size_t rows, size_t cols)
{
    float *m = malloc(rows * cols * sizeof *m);
    CHECK(m);
    float range = sqrtf(3.0f / (float)cols); /* unit variance of a product with unit inputs */
    for (size_t i = 0; i < rows * cols; i++) m[i] = random_f32(r, -range, range);
    return m;
}

static enum status site_make(struct device *d, struct test_random *r, size_t d_in, size_t d_out,
                             const struct random_adapter_config *c, struct lr_site **out)
{
    size_t experts = (size_t)c->experts, rank = (size_t)c->rank;
    float *router = c->rule == GATE_NONE ? NULL : random_matrix(r, experts, d_in);
    const void *a[LR_EXPERTS_MAX], *b[LR_EXPERTS_MAX];
    float scale[LR_EXPERTS_MAX];
    for (size_t e = 0; e < experts; e++) {
        a[e] = random_matrix(r, rank, d_in);
        b[e] = random_matrix(r, d_out, rank);
        scale[e] = c->scale;
    }
    struct lr_site_source src = {.experts = c->experts, .rank = c->rank, .top_k = c->top_k,
                                 .d_in = d_in, .d_out = d_out, .rule = c->rule, .temperature = 1,
                                 .type = DTYPE_F32, .router_type = DTYPE_F32, .router = router,
                                 .a = a, .b = b, .scale = scale};
    enum status st = d->ops->lr_site_pack(d, &src, out);
    for (size_t e = 0; e < experts; e++) {
        free((void *)a[e]);
        free((void *)b[e]);
    }
    free(router);
    return st;
}

/* The widest group of sites that share an input. */
static size_t width_of(const struct random_adapter_config *c)
{
    static const unsigned group[] = {1u << PROJ_Q | 1u << PROJ_K | 1u << PROJ_V, 1u << PROJ_O,
                                     1u << PROJ_GATE | 1u << PROJ_UP, 1u << PROJ_DOWN};
    int most = 0;
    for (int i = 0; i < 4; i++) {
        int sites = __builtin_popcount(c->projections & group[i]);
        if (sites > most) most = sites;
    }
    return (size_t)most * (size_t)c->experts * (size_t)(c->rank + 1);
}

enum status random_adapter_make(struct device *d, const struct model_shape *shape,
                                const struct random_adapter_config *c, struct lr_adapter *out)
{
    struct test_random r = {c->seed};
    struct lr_adapter a = {.layers = shape->layers, .width = width_of(c)};
    struct lr_site **sites = calloc((size_t)shape->layers * PROJ_COUNT, sizeof *sites);
    CHECK(sites);
    a.sites = (const struct lr_site **)sites;
    enum status st = ST_OK;
    for (int i = 0; i < shape->layers * PROJ_COUNT && !st; i++) {
        enum projection p = (enum projection)(i % PROJ_COUNT);
        size_t d_in, d_out;
        model_shape_projection(shape, p, &d_in, &d_out);
        if (c->projections >> p & 1) st = site_make(d, &r, d_in, d_out, c, &sites[i]);
    }
    if (st) random_adapter_release(d, &a);
    else *out = a;
    return st;
}

void random_adapter_release(struct device *d, struct lr_adapter *a)
{
    for (int i = 0; i < a->layers * PROJ_COUNT; i++)
        if (a->sites[i]) d->ops->lr_site_free(d, (struct lr_site *)a->sites[i]);
    free((void *)a->sites);
    *a = (struct lr_adapter){0};
}

#include "tests/support/sites.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

void test_fill(struct test_random *r, float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) x[i] = random_f32(r, -1, 1);
}

static void *allocate(size_t bytes)
{
    void *p = malloc(bytes ? bytes : 1);
    CHECK(p);
    return p;
}

/* n random values around `scale` in magnitude, as a file would hold them. */
static void *random_elements(struct test_random *r, enum dtype type, size_t n, float scale)
{
    size_t elems = dtype_block_elems(type), bytes = dtype_block_bytes(type);
    char *data = allocate(n / elems * bytes), *out = data;
    for (size_t i = 0; i < n; i += elems, out += bytes) {
        float v = random_f32(r, -scale, scale);
        uint16_t half = type == DTYPE_BF16 ? f32_to_bf16(v) : f32_to_f16(v);
        random_bytes(r, out, bytes);
        if (type == DTYPE_F32)
            memcpy(out, &v, sizeof v);
        else
            memcpy(type == DTYPE_Q6_K ? out + bytes - 2 : out, &half, sizeof half);
        uint16_t second = f32_to_f16(random_f32(r, -scale, scale));
        bool two = type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q4_K || type == DTYPE_Q5_K;
        if (two) memcpy(out + 2, &second, sizeof second);
    }
    return data;
}

void test_weight_make(struct device *d, struct test_random *r, enum dtype type, size_t rows, size_t cols,
                      struct test_weight *out)
{
    void *data = random_elements(r, type, rows * cols, dtype_block_elems(type) > 1 ? 0.02f : 1);
    out->file = (struct matrix){type, rows, cols, data};
    out->values = allocate(rows * cols * sizeof *out->values);
    dtype_decode(type, data, out->values, rows * cols);
    CHECK(d->ops->weight_pack(d, &out->file, &out->packed) == ST_OK);
}

void test_weight_release(struct device *d, struct test_weight *w)
{
    d->ops->weight_free(d, w->packed);
    free((void *)w->file.data);
    free(w->values);
}

static float *decoded(enum dtype type, const void *data, size_t n)
{
    float *values = allocate(n * sizeof *values);
    dtype_decode(type, data, values, n);
    return values;
}

static void site_make(struct device *d, struct test_random *r, struct test_site *s,
                      const struct lr_site **packed)
{
    const struct test_site_shape *shape = &s->shape;
    size_t experts = (size_t)shape->experts, rank = (size_t)shape->rank,
           elem = dtype_block_bytes(shape->type);
    size_t router_row = s->d_in * dtype_block_bytes(shape->router_type);
    char *router = random_elements(r, shape->router_type, experts * s->d_in, 1);
    char *a = random_elements(r, shape->type, experts * rank * s->d_in, 1);
    char *b = random_elements(r, shape->type, experts * rank * s->d_out, 1);
    for (size_t e = 2; shape->ties && e < experts; e++)
        memcpy(router + e * router_row, router + router_row, router_row);

    s->router = decoded(shape->router_type, router, experts * s->d_in);
    s->a = decoded(shape->type, a, experts * rank * s->d_in);
    s->b = decoded(shape->type, b, experts * rank * s->d_out);
    s->scale = allocate(experts * sizeof *s->scale);
    for (size_t e = 0; e < experts; e++) s->scale[e] = random_f32(r, 0.25f, 2);

    const void *a_of[LR_EXPERTS_MAX], *b_of[LR_EXPERTS_MAX];
    for (size_t e = 0; e < experts; e++) a_of[e] = a + e * rank * s->d_in * elem;
    for (size_t e = 0; e < experts; e++) b_of[e] = b + e * rank * s->d_out * elem;
    struct lr_site_source source = {
        .experts = shape->experts,
        .rank = shape->rank,
        .top_k = shape->top_k,
        .d_in = s->d_in,
        .d_out = s->d_out,
        .rule = shape->rule,
        .temperature = shape->temperature,
        .type = shape->type,
        .router_type = shape->router_type,
        .router = shape->rule == GATE_NONE ? NULL : router,
        .a = a_of,
        .b = b_of,
        .scale = s->scale,
    };
    struct lr_site *site;
    CHECK(d->ops->lr_site_pack(d, &source, &site) == ST_OK);
    *packed = site;
    free(router);
    free(a);
    free(b);
}

void test_adapter_make(struct device *d, struct test_random *r, const struct test_site_shape *shape,
                       size_t d_in, const size_t d_out[PROJ_COUNT], struct test_adapter *out)
{
    *out = (struct test_adapter){.lr = {.layers = 1, .sites = out->packed}};
    for (int p = 0; p < PROJ_COUNT; p++) {
        if (d_out[p] == 0) continue;
        out->site[p] = (struct test_site){.d_in = d_in, .d_out = d_out[p], .shape = *shape};
        site_make(d, r, &out->site[p], &out->packed[p]);
        out->lr.width += (size_t)shape->experts * ((size_t)shape->rank + 1);
    }
}

void test_adapter_release(struct device *d, struct test_adapter *a)
{
    for (int p = 0; p < PROJ_COUNT; p++) {
        if (!a->packed[p]) continue;
        d->ops->lr_site_free(d, (struct lr_site *)a->packed[p]);
        free(a->site[p].router);
        free(a->site[p].a);
        free(a->site[p].b);
        free(a->site[p].scale);
    }
}

/* sum a[i] b[i], and sum |a[i] b[i]|. */
static double dot(const float *a, const float *b, size_t n, double *magnitude)
{
    double sum = 0;
    *magnitude = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)a[i] * b[i];
        *magnitude += fabs((double)a[i] * b[i]);
    }
    return sum;
}

/* The k-th largest logit counts as chosen if fewer than k others are larger, or equal and of a lower
 * index. */
static bool chosen(const struct test_site_shape *shape, const double *u, int i)
{
    if (shape->rule == GATE_NONE || shape->rule == GATE_DENSE) return true;
    int ahead = 0;
    for (int j = 0; j < shape->experts; j++) ahead += u[j] > u[i] || (u[j] == u[i] && j < i);
    return ahead < shape->top_k;
}

void test_site_add_delta(const struct test_site *s, double weight, const float *x, double *y, double *bound)
{
    const struct test_site_shape *shape = &s->shape;
    size_t rank = (size_t)shape->rank;
    double u[LR_EXPERTS_MAX], total = 0, logit_error = 0, magnitude;
    for (int i = 0; i < shape->experts; i++) {
        u[i] = dot(s->router + (size_t)i * s->d_in, x, s->d_in, &magnitude) / shape->temperature;
        logit_error = fmax(logit_error, magnitude * FLT_EPSILON * (double)s->d_in / 4 / shape->temperature);
    }
    for (int i = 0; i < shape->experts; i++)
        if (shape->rule != GATE_TOPK || chosen(shape, u, i)) total += exp(u[i]);

    for (int i = 0; i < shape->experts; i++) {
        if (!chosen(shape, u, i)) continue;
        double gate = shape->rule == GATE_NONE ? 1 : exp(u[i]) / total;
        double gate_error = shape->rule == GATE_NONE ? 0 : 2 * logit_error; /* relative: numerator and sum */
        double factor = gate * s->scale[i] * weight;
        for (size_t j = 0; j < rank; j++) {
            double z = dot(s->a + ((size_t)i * rank + j) * s->d_in, x, s->d_in, &magnitude);
            double relative = gate_error + FLT_EPSILON * (double)(s->d_in / 4 + rank + 16);
            for (size_t o = 0; o < s->d_out; o++) {
                double b = s->b[((size_t)i * s->d_out + o) * rank + j];
                y[o] += factor * b * z;
                bound[o] += fabs(factor * b) * magnitude * relative;
            }
        }
    }
}

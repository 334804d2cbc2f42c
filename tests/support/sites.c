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

static float *random_vector(struct test_random *r, size_t n)
{
    float *v = allocate(n * sizeof *v);
    test_fill(r, v, n);
    return v;
}

/* What a file would hold of a site's matrices. */
struct elements {
    char *router, *threshold_row, *a, *b;
};

static void site_fill(struct test_random *r, struct test_site *s, struct elements *e)
{
    const struct test_site_shape *shape = &s->shape;
    size_t experts = (size_t)shape->experts, rank = (size_t)shape->rank;
    size_t router_row = s->d_in * dtype_block_bytes(shape->router_type);
    e->router = random_elements(r, shape->router_type, experts * s->d_in, 1);
    e->threshold_row = random_elements(r, shape->router_type, s->d_in, 1);
    e->a = random_elements(r, shape->type, experts * rank * s->d_in, 1);
    e->b = random_elements(r, shape->type, experts * rank * s->d_out, 1);
    for (size_t i = 2; shape->ties && i < experts; i++)
        memcpy(e->router + i * router_row, e->router + router_row, router_row);
    size_t a_bytes = rank * s->d_in * dtype_block_bytes(shape->type);
    for (size_t i = 1; shape->shared_a && i < experts; i++) memcpy(e->a + i * a_bytes, e->a, a_bytes);

    s->router = decoded(shape->router_type, e->router, experts * s->d_in);
    s->threshold_row = decoded(shape->router_type, e->threshold_row, s->d_in);
    s->a = decoded(shape->type, e->a, experts * rank * s->d_in);
    s->b = decoded(shape->type, e->b, experts * rank * s->d_out);
    s->scale = random_vector(r, experts);
    for (size_t i = 0; i < experts; i++) s->scale[i] = 1.125f + 0.875f * s->scale[i];
    s->gain = shape->gain ? random_vector(r, s->d_out) : NULL;
    s->bias = shape->bias ? random_vector(r, s->d_out) : NULL;
}

void test_site_make(struct device *d, struct test_random *r, const struct test_site_shape *shape, size_t d_in,
                    size_t d_out, struct test_site *out, const struct lr_site **packed)
{
    size_t rank = (size_t)shape->rank, elem = dtype_block_bytes(shape->type);
    *out = (struct test_site){.d_in = d_in, .d_out = d_out, .shape = *shape};
    struct elements e;
    site_fill(r, out, &e);

    const void *a_of[LR_EXPERTS_MAX], *b_of[LR_EXPERTS_MAX];
    for (size_t i = 0; i < (size_t)shape->experts; i++) {
        /* only the first is to be read where it is shared */
        a_of[i] = shape->shared_a && i > 0 ? NULL : e.a + i * rank * d_in * elem;
        b_of[i] = e.b + i * rank * d_out * elem;
    }
    bool routed = shape->rule != GATE_NONE && shape->rule != GATE_FFN;
    struct lr_site_source source = {
        .experts = shape->experts,
        .rank = shape->rank,
        .top_k = shape->top_k,
        .d_in = d_in,
        .d_out = d_out,
        .rule = shape->rule,
        .shared_a = shape->shared_a,
        .temperature = shape->temperature,
        .top_p = shape->top_p,
        .threshold = shape->threshold,
        .threshold_bias = shape->threshold_bias,
        .type = shape->type,
        .router_type = shape->router_type,
        .router = routed ? e.router : NULL,
        .threshold_row = shape->rule == GATE_ADA_THRESHOLD ? e.threshold_row : NULL,
        .a = rank ? a_of : NULL,
        .b = rank ? b_of : NULL,
        .scale = rank ? out->scale : NULL,
        .base_gain = out->gain,
        .bias = out->bias,
    };
    struct lr_site *site;
    CHECK(d->ops->lr_site_pack(d, &source, &site) == ST_OK);
    *packed = site;
    free(e.router);
    free(e.threshold_row);
    free(e.a);
    free(e.b);
}

void test_site_release(struct device *d, struct test_site *s, const struct lr_site *packed)
{
    d->ops->lr_site_free(d, (struct lr_site *)packed);
    free(s->router);
    free(s->threshold_row);
    free(s->a);
    free(s->b);
    free(s->scale);
    free(s->gain);
    free(s->bias);
}

void test_adapter_make(struct device *d, struct test_random *r, const struct test_site_shape *shape,
                       size_t d_in, const size_t d_out[PROJ_COUNT], struct test_adapter *out)
{
    *out = (struct test_adapter){.lr = {.layers = 1, .sites = out->packed}};
    for (int p = 0; p < PROJ_COUNT; p++) {
        if (d_out[p] == 0) continue;
        test_site_make(d, r, shape, d_in, d_out[p], &out->site[p], &out->packed[p]);
        out->lr.width += (size_t)shape->experts * ((size_t)shape->rank + 1);
    }
}

void test_adapter_release(struct device *d, struct test_adapter *a)
{
    for (int p = 0; p < PROJ_COUNT; p++)
        if (a->packed[p]) test_site_release(d, &a->site[p], a->packed[p]);
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

/* How many others are larger, or equal and of a lower index. */
static int rank_of(const double *u, int count, int i)
{
    int ahead = 0;
    for (int j = 0; j < count; j++) ahead += u[j] > u[i] || (u[j] == u[i] && j < i);
    return ahead;
}

/* The sum of p of those before i in descending order. */
static double sum_before(const double *u, const double *p, int count, int i)
{
    double sum = 0;
    for (int j = 0; j < count; j++)
        if (u[j] > u[i] || (u[j] == u[i] && j < i)) sum += p[j];
    return sum;
}

/* Whether expert i is chosen; *margin shrinks to how near to the other answer that is. Equal logits
 * are equal in any precision. */
static bool chosen(const struct test_site_shape *shape, const double *u, const double *p, double tau, int i,
                   double *margin)
{
    int count = shape->experts, rank = rank_of(u, count, i);
    double before, gap = INFINITY;
    bool yes = true;
    switch (shape->rule) {
    case GATE_TOPK:
    case GATE_TOPK_RAW:
        yes = rank < shape->top_k;
        for (int j = 0; j < count; j++)
            if (u[j] != u[i] && (rank_of(u, count, j) < shape->top_k) != yes)
                gap = fmin(gap, fabs(u[j] - u[i]) * fmin(p[i], p[j]));
        break;
    case GATE_TOP_P:
        before = sum_before(u, p, count, i);
        yes = rank == 0 || before <= (double)shape->top_p;
        if (rank > 0) gap = fabs(before - (double)shape->top_p);
        break;
    case GATE_THRESHOLD:
    case GATE_ADA_THRESHOLD:
        yes = p[i] >= tau;
        if (shape->rule == GATE_THRESHOLD) gap = fabs(p[i] - tau);
        break;
    default: break;
    }
    *margin = fmin(*margin, gap);
    return yes;
}

/* Logits over the temperature, where it divides them, and the most that fp32 may be off. */
static double site_logits(const struct test_site *s, const float *x, double *u)
{
    double error = 0, magnitude, t = s->shape.rule == GATE_TOP_P ? 1 : (double)s->shape.temperature;
    for (int i = 0; i < s->shape.experts; i++) {
        u[i] = dot(s->router + (size_t)i * s->d_in, x, s->d_in, &magnitude) / t;
        error = fmax(error, magnitude * (double)FLT_EPSILON * (double)s->d_in / 4 / t);
    }
    return error;
}

/* The threshold of a row, and how far fp32 may be from it. */
static double site_threshold(const struct test_site *s, const float *x, double *error)
{
    double magnitude, most = (double)s->shape.threshold;
    *error = 0;
    if (s->shape.rule != GATE_ADA_THRESHOLD) return most;
    double t = dot(s->threshold_row, x, s->d_in, &magnitude) + (double)s->shape.threshold_bias;
    *error = most * (magnitude * (double)FLT_EPSILON * (double)s->d_in / 4 + 8 * (double)FLT_EPSILON);
    return most / (1 + exp(-t));
}

void test_site_gates(const struct test_site *s, const float *x, double *gate, double *error)
{
    const struct test_site_shape *shape = &s->shape;
    int count = shape->experts;
    double u[LR_EXPERTS_MAX], p[LR_EXPERTS_MAX], tau_error, total = 0, margin = INFINITY;
    if (shape->rule == GATE_NONE) {
        for (int i = 0; i < count; i++) gate[i] = 1, error[i] = 0;
        return;
    }
    double logit_error = site_logits(s, x, u), tau = site_threshold(s, x, &tau_error);
    for (int i = 0; i < count; i++) total += exp(u[i]);
    for (int i = 0; i < count; i++) p[i] = exp(u[i]) / total;
    bool divided = shape->rule == GATE_TOP_P;
    for (int i = 0; i < count && divided; i++) p[i] /= (double)shape->temperature;

    /* of a p: numerator and sum, and the rounding of sums of p */
    double p_error = 2 * logit_error + (double)(count + 8) * (double)FLT_EPSILON;
    bool adaptive = shape->rule == GATE_ADA_THRESHOLD;
    bool whole = shape->rule == GATE_DENSE || shape->rule == GATE_TOPK_RAW || divided;
    total = 0;
    for (int i = 0; i < count; i++) {
        gate[i] = chosen(shape, u, p, tau, i, &margin) ? p[i] - (adaptive ? tau : 0) : 0;
        total += gate[i];
    }
    if (whole) total = 1;
    for (int i = 0; i < count; i++) {
        double own = p[i] * p_error + tau_error * adaptive, all = p_error + tau_error * (double)count;
        bool may_be = gate[i] > 0 || (adaptive && fabs(p[i] - tau) < own); /* right at tau */
        if (total > 0) gate[i] /= total;
        error[i] = !may_be ? 0 : total > 0 ? (own + gate[i] * all) / total : INFINITY;
        if (margin < p_error) error[i] = INFINITY;
    }
}

void test_site_add_expert(const struct test_site *s, int expert, double factor, const double *x, double *y)
{
    size_t rank = (size_t)s->shape.rank;
    for (size_t j = 0; j < rank; j++) {
        const float *a = s->a + ((size_t)expert * rank + j) * s->d_in;
        double z = 0;
        for (size_t k = 0; k < s->d_in; k++) z += (double)a[k] * x[k];
        z *= factor * (double)s->scale[expert];
        for (size_t o = 0; o < s->d_out; o++)
            y[o] += (double)s->b[((size_t)expert * s->d_out + o) * rank + j] * z;
    }
}

void test_site_add_delta(const struct test_site *s, double weight, const float *x, const double *base,
                         const double *base_bound, double *y, double *bound)
{
    const double epsilon = (double)FLT_EPSILON;
    size_t rank = (size_t)s->shape.rank;
    double gate[LR_EXPERTS_MAX], error[LR_EXPERTS_MAX];
    test_site_gates(s, x, gate, error);
    for (int i = 0; i < s->shape.experts; i++) {
        double gate_error = error[i] + gate[i] * epsilon * (double)(s->d_in / 4 + rank + 16);
        if (gate_error == 0) continue;
        double factor = (double)s->scale[i] * weight;
        for (size_t j = 0; j < rank; j++) {
            double magnitude;
            double z = dot(s->a + ((size_t)i * rank + j) * s->d_in, x, s->d_in, &magnitude);
            for (size_t o = 0; o < s->d_out; o++) {
                double b = factor * (double)s->b[((size_t)i * s->d_out + o) * rank + j];
                y[o] += gate[i] * b * z;
                bound[o] += fabs(b) * magnitude * gate_error;
            }
        }
    }
    for (size_t o = 0; s->gain && o < s->d_out; o++) {
        double gain = weight * (double)s->gain[o];
        y[o] += gain * base[o];
        bound[o] += (1 + fabs(gain)) * (fabs(base[o]) * 4 * epsilon) + fabs(gain) * base_bound[o];
    }
    for (size_t o = 0; s->bias && o < s->d_out; o++) {
        y[o] += weight * (double)s->bias[o];
        bound[o] += fabs(weight * (double)s->bias[o]) * 2 * epsilon;
    }
}

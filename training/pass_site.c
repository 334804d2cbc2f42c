/* A site's low-rank part, all experts at once: with A and B stacked, each step is one matrix product, and the gates, of
 * which most are 0, stand between them. Four times the arithmetic of choosing at 8 experts and top 2, and still
 * the faster way for ranks this small. */
#include "training/pass_int.h"

#include "training/random.h"

#include <stdlib.h>

/* C = op(A) op(B) + beta C, contiguous. */
static void product(struct pass *p, int m, size_t n, size_t k, const float *a, bool a_transposed, const float *b,
                    bool b_transposed, float beta, float *c)
{
    struct matmul_args args = {.m = m, .n = (int)n, .k = (int)k, .a_transposed = a_transposed,
                               .b_transposed = b_transposed, .a = a, .b = b,
                               .a_stride = a_transposed ? (size_t)m : k, .b_stride = b_transposed ? k : n,
                               .alpha = 1, .beta = beta, .c = c, .c_stride = n};
    if (pass_ready(p)) p->grad->matmul(p->device, &args);
}

static int width(const struct train_site *s) { return s->experts * s->rank; }

static bool routed(const struct train_site *s) { return s->routed >= 0; }

static float *stats_of(const struct pass *p, const struct train_site *s)
{
    return p->stats + (size_t)s->routed * 3 * (size_t)p->experts_max;
}

static void gate(struct pass *p, const struct train_site *s, const struct site_state *state)
{
    struct gate_args args = {.rows = p->batch->rows, .experts = s->experts, .rank = s->rank, .scale = s->scale,
                             .g = routed(s) ? state->g : NULL, .z = state->z, .zg = p->zg};
    if (pass_ready(p)) p->grad->gate(p->device, &args);
}

/* --- the contrastive loss --- */

static int key_compare(const void *a, const void *b)
{
    const struct sample_key *x = a, *y = b;
    if (x->key != y->key) return x->key < y->key ? -1 : 1;
    return x->row < y->row ? -1 : 1;
}

static int row_compare(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* The rows whose experts are compared: those of the smallest hash(seed ^ index of the site << 32 ^ row), so many that
 * they give about loss->pairs pairs; in order. Returns how many. */
static int sample_rows(struct pass *p, const struct train_site *s)
{
    int rows = p->batch->rows, chosen = s->rule == GATE_DENSE ? s->experts : s->top_k;
    int count = p->loss->pairs / chosen > 1 ? p->loss->pairs / chosen : 1;
    uint64_t site = (uint64_t)(s - p->params->site) << 32;
    if (count > rows) count = rows;
    for (int r = 0; r < rows; r++)
        p->keys[r] = (struct sample_key){random_hash(p->loss->seed ^ site ^ (uint64_t)r), r};
    qsort(p->keys, (size_t)rows, sizeof *p->keys, key_compare);
    for (int i = 0; i < count; i++) p->sample[i] = p->keys[i].row;
    qsort(p->sample, (size_t)count, sizeof *p->sample, row_compare);
    return count;
}

/* d_z and d_bt as struct contrast_args': NULL both for the loss alone. */
static void contrast(struct pass *p, const struct train_site *s, float *d_z, float *d_bt)
{
    if (!p->loss || p->loss->contrast == 0 || !routed(s) || s->experts < 2) return;
    const struct site_state *state = &p->act->site[s->projection];
    struct contrast_args args = {.count = sample_rows(p, s), .row = p->sample, .experts = s->experts,
                                 .rank = s->rank, .d_out = s->d_out, .g = state->g, .z = state->z,
                                 .bt = p->params->value + s->bt,
                                 .temperature = (float)p->loss->temperature,
                                 .weight = (float)(p->loss->contrast / p->params->routed_count),
                                 .loss = p->contrast + CONTRAST_RESULTS * s->routed, .d_z = d_z, .d_bt = d_bt};
    if (pass_ready(p)) p->grad->contrast(p->device, &args);
}

/* --- forward --- */

void site_prepare(struct pass *p, const struct train_site *s, const float *x)
{
    const struct site_state *state = &p->act->site[s->projection];
    const float *value = p->params->value;
    int rows = p->batch->rows;
    product(p, rows, (size_t)width(s), s->d_in, x, false, value + s->a, true, 0, state->z);
    if (!routed(s)) return;
    product(p, rows, (size_t)s->experts, s->d_in, x, false, value + s->router, true, 0, p->u);
    struct route_args args = {.rows = rows, .experts = s->experts, .top_k = s->top_k, .rule = s->rule,
                              .temperature = s->temperature, .u = p->u, .p = state->p, .g = state->g,
                              .stats = stats_of(p, s)};
    if (pass_ready(p)) p->grad->route(p->device, &args);
}

void site_forward(struct pass *p, const struct train_site *s, const float *x, float *y)
{
    const struct site_state *state = &p->act->site[s->projection];
    site_prepare(p, s, x);
    gate(p, s, state);
    product(p, p->batch->rows, s->d_out, (size_t)width(s), p->zg, false, p->params->value + s->bt, false, 1, y);
    if (!p->backward) contrast(p, s, NULL, NULL);
}

/* --- backward --- */

/* The gradient of lambda_b/S E sum_i f_i P_i by p[t, i] is this times the count of rows that chose i, with
 * f_i = count_i / T and P_i = sum_t p[t, i] / T. */
static float balance_factor(const struct pass *p, const struct train_site *s)
{
    double rows = p->batch->rows;
    return p->loss ? (float)(p->loss->balance * s->experts / (p->params->routed_count * rows * rows)) : 0;
}

static void router_backward(struct pass *p, const struct train_site *s, const float *x, float *d_x)
{
    const struct site_state *state = &p->act->site[s->projection];
    struct route_backward_args args = {.rows = p->batch->rows, .experts = s->experts, .rule = s->rule,
                                       .temperature = s->temperature, .balance = balance_factor(p, s),
                                       .p = state->p, .g = state->g, .d_g = p->u, .stats = stats_of(p, s),
                                       .d_u = p->u};
    if (pass_ready(p)) p->grad->route_backward(p->device, &args);
    size_t rows = (size_t)p->batch->rows;
    product(p, s->experts, s->d_in, rows, p->u, true, x, false, 1, p->params->grad + s->router);
    if (d_x)
        product(p, p->batch->rows, s->d_in, (size_t)s->experts, p->u, false, p->params->value + s->router, false, 1,
                d_x);
}

void site_backward(struct pass *p, const struct train_site *s, const float *x, const float *d_y, float *d_x)
{
    const struct site_state *state = &p->act->site[s->projection];
    const float *value = p->params->value;
    float *grad = p->params->grad;
    int rows = p->batch->rows;

    gate(p, s, state);
    product(p, width(s), s->d_out, (size_t)rows, p->zg, true, d_y, false, 1, grad + s->bt);
    product(p, rows, (size_t)width(s), s->d_out, d_y, false, value + s->bt, true, 0, p->d_zg);
    struct gate_backward_args args = {.rows = rows, .experts = s->experts, .rank = s->rank, .scale = s->scale,
                                      .g = routed(s) ? state->g : NULL, .z = state->z, .d_zg = p->d_zg,
                                      .d_g = routed(s) ? p->u : NULL};
    if (pass_ready(p)) p->grad->gate_backward(p->device, &args);
    contrast(p, s, p->d_zg, grad + s->bt);
    product(p, width(s), s->d_in, (size_t)rows, p->d_zg, true, x, false, 1, grad + s->a);
    if (d_x) product(p, rows, s->d_in, (size_t)width(s), p->d_zg, false, value + s->a, false, 1, d_x);
    if (routed(s)) router_backward(p, s, x, d_x);
}

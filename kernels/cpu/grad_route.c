/* Routing of an adapter in training: gates from logits and back, and gated low-rank sums. */
#include "kernels/cpu/grad_int.h"
#include "kernels/cpu/route.h"

#include <math.h>
#include <string.h>

static bool rule_is_trained(enum gate_rule rule)
{
    return rule == GATE_DENSE || rule == GATE_TOPK || rule == GATE_TOPK_RAW;
}

struct route_job {
    const struct cpu_grad *grad;
    const struct route_args *a;
};

/* Rows of one block, and their part of the statistics. The gates are serving's own. */
static void route_block(void *ctx, size_t block, int worker)
{
    (void)worker;
    const struct route_job *job = ctx;
    const struct route_args *a = job->a;
    size_t experts = (size_t)a->experts, end = (block + 1) * CPU_ROUTE_ROWS;
    double *sums = job->grad->route_sums + block * 3 * experts;
    memset(sums, 0, 3 * experts * sizeof *sums);
    struct lr_site all = {.experts = a->experts, .rule = GATE_DENSE, .temperature = a->temperature};
    struct lr_site site = all;
    site.rule = a->rule;
    site.top_k = a->top_k;

    int32_t chosen[LR_EXPERTS_MAX];
    float gate[LR_EXPERTS_MAX];
    for (size_t t = block * CPU_ROUTE_ROWS; t < end && t < (size_t)a->rows; t++) {
        const float *u = a->u + t * experts;
        float *p = a->p + t * experts, *g = a->g + t * experts;
        route_gates(&all, u, chosen, p);
        int count = route_gates(&site, u, chosen, gate);
        memset(g, 0, experts * sizeof *g);
        for (int j = 0; j < count; j++) {
            g[chosen[j]] = gate[j];
            sums[chosen[j]] += 1;
        }
        for (size_t i = 0; i < experts; i++) {
            sums[experts + i] += g[i];
            sums[2 * experts + i] += p[i];
        }
    }
}

void cpu_route(struct device *device, const struct route_args *a)
{
    struct cpu_device *d = cpu_device_of(device);
    CHECK(rule_is_trained(a->rule) && a->experts >= 1 && a->experts <= LR_EXPERTS_MAX);
    CHECK(a->experts <= d->grad->limits.experts_rank && a->rows <= d->grad->limits.rows);
    size_t blocks = cpu_chunks((size_t)a->rows, CPU_ROUTE_ROWS), width = 3 * (size_t)a->experts;
    struct route_job job = {d->grad, a};
    cpu_run(d, blocks, route_block, &job);
    for (size_t i = 0; i < width; i++) {
        double sum = 0;
        for (size_t b = 0; b < blocks; b++) sum += d->grad->route_sums[b * width + i];
        a->stats[i] = (float)sum;
    }
}

/* du_i += w_i (d_i - sum_j w_j d_j) / temperature, of w = softmax(u / temperature) over the i with w_i != 0.
 */
static void softmax_back(int n, const float *w, const float *d, float temperature, float *d_u)
{
    float along = 0;
    for (int i = 0; i < n; i++)
        if (w[i] != 0) along += w[i] * d[i];
    for (int i = 0; i < n; i++)
        if (w[i] != 0) d_u[i] += w[i] * (d[i] - along) / temperature;
}

static void route_backward_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct grad_rows *job = ctx;
    const struct route_backward_args *a = job->args;
    int experts = a->experts;
    for (size_t t = chunk * job->chunk; t < grad_rows_end(job, chunk); t++) {
        const float *p = a->p + t * (size_t)experts, *g = a->g + t * (size_t)experts;
        const float *d_g = a->d_g + t * (size_t)experts;
        float d_u[LR_EXPERTS_MAX] = {0}, d_p[LR_EXPERTS_MAX];
        /* Renormalised gates are themselves the softmax over the chosen; others are p. */
        for (int i = 0; i < experts; i++) {
            d_p[i] = a->balance * a->stats[i];
            if (a->rule != GATE_TOPK && g[i] != 0) d_p[i] += d_g[i];
        }
        if (a->rule == GATE_TOPK) softmax_back(experts, g, d_g, a->temperature, d_u);
        softmax_back(experts, p, d_p, a->temperature, d_u);
        memcpy(a->d_u + t * (size_t)experts, d_u, (size_t)experts * sizeof *d_u);
    }
}

void cpu_route_backward(struct device *device, const struct route_backward_args *a)
{
    CHECK(rule_is_trained(a->rule) && a->experts >= 1 && a->experts <= LR_EXPERTS_MAX);
    cpu_rows_run(cpu_device_of(device), a->rows, (size_t)a->experts * 8, a, route_backward_chunk);
}

static void gate_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct grad_rows *job = ctx;
    const struct gate_args *a = job->args;
    size_t experts = (size_t)a->experts, rank = (size_t)a->rank;
    for (size_t t = chunk * job->chunk; t < grad_rows_end(job, chunk); t++)
        for (size_t i = 0; i < experts; i++) {
            size_t at = (t * experts + i) * rank;
            float factor = a->scale[i] * (a->g ? a->g[t * experts + i] : 1);
            for (size_t j = 0; j < rank; j++) a->zg[at + j] = factor * a->z[at + j];
        }
}

void cpu_gate(struct device *device, const struct gate_args *a)
{
    cpu_rows_run(cpu_device_of(device), a->rows, (size_t)a->experts * (size_t)a->rank, a, gate_chunk);
}

static void gate_backward_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct grad_rows *job = ctx;
    const struct gate_backward_args *a = job->args;
    size_t experts = (size_t)a->experts, rank = (size_t)a->rank;
    for (size_t t = chunk * job->chunk; t < grad_rows_end(job, chunk); t++)
        for (size_t i = 0; i < experts; i++) {
            size_t at = (t * experts + i) * rank;
            float factor = a->scale[i] * (a->g ? a->g[t * experts + i] : 1), along = 0;
            for (size_t j = 0; a->g && j < rank; j++) along += a->d_zg[at + j] * a->z[at + j];
            if (a->g) a->d_g[t * experts + i] = a->scale[i] * along;
            for (size_t j = 0; j < rank; j++) a->d_zg[at + j] *= factor;
        }
}

void cpu_gate_backward(struct device *device, const struct gate_backward_args *a)
{
    cpu_rows_run(cpu_device_of(device), a->rows, (size_t)a->experts * (size_t)a->rank, a,
                 gate_backward_chunk);
}

/* Training's ops: scratch, products, and the ops that go row by row or element by element. */
#include "kernels/cpu/grad_int.h"

#include "base/memory.h"
#include "kernels/cpu/carver.h"

#include <string.h>

/* The struct itself comes first in the block. */
static void grad_lay_out(const struct cpu_device *d, const struct grad_limits *limits, struct carver *c,
                         struct cpu_grad *g)
{
    carve(c, 1, sizeof *g);
    *g = (struct cpu_grad){.limits = *limits};

    size_t rows = (size_t)limits->rows, seq_rows = (size_t)limits->seq_rows, half = limits->head_dim / 2;
    size_t heads_row = size_mul((size_t)limits->heads, limits->head_dim), er = (size_t)limits->experts_rank;
    size_t strips = size_mul(2 * CPU_STRIP_ROWS, seq_rows);
    g->worker_stride = size_round_up(size_add(CPU_MATMUL_FLOATS, strips), MEMORY_ALIGN);
    g->worker = carve(c, size_mul((size_t)pool_size(d->pool), g->worker_stride), sizeof(float));
    g->head_d_k = carve(c, size_mul(rows, heads_row), sizeof(float));
    g->head_d_v = carve(c, size_mul(rows, heads_row), sizeof(float));
    g->route_sums = carve(c, size_mul(cpu_chunks(rows, CPU_ROUTE_ROWS), size_mul(3, er)), sizeof(double));
    g->rope_cos = carve(c, size_mul(seq_rows, half), sizeof(float));
    g->rope_sin = carve(c, size_mul(seq_rows, half), sizeof(float));
    g->rope_freq = carve(c, half, sizeof(float));

    size_t pairs = CONTRAST_PAIRS_MAX;
    g->pair_row = carve(c, pairs, sizeof(int32_t));
    g->pair_expert = carve(c, pairs, sizeof(int32_t));
    g->pair_norm = carve(c, pairs, sizeof(float));
    g->pair_loss = carve(c, pairs, sizeof(float));
    g->pair_apart = carve(c, pairs, sizeof(float));
    g->pair_near = carve(c, pairs, sizeof(float));
    g->gram = carve(c, size_mul(er, er), sizeof(float));
    g->mix = carve(c, size_mul(er, er), sizeof(float));
    g->unit = carve(c, size_mul(pairs, er), sizeof(float));
    g->unit_gram = carve(c, size_mul(pairs, er), sizeof(float));
    g->d_unit = carve(c, size_mul(pairs, er), sizeof(float));
    g->cosine = carve(c, pairs * pairs, sizeof(float));
}

#define GROW(field)                                                                 \
    do {                                                                            \
        if (limits->field > most->field) most->field = limits->field, grows = true; \
    } while (0)

/* Whether `most` had to grow to hold `limits`. */
static bool limits_grow(struct grad_limits *most, const struct grad_limits *limits)
{
    bool grows = false;
    GROW(rows);
    GROW(cols);
    GROW(seq_rows);
    GROW(heads);
    GROW(head_dim);
    GROW(experts_rank);
    return grows;
}

static enum status grad_reserve(struct device *device, const struct grad_limits *limits)
{
    struct cpu_device *d = cpu_device_of(device);
    CHECK(limits->rows >= 1 && limits->seq_rows >= 1 && limits->heads >= 0 && limits->experts_rank >= 0);
    struct grad_limits most = d->grad ? d->grad->limits : (struct grad_limits){0};
    if (!limits_grow(&most, limits)) return ST_OK;

    struct carver measure = {0};
    struct cpu_grad g;
    grad_lay_out(d, &most, &measure, &g);
    struct carver c = {.block = memory_alloc(measure.used)};
    if (!c.block) return ST_NOMEM;
    grad_lay_out(d, &most, &c, &g);
    memory_free(d->grad);
    d->grad = memcpy(c.block, &g, sizeof g);
    return ST_OK;
}

struct matmul_job {
    struct cpu_device *d;
    const struct matmul_args *a;
    int rows, cols; /* of a block */
    size_t across;  /* blocks side by side */
};

static void matmul_block(void *ctx, size_t block, int worker)
{
    const struct matmul_job *job = ctx;
    struct matmul_args p = *job->a;
    size_t row = block / job->across * (size_t)job->rows, col = block % job->across * (size_t)job->cols;
    p.a += p.a_transposed ? row : row * p.a_stride;
    p.b += p.b_transposed ? col * p.b_stride : col;
    p.c += row * p.c_stride + col;
    if (p.m - (int)row < job->rows)
        p.m -= (int)row;
    else
        p.m = job->rows;
    if (p.n - (int)col < job->cols)
        p.n -= (int)col;
    else
        p.n = job->cols;
    job->d->kernels->matmul(&p, cpu_grad_worker(job->d, worker));
}

/* All blocks of about one size, and their number a multiple of 4, so that a few threads end together. */
static int block_rows(int m)
{
    size_t blocks = cpu_chunks((size_t)m, CPU_MATMUL_ROWS);
    if (blocks > 1) blocks = size_round_up(blocks, 4);
    return (int)cpu_chunks((size_t)m, blocks);
}

void cpu_matmul(struct device *device, const struct matmul_args *a)
{
    struct cpu_device *d = cpu_device_of(device);
    if (a->m <= 0 || a->n <= 0) return;
    struct matmul_job job = {d, a, block_rows(a->m), CPU_MATMUL_COLS, 1};
    if ((double)a->m * a->n * a->k < CPU_MATMUL_SERIAL) {
        job.rows = a->m;
        job.cols = a->n;
    }
    job.across = cpu_chunks((size_t)a->n, (size_t)job.cols);
    cpu_run(d, job.across * cpu_chunks((size_t)a->m, (size_t)job.rows), matmul_block, &job);
}

/* Work on a long vector: fn(ctx, begin, count) once for each part of it. */
struct vector_job {
    struct cpu_device *d;
    size_t n, part;
    void (*fn)(const struct vector_job *job, size_t begin, size_t count);
    const void *args;
    double *sums; /* of each part, or NULL */
};

static void vector_part(void *ctx, size_t part, int worker)
{
    (void)worker;
    const struct vector_job *job = ctx;
    size_t begin = part * job->part, left = job->n - begin;
    job->fn(job, begin, left < job->part ? left : job->part);
}

static void vector_run(struct vector_job *job)
{
    if (!job->part) job->part = CPU_VECTOR_FLOATS;
    cpu_run(job->d, cpu_chunks(job->n, job->part), vector_part, job);
}

static void silu_mul_part(const struct vector_job *job, size_t begin, size_t count)
{
    const struct silu_mul_args *a = job->args;
    job->d->kernels->silu_mul(a->gate + begin, a->up + begin, count, a->y + begin);
}

static void grad_silu_mul(struct device *device, const struct silu_mul_args *a)
{
    vector_run(&(struct vector_job){.d = cpu_device_of(device), .n = a->n, .fn = silu_mul_part, .args = a});
}

static void silu_mul_backward_part(const struct vector_job *job, size_t begin, size_t count)
{
    const struct silu_mul_backward_args *a = job->args;
    job->d->kernels->silu_mul_backward(a->gate + begin, a->up + begin, a->d_y + begin, count,
                                       a->d_gate + begin, a->d_up + begin);
}

static void grad_silu_mul_backward(struct device *device, const struct silu_mul_backward_args *a)
{
    vector_run(
        &(struct vector_job){.d = cpu_device_of(device), .n = a->n, .fn = silu_mul_backward_part, .args = a});
}

static void adamw_part(const struct vector_job *job, size_t begin, size_t count)
{
    struct adamw_args a = *(const struct adamw_args *)job->args;
    a.n = count;
    a.value += begin;
    a.grad += begin;
    a.m += begin;
    a.v += begin;
    job->d->kernels->adamw(&a);
}

static void grad_adamw(struct device *device, const struct adamw_args *a)
{
    vector_run(&(struct vector_job){.d = cpu_device_of(device), .n = a->n, .fn = adamw_part, .args = a});
}

struct add_args {
    float *x;
    const float *y;
    float value;
};

static void fill_part(const struct vector_job *job, size_t begin, size_t count)
{
    const struct add_args *a = job->args;
    for (size_t i = 0; i < count; i++) a->x[begin + i] = a->value;
}

static void grad_fill(struct device *device, float *x, size_t n, float value)
{
    struct add_args a = {.x = x, .value = value};
    vector_run(&(struct vector_job){.d = cpu_device_of(device), .n = n, .fn = fill_part, .args = &a});
}

static void add_part(const struct vector_job *job, size_t begin, size_t count)
{
    const struct add_args *a = job->args;
    job->d->kernels->add(a->x + begin, a->y + begin, count);
}

static void grad_add(struct device *device, float *x, const float *y, size_t n)
{
    struct add_args a = {.x = x, .y = y};
    vector_run(&(struct vector_job){.d = cpu_device_of(device), .n = n, .fn = add_part, .args = &a});
}

static void sum_squares_part(const struct vector_job *job, size_t begin, size_t count)
{
    const float *x = job->args;
    job->sums[begin / job->part] = job->d->kernels->sum_squares(x + begin, count);
}

static void grad_sum_squares(struct device *device, const float *x, size_t n, float *out)
{
    double sums[CPU_SUM_PARTS_MAX], total = 0;
    size_t part = cpu_chunks(n, CPU_SUM_PARTS_MAX);
    if (part < CPU_VECTOR_FLOATS) part = CPU_VECTOR_FLOATS;
    vector_run(&(struct vector_job){cpu_device_of(device), n, part, sum_squares_part, x, sums});
    for (size_t i = 0; i < cpu_chunks(n, part); i++) total += sums[i];
    *out = (float)total;
}

void cpu_rows_run(struct cpu_device *d, int rows, size_t row_elems, const void *args, pool_fn fn)
{
    if (rows <= 0) return;
    struct grad_rows job = {d->kernels, d->grad, args, (size_t)rows, cpu_row_chunk(d, rows, row_elems, 1)};
    cpu_run(d, cpu_chunks(job.rows, job.chunk), fn, &job);
}

static void rmsnorm_backward_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct grad_rows *job = ctx;
    const struct rmsnorm_backward_args *a = job->args;
    for (size_t i = chunk * job->chunk; i < grad_rows_end(job, chunk); i++) {
        size_t at = (a->row ? (size_t)a->row[i] : i) * a->cols;
        job->kernels->rmsnorm_backward(a->x + at, a->weight, a->eps, a->cols, a->d_y + i * a->cols,
                                       a->d_x + at);
    }
}

static void grad_rmsnorm_backward(struct device *device, const struct rmsnorm_backward_args *a)
{
    cpu_rows_run(cpu_device_of(device), a->rows, a->cols, a, rmsnorm_backward_chunk);
}

static void cross_entropy_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct grad_rows *job = ctx;
    const struct cross_entropy_args *a = job->args;
    for (size_t i = chunk * job->chunk; i < grad_rows_end(job, chunk); i++) {
        float *x = a->logits + i * a->vocab, weight = a->weight ? a->weight[i] : 0;
        size_t target = (size_t)a->target[i];
        float wanted = x[target];
        a->logprob[i] = wanted - job->kernels->softmax(x, a->vocab, 1, weight, a->weight ? x : NULL);
        if (a->weight) x[target] -= weight;
    }
}

static void grad_cross_entropy(struct device *device, const struct cross_entropy_args *a)
{
    for (int i = 0; i < a->rows; i++) CHECK(a->target[i] >= 0 && (size_t)a->target[i] < a->vocab);
    cpu_rows_run(cpu_device_of(device), a->rows, a->vocab, a, cross_entropy_chunk);
}

const struct grad_ops cpu_grad_ops = {
    .weight_pack = cpu_grad_weight_pack,
    .reserve = grad_reserve,
    .matmul = cpu_matmul,
    .silu_mul = grad_silu_mul,
    .silu_mul_backward = grad_silu_mul_backward,
    .rmsnorm_backward = grad_rmsnorm_backward,
    .rope_backward = cpu_rope_backward,
    .attention_backward = cpu_attention_backward,
    .route = cpu_route,
    .route_backward = cpu_route_backward,
    .gate = cpu_gate,
    .gate_backward = cpu_gate_backward,
    .contrast = cpu_contrast,
    .cross_entropy = grad_cross_entropy,
    .adamw = grad_adamw,
    .fill = grad_fill,
    .add = grad_add,
    .sum_squares = grad_sum_squares,
};

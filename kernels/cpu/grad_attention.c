/* Backward passes of rotation and of attention over whole sequences. */
#include "kernels/cpu/grad_int.h"

#include <math.h>
#include <string.h>

/* R^T turns by the negative angle. Every layer and step turns by the same angles: tables stay. */
static void rope_tables(struct cpu_grad *g, const struct rope_backward_args *a)
{
    size_t half = a->rope_dims / 2;
    if (g->rope_dims == a->rope_dims && g->rope_magnitude == a->magnitude &&
        memcmp(g->rope_freq, a->inv_freq, half * sizeof(float)) == 0)
        return;
    g->rope_dims = a->rope_dims;
    g->rope_magnitude = a->magnitude;
    if (half) memcpy(g->rope_freq, a->inv_freq, half * sizeof(float));
    for (int position = 0; position < g->limits.seq_rows; position++)
        for (size_t i = 0; i < half; i++) {
            float angle = (float)position * a->inv_freq[i];
            g->rope_cos[(size_t)position * half + i] = cosf(angle) * a->magnitude;
            g->rope_sin[(size_t)position * half + i] = -sinf(angle) * a->magnitude;
        }
}

static void rope_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct grad_rows *job = ctx;
    const struct rope_backward_args *a = job->args;
    const struct cpu_grad *g = job->grad;
    size_t heads = (size_t)a->heads;
    for (size_t r = chunk * job->chunk; r < grad_rows_end(job, chunk); r++) {
        size_t at = (size_t)a->position[r] * (a->rope_dims / 2);
        for (size_t h = 0; h < heads; h++)
            job->kernels->rope(a->d_x + (r * heads + h) * a->head_dim, a->rope_dims, g->rope_cos + at,
                               g->rope_sin + at, a->adjacent_pairs);
    }
}

void cpu_rope_backward(struct device *device, const struct rope_backward_args *a)
{
    struct cpu_device *d = cpu_device_of(device);
    CHECK(a->rope_dims % 2 == 0 && a->rope_dims <= a->head_dim && a->head_dim <= d->grad->limits.head_dim);
    for (int r = 0; r < a->rows; r++) CHECK(a->position[r] >= 0 && a->position[r] < d->grad->limits.seq_rows);
    rope_tables(d->grad, a);
    cpu_rows_run(d, a->rows, (size_t)a->heads * a->head_dim, a, rope_chunk);
}

/* With S = scale Q K^T, P = softmax(S) and Y = P V of one head:
 *
 *     dV = P^T dY    dP = dY V^T    dS = P o (dP - rowsum(dY o Y))    dQ = scale dS K    dK = scale dS^T Q
 *
 * (FlashAttention, arXiv 2205.14135, appendix B). A unit is one head of one sequence, by strips of queries
 * with all the keys they see. Heads that share keys leave their parts of dK and dV side by side, to be added
 * after. */
struct attention_job {
    struct cpu_device *d;
    const struct attention_backward_args *a;
    size_t q_stride, kv_stride;
};

/* One strip: queries [first, first + count) of the sequence at row `start`, keys 0 .. first + count. */
struct strip {
    size_t start, first, count, keys;
    size_t head;
    float *p, *d_s; /* (count, keys) */
    float *scratch;
    float beta; /* of dK and dV: 0 in the first strip */
};

static void strip_probabilities(const struct attention_job *job, const struct strip *s)
{
    for (size_t i = 0; i < s->count; i++) {
        size_t seen = s->first + i + 1;
        float *p = s->p + i * s->keys;
        job->d->kernels->softmax(p, seen, 1, 1, p);
        memset(p + seen, 0, (s->keys - seen) * sizeof *p);
    }
}

/* In eight parts, which a compiler may compute side by side. */
static float dot(const float *x, const float *y, size_t n)
{
    float part[8] = {0}, sum = 0;
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (size_t j = 0; j < 8; j++) part[j] += x[i + j] * y[i + j];
    for (; i < n; i++) sum += x[i] * y[i];
    for (size_t j = 0; j < 8; j++) sum += part[j];
    return sum;
}

/* dS in place of dP */
static void strip_score_gradients(const struct attention_job *job, const struct strip *s)
{
    const struct attention_backward_args *a = job->a;
    for (size_t i = 0; i < s->count; i++) {
        size_t at = (s->start + s->first + i) * job->q_stride + s->head * a->head_dim;
        float p_d_p = dot(a->y + at, a->d_y + at, a->head_dim);
        const float *p = s->p + i * s->keys;
        float *d_s = s->d_s + i * s->keys;
        for (size_t t = 0; t < s->keys; t++) d_s[t] = p[t] * (d_s[t] - p_d_p);
    }
}

static void strip_run(const struct attention_job *job, const struct strip *s)
{
    const struct attention_backward_args *a = job->a;
    const struct cpu_kernels *kernels = job->d->kernels;
    const struct cpu_grad *g = job->d->grad;
    int count = (int)s->count, keys = (int)s->keys, dim = (int)a->head_dim;
    size_t kv_head = s->head / (size_t)(a->heads / a->kv_heads);
    size_t q_at = (s->start + s->first) * job->q_stride + s->head * a->head_dim;
    size_t kv_at = s->start * job->kv_stride + kv_head * a->head_dim;
    size_t part_at = s->start * job->q_stride + s->head * a->head_dim;

    /* P, then dP */
    struct matmul_args m = {count,         keys,           dim,      false, true, a->q + q_at, a->k + kv_at,
                            job->q_stride, job->kv_stride, a->scale, 0,     s->p, s->keys};
    kernels->matmul(&m, s->scratch);
    strip_probabilities(job, s);
    m.a = a->d_y + q_at;
    m.b = a->v + kv_at;
    m.alpha = 1;
    m.c = s->d_s;
    kernels->matmul(&m, s->scratch);
    strip_score_gradients(job, s);

    /* dQ */
    m = (struct matmul_args){count,  dim,           keys,         false,          false,
                             s->d_s, a->k + kv_at,  s->keys,      job->kv_stride, a->scale,
                             0,      a->d_q + q_at, job->q_stride};
    kernels->matmul(&m, s->scratch);

    /* dK, dV */
    m = (struct matmul_args){keys,         dim,     count,         true,     false,   s->d_s,
                             a->q + q_at,  s->keys, job->q_stride, a->scale, s->beta, g->head_d_k + part_at,
                             job->q_stride};
    kernels->matmul(&m, s->scratch);
    m.a = s->p;
    m.b = a->d_y + q_at;
    m.alpha = 1;
    m.c = g->head_d_v + part_at;
    kernels->matmul(&m, s->scratch);
}

static void attention_unit(void *ctx, size_t unit, int worker)
{
    const struct attention_job *job = ctx;
    size_t heads = (size_t)job->a->heads;
    const struct seq_rows *seq = &job->a->seqs[unit / heads];
    size_t rows = (size_t)seq->row_count;
    float *scratch = cpu_grad_worker(job->d, worker);
    struct strip s = {.start = (size_t)seq->first_row, .head = unit % heads, .scratch = scratch};
    s.p = scratch + CPU_MATMUL_FLOATS;

    /* The last strip sees every key: it comes first and overwrites. */
    for (size_t strips = cpu_chunks(rows, CPU_STRIP_ROWS), i = strips; i-- > 0;) {
        s.first = i * CPU_STRIP_ROWS;
        s.keys = i + 1 == strips ? rows : s.first + CPU_STRIP_ROWS;
        s.count = s.keys - s.first;
        s.d_s = s.p + s.count * s.keys;
        s.beta = i + 1 == strips ? 0 : 1;
        strip_run(job, &s);
    }
}

static void merge_heads(const struct attention_backward_args *a, size_t row, const float *part, float *sum)
{
    size_t kv_heads = (size_t)a->kv_heads, group = (size_t)a->heads / kv_heads, dim = a->head_dim;
    for (size_t h = 0; h < kv_heads; h++) {
        const float *from = part + (row * (size_t)a->heads + h * group) * dim;
        float *to = sum + (row * kv_heads + h) * dim;
        memcpy(to, from, dim * sizeof *to);
        for (size_t g = 1; g < group; g++)
            for (size_t i = 0; i < dim; i++) to[i] += from[g * dim + i];
    }
}

static void merge_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct grad_rows *job = ctx;
    const struct attention_backward_args *a = job->args;
    for (size_t r = chunk * job->chunk; r < grad_rows_end(job, chunk); r++) {
        merge_heads(a, r, job->grad->head_d_k, a->d_k);
        merge_heads(a, r, job->grad->head_d_v, a->d_v);
    }
}

void cpu_attention_backward(struct device *device, const struct attention_backward_args *a)
{
    struct cpu_device *d = cpu_device_of(device);
    const struct grad_limits *limits = &d->grad->limits;
    size_t q_stride = (size_t)a->heads * a->head_dim;
    CHECK(a->rows <= limits->rows && a->heads % a->kv_heads == 0 &&
          q_stride <= (size_t)limits->heads * limits->head_dim);
    for (int i = 0; i < a->seq_count; i++)
        CHECK(a->seqs[i].first_position == 0 && a->seqs[i].row_count <= limits->seq_rows);

    struct attention_job job = {d, a, q_stride, (size_t)a->kv_heads * a->head_dim};
    cpu_run(d, (size_t)a->seq_count * (size_t)a->heads, attention_unit, &job);
    cpu_rows_run(d, a->rows, q_stride, a, merge_chunk);
}

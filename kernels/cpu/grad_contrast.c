/* The contrastive loss between experts' outputs, in rank space.
 *
 * The output of pair a = (token, expert i) is o_a = Bt^T z_a, with z_a the token's (experts * rank) where all
 * but expert i's part is 0. With the Gram matrix G = Bt Bt^T and unit u_a = z_a / |o_a|, the cosine of two
 * pairs is s_ab = u_a^T G u_b. With D = dL/ds, the gradient of the unit output is sum_b (D + D^T)_ab o_b /
 * |o_b|, of which the part along o_a itself does nothing:
 *
 *     V = U G    dU = (D + D^T) U    dU_a -= (V_a . dU_a) U_a    dz_a = (dU G)_a / |o_a|    dBt = U^T dU Bt
 *
 * where U has a row for each pair. */
#include "kernels/cpu/grad_int.h"

#include <math.h>
#include <string.h>

struct contrast_job {
    struct cpu_device *d;
    const struct contrast_args *a;
    int pairs, width;                  /* width = experts * rank */
    int32_t of_expert[LR_EXPERTS_MAX]; /* pairs */
    int anchors;
};

static const float *pair_z(const struct contrast_job *job, int a)
{
    const struct cpu_grad *g = job->d->grad;
    return job->a->z + (size_t)g->pair_row[a] * (size_t)job->width +
           (size_t)(g->pair_expert[a] * job->a->rank);
}

/* |B_i z|, by the Gram matrix */
static float pair_norm(const struct contrast_job *job, int a)
{
    const struct cpu_grad *g = job->d->grad;
    size_t width = (size_t)job->width, rank = (size_t)job->a->rank, at = (size_t)g->pair_expert[a] * rank;
    const float *z = pair_z(job, a);
    double sum = 0;
    for (size_t i = 0; i < rank; i++)
        for (size_t j = 0; j < rank; j++) sum += (double)z[i] * z[j] * g->gram[(at + i) * width + at + j];
    return sum < 0 ? 0 : (float)sqrt(sum); /* below 0 by rounding; NaN stays, to show */
}

static void pairs_collect(struct contrast_job *job)
{
    const struct contrast_args *a = job->a;
    struct cpu_grad *g = job->d->grad;
    int seen = 0;
    for (int t = 0; t < a->count; t++)
        for (int i = 0; i < a->experts && seen < CONTRAST_PAIRS_MAX; i++) {
            if (a->g[(size_t)a->row[t] * (size_t)a->experts + (size_t)i] == 0) continue;
            seen++;
            int next = job->pairs;
            g->pair_row[next] = a->row[t];
            g->pair_expert[next] = i;
            g->pair_norm[next] = pair_norm(job, next);
            if (g->pair_norm[next] < CONTRAST_NORM_MIN) continue;
            job->of_expert[i]++;
            job->pairs++;
        }
    for (int i = 0; i < a->experts; i++)
        if (job->of_expert[i] > 1) job->anchors += job->of_expert[i];
}

/* Unit rows of U, each in its expert's part. */
static void pairs_normalise(const struct contrast_job *job)
{
    struct cpu_grad *g = job->d->grad;
    size_t width = (size_t)job->width, rank = (size_t)job->a->rank;
    memset(g->unit, 0, (size_t)job->pairs * width * sizeof(float));
    for (int a = 0; a < job->pairs; a++) {
        const float *z = pair_z(job, a);
        float *u = g->unit + (size_t)a * width + (size_t)g->pair_expert[a] * rank;
        for (size_t j = 0; j < rank; j++) u[j] = z[j] / g->pair_norm[a];
    }
}

/* C (m, n) = op(A) op(B) + beta C, of matrices without gaps between rows but C. */
static void product(const struct contrast_job *job, int m, int n, int k, const float *a, bool a_transposed,
                    const float *b, bool b_transposed, float beta, float *c)
{
    cpu_matmul(&job->d->base, &(struct matmul_args){
                                  .m = m,
                                  .n = n,
                                  .k = k,
                                  .a_transposed = a_transposed,
                                  .b_transposed = b_transposed,
                                  .a = a,
                                  .b = b,
                                  .a_stride = (size_t)(a_transposed ? m : k),
                                  .b_stride = (size_t)(b_transposed ? k : n),
                                  .alpha = 1,
                                  .beta = beta,
                                  .c = c,
                                  .c_stride = (size_t)n,
                              });
}

/* One anchor: its loss, and its row of cosines becomes a row of D. */
static void anchor_row(const struct contrast_job *job, int a)
{
    const struct cpu_grad *g = job->d->grad;
    float *s = g->cosine + (size_t)a * (size_t)job->pairs, temperature = job->a->temperature;
    int expert = g->pair_expert[a], positives = job->of_expert[expert] - 1;
    double near = 0, apart = 0;
    for (int b = 0; b < job->pairs; b++) {
        if (g->pair_expert[b] != expert)
            apart += s[b];
        else if (b != a)
            near += s[b];
    }
    g->pair_apart[a] = (float)apart;
    g->pair_near[a] = (float)near;
    g->pair_loss[a] = 0;
    if (positives == 0) {
        memset(s, 0, (size_t)job->pairs * sizeof *s);
        return;
    }
    s[a] = -INFINITY;
    float factor = job->a->weight / (temperature * (float)job->anchors);
    float total = job->d->kernels->softmax(s, (size_t)job->pairs, 1 / temperature, factor, s);
    g->pair_loss[a] = (float)(total - near / (positives * (double)temperature));
    s[a] = 0;
    for (int b = 0; b < job->pairs; b++)
        if (b != a && g->pair_expert[b] == expert) s[b] -= factor / (float)positives;
}

static void anchor_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct grad_rows *rows = ctx;
    for (size_t a = chunk * rows->chunk; a < grad_rows_end(rows, chunk); a++) anchor_row(rows->args, (int)a);
}

static void losses_sum(const struct contrast_job *job)
{
    const struct cpu_grad *g = job->d->grad;
    double loss = 0, apart = 0, apart_count = 0, near = 0, near_count = 0;
    for (int a = 0; a < job->pairs; a++) {
        loss += g->pair_loss[a];
        apart += g->pair_apart[a];
        apart_count += job->pairs - job->of_expert[g->pair_expert[a]];
        near += g->pair_near[a];
        near_count += job->of_expert[g->pair_expert[a]] - 1;
    }
    job->a->loss[0] = job->anchors ? (float)(loss / job->anchors) : 0;
    job->a->loss[1] = apart_count > 0 ? (float)(apart / apart_count) : 0;
    job->a->loss[2] = near_count > 0 ? (float)(near / near_count) : 0;
}

/* dU without what lies along each output itself, which does not turn it. */
static void project_out(const struct contrast_job *job)
{
    const struct cpu_grad *g = job->d->grad;
    size_t width = (size_t)job->width;
    for (int a = 0; a < job->pairs; a++) {
        const float *v = g->unit_gram + (size_t)a * width, *u = g->unit + (size_t)a * width;
        float *d_u = g->d_unit + (size_t)a * width;
        double along = 0;
        for (size_t j = 0; j < width; j++) along += (double)v[j] * d_u[j];
        for (size_t j = 0; j < width; j++) d_u[j] -= (float)along * u[j];
    }
}

static void gradients_add(const struct contrast_job *job)
{
    const struct contrast_args *a = job->a;
    struct cpu_grad *g = job->d->grad;
    int pairs = job->pairs, width = job->width;
    product(job, pairs, width, pairs, g->cosine, false, g->unit, false, 0, g->d_unit);
    product(job, pairs, width, pairs, g->cosine, true, g->unit, false, 1, g->d_unit);
    project_out(job);

    product(job, width, width, pairs, g->unit, true, g->d_unit, false, 0, g->mix);
    product(job, width, (int)a->d_out, width, g->mix, false, a->bt, false, 1, a->d_bt);
    product(job, pairs, width, width, g->d_unit, false, g->gram, false, 0, g->unit_gram);
    for (int i = 0; i < pairs; i++) {
        size_t part = (size_t)(g->pair_expert[i] * a->rank);
        float *d_z = a->d_z + (size_t)g->pair_row[i] * (size_t)width + part;
        const float *d = g->unit_gram + (size_t)i * (size_t)width + part;
        for (int j = 0; j < a->rank; j++) d_z[j] += d[j] / g->pair_norm[i];
    }
}

void cpu_contrast(struct device *device, const struct contrast_args *a)
{
    struct cpu_device *d = cpu_device_of(device);
    struct contrast_job job = {.d = d, .a = a, .width = a->experts * a->rank};
    CHECK(a->experts <= LR_EXPERTS_MAX && job.width <= d->grad->limits.experts_rank);
    struct cpu_grad *g = d->grad;
    product(&job, job.width, job.width, (int)a->d_out, a->bt, false, a->bt, true, 0, g->gram);
    pairs_collect(&job);
    pairs_normalise(&job);
    product(&job, job.pairs, job.width, job.width, g->unit, false, g->gram, false, 0, g->unit_gram);
    product(&job, job.pairs, job.pairs, job.width, g->unit_gram, false, g->unit, true, 0, g->cosine);
    cpu_rows_run(d, job.pairs, (size_t)job.pairs, &job, anchor_chunk);
    losses_sum(&job);
    if (a->d_z && job.anchors) gradients_add(&job);
}

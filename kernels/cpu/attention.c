/* Rotation, the cache's writing, and attention. */
#include "kernels/cpu/device_int.h"

#include <math.h>
#include <string.h>

static size_t page_stride(const struct kv_cache *c)
{
    return (size_t)c->kv_heads * KV_PAGE_TOKENS * (size_t)c->head_dim;
}

/* Elements from the cache's start to (layer, page 0, kv_head, 0, 0). */
static size_t head_offset(const struct kv_cache *c, int layer, int kv_head)
{
    return (size_t)layer * (size_t)c->pages * page_stride(c) +
           (size_t)kv_head * KV_PAGE_TOKENS * (size_t)c->head_dim;
}

struct rope_job {
    struct cpu_device *d;
    const struct rope_kv_args *a;
    size_t chunk;
};

/* Layers of a step rotate by the same angles, so a row's tables are made once and kept while its
 * position stays. */
static void rope_table(struct cpu_device *d, const struct rope_kv_args *a, int row, int32_t position)
{
    size_t half = a->rope_dims / 2;
    struct cpu_scratch *s = &d->scratch;
    if (s->rope_position[row] == position) return;
    for (size_t i = 0; i < half; i++) {
        float angle = (float)position * a->inv_freq[i];
        s->rope_cos[(size_t)row * half + i] = cosf(angle) * a->magnitude;
        s->rope_sin[(size_t)row * half + i] = sinf(angle) * a->magnitude;
    }
    s->rope_position[row] = position;
}

static void rope_forget_other_angles(struct cpu_device *d, const struct rope_kv_args *a)
{
    struct cpu_scratch *s = &d->scratch;
    size_t bytes = a->rope_dims / 2 * sizeof(float);
    if (d->rope_dims == a->rope_dims && d->rope_magnitude == a->magnitude &&
        memcmp(s->rope_freq, a->inv_freq, bytes) == 0)
        return;
    d->rope_dims = a->rope_dims;
    d->rope_magnitude = a->magnitude;
    memcpy(s->rope_freq, a->inv_freq, bytes);
    for (int r = 0; r < d->limits.rows; r++) s->rope_position[r] = -1;
}

static void rope_row(struct cpu_device *d, const struct rope_kv_args *a, int row, int32_t position,
                     int32_t page)
{
    const struct cpu_kernels *k = d->kernels;
    const struct kv_cache *c = a->cache;
    size_t dim = (size_t)c->head_dim, half = a->rope_dims / 2;
    rope_table(d, a, row, position);
    const float *cos = d->scratch.rope_cos + (size_t)row * half,
                *sin = d->scratch.rope_sin + (size_t)row * half;

    float *q = a->q + (size_t)row * (size_t)a->heads * dim;
    for (int h = 0; h < a->heads; h++)
        k->rope(q + (size_t)h * dim, a->rope_dims, cos, sin, a->adjacent_pairs);

    size_t token = (size_t)page * page_stride(c) + (size_t)(position % KV_PAGE_TOKENS) * dim;
    size_t elem = dtype_block_bytes(c->type);
    for (int h = 0; h < c->kv_heads; h++) {
        size_t at = (head_offset(c, a->layer, h) + token) * elem;
        size_t from = ((size_t)row * (size_t)c->kv_heads + (size_t)h) * dim;
        k->rope(a->k + from, a->rope_dims, cos, sin, a->adjacent_pairs);
        k->kv_store((char *)c->k + at, c->type, a->k + from, dim);
        k->kv_store((char *)c->v + at, c->type, a->v + from, dim);
    }
}

static void rope_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct rope_job *job = ctx;
    const struct rope_kv_args *a = job->a;
    int begin = (int)(chunk * job->chunk), end = begin + (int)job->chunk;
    for (int i = 0; i < a->seq_count; i++) {
        const struct seq_rows *s = &a->seqs[i];
        int from = s->first_row > begin ? s->first_row : begin;
        int to = s->first_row + s->row_count < end ? s->first_row + s->row_count : end;
        for (int row = from; row < to; row++) {
            int32_t position = s->first_position + row - s->first_row;
            rope_row(job->d, a, row, position, s->pages[position / KV_PAGE_TOKENS]);
        }
    }
}

void cpu_rope_kv(struct device *device, const struct rope_kv_args *a)
{
    struct cpu_device *d = cpu_device_of(device);
    size_t dim = (size_t)a->cache->head_dim;
    CHECK(a->rows >= 1 && a->rows <= d->limits.rows);
    CHECK(a->rope_dims % 2 == 0 && a->rope_dims <= dim && dim <= d->limits.cols);
    rope_forget_other_angles(d, a);
    size_t row_elems = (size_t)(a->heads + 2 * a->cache->kv_heads) * dim;
    struct rope_job job = {d, a, cpu_row_chunk(d, a->rows, row_elems, 1)};
    cpu_run(d, cpu_chunks((size_t)a->rows, job.chunk), rope_chunk, &job);
}

/* A unit of attention: up to `block` rows of one sequence against one kv head, for `heads_per_unit` of
 * the query heads that share it. */
struct attention_job {
    struct cpu_device *d;
    const struct attention_args *a;
    int group, heads_per_unit, splits; /* splits * heads_per_unit = group */
    int block;
};

static void attention_unit(void *ctx, size_t unit, int worker)
{
    const struct attention_job *job = ctx;
    const struct attention_args *a = job->a;
    const struct kv_cache *c = a->cache;
    const struct cpu_scratch *scratch = &job->d->scratch;

    size_t index = cpu_item_of_unit(scratch->first_unit, (size_t)a->seq_count, unit);
    const struct seq_rows *s = &a->seqs[index];
    size_t local = unit - scratch->first_unit[index], lanes = (size_t)c->kv_heads * (size_t)job->splits;
    int lane = (int)(local % lanes), first = (int)(local / lanes) * job->block;
    int count = s->row_count - first < job->block ? s->row_count - first : job->block;
    int kv_head = lane / job->splits;
    int head = kv_head * job->group + lane % job->splits * job->heads_per_unit;

    size_t dim = (size_t)c->head_dim, stride = (size_t)a->heads * dim;
    size_t at = (size_t)(s->first_row + first) * stride + (size_t)head * dim;
    size_t cache_at = head_offset(c, a->layer, kv_head) * dtype_block_bytes(c->type);
    job->d->kernels->attention(a->q + at, stride, a->y + at, stride, count, job->heads_per_unit, dim,
                               a->scale, s->first_position + first, s->pages, (const char *)c->k + cache_at,
                               (const char *)c->v + cache_at, c->type, page_stride(c),
                               scratch->attention + (size_t)worker * scratch->attention_floats);
}

static size_t plan_units(struct attention_job *job)
{
    const struct attention_args *a = job->a;
    size_t *first = job->d->scratch.first_unit, units = 0;
    for (int i = 0; i < a->seq_count; i++) {
        first[i] = units;
        units += cpu_chunks((size_t)a->seqs[i].row_count, (size_t)job->block) * (size_t)a->cache->kv_heads *
                 (size_t)job->splits;
    }
    first[a->seq_count] = units;
    return units;
}

void cpu_attention(struct device *device, const struct attention_args *a)
{
    struct cpu_device *d = cpu_device_of(device);
    const struct kv_cache *c = a->cache;
    CHECK(a->rows >= 1 && a->rows <= d->limits.rows && a->seq_count <= a->rows);
    CHECK(a->heads % c->kv_heads == 0 && (size_t)a->heads * (size_t)c->head_dim <= d->limits.cols);

    int group = a->heads / c->kv_heads, block = CPU_ATTENTION_ROWS;
    while (block > 1 &&
           cpu_attention_scratch(block, group, (size_t)c->head_dim) > d->scratch.attention_floats)
        block /= 2;
    struct attention_job job = {d, a, group, group, 1, block};
    size_t units = plan_units(&job);
    /* Too few to go round: the heads of a group part, and read the same keys from a shared cache. */
    if (units < 2 * (size_t)pool_size(d->pool)) {
        job.heads_per_unit = 1;
        job.splits = group;
        units = plan_units(&job);
    }
    cpu_run(d, units, attention_unit, &job);
}

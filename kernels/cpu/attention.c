/* Rotation, the cache's writing, and attention. */
#include "kernels/cpu/device_int.h"

#include <math.h>
#include <string.h>

static size_t page_stride(const struct kv_cache *c)
{
    return KV_PAGE_TOKENS * (size_t)c->head_dim;
}

/* Elements from the cache's start to (layer, kv_head, page 0, 0, 0). */
static size_t head_offset(const struct kv_cache *c, int layer, int kv_head)
{
    return ((size_t)layer * (size_t)c->kv_heads + (size_t)kv_head) * (size_t)c->pages * page_stride(c);
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

/* A lane is a kv head, or one of the query heads that share it; a block is up to `block` rows of one sequence. A unit
 * of work is a lane of a block, or one span of its positions where lanes are too few to go round: what those come to
 * stands in scratch.parts, unit by unit, until join_parts. */
struct attention_job {
    struct cpu_device *d;
    const struct attention_args *a;
    int heads_per_lane, lanes, block;
    bool apart;  /* spans are units of their own */
    size_t part; /* floats of one in scratch.parts */
};

/* A lane of a block. */
struct lane {
    const struct seq_rows *seq;
    int kv_head, head; /* head: the first of heads_per_lane */
    int first, count;  /* rows of the sequence */
};

/* The softmax of a lane's queries, as far as it has come. */
struct state {
    float *y;
    size_t y_stride;
    float *max, *sum;
};

static int span_count(const struct attention_job *job, const struct seq_rows *s)
{
    return job->apart ? (int)cpu_chunks((size_t)(s->first_position + s->row_count), CPU_ATTENTION_SPAN) : 1;
}

/* Lane number `index` of a sequence, blocks outermost. */
static struct lane lane_of(const struct attention_job *job, const struct seq_rows *s, size_t index)
{
    int lane = (int)(index % (size_t)job->lanes), first = (int)(index / (size_t)job->lanes) * job->block;
    int left = s->row_count - first, head = lane * job->heads_per_lane;
    return (struct lane){.seq = s,
                         .kv_head = head / (job->a->heads / job->a->cache->kv_heads),
                         .head = head,
                         .first = first,
                         .count = left < job->block ? left : job->block};
}

/* Where a lane's result goes. */
static struct state lane_output(const struct attention_job *job, const struct lane *l, float *max)
{
    size_t dim = (size_t)job->a->cache->head_dim, stride = (size_t)job->a->heads * dim;
    size_t at = (size_t)(l->seq->first_row + l->first) * stride + (size_t)l->head * dim;
    return (struct state){job->a->y + at, stride, max, max + l->count * job->heads_per_lane};
}

/* A state in scratch: (count, heads_per_lane, head_dim), then max and sum. */
static struct state state_at(const struct attention_job *job, const struct lane *l, float *data)
{
    size_t width = (size_t)job->heads_per_lane * (size_t)job->a->cache->head_dim;
    float *max = data + (size_t)l->count * width;
    return (struct state){data, width, max, max + l->count * job->heads_per_lane};
}

static void attend(const struct attention_job *job, const struct lane *l, int span, const struct state *out)
{
    const struct attention_args *a = job->a;
    const struct kv_cache *c = a->cache;
    size_t dim = (size_t)c->head_dim, stride = (size_t)a->heads * dim;
    size_t cache_at = head_offset(c, a->layer, l->kv_head) * dtype_block_bytes(c->type);
    struct cpu_attention_part part = {
        .row_count = l->count,
        .group = job->heads_per_lane,
        .first_position = l->seq->first_position + l->first,
        .begin = span * CPU_ATTENTION_SPAN,
        .end = (span + 1) * CPU_ATTENTION_SPAN,
        .head_dim = dim,
        .scale = a->scale,
        .q = a->q + (size_t)(l->seq->first_row + l->first) * stride + (size_t)l->head * dim,
        .q_stride = stride,
        .y = out->y,
        .y_stride = out->y_stride,
        .max = out->max,
        .sum = out->sum,
        .k = (const char *)c->k + cache_at,
        .v = (const char *)c->v + cache_at,
        .type = c->type,
        .page_stride = page_stride(c),
        .pages = l->seq->pages,
    };
    job->d->kernels->attention(&part);
}

/* The softmax over both's positions: each is brought to the larger maximum. */
static void join(const struct attention_job *job, const struct lane *l, const struct state *to,
                 const struct state *from)
{
    size_t dim = (size_t)job->a->cache->head_dim;
    for (int i = 0; i < l->count * job->heads_per_lane; i++) {
        if (from->sum[i] == 0) continue; /* it saw nothing */
        float max = to->max[i] > from->max[i] ? to->max[i] : from->max[i];
        float own = expf(to->max[i] - max), other = expf(from->max[i] - max);
        size_t row = (size_t)(i / job->heads_per_lane), head = (size_t)(i % job->heads_per_lane) * dim;
        float *y = to->y + row * to->y_stride + head;
        const float *more = from->y + row * from->y_stride + head;
        for (size_t d = 0; d < dim; d++) y[d] = y[d] * own + more[d] * other;
        to->max[i] = max;
        to->sum[i] = to->sum[i] * own + from->sum[i] * other;
    }
}

static void divide(const struct attention_job *job, const struct lane *l, const struct state *s)
{
    size_t dim = (size_t)job->a->cache->head_dim;
    for (int i = 0; i < l->count * job->heads_per_lane; i++) {
        float factor = 1 / s->sum[i];
        float *y = s->y + (size_t)(i / job->heads_per_lane) * s->y_stride + (size_t)(i % job->heads_per_lane) * dim;
        for (size_t d = 0; d < dim; d++) y[d] *= factor;
    }
}

static void attention_unit(void *ctx, size_t unit, int worker)
{
    const struct attention_job *job = ctx;
    const struct cpu_scratch *scratch = &job->d->scratch;
    size_t index = cpu_item_of_unit(scratch->first_unit, (size_t)job->a->seq_count, unit);
    const struct seq_rows *s = &job->a->seqs[index];
    size_t local = unit - scratch->first_unit[index], spans = (size_t)span_count(job, s);
    struct lane l = lane_of(job, s, local / spans);
    if (job->apart) {
        struct state part = state_at(job, &l, scratch->parts + unit * job->part);
        attend(job, &l, (int)(local % spans), &part);
        return;
    }
    float *own = scratch->attention + (size_t)worker * scratch->attention_floats;
    struct state out = lane_output(job, &l, own);
    struct state more = state_at(job, &l, own + 2 * l.count * job->heads_per_lane);
    int end = s->first_position + l.first + l.count;
    for (int span = 0; span * CPU_ATTENTION_SPAN < end; span++) {
        attend(job, &l, span, span == 0 ? &out : &more);
        if (span > 0) join(job, &l, &out, &more);
    }
    divide(job, &l, &out);
}

/* All lanes of one sequence. */
static void join_parts(void *ctx, size_t index, int worker)
{
    const struct attention_job *job = ctx;
    const struct cpu_scratch *scratch = &job->d->scratch;
    const struct seq_rows *s = &job->a->seqs[index];
    size_t spans = (size_t)span_count(job, s), dim = (size_t)job->a->cache->head_dim;
    float *own = scratch->attention + (size_t)worker * scratch->attention_floats;
    for (size_t unit = scratch->first_unit[index]; unit < scratch->first_unit[index + 1]; unit += spans) {
        struct lane l = lane_of(job, s, (unit - scratch->first_unit[index]) / spans);
        struct state out = lane_output(job, &l, own);
        for (size_t span = 0; span < spans; span++) {
            struct state part = state_at(job, &l, scratch->parts + (unit + span) * job->part);
            if (span > 0) {
                join(job, &l, &out, &part);
                continue;
            }
            size_t queries = (size_t)l.count * (size_t)job->heads_per_lane;
            memcpy(out.max, part.max, queries * sizeof *out.max);
            memcpy(out.sum, part.sum, queries * sizeof *out.sum);
            for (int r = 0; r < l.count; r++)
                memcpy(out.y + (size_t)r * out.y_stride, part.y + (size_t)r * part.y_stride,
                       (size_t)job->heads_per_lane * dim * sizeof *out.y);
        }
        divide(job, &l, &out);
    }
}

static size_t plan_units(struct attention_job *job)
{
    const struct attention_args *a = job->a;
    size_t *first = job->d->scratch.first_unit, units = 0;
    for (int i = 0; i < a->seq_count; i++) {
        first[i] = units;
        units += cpu_chunks((size_t)a->seqs[i].row_count, (size_t)job->block) * (size_t)job->lanes *
                 (size_t)span_count(job, &a->seqs[i]);
    }
    first[a->seq_count] = units;
    return units;
}

/* Floats of a lane of `rows` rows: its state and another's max and sum. */
static size_t lane_floats(const struct attention_job *job, int rows)
{
    return (size_t)rows * (size_t)job->heads_per_lane * ((size_t)job->a->cache->head_dim + 4);
}

/* Spans as units of their own, if there is room and any sequence has more than one; else the units there were. */
static size_t plan_apart(struct attention_job *job, size_t units)
{
    int rows = 1;
    for (int i = 0; i < job->a->seq_count; i++)
        if (job->a->seqs[i].row_count > rows) rows = job->a->seqs[i].row_count;
    job->part = lane_floats(job, rows < job->block ? rows : job->block);
    job->apart = true;
    size_t apart = plan_units(job);
    if (apart > units && apart <= job->d->scratch.parts_floats / job->part) return apart;
    job->apart = false;
    return plan_units(job);
}

void cpu_attention(struct device *device, const struct attention_args *a)
{
    struct cpu_device *d = cpu_device_of(device);
    const struct kv_cache *c = a->cache;
    CHECK(a->rows >= 1 && a->rows <= d->limits.rows && a->seq_count <= a->rows);
    CHECK(a->heads % c->kv_heads == 0 && (size_t)a->heads * (size_t)c->head_dim <= d->limits.cols);

    struct attention_job job = {
        .d = d, .a = a, .heads_per_lane = a->heads / c->kv_heads, .lanes = c->kv_heads, .block = CPU_ATTENTION_ROWS};
    while (job.block > 1 && lane_floats(&job, job.block) > d->scratch.attention_floats) job.block /= 2;
    size_t units = plan_units(&job), threads = (size_t)pool_size(d->pool);
    if (threads > 1 && units < 4 * threads) units = plan_apart(&job, units);
    /* Still too few: the heads of a group part, and read the same keys from a shared cache. */
    if (units < 2 * threads && !job.apart) {
        job.heads_per_lane = 1;
        job.lanes = a->heads;
        units = plan_units(&job);
    }
    cpu_run(d, units, attention_unit, &job);
    if (job.apart) cpu_run(d, (size_t)a->seq_count, join_parts, &job);
}

#include "training/batch.h"

#include "base/memory.h"
#include "training/random.h"

#include <math.h>
#include <string.h>

/* --- order --- */

/* Streams of one seed that have nothing to do with each other. */
static uint64_t stream_of(uint64_t seed, uint64_t stream) { return random_hash(random_hash(seed) + stream); }

static void shuffle(uint32_t *x, size_t n, uint64_t state)
{
    for (size_t i = n; i > 1; i--) {
        size_t k = (size_t)(((unsigned __int128)random_next(&state) * i) >> 64);
        uint32_t t = x[i - 1];
        x[i - 1] = x[k];
        x[k] = t;
    }
}

#define STREAM_HELD_OUT UINT64_MAX /* the others are epochs */
#define HELD_OUT_FROM   10         /* examples */
#define HELD_OUT_MAX    1000       /* more judge no better, and take their time */

static size_t held_count_of(size_t examples, double share)
{
    if (share == 0 || examples < HELD_OUT_FROM) return 0;
    size_t n = (size_t)llround((double)examples * share);
    return n == 0 ? 1 : n < HELD_OUT_MAX ? n : HELD_OUT_MAX;
}

/* Puts the examples into train and held, each in the order of the data. */
static enum status split(struct batch_plan *p, double share)
{
    size_t n = p->data->example_count;
    p->held_count = held_count_of(n, share);
    p->train_count = n - p->held_count;
    uint32_t *all = memory_zalloc(n, sizeof *all);
    bool *held = memory_zalloc(n, sizeof *held);
    enum status st = all && held ? ST_OK : ST_NOMEM;
    for (size_t i = 0; !st && i < n; i++) all[i] = (uint32_t)i;
    if (!st) shuffle(all, n, stream_of(p->seed, STREAM_HELD_OUT));
    for (size_t i = 0; !st && i < p->held_count; i++) held[all[i]] = true;
    size_t t = 0, h = 0;
    for (size_t i = 0; !st && i < n; i++) {
        if (held[i])
            p->held[h++] = (uint32_t)i;
        else
            p->train[t++] = (uint32_t)i;
    }
    memory_free(all);
    memory_free(held);
    return st;
}

size_t batch_fit(const struct dataset *d, const uint32_t *examples, size_t count, size_t at,
                 int64_t batch_tokens)
{
    size_t n = 1;
    int64_t rows = d->example[examples[at]].rows;
    while (at + n < count && (rows += d->example[examples[at + n]].rows) <= batch_tokens) n++;
    return n;
}

static void plan_epoch(struct batch_plan *p, int64_t epoch, int64_t first_step)
{
    size_t n = 0;
    p->epoch = epoch;
    p->first_step = first_step;
    memcpy(p->order, p->train, p->train_count * sizeof *p->order);
    shuffle(p->order, p->train_count, stream_of(p->seed, (uint64_t)epoch));
    for (size_t at = 0; at < p->train_count;) {
        p->batch_start[n++] = at;
        at += batch_fit(p->data, p->order, p->train_count, at, p->batch_tokens);
    }
    p->batch_start[n] = p->train_count;
    p->batch_count = n;
}

enum status batch_plan_init(struct batch_plan *p, const struct dataset *d, uint64_t seed, double held_out,
                            int64_t batch_tokens)
{
    size_t n = d->example_count;
    *p = (struct batch_plan){.data = d, .seed = seed, .batch_tokens = batch_tokens};
    p->train = memory_zalloc(n, sizeof *p->train);
    p->held = memory_zalloc(n, sizeof *p->held);
    p->order = memory_zalloc(n, sizeof *p->order);
    p->batch_start = memory_zalloc(n + 1, sizeof *p->batch_start);
    enum status st = p->train && p->held && p->order && p->batch_start ? split(p, held_out) : ST_NOMEM;
    if (st)
        batch_plan_release(p);
    else
        plan_epoch(p, 0, 0);
    return st;
}

void batch_plan_release(struct batch_plan *p)
{
    memory_free(p->train);
    memory_free(p->held);
    memory_free(p->order);
    memory_free(p->batch_start);
    *p = (struct batch_plan){0};
}

int64_t batch_plan_steps(struct batch_plan *p, double epochs)
{
    int64_t steps = 0, whole = (int64_t)floor(epochs);
    for (int64_t e = 0; e < whole; e++) {
        plan_epoch(p, e, steps);
        steps += (int64_t)p->batch_count;
    }
    plan_epoch(p, whole, steps);
    return steps + (int64_t)ceil((epochs - (double)whole) * (double)p->batch_count);
}

const uint32_t *batch_plan_step(struct batch_plan *p, int64_t step, size_t *count_out, double *epoch_out)
{
    if (step < p->first_step) plan_epoch(p, 0, 0);
    while (step >= p->first_step + (int64_t)p->batch_count)
        plan_epoch(p, p->epoch + 1, p->first_step + (int64_t)p->batch_count);
    size_t i = (size_t)(step - p->first_step);
    *count_out = p->batch_start[i + 1] - p->batch_start[i];
    *epoch_out = (double)p->epoch + (double)(i + 1) / (double)p->batch_count;
    return p->order + p->batch_start[i];
}

/* --- rows --- */

void train_batch_release(struct train_batch *b)
{
    memory_free(b->first_row);
    memory_free(b->token);
    memory_free(b->target);
    memory_free(b->weight);
    memory_free(b->logprob);
    memory_free(b->old);
    *b = (struct train_batch){0};
}

enum status train_batch_reserve(struct train_batch *b, int rows, int sequences)
{
    if (rows <= b->rows_max && sequences <= b->seq_max) return ST_OK;
    struct train_batch n = {.rows_max = rows > b->rows_max ? rows : b->rows_max,
                            .seq_max = sequences > b->seq_max ? sequences : b->seq_max};
    size_t count = (size_t)n.rows_max;
    n.first_row = memory_zalloc((size_t)n.seq_max + 1, sizeof *n.first_row);
    n.token = memory_zalloc(count, sizeof *n.token);
    n.target = memory_zalloc(count, sizeof *n.target);
    n.weight = memory_zalloc(count, sizeof *n.weight);
    n.logprob = memory_zalloc(count, sizeof *n.logprob);
    n.old = memory_zalloc(count, sizeof *n.old);
    if (!n.first_row || !n.token || !n.target || !n.weight || !n.logprob || !n.old) {
        train_batch_release(&n);
        return ST_NOMEM;
    }
    n.pass = (struct pass_batch){
        .first_row = n.first_row, .token = n.token, .target = n.target, .weight = n.weight};
    train_batch_release(b);
    *b = n;
    return ST_OK;
}

/* Row r predicts token r + 1 of its sequence, so what the data says of a token stands one row before it; the last token
 * predicts nothing and has no row. */
static void fill_sequence(struct train_batch *b, const struct dataset *d, const struct dataset_sequence *s,
                          int row)
{
    size_t rows = (size_t)s->count - 1;
    const int32_t *token = d->token + s->first;
    memcpy(b->token + row, token, rows * sizeof *token);
    memcpy(b->target + row, token + 1, rows * sizeof *token);
    memset(b->old + row, 0, rows * sizeof *b->old);
    if (d->old_count) memcpy(b->old + row, d->old + s->first_old + 1, rows * sizeof *b->old);
    dataset_weights(d, s, b->weight + row); /* one more than rows */
    memmove(b->weight + row, b->weight + row + 1, rows * sizeof *b->weight);
    for (size_t r = 0; r < rows; r++) b->weight_sum += b->weight[(size_t)row + r];
}

enum status train_batch_fill(struct train_batch *b, const struct dataset *d, const uint32_t *examples,
                             size_t count)
{
    int rows = 0, each = d->sequences_each, seqs = (int)count * each;
    for (size_t i = 0; i < count; i++) rows += d->example[examples[i]].rows;
    enum status st = train_batch_reserve(b, rows, seqs);
    if (st) return st;
    b->weight_sum = 0;
    b->tokens = rows;
    b->pass.rows = rows - seqs;
    b->pass.seq_count = seqs;
    int row = 0;
    for (int i = 0; i < seqs; i++) {
        const struct dataset_example *e = &d->example[examples[i / each]];
        const struct dataset_sequence *s = &d->sequence[e->first_sequence + (size_t)(i % each)];
        b->first_row[i] = row;
        fill_sequence(b, d, s, row);
        row += s->count - 1;
    }
    b->first_row[seqs] = row;
    return ST_OK;
}

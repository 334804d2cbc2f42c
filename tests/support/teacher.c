#include "tests/support/teacher.h"

#include <stdlib.h>
#include <string.h>

#define LOGIT_ROWS \
    64 /* of one forward_logits, so that a large vocabulary needs no more memory than it must */

enum status teacher_open(const char *model_path, struct device *device, int tokens_max, enum dtype kv_type,
                         struct teacher *out, struct error *err)
{
    return teacher_open_as(&(struct model_config){.path = model_path, .device = device}, tokens_max, kv_type, out,
                           err);
}

enum status teacher_open_as(const struct model_config *model, int tokens_max, enum dtype kv_type,
                            struct teacher *out, struct error *err)
{
    struct teacher t = {.tokens_max = tokens_max};
    int pages = (tokens_max + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    struct forward_config config = {.rows = tokens_max,
                                    .logit_rows = LOGIT_ROWS,
                                    .lr_width = 4096,
                                    .kv_type = kv_type,
                                    .kv_pages = pages};
    t.pages = malloc((size_t)pages * sizeof *t.pages);
    t.rows = malloc((size_t)tokens_max * sizeof *t.rows);
    t.tokens = malloc((size_t)tokens_max * sizeof *t.tokens);
    enum status st = t.pages && t.rows && t.tokens ? ST_OK : ST_NOMEM;
    if (!st) st = model_open(model, &t.model, err);
    if (!st) st = forward_open(t.model, &config, &t.forward, err);
    if (st) {
        teacher_close(&t);
        return st;
    }
    /* Backwards, so that nothing depends on pages being neighbours. */
    for (int i = 0; i < pages; i++) t.pages[i] = pages - 1 - i;
    *out = t;
    return ST_OK;
}

void teacher_close(struct teacher *t)
{
    forward_close(t->forward);
    model_close(t->model);
    free(t->pages);
    free(t->rows);
    free(t->tokens);
    *t = (struct teacher){0};
}

static void base_row(const void *model, int layer, enum projection p, size_t row, float *out)
{
    model_weight_row(model, layer, p, row, out);
}

struct adapter_base adapter_base_of(const struct model *m)
{
    const struct model_shape *s = &m->shape;
    struct adapter_base base = {.layers = s->layers,
                                .heads = s->heads,
                                .kv_heads = s->kv_heads,
                                .head_dim = s->head_dim,
                                .qk_permuted = s->qk_permuted,
                                .rank_max = LR_RANK_MAX,
                                .experts_max = LR_EXPERTS_MAX,
                                .row = base_row,
                                .model = m};
    for (int p = 0; p < PROJ_COUNT; p++)
        model_shape_projection(s, (enum projection)p, &base.d_in[p], &base.d_out[p]);
    return base;
}

/* One step's batch, and which rows of it are whose. */
struct step {
    struct batch batch;
    struct seq_rows seqs[LESSONS_MAX];
    struct lr_segment segments[LESSONS_MAX];
    int lesson[LESSONS_MAX]; /* of each sequence */
};

/* The lessons' rows at positions [at, at + chunk). */
static void step_build(struct teacher *t, struct step *s, const struct lesson *lessons, int count, int at,
                       int chunk)
{
    struct batch *b = &s->batch;
    *b = (struct batch){.tokens = t->tokens, .seqs = s->seqs, .segments = s->segments};
    int pages = 0;
    for (int i = 0; i < count; i++) {
        const struct lesson *l = &lessons[i];
        const int32_t *own_pages = t->pages + pages;
        pages += (l->count + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
        CHECK(pages * KV_PAGE_TOKENS < t->tokens_max + KV_PAGE_TOKENS);
        if (at >= l->count) continue;

        int rows = l->count - at < chunk ? l->count - at : chunk;
        memcpy(t->tokens + b->rows, l->tokens + at, (size_t)rows * sizeof *l->tokens);
        s->lesson[b->seq_count] = i;
        s->seqs[b->seq_count++] = (struct seq_rows){
            .first_row = b->rows, .row_count = rows, .first_position = at, .pages = own_pages};
        if (l->member_count > 0)
            s->segments[b->segment_count++] = (struct lr_segment){.first_row = b->rows,
                                                                  .row_count = rows,
                                                                  .member_count = l->member_count,
                                                                  .members = l->members};
        b->rows += rows;
    }
}

/* The rows whose logits somebody wants, into t->rows; returns their number. */
static int rows_wanted(struct teacher *t, const struct step *s, const struct lesson *lessons)
{
    int wanted = 0;
    for (int q = 0; q < s->batch.seq_count; q++) {
        const struct seq_rows *seq = &s->seqs[q];
        for (int r = 0; r < seq->row_count; r++)
            if (seq->first_position + r >= lessons[s->lesson[q]].first)
                t->rows[wanted++] = seq->first_row + r;
    }
    return wanted;
}

static void give(const struct step *s, int row, const float *logits, teacher_sink sink, void *ctx)
{
    int q = 0;
    while (row >= s->seqs[q].first_row + s->seqs[q].row_count) q++;
    sink(ctx, s->lesson[q], s->seqs[q].first_position + row - s->seqs[q].first_row, logits);
}

enum status teacher_run_all(struct teacher *t, const struct lesson *lessons, int count, int chunk,
                            teacher_sink sink, void *ctx)
{
    CHECK(count <= LESSONS_MAX && chunk > 0);
    size_t vocab = t->model->shape.vocab;
    struct step s;
    for (int at = 0;; at += chunk) {
        step_build(t, &s, lessons, count, at, chunk);
        if (s.batch.rows == 0) return ST_OK;
        forward_run(t->forward, &s.batch);
        int wanted = rows_wanted(t, &s, lessons);
        for (int i = 0; i < wanted; i += LOGIT_ROWS) {
            int n = wanted - i < LOGIT_ROWS ? wanted - i : LOGIT_ROWS;
            const float *logits;
            enum status st = forward_logits(t->forward, n, t->rows + i, &logits);
            if (st) return st;
            for (int r = 0; r < n; r++) give(&s, t->rows[i + r], logits + (size_t)r * vocab, sink, ctx);
        }
        enum status st = forward_sync(t->forward);
        if (st) return st;
    }
}

struct copy {
    float *logits;
    size_t vocab;
};

static void copy_logits(void *ctx, int lesson, int position, const float *logits)
{
    (void)lesson;
    struct copy *c = ctx;
    memcpy(c->logits + (size_t)position * c->vocab, logits, c->vocab * sizeof *logits);
}

enum status teacher_run(struct teacher *t, const int32_t *tokens, int count, int chunk,
                        const struct lr_member *members, int member_count, float *logits)
{
    struct lesson lesson = {
        .tokens = tokens, .count = count, .members = members, .member_count = member_count};
    struct copy copy = {logits, t->model->shape.vocab};
    return teacher_run_all(t, &lesson, 1, chunk, copy_logits, &copy);
}

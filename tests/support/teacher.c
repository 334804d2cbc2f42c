#include "tests/support/teacher.h"

#include <stdlib.h>
#include <string.h>

enum status teacher_open(const char *model_path, struct device *device, int tokens_max,
                         enum dtype kv_type, struct teacher *out, struct error *err)
{
    struct teacher t = {.tokens_max = tokens_max};
    int pages = (tokens_max + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    struct forward_config config = {.rows = tokens_max, .logit_rows = tokens_max, .lr_width = 4096,
                                    .kv_type = kv_type, .kv_pages = pages};
    t.pages = malloc((size_t)pages * sizeof *t.pages);
    t.rows = malloc((size_t)tokens_max * sizeof *t.rows);
    enum status st = t.pages && t.rows ? ST_OK : ST_NOMEM;
    if (!st) st = model_open(model_path, device, NULL, NULL, &t.model, err);
    if (!st) st = forward_open(t.model, &config, &t.forward, err);
    if (st) {
        teacher_close(&t);
        return st;
    }
    /* Backwards, so that nothing depends on pages being neighbours. */
    for (int i = 0; i < pages; i++) t.pages[i] = pages - 1 - i;
    for (int i = 0; i < tokens_max; i++) t.rows[i] = i;
    *out = t;
    return ST_OK;
}

void teacher_close(struct teacher *t)
{
    forward_close(t->forward);
    model_close(t->model);
    free(t->pages);
    free(t->rows);
    *t = (struct teacher){0};
}

enum status teacher_run(struct teacher *t, const int32_t *tokens, int count, int chunk,
                        const struct lr_member *members, int member_count, float *logits)
{
    CHECK(count <= t->tokens_max && chunk > 0);
    size_t vocab = t->model->shape.vocab;
    for (int at = 0; at < count; at += chunk) {
        int rows = count - at < chunk ? count - at : chunk;
        struct seq_rows seq = {.row_count = rows, .first_position = at, .pages = t->pages};
        struct lr_segment segment = {.row_count = rows, .member_count = member_count,
                                     .members = members};
        struct batch b = {.rows = rows, .tokens = tokens + at, .seq_count = 1, .seqs = &seq,
                          .segment_count = member_count > 0, .segments = &segment};
        forward_run(t->forward, &b);
        const float *got = forward_logits(t->forward, rows, t->rows);
        enum status st = forward_sync(t->forward);
        if (st) return st;
        memcpy(logits + (size_t)at * vocab, got, (size_t)rows * vocab * sizeof *logits);
    }
    return ST_OK;
}

/* The head and L_ce, a few rows at a time. */
#include "training/pass_int.h"

/* head_normed = W_head^T logits, block by block of the vocabulary. */
static void product_backward(struct pass *p, int rows)
{
    const struct transposed *t = p->transposed;
    for (size_t i = 0; i < t->block_count; i++) {
        struct site_group_args args = {
            .rows = rows,
            .x = p->logits + i * t->block_rows,
            .x_stride = p->model->shape.vocab,
            .site_count = 1,
            .site = {{.weight = t->head[i].weight, .y = p->head_normed, .y_stride = p->model->shape.embed}},
            .epilogue = i == 0 ? EPILOGUE_STORE : EPILOGUE_ADD,
        };
        if (pass_ready(p)) p->ops->site_group(p->device, &args);
    }
}

static void rows_backward(struct pass *p, int rows, const int32_t *row)
{
    product_backward(p, rows);
    struct rmsnorm_backward_args norm = {.rows = rows, .row = row, .cols = p->model->shape.embed, .x = layer_input(p, p->model->shape.layers),
                                         .weight = p->model->output_norm, .eps = p->model->rms_eps,
                                         .d_y = p->head_normed, .d_x = p->d_x};
    if (pass_ready(p)) p->grad->rmsnorm_backward(p->device, &norm);
}

/* Scored rows row[0 .. rows). */
static void rows_run(struct pass *p, int rows, const int32_t *row)
{
    const struct model *m = p->model;
    int32_t target[HEAD_ROWS];
    float weight[HEAD_ROWS], logprob[HEAD_ROWS];
    for (int i = 0; i < rows; i++) {
        target[i] = p->batch->target[row[i]];
        weight[i] = p->batch->weight[row[i]];
    }
    struct logits_args logits = {.count = rows, .row = row, .x = layer_input(p, p->model->shape.layers), .x_stride = m->shape.embed,
                                 .norm_weight = m->output_norm, .eps = m->rms_eps, .head = m->head,
                                 .y = p->logits};
    if (pass_ready(p)) p->ops->logits(p->device, &logits);
    struct cross_entropy_args ce = {.rows = rows, .vocab = m->shape.vocab, .logits = p->logits,
                                    .target = target, .weight = p->backward ? weight : NULL,
                                    .logprob = p->logprob};
    if (!pass_ready(p)) return;
    p->grad->cross_entropy(p->device, &ce);
    p->ops->read(p->device, logprob, p->logprob, (size_t)rows * sizeof *logprob);
    for (int i = 0; i < rows; i++) {
        p->logprob_host[row[i]] = logprob[i];
        p->ce -= (double)weight[i] * (double)logprob[i];
    }
    if (p->backward) rows_backward(p, rows, row);
}

void head_run(struct pass *p)
{
    if (p->backward && pass_ready(p))
        p->grad->fill(p->device, p->d_x, (size_t)p->batch->rows * p->model->shape.embed, 0);
    int rows = p->tile_rows < HEAD_ROWS ? p->tile_rows : HEAD_ROWS; /* of an op at most */
    for (int at = 0; at < p->scored_count; at += rows) {
        int left = p->scored_count - at;
        rows_run(p, left < rows ? left : rows, p->scored + at);
    }
}

/* The frozen weights once more, transposed: dx = W^T dy is then a forward product.
 *
 * Weights in F32 and BF16 keep their type and every bit. Others, which are coarse themselves, go through the device's
 * product for gradients, whose rounding is far below theirs (grad.h).
 * The head, with its many outputs, is cut into blocks no wider than the layers' products, so that a device needs no
 * scratch for rows of the vocabulary's width. */
#include "training/transposed.h"

#include "base/memory.h"
#include "engine/engine.h"

#include <stdlib.h>

/* Rows that are decoded together: what they fill of a transposed row is a cache line or two. */
#define DECODE_ROWS 32

static bool is_exact(enum dtype file) { return file == DTYPE_F32 || file == DTYPE_BF16; }

static void store(enum dtype type, float v, void *data, size_t i)
{
    if (type == DTYPE_F32)
        ((float *)data)[i] = v;
    else
        ((uint16_t *)data)[i] = f32_to_bf16(v);
}

/* Which rows of which matrix. */
struct source {
    const struct model *model;
    int layer; /* -1: the head */
    enum projection projection;
    size_t first, rows, cols;
};

static void source_row(const struct source *s, size_t row, float *out)
{
    if (s->layer < 0)
        model_head_row(s->model, s->first + row, out);
    else
        model_weight_row(s->model, s->layer, s->projection, s->first + row, out);
}

/* One matrix being transposed, by blocks of DECODE_ROWS of its rows. */
struct filling {
    const struct source *source;
    enum dtype type;
    float *decoded; /* (workers, DECODE_ROWS, cols) */
    void *out;      /* (cols, rows) of `type` */
};

static void block_fill(void *ctx, size_t block, int worker)
{
    const struct filling *f = ctx;
    const struct source *s = f->source;
    size_t at = block * DECODE_ROWS, n = s->rows - at < DECODE_ROWS ? s->rows - at : DECODE_ROWS;
    float *decoded = f->decoded + (size_t)worker * DECODE_ROWS * s->cols;
    for (size_t i = 0; i < n; i++) source_row(s, at + i, decoded + i * s->cols);
    for (size_t c = 0; c < s->cols; c++)
        for (size_t i = 0; i < n; i++) store(f->type, decoded[i * s->cols + c], f->out, c * s->rows + at + i);
}

/* On all threads, while the device is ours. */
static enum status fill(struct transposed *t, const struct source *s, enum dtype type, void *out)
{
    struct device *d = t->model->device;
    size_t floats = size_mul((size_t)d->host_threads * DECODE_ROWS, s->cols);
    struct filling f = {s, type, memory_alloc(size_mul(floats, sizeof(float))), out};
    if (!f.decoded) return ST_NOMEM;
    d->ops->host_run(d, (s->rows + DECODE_ROWS - 1) / DECODE_ROWS, block_fill, &f);
    memory_free(f.decoded);
    return engine_turn_continue(t->turn);
}

static enum status weight_make(struct transposed *t, const struct source *s, enum dtype file_type,
                               struct transposed_weight *out)
{
    struct device *d = t->model->device;
    enum dtype type = is_exact(file_type) ? file_type : DTYPE_F32;
    size_t bytes = size_mul(size_mul(s->rows, s->cols), dtype_block_bytes(type));
    out->data = memory_alloc(bytes);
    if (!out->data) return ST_NOMEM;
    enum status st = fill(t, s, type, out->data);
    struct matrix m = {.type = type, .rows = s->cols, .cols = s->rows, .data = out->data};
    if (!st) st = is_exact(file_type) ? d->ops->weight_pack(d, &m, &out->weight) : d->grad->weight_pack(d, &m, &out->weight);
    if (st) return st;
    t->bytes += out->weight->bytes ? out->weight->bytes : bytes;
    if (out->weight->bytes) { /* otherwise the device uses the matrix in place */
        memory_free(out->data);
        out->data = NULL;
    }
    return ST_OK;
}

static enum status layer_make(struct transposed *t, int layer)
{
    for (int p = 0; p < PROJ_COUNT; p++) {
        const struct weight *w = t->model->layers[layer].projection[p];
        struct source s = {t->model, layer, (enum projection)p, 0, w->rows, w->cols};
        enum status st = weight_make(t, &s, w->type, &t->layer[layer * PROJ_COUNT + p]);
        if (st) return st;
    }
    return ST_OK;
}

static enum status head_make(struct transposed *t)
{
    const struct weight *w = t->model->head;
    t->block_rows = t->model->shape.ffn;
    t->block_count = (w->rows + t->block_rows - 1) / t->block_rows;
    t->head = calloc(t->block_count, sizeof *t->head);
    enum status st = t->head ? ST_OK : ST_NOMEM;
    for (size_t i = 0; i < t->block_count && !st; i++) {
        size_t first = i * t->block_rows, left = w->rows - first;
        struct source s = {t->model, -1, PROJ_Q, first, left < t->block_rows ? left : t->block_rows, w->cols};
        st = weight_make(t, &s, w->type, &t->head[i]);
    }
    return st;
}

static enum status weights_make(struct transposed *t)
{
    enum status st = engine_turn_begin(t->turn);
    if (st) return st;
    for (int l = 0; l < t->model->shape.layers && !st; l++) st = layer_make(t, l);
    if (!st) st = head_make(t);
    if (st != ST_DEVICE) engine_turn_end(t->turn);
    return st;
}

enum status transposed_open(struct engine *e, struct transposed **out, struct error *err)
{
    struct transposed *t = calloc(1, sizeof *t);
    if (!t) return error_set(err, ST_NOMEM, "out of memory");
    t->model = engine_model(e);
    t->layer = calloc((size_t)t->model->shape.layers * PROJ_COUNT, sizeof *t->layer);
    enum status st = t->layer ? engine_turn_open(e, &t->turn) : ST_NOMEM;
    if (!st) st = weights_make(t);
    if (st) {
        const char *device = t->model->device->name;
        transposed_close(t);
        return error_set(err, st, "%s: the transposed weights that training needs: %s", device, status_text(st));
    }
    *out = t;
    return ST_OK;
}

static void weight_release(struct transposed *t, struct transposed_weight *w)
{
    if (w->weight) t->model->device->ops->weight_free(t->model->device, w->weight);
    memory_free(w->data);
}

void transposed_close(struct transposed *t)
{
    if (!t) return;
    for (int i = 0; t->layer && i < t->model->shape.layers * PROJ_COUNT; i++) weight_release(t, &t->layer[i]);
    for (size_t i = 0; t->head && i < t->block_count; i++) weight_release(t, &t->head[i]);
    free(t->layer);
    free(t->head);
    engine_turn_close(t->turn);
    free(t);
}

size_t transposed_bytes(const struct transposed *t) { return t->bytes; }

#include "engine/forward.h"

#include "base/memory.h"

#include <math.h>
#include <stdlib.h>

/* The arguments of one layer's ops, kept apart for each layer because a device may read them
 * until the next sync. */
struct layer_ops {
    struct rmsnorm_args attn_norm;
    struct site_group_args qkv;
    struct rope_kv_args rope_kv;
    struct attention_args attention;
    struct site_group_args o;
    struct rmsnorm_args ffn_norm;
    struct site_group_args gate_up;
    struct site_group_args down;
};

struct forward {
    const struct model *model;
    struct device *device;
    struct forward_config config;
    struct kv_cache cache;

    /* Activations, device memory. */
    float *x;         /* (rows, embed): the residual stream */
    float *normed;    /* (rows, embed) */
    float *q;         /* (rows, heads * head_dim) */
    float *k, *v;     /* (rows, kv_heads * head_dim) */
    float *attended;  /* (rows, heads * head_dim) */
    float *activated; /* (rows, ffn) */
    float *logits;    /* (logit_rows, vocab) */
    float *logits_host;

    struct layer_ops *layers;
    struct logits_args head;
};

/* --- arguments --------------------------------------------------------------------------------- */

static struct rmsnorm_args norm_args(const struct forward *f, const float *weight)
{
    return (struct rmsnorm_args){.cols = f->model->shape.embed,
                                 .x = f->x,
                                 .weight = weight,
                                 .eps = f->model->rms_eps,
                                 .y = f->normed};
}

/* y has the stride of its own width; NULL where the epilogue leaves a site without output. */
static void site_add(const struct forward *f, struct site_group_args *a, enum projection p, float *y)
{
    size_t d_in, d_out;
    model_shape_projection(&f->model->shape, p, &d_in, &d_out);
    a->site[a->site_count].projection = p;
    a->site[a->site_count].weight = f->model->layers[a->layer].projection[p];
    a->site[a->site_count].y = y;
    a->site[a->site_count].y_stride = d_out;
    a->site_count++;
    a->x_stride = d_in;
}

static void layer_prepare(struct forward *f, int layer)
{
    const struct model *m = f->model;
    const struct model_shape *s = &m->shape;
    const struct model_layer *w = &m->layers[layer];
    struct layer_ops *l = &f->layers[layer];

    l->attn_norm = norm_args(f, w->attn_norm);
    l->qkv = (struct site_group_args){.x = f->normed, .layer = layer, .epilogue = EPILOGUE_STORE};
    site_add(f, &l->qkv, PROJ_Q, f->q);
    site_add(f, &l->qkv, PROJ_K, f->k);
    site_add(f, &l->qkv, PROJ_V, f->v);

    l->rope_kv = (struct rope_kv_args){.heads = s->heads, .layer = layer, .q = f->q, .k = f->k,
                                       .v = f->v, .rope_dims = m->rope.dims,
                                       .inv_freq = m->rope.inv_freq,
                                       .magnitude = m->rope.magnitude,
                                       .adjacent_pairs = s->qk_permuted, .cache = &f->cache};
    l->attention = (struct attention_args){.heads = s->heads, .layer = layer, .q = f->q,
                                           .y = f->attended,
                                           .scale = 1 / sqrtf((float)s->head_dim),
                                           .cache = &f->cache};
    l->o = (struct site_group_args){.x = f->attended, .layer = layer, .epilogue = EPILOGUE_ADD};
    site_add(f, &l->o, PROJ_O, f->x);

    l->ffn_norm = norm_args(f, w->ffn_norm);
    l->gate_up = (struct site_group_args){.x = f->normed, .layer = layer,
                                          .epilogue = EPILOGUE_SILU_MUL};
    site_add(f, &l->gate_up, PROJ_GATE, f->activated);
    site_add(f, &l->gate_up, PROJ_UP, NULL);
    l->down = (struct site_group_args){.x = f->activated, .layer = layer, .epilogue = EPILOGUE_ADD};
    site_add(f, &l->down, PROJ_DOWN, f->x);
}

static void group_set(struct site_group_args *a, const struct batch *b)
{
    a->rows = b->rows;
    a->segment_count = b->segment_count;
    a->segments = b->segments;
}

static void layer_set_batch(struct layer_ops *l, const struct batch *b)
{
    l->attn_norm.rows = l->ffn_norm.rows = b->rows;
    group_set(&l->qkv, b);
    group_set(&l->o, b);
    group_set(&l->gate_up, b);
    group_set(&l->down, b);
    l->rope_kv.rows = l->attention.rows = b->rows;
    l->rope_kv.seq_count = l->attention.seq_count = b->seq_count;
    l->rope_kv.seqs = l->attention.seqs = b->seqs;
}

/* --- running ----------------------------------------------------------------------------------- */

void forward_run(struct forward *f, const struct batch *b)
{
    CHECK(b->rows > 0 && b->rows <= f->config.rows);
    struct device *d = f->device;
    const struct device_ops *ops = d->ops;

    ops->embed(d, f->model->embed, b->rows, b->tokens, f->x);
    for (int layer = 0; layer < f->model->shape.layers; layer++) {
        struct layer_ops *l = &f->layers[layer];
        layer_set_batch(l, b);
        ops->rmsnorm(d, &l->attn_norm);
        ops->site_group(d, &l->qkv);
        ops->rope_kv(d, &l->rope_kv);
        ops->attention(d, &l->attention);
        ops->site_group(d, &l->o);
        ops->rmsnorm(d, &l->ffn_norm);
        ops->site_group(d, &l->gate_up);
        ops->site_group(d, &l->down);
    }
}

enum status forward_logits(struct forward *f, int count, const int32_t *rows, const float **out)
{
    CHECK(count > 0 && count <= f->config.logit_rows);
    f->head.count = count;
    f->head.row = rows;
    f->device->ops->logits(f->device, &f->head);
    size_t bytes = (size_t)count * f->model->shape.vocab * sizeof *f->logits;
    f->device->ops->read(f->device, f->logits_host, f->logits, bytes);
    enum status st = forward_sync(f);
    if (!st) *out = f->logits_host;
    return st;
}

enum status forward_sync(struct forward *f) { return f->device->ops->sync(f->device); }

/* --- opening ----------------------------------------------------------------------------------- */

static enum status buffer_alloc(struct forward *f, size_t rows, size_t cols, float **out)
{
    *out = f->device->ops->alloc(f->device, size_mul(size_mul(rows, cols), sizeof **out));
    return *out ? ST_OK : ST_NOMEM;
}

static enum status buffers_alloc(struct forward *f)
{
    const struct model_shape *s = &f->model->shape;
    size_t rows = (size_t)f->config.rows, logit_rows = (size_t)f->config.logit_rows;
    size_t q = (size_t)s->heads * (size_t)s->head_dim;
    size_t kv = (size_t)s->kv_heads * (size_t)s->head_dim;
    const struct { float **buffer; size_t rows, cols; } want[] = {
        {&f->x, rows, s->embed},        {&f->normed, rows, s->embed},
        {&f->q, rows, q},               {&f->k, rows, kv},
        {&f->v, rows, kv},              {&f->attended, rows, q},
        {&f->activated, rows, s->ffn},  {&f->logits, logit_rows, s->vocab},
    };
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        enum status st = buffer_alloc(f, want[i].rows, want[i].cols, want[i].buffer);
        if (st) return st;
    }
    f->logits_host = memory_alloc(size_mul(size_mul(logit_rows, s->vocab), sizeof(float)));
    return f->logits_host ? ST_OK : ST_NOMEM;
}

static enum status cache_alloc(struct forward *f)
{
    const struct model_shape *s = &f->model->shape;
    f->cache = (struct kv_cache){.type = f->config.kv_type, .layers = s->layers,
                                 .kv_heads = s->kv_heads, .head_dim = s->head_dim,
                                 .pages = f->config.kv_pages};
    size_t bytes = kv_cache_bytes(f->config.kv_type, s->layers, s->kv_heads, s->head_dim,
                                  f->config.kv_pages);
    if (bytes == SIZE_MAX) return ST_NOMEM;
    f->cache.k = f->device->ops->alloc(f->device, bytes);
    f->cache.v = f->device->ops->alloc(f->device, bytes);
    return f->cache.k && f->cache.v ? ST_OK : ST_NOMEM;
}

static enum status device_reserve(struct forward *f)
{
    const struct model_shape *s = &f->model->shape;
    struct device_limits limits = {.rows = f->config.rows, .lr_width = f->config.lr_width};
    for (int p = 0; p < PROJ_COUNT; p++) {
        size_t d_in, d_out;
        model_shape_projection(s, (enum projection)p, &d_in, &d_out);
        if (d_in > limits.cols) limits.cols = d_in;
        if (d_out > limits.cols) limits.cols = d_out;
    }
    return f->device->ops->reserve(f->device, &limits);
}

enum status forward_open(const struct model *m, const struct forward_config *config,
                         struct forward **out, struct error *err)
{
    struct forward *f = calloc(1, sizeof *f);
    if (!f) return error_set(err, ST_NOMEM, "out of memory");
    f->model = m;
    f->device = m->device;
    f->config = *config;
    f->layers = calloc((size_t)m->shape.layers, sizeof *f->layers);
    enum status st = f->layers ? buffers_alloc(f) : ST_NOMEM;
    if (!st) st = cache_alloc(f);
    if (!st) st = device_reserve(f);
    if (st) {
        forward_close(f);
        return error_set(err, st,
                         "%d rows of activations and %d KV pages on %s: %s; lower the KV budget, "
                         "the batch or the prefill chunk",
                         config->rows, config->kv_pages, m->device->name, status_text(st));
    }
    for (int l = 0; l < m->shape.layers; l++) layer_prepare(f, l);
    f->head = (struct logits_args){.x = f->x, .x_stride = m->shape.embed,
                                   .norm_weight = m->output_norm, .eps = m->rms_eps,
                                   .head = m->head, .y = f->logits};
    *out = f;
    return ST_OK;
}

void forward_close(struct forward *f)
{
    if (!f) return;
    void *const device_memory[] = {f->x,        f->normed, f->q,       f->k,      f->v, f->attended,
                                   f->activated, f->logits, f->cache.k, f->cache.v};
    for (size_t i = 0; i < sizeof device_memory / sizeof *device_memory; i++)
        if (device_memory[i]) f->device->ops->free(f->device, device_memory[i]);
    memory_free(f->logits_host);
    free(f->layers);
    free(f);
}

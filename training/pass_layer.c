/* One layer over the whole batch. The base's products go by tiles of rows, as large as a forward op takes; the
 * low-rank products take all rows at once. */
#include "training/pass_int.h"

#include <math.h>

static size_t embed_of(const struct pass *p) { return p->model->shape.embed; }

float *layer_input(const struct pass *p, int layer)
{
    int slot = p->backward ? layer : layer % 2;
    return p->inputs + (size_t)slot * (size_t)p->batch->rows * embed_of(p);
}

/* The layer's own activations, if it keeps them. */
static const struct activations *layer_kept(const struct pass *p, int layer)
{
    int from_top = p->model->shape.layers - 1 - layer;
    return p->backward && from_top < p->kept_count ? &p->kept[from_top] : NULL;
}

/* --- products of the base --- */

struct output {
    enum projection projection;
    float *y; /* (T, d_out), or of a backward product (T, d_in) */
};

/* y_i = W_i x for the projections that share x, or += with EPILOGUE_ADD; x (T, d_in). */
static void base_forward(struct pass *p, int layer, const float *x, const struct output *outputs, int count,
                         enum epilogue epilogue)
{
    const struct model_layer *l = &p->model->layers[layer];
    size_t d_in = l->projection[outputs[0].projection]->cols;
    for (int first = 0; first < p->batch->rows; first += p->tile_rows) {
        int left = p->batch->rows - first;
        struct site_group_args args = {.rows = left < p->tile_rows ? left : p->tile_rows,
                                       .x = x + (size_t)first * d_in, .x_stride = d_in, .site_count = count,
                                       .epilogue = epilogue, .layer = layer};
        for (int i = 0; i < count; i++) {
            const struct weight *w = l->projection[outputs[i].projection];
            args.site[i].projection = outputs[i].projection;
            args.site[i].weight = w;
            args.site[i].y = outputs[i].y + (size_t)first * w->rows;
            args.site[i].y_stride = w->rows;
        }
        if (pass_ready(p)) p->ops->site_group(p->device, &args);
    }
}

/* d_x = W^T d_y, or += */
static void base_backward(struct pass *p, int layer, enum projection projection, const float *d_y, float *d_x,
                          enum epilogue epilogue)
{
    const struct weight *w = p->transposed->layer[layer * PROJ_COUNT + (int)projection].weight;
    for (int first = 0; first < p->batch->rows; first += p->tile_rows) {
        int left = p->batch->rows - first;
        struct site_group_args args = {
            .rows = left < p->tile_rows ? left : p->tile_rows,
            .x = d_y + (size_t)first * w->cols,
            .x_stride = w->cols,
            .site_count = 1,
            .site = {{.weight = w, .y = d_x + (size_t)first * w->rows, .y_stride = w->rows}},
            .epilogue = epilogue,
        };
        if (pass_ready(p)) p->ops->site_group(p->device, &args);
    }
}

static void delta_forward(struct pass *p, int layer, enum projection projection, const float *x, float *y)
{
    const struct train_site *s = pass_site(p, layer, projection);
    if (s) site_forward(p, s, x, y);
}

/* d_x = (or +=) the gradient through W and through the site. d_x NULL: the site's own gradients alone. */
static void projection_backward(struct pass *p, int layer, enum projection projection, const float *x,
                                const float *d_y, float *d_x, enum epilogue epilogue)
{
    const struct train_site *s = pass_site(p, layer, projection);
    if (d_x) base_backward(p, layer, projection, d_y, d_x, epilogue);
    if (s) site_backward(p, s, x, d_y, d_x);
}

/* --- forward --- */

static void norm_forward(struct pass *p, const float *x, const float *weight, float *y)
{
    for (int first = 0; first < p->batch->rows; first += p->tile_rows) {
        int left = p->batch->rows - first;
        struct rmsnorm_args args = {.rows = left < p->tile_rows ? left : p->tile_rows, .cols = embed_of(p),
                                    .x = x + (size_t)first * embed_of(p), .weight = weight,
                                    .eps = p->model->rms_eps, .y = y + (size_t)first * embed_of(p)};
        if (pass_ready(p)) p->ops->rmsnorm(p->device, &args);
    }
}

/* Rotates q and k of a tile, fills the cache, attends. */
static void tile_attend(struct pass *p, int tile)
{
    const struct model *m = p->model;
    int first = tile * p->tile_rows, left = p->batch->rows - first;
    int rows = left < p->tile_rows ? left : p->tile_rows;
    const struct seq_rows *seqs = p->tiles + p->first_tile[tile];
    int count = p->first_tile[tile + 1] - p->first_tile[tile];
    struct rope_kv_args rope = {.rows = rows, .heads = m->shape.heads, .q = p->act->q + (size_t)first * p->q_cols,
                                .k = p->act->k + (size_t)first * p->kv_cols, .v = p->act->v + (size_t)first * p->kv_cols,
                                .rope_dims = m->rope.dims, .inv_freq = m->rope.inv_freq,
                                .magnitude = m->rope.magnitude, .adjacent_pairs = m->shape.qk_permuted,
                                .seq_count = count, .seqs = seqs, .cache = &p->cache};
    if (pass_ready(p)) p->ops->rope_kv(p->device, &rope);
    struct attention_args attention = {.rows = rows, .heads = m->shape.heads, .q = rope.q,
                                       .y = p->act->attended + (size_t)first * p->q_cols,
                                       .scale = 1 / sqrtf((float)m->shape.head_dim), .seq_count = count,
                                       .seqs = seqs, .cache = &p->cache};
    if (pass_ready(p)) p->ops->attention(p->device, &attention);
}

/* From the layer's input to `middle`. */
static void attention_forward(struct pass *p, int layer)
{
    const float *x = layer_input(p, layer);
    const struct output qkv[] = {{PROJ_Q, p->act->q}, {PROJ_K, p->act->k}, {PROJ_V, p->act->v}};
    const struct output o[] = {{PROJ_O, p->act->middle}};
    norm_forward(p, x, p->model->layers[layer].attn_norm, p->attn_normed);
    base_forward(p, layer, p->attn_normed, qkv, 3, EPILOGUE_STORE);
    for (int i = 0; i < 3; i++) delta_forward(p, layer, qkv[i].projection, p->attn_normed, qkv[i].y);
    for (int tile = 0; tile < p->tile_count; tile++) tile_attend(p, tile);
    base_forward(p, layer, p->act->attended, o, 1, EPILOGUE_STORE);
    delta_forward(p, layer, PROJ_O, p->act->attended, p->act->middle);
    if (pass_ready(p)) p->grad->add(p->device, p->act->middle, x, (size_t)p->batch->rows * embed_of(p));
}

static void activate(struct pass *p)
{
    struct silu_mul_args args = {.n = (size_t)p->batch->rows * p->model->shape.ffn, .gate = p->act->gate,
                                 .up = p->act->up, .y = p->activated};
    if (pass_ready(p)) p->grad->silu_mul(p->device, &args);
}

/* From `middle` to `activated`. */
static void ffn_forward(struct pass *p, int layer)
{
    const struct output gate_up[] = {{PROJ_GATE, p->act->gate}, {PROJ_UP, p->act->up}};
    norm_forward(p, p->act->middle, p->model->layers[layer].ffn_norm, p->ffn_normed);
    base_forward(p, layer, p->ffn_normed, gate_up, 2, EPILOGUE_STORE);
    for (int i = 0; i < 2; i++) delta_forward(p, layer, gate_up[i].projection, p->ffn_normed, gate_up[i].y);
    activate(p);
}

void layer_forward(struct pass *p, int layer)
{
    float *x = layer_input(p, layer + 1);
    const struct output down[] = {{PROJ_DOWN, x}};
    p->act = layer_kept(p, layer);
    if (!p->act) p->act = &p->scratch;
    attention_forward(p, layer);
    ffn_forward(p, layer);
    base_forward(p, layer, p->activated, down, 1, EPILOGUE_STORE);
    delta_forward(p, layer, PROJ_DOWN, p->activated, x);
    if (pass_ready(p)) p->grad->add(p->device, x, p->act->middle, (size_t)p->batch->rows * embed_of(p));
}

/* --- backward --- */

static void norm_backward(struct pass *p, const float *x, const float *weight)
{
    struct rmsnorm_backward_args args = {.rows = p->batch->rows, .cols = embed_of(p), .x = x, .weight = weight,
                                         .eps = p->model->rms_eps, .d_y = p->d_normed, .d_x = p->d_x};
    if (pass_ready(p)) p->grad->rmsnorm_backward(p->device, &args);
}

/* d_x of the layer's output becomes that of `middle`. */
static void ffn_backward(struct pass *p, int layer)
{
    projection_backward(p, layer, PROJ_DOWN, p->activated, p->d_x, p->d_activated, EPILOGUE_STORE);
    struct silu_mul_backward_args silu = {.n = (size_t)p->batch->rows * p->model->shape.ffn, .gate = p->act->gate,
                                          .up = p->act->up, .d_y = p->d_activated, .d_gate = p->act->gate, .d_up = p->act->up};
    if (pass_ready(p)) p->grad->silu_mul_backward(p->device, &silu);
    projection_backward(p, layer, PROJ_GATE, p->ffn_normed, p->act->gate, p->d_normed, EPILOGUE_STORE);
    projection_backward(p, layer, PROJ_UP, p->ffn_normed, p->act->up, p->d_normed, EPILOGUE_ADD);
    norm_backward(p, p->act->middle, p->model->layers[layer].ffn_norm);
}

static void heads_backward(struct pass *p)
{
    const struct model *m = p->model;
    struct attention_backward_args attention = {
        .rows = p->batch->rows, .heads = m->shape.heads, .kv_heads = m->shape.kv_heads,
        .head_dim = (size_t)m->shape.head_dim, .scale = 1 / sqrtf((float)m->shape.head_dim), .q = p->act->q, .k = p->act->k,
        .v = p->act->v, .y = p->act->attended, .d_y = p->d_attended, .d_q = p->d_q, .d_k = p->d_k, .d_v = p->d_v,
        .seq_count = p->batch->seq_count, .seqs = p->seqs};
    if (pass_ready(p)) p->grad->attention_backward(p->device, &attention);
    struct rope_backward_args rope = {.rows = p->batch->rows, .heads = m->shape.heads,
                                      .head_dim = (size_t)m->shape.head_dim, .rope_dims = m->rope.dims,
                                      .position = p->position, .inv_freq = m->rope.inv_freq,
                                      .magnitude = m->rope.magnitude, .adjacent_pairs = m->shape.qk_permuted,
                                      .d_x = p->d_q};
    if (pass_ready(p)) p->grad->rope_backward(p->device, &rope);
    struct rope_backward_args rope_k = rope;
    rope_k.heads = m->shape.kv_heads;
    rope_k.d_x = p->d_k;
    if (pass_ready(p)) p->grad->rope_backward(p->device, &rope_k);
}

/* d_x of `middle` becomes that of the layer's input; nobody needs it below the first layer with a site. */
static void attention_backward(struct pass *p, int layer)
{
    float *d_normed = layer > p->first_layer ? p->d_normed : NULL;
    projection_backward(p, layer, PROJ_O, p->act->attended, p->d_x, p->d_attended, EPILOGUE_STORE);
    heads_backward(p);
    projection_backward(p, layer, PROJ_Q, p->attn_normed, p->d_q, d_normed, EPILOGUE_STORE);
    projection_backward(p, layer, PROJ_K, p->attn_normed, p->d_k, d_normed, EPILOGUE_ADD);
    projection_backward(p, layer, PROJ_V, p->attn_normed, p->d_v, d_normed, EPILOGUE_ADD);
    if (d_normed) norm_backward(p, layer_input(p, layer), p->model->layers[layer].attn_norm);
}

/* The layer's inside as its forward pass left it. */
static void layer_restore(struct pass *p, int layer)
{
    const struct model_layer *l = &p->model->layers[layer];
    const struct train_site *down = pass_site(p, layer, PROJ_DOWN);
    p->act = layer_kept(p, layer);
    if (p->act) {
        norm_forward(p, layer_input(p, layer), l->attn_norm, p->attn_normed);
        norm_forward(p, p->act->middle, l->ffn_norm, p->ffn_normed);
        activate(p);
        return;
    }
    p->act = &p->scratch;
    attention_forward(p, layer);
    ffn_forward(p, layer);
    if (down) site_prepare(p, down, p->activated);
}

void layer_backward(struct pass *p, int layer)
{
    layer_restore(p, layer);
    ffn_backward(p, layer);
    attention_backward(p, layer);
}

#include "training/pass.h"

#include "base/memory.h"
#include "training/pass_int.h"

#include <stdlib.h>
#include <string.h>

/* --- opening --- */

static enum status device_alloc(struct pass *p, size_t rows, size_t cols, float **out)
{
    size_t bytes = size_mul(size_mul(rows, cols), sizeof **out);
    *out = p->ops->alloc(p->device, bytes);
    if (!*out) return ST_NOMEM;
    p->bytes += bytes;
    return ST_OK;
}

/* The widest of any site at a projection: floats of a row. */
struct site_widths {
    size_t stacked, experts;
};

static struct site_widths site_widths(const struct params *params, int projection)
{
    struct site_widths w = {0};
    for (int l = 0; l < params->layers; l++) {
        const struct train_site *s = params->place[l * PROJ_COUNT + projection];
        if (!s) continue;
        size_t n = (size_t)s->experts * (size_t)s->rank;
        if (n > w.stacked) w.stacked = n;
        if (s->routed >= 0 && (size_t)s->experts > w.experts) w.experts = (size_t)s->experts;
    }
    return w;
}

/* Deals out parts of one block, or with block NULL only counts. */
struct dealer {
    float *block;
    size_t at; /* floats */
};

static void deal(struct dealer *d, size_t rows, size_t cols, float **out)
{
    size_t floats = size_round_up(size_mul(rows, cols), MEMORY_ALIGN / sizeof(float));
    if (d->block) *out = d->block + d->at;
    d->at = size_add(d->at, floats);
}

static size_t activations_deal(const struct pass *p, size_t rows, float *block, struct activations *a)
{
    const struct model_shape *s = &p->model->shape;
    struct dealer d = {.block = block};
    deal(&d, rows, p->q_cols, &a->q);
    deal(&d, rows, p->kv_cols, &a->k);
    deal(&d, rows, p->kv_cols, &a->v);
    deal(&d, rows, p->q_cols, &a->attended);
    deal(&d, rows, s->embed, &a->middle);
    deal(&d, rows, s->ffn, &a->gate);
    deal(&d, rows, s->ffn, &a->up);
    for (int i = 0; i < PROJ_COUNT; i++) {
        struct site_widths w = site_widths(p->params, i);
        deal(&d, rows, w.stacked, &a->site[i].z);
        deal(&d, rows, w.experts, &a->site[i].p);
        deal(&d, rows, w.experts, &a->site[i].g);
    }
    a->block = block;
    return size_mul(d.at, sizeof(float));
}

static enum status activations_alloc(struct pass *p, size_t rows, struct activations *out)
{
    size_t bytes = activations_deal(p, rows, NULL, out);
    float *block = p->ops->alloc(p->device, bytes);
    if (!block) return ST_NOMEM;
    p->bytes += bytes;
    activations_deal(p, rows, block, out);
    return ST_OK;
}

/* Whether another layer's bytes are left of what all passes over the model may keep. */
static bool keep_claim(struct pass *p, size_t keep_bytes)
{
    size_t before = atomic_fetch_add(&p->transposed->kept, p->kept_layer);
    if (before <= keep_bytes && p->kept_layer <= keep_bytes - before) return true;
    atomic_fetch_sub(&p->transposed->kept, p->kept_layer);
    return false;
}

/* The last layers keep theirs, as many as fit keep_bytes: the backward pass begins with them. */
static enum status kept_alloc(struct pass *p, size_t rows, size_t keep_bytes)
{
    struct activations measured;
    int layers = p->model->shape.layers - p->first_layer;
    p->kept_layer = activations_deal(p, rows, NULL, &measured);
    p->kept = calloc((size_t)layers + 1, sizeof *p->kept);
    if (!p->kept) return ST_NOMEM;
    while (p->kept_count < layers && keep_claim(p, keep_bytes)) {
        enum status st = activations_alloc(p, rows, &p->kept[p->kept_count++]);
        if (st) return st;
    }
    return ST_OK;
}

static void kept_free(struct pass *p)
{
    for (int i = 0; i < p->kept_count; i++)
        if (p->kept[i].block) p->ops->free(p->device, p->kept[i].block);
    atomic_fetch_sub(&p->transposed->kept, (size_t)p->kept_count * p->kept_layer);
    free(p->kept);
}

/* What sites need beyond their activations. */
static enum status sites_alloc(struct pass *p, size_t rows)
{
    size_t stacked = 1, experts = 1, routed = (size_t)p->params->routed_count + 1;
    for (int i = 0; i < PROJ_COUNT; i++) {
        struct site_widths w = site_widths(p->params, i);
        if (w.stacked > stacked) stacked = w.stacked;
        if (w.experts > experts) experts = w.experts;
    }
    p->experts_max = (int)experts;
    enum status st = device_alloc(p, rows, stacked, &p->zg);
    if (!st) st = device_alloc(p, rows, stacked, &p->d_zg);
    if (!st) st = device_alloc(p, rows, experts, &p->u);
    if (!st) st = device_alloc(p, routed * 3, experts, &p->stats);
    return st ? st : device_alloc(p, routed, CONTRAST_RESULTS, &p->contrast);
}

static enum status streams_alloc(struct pass *p, size_t rows)
{
    const struct model_shape *s = &p->model->shape;
    const struct {
        float **buffer;
        size_t cols;
    } want[] = {
        {&p->inputs, size_mul((size_t)s->layers + 1, s->embed)},
        {&p->attn_normed, s->embed},
        {&p->ffn_normed, s->embed},
        {&p->activated, s->ffn},
        {&p->d_x, s->embed},
        {&p->d_normed, s->embed},
        {&p->d_q, p->q_cols},
        {&p->d_k, p->kv_cols},
        {&p->d_v, p->kv_cols},
        {&p->d_attended, p->q_cols},
        {&p->d_activated, s->ffn},
    };
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        enum status st = device_alloc(p, rows, want[i].cols, want[i].buffer);
        if (st) return st;
    }
    enum status st = device_alloc(p, HEAD_ROWS, s->vocab, &p->logits);
    if (!st) st = device_alloc(p, HEAD_ROWS, 1, &p->logprob);
    return st ? st : device_alloc(p, HEAD_ROWS, s->embed, &p->head_normed);
}

static enum status host_alloc(struct pass *p, size_t rows)
{
    size_t routed = (size_t)p->params->routed_count + 1, stats = routed * 3 * (size_t)p->experts_max;
    p->position = calloc(rows, sizeof *p->position);
    p->keys = calloc(rows, sizeof *p->keys);
    p->sample = calloc(rows, sizeof *p->sample);
    p->scored = calloc(rows, sizeof *p->scored);
    p->logprob_host = calloc(rows, sizeof *p->logprob_host);
    p->seqs = calloc(rows, sizeof *p->seqs);
    /* A piece ends with its sequence or with its tile. */
    p->tiles = calloc(2 * rows, sizeof *p->tiles);
    p->first_tile = calloc(rows + 1, sizeof *p->first_tile);
    p->stats_host = calloc(stats, sizeof *p->stats_host);
    p->contrast_host = calloc(CONTRAST_RESULTS * routed, sizeof *p->contrast_host);
    p->routing = calloc(routed, sizeof *p->routing);
    bool all = p->position && p->keys && p->sample && p->scored && p->logprob_host && p->seqs && p->tiles &&
               p->first_tile && p->stats_host && p->contrast_host && p->routing;
    return all ? ST_OK : ST_NOMEM;
}

static enum status device_reserve(struct pass *p, int seq_rows_max)
{
    const struct model_shape *s = &p->model->shape;
    int stacked = 1;
    for (int i = 0; i < p->params->site_count; i++) {
        int n = p->params->site[i].experts * p->params->site[i].rank;
        if (n > stacked) stacked = n;
    }
    struct grad_limits limits = {.rows = p->rows_max,
                                 .cols = s->vocab > s->ffn ? s->vocab : s->ffn,
                                 .seq_rows = seq_rows_max,
                                 .heads = s->heads,
                                 .head_dim = (size_t)s->head_dim,
                                 .experts_rank = stacked};
    enum status st = engine_turn_begin(p->turn);
    if (st) return st;
    st = p->grad->reserve(p->device, &limits);
    engine_turn_end(p->turn);
    return st;
}

static enum status pass_build(struct pass *p, int seq_rows_max, size_t keep_bytes)
{
    enum status st = engine_turn_open(p->engine, &p->turn);
    if (!st) st = streams_alloc(p, (size_t)p->rows_max);
    if (!st) st = activations_alloc(p, (size_t)p->rows_max, &p->scratch);
    if (!st) st = kept_alloc(p, (size_t)p->rows_max, keep_bytes);
    if (!st) st = sites_alloc(p, (size_t)p->rows_max);
    if (!st) st = host_alloc(p, (size_t)p->rows_max);
    return st ? st : device_reserve(p, seq_rows_max);
}

static int first_layer(const struct params *params)
{
    return params->site_count > 0 ? params->site[0].layer : params->layers;
}

enum status pass_open(struct engine *e, struct transposed *t, struct params *params, int rows_max,
                      int seq_rows_max, size_t keep_bytes, struct pass **out)
{
    struct pass *p = calloc(1, sizeof *p);
    if (!p) return ST_NOMEM;
    const struct model *m = engine_model(e);
    p->engine = e;
    p->model = m;
    p->transposed = t;
    p->params = params;
    p->device = m->device;
    p->ops = m->device->ops;
    p->grad = m->device->grad;
    p->rows_max = rows_max;
    p->tile_rows = engine_step_rows(e);
    p->first_layer = first_layer(params);
    p->q_cols = (size_t)m->shape.heads * (size_t)m->shape.head_dim;
    p->kv_cols = (size_t)m->shape.kv_heads * (size_t)m->shape.head_dim;
    p->cache = (struct kv_cache){
        .type = DTYPE_F32, .layers = 1, .kv_heads = m->shape.kv_heads, .head_dim = m->shape.head_dim};
    enum status st = pass_build(p, seq_rows_max, keep_bytes);
    if (st)
        pass_close(p);
    else
        *out = p;
    return st;
}

void pass_close(struct pass *p)
{
    if (!p) return;
    void *const device_memory[] = {
        p->inputs,   p->scratch.block, p->attn_normed, p->ffn_normed, p->activated,  p->d_x,
        p->d_normed, p->d_q,           p->d_k,         p->d_v,        p->d_attended, p->d_activated,
        p->zg,       p->d_zg,          p->u,           p->logits,     p->logprob,    p->head_normed,
        p->stats,    p->contrast,      p->cache.k,     p->cache.v};
    for (size_t i = 0; i < sizeof device_memory / sizeof *device_memory; i++)
        if (device_memory[i]) p->ops->free(p->device, device_memory[i]);
    kept_free(p);
    void *const host_memory[] = {p->pages,      p->seqs,          p->tiles,   p->first_tile,
                                 p->position,   p->keys,          p->sample,  p->scored,
                                 p->stats_host, p->contrast_host, p->routing, p->logprob_host};
    for (size_t i = 0; i < sizeof host_memory / sizeof *host_memory; i++) free(host_memory[i]);
    engine_turn_close(p->turn);
    free(p);
}

size_t pass_bytes(const struct pass *p) { return p->bytes; }

/* --- a batch --- */

/* Room for so many pages of the one layer's cache. */
static enum status cache_fit(struct pass *p, int pages)
{
    struct kv_cache *c = &p->cache;
    if (pages <= c->pages) return ST_OK;
    void *const old[] = {c->k, c->v};
    for (size_t i = 0; i < 2; i++)
        if (old[i]) p->ops->free(p->device, old[i]);
    free(p->pages);
    size_t bytes = kv_cache_bytes(c->type, 1, c->kv_heads, c->head_dim, pages);
    c->pages = 0;
    c->k = p->ops->alloc(p->device, bytes);
    c->v = p->ops->alloc(p->device, bytes);
    p->pages = malloc((size_t)pages * sizeof *p->pages);
    if (!c->k || !c->v || !p->pages) return ST_NOMEM;
    for (int i = 0; i < pages; i++) p->pages[i] = i;
    c->pages = pages;
    return ST_OK;
}

static int pages_of(int rows) { return (rows + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS; }

/* The batch's sequences, whole and cut into pieces by tiles of rows. Pages are dealt out in order. */
static enum status sequences_lay(struct pass *p)
{
    const struct pass_batch *b = p->batch;
    int pages = 0, pieces = 0;
    for (int i = 0; i < b->seq_count; i++) pages += pages_of(b->first_row[i + 1] - b->first_row[i]);
    enum status st = cache_fit(p, pages);
    if (st) return st;
    p->tile_count = (b->rows + p->tile_rows - 1) / p->tile_rows;
    pages = 0;
    int tile = 0;
    p->first_tile[0] = 0;
    for (int i = 0; i < b->seq_count; i++) {
        int first = b->first_row[i], end = b->first_row[i + 1];
        p->seqs[i] = (struct seq_rows){.first_row = first, .row_count = end - first};
        for (int row = first, next; row < end; row = next) {
            int tile_end = (tile + 1) * p->tile_rows;
            next = end < tile_end ? end : tile_end;
            p->tiles[pieces++] = (struct seq_rows){.first_row = row - tile * p->tile_rows,
                                                   .row_count = next - row,
                                                   .first_position = row - first,
                                                   .pages = p->pages + pages};
            if (next == tile_end) p->first_tile[++tile] = pieces;
        }
        for (int row = first; row < end; row++) p->position[row] = row - first;
        pages += pages_of(end - first);
    }
    p->first_tile[p->tile_count] = pieces;
    return ST_OK;
}

static void rows_score(struct pass *p)
{
    p->scored_count = 0;
    for (int i = 0; i < p->batch->rows; i++) {
        p->logprob_host[i] = 0;
        if (p->batch->weight[i] == 0) continue;
        CHECK(p->batch->target[i] >= 0);
        p->scored[p->scored_count++] = i;
    }
}

bool pass_ready(struct pass *p)
{
    if (p->status) return false;
    if (p->cancel && atomic_load_explicit(p->cancel, memory_order_relaxed))
        p->status = ST_CANCELLED;
    else
        p->status = engine_turn_continue(p->turn);
    return p->status == ST_OK;
}

static void embed(struct pass *p)
{
    size_t cols = p->model->shape.embed;
    for (int first = 0; first < p->batch->rows; first += p->tile_rows) {
        int left = p->batch->rows - first, rows = left < p->tile_rows ? left : p->tile_rows;
        if (pass_ready(p))
            p->ops->embed(p->device, p->model->embed, rows, p->batch->token + first,
                          layer_input(p, 0) + (size_t)first * cols);
    }
}

/* --- results --- */

static void routing_read(struct pass *p, struct pass_result *out)
{
    int routed = p->params->routed_count;
    size_t most = (size_t)p->experts_max;
    p->ops->read(p->device, p->stats_host, p->stats, (size_t)routed * 3 * most * sizeof(float));
    p->ops->read(p->device, p->contrast_host, p->contrast, (size_t)routed * CONTRAST_RESULTS * sizeof(float));
    double rows = p->batch->rows;
    for (int i = 0; i < p->params->site_count; i++) {
        const struct train_site *s = &p->params->site[i];
        if (s->routed < 0) continue;
        size_t n = (size_t)s->experts;
        const float *stats = p->stats_host + (size_t)s->routed * 3 * most;
        p->routing[s->routed] = (struct pass_routing){s, stats, stats + n, stats + 2 * n};
        double balance = 0;
        for (size_t e = 0; e < n; e++) balance += stats[e] / rows * (stats[2 * n + e] / rows);
        out->balance += balance * s->experts / routed;
        const float *contrast = p->contrast_host + CONTRAST_RESULTS * s->routed;
        out->contrast += (double)contrast[0] / routed;
        out->similarity += (double)contrast[1] / routed;
        out->cohesion += (double)contrast[2] / routed;
    }
}

static void run(struct pass *p)
{
    int layers = p->model->shape.layers;
    if (p->params->routed_count > 0 && pass_ready(p))
        p->grad->fill(p->device, p->contrast, CONTRAST_RESULTS * (size_t)p->params->routed_count, 0);
    embed(p);
    for (int l = 0; l < layers; l++) layer_forward(p, l);
    head_run(p);
    for (int l = layers - 1; p->backward && l >= p->first_layer; l--) layer_backward(p, l);
}

static enum status pass_run(struct pass *p, const struct pass_batch *b, const struct pass_loss *loss,
                            const atomic_bool *cancel, bool backward, struct pass_result *out)
{
    CHECK(b->rows > 0 && b->rows <= p->rows_max && b->seq_count > 0);
    p->batch = b;
    p->loss = loss;
    p->cancel = cancel;
    p->backward = backward;
    p->ce = 0;
    p->status = sequences_lay(p);
    if (p->status) return p->status;
    rows_score(p);
    p->status = engine_turn_begin(p->turn);
    if (p->status) return p->status;
    run(p);
    *out = (struct pass_result){.ce = p->ce, .logprob = p->logprob_host, .routing = p->routing};
    if (pass_ready(p)) routing_read(p, out);
    if (p->status != ST_DEVICE) engine_turn_end(p->turn);
    return p->status;
}

enum status pass_forward(struct pass *p, const struct pass_batch *b, const struct pass_loss *loss,
                         const atomic_bool *cancel, struct pass_result *out)
{
    return pass_run(p, b, loss, cancel, false, out);
}

enum status pass_backward(struct pass *p, const struct pass_batch *b, const struct pass_loss *loss,
                          const atomic_bool *cancel, struct pass_result *out)
{
    return pass_run(p, b, loss, cancel, true, out);
}

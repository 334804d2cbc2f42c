#include "engine/model.h"

#include "base/utf8.h"
#include "engine/metadata.h"

#include <inttypes.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Ceilings far above real models, far below where sizes could overflow. */
#define LAYERS_MAX 1024
#define HEADS_MAX 1024
#define HEAD_DIM_MAX 1024
#define EMBED_MAX (1u << 18)
#define FFN_MAX (1u << 20)
#define VOCAB_MAX (1u << 22)
#define CONTEXT_MAX (1u << 24)

static const char *const projection_tensor[PROJ_COUNT] = {
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
};

void model_shape_projection(const struct model_shape *s, enum projection p, size_t *d_in,
                            size_t *d_out)
{
    size_t q = (size_t)s->heads * (size_t)s->head_dim;
    size_t kv = (size_t)s->kv_heads * (size_t)s->head_dim;
    const size_t in[PROJ_COUNT] = {s->embed, s->embed, s->embed, q, s->embed, s->embed, s->ffn};
    const size_t out[PROJ_COUNT] = {q, kv, kv, s->embed, s->ffn, s->ffn, s->embed};
    *d_in = in[p];
    *d_out = out[p];
}

/* --- shapes ------------------------------------------------------------------------------------ */

static enum status architecture_check(const struct gguf *g, struct error *err)
{
    struct gguf_string s;
    enum status st = gguf_get_string(g, "general.architecture", &s, err);
    if (st == ST_NOT_FOUND)
        return error_set(err, ST_BAD_FORMAT, "metadata 'general.architecture' is missing");
    if (st) return st;
    if (s.size == 5 && memcmp(s.data, "llama", 5) == 0) return ST_OK;
    return error_set(err, ST_UNSUPPORTED, "architecture '%.*s' is not supported; supported: llama",
                     (int)(s.size < 64 ? s.size : 64), s.data);
}

static void name_read(const struct gguf *g, struct model_shape *s)
{
    struct gguf_string name;
    if (gguf_get_string(g, "general.name", &name, NULL) != ST_OK || !utf8_valid(name.data, name.size))
        name = (struct gguf_string){"unnamed", 7};
    size_t n = sizeof s->name - 1;
    n = name.size <= n ? name.size : utf8_complete_prefix(name.data, n);
    snprintf(s->name, sizeof s->name, "%.*s", (int)n, name.data);
}

static enum status shape_read(const struct gguf *g, struct model_shape *out, float *rms_eps,
                              struct error *err)
{
    const struct gguf_tensor *table = gguf_tensor_find(g, "token_embd.weight");
    if (!table) return error_set(err, ST_BAD_FORMAT, "tensor 'token_embd.weight' is missing");

    struct metadata m = {.gguf = g, .err = err};
    struct model_shape s = {.qk_permuted = true};
    s.layers = (int)metadata_u64(&m, "llama.block_count", 1, LAYERS_MAX, METADATA_REQUIRED);
    s.embed = metadata_u64(&m, "llama.embedding_length", 1, EMBED_MAX, METADATA_REQUIRED);
    s.ffn = metadata_u64(&m, "llama.feed_forward_length", 1, FFN_MAX, METADATA_REQUIRED);
    s.heads = (int)metadata_u64(&m, "llama.attention.head_count", 1, HEADS_MAX, METADATA_REQUIRED);
    s.kv_heads = (int)metadata_u64(&m, "llama.attention.head_count_kv", 1, (uint64_t)s.heads,
                                   (uint64_t)s.heads);
    s.head_dim = (int)metadata_u64(&m, "llama.attention.key_length", 2, HEAD_DIM_MAX,
                                   s.embed / (size_t)s.heads);
    int value_dim = (int)metadata_u64(&m, "llama.attention.value_length", 2, HEAD_DIM_MAX,
                                      (uint64_t)s.head_dim);
    uint64_t context =
        metadata_u64(&m, "llama.context_length", 1, CONTEXT_MAX, METADATA_REQUIRED);
    /* Within its window, attention with a sliding window is plain attention. */
    uint64_t window = metadata_u64(&m, "llama.attention.sliding_window", 1, UINT64_MAX - 1, context);
    metadata_u64(&m, "llama.expert_count", 0, 0, 0);
    s.vocab = metadata_u64(&m, "llama.vocab_size", 1, VOCAB_MAX, table->dim[1]);
    *rms_eps =
        (float)metadata_f64(&m, "llama.attention.layer_norm_rms_epsilon", 0, 1, 1e-5);
    if (m.status) return m.status;

    if (s.heads % s.kv_heads)
        return error_set(err, ST_BAD_FORMAT, "%d heads cannot share %d key/value heads", s.heads,
                         s.kv_heads);
    if (s.head_dim < 2 || s.head_dim > HEAD_DIM_MAX || value_dim != s.head_dim)
        return error_set(err, ST_UNSUPPORTED,
                         "keys of %d and values of %d elements; supported: equal, 2 to %d",
                         s.head_dim, value_dim, HEAD_DIM_MAX);
    s.context_length = (int)(window < context ? window : context);
    name_read(g, &s);
    *out = s;
    return ST_OK;
}

/* --- which tensors there may be ---------------------------------------------------------------- */

static bool string_is(const char *s, size_t n, const char *text)
{
    return n == strlen(text) && memcmp(s, text, n) == 0;
}

static bool layer_tensor_known(const char *s, size_t n)
{
    static const char suffix[] = ".weight";
    size_t suffix_size = sizeof suffix - 1;
    if (n < suffix_size || memcmp(s + n - suffix_size, suffix, suffix_size) != 0) return false;
    n -= suffix_size;
    for (int p = 0; p < PROJ_COUNT; p++)
        if (string_is(s, n, projection_tensor[p])) return true;
    return string_is(s, n, "attn_norm") || string_is(s, n, "ffn_norm");
}

static bool tensor_known(const struct gguf_string *name, int layers)
{
    static const char *const whole[] = {"token_embd.weight", "output.weight",
                                        "output_norm.weight", "rope_freqs.weight"};
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++)
        if (string_is(name->data, name->size, whole[i])) return true;

    if (name->size < 4 || memcmp(name->data, "blk.", 4) != 0) return false;
    size_t i = 4;
    int layer = 0;
    for (; i < name->size && name->data[i] >= '0' && name->data[i] <= '9'; i++) {
        layer = layer * 10 + (name->data[i] - '0');
        if (layer >= layers) return false;
    }
    if (i == 4 || i == name->size || name->data[i] != '.') return false;
    return layer_tensor_known(name->data + i + 1, name->size - i - 1);
}

/* Serving a file without one of its tensors (a bias, say) would give wrong answers in silence. */
static enum status tensors_check(const struct gguf *g, int layers, struct error *err)
{
    for (size_t i = 0; i < gguf_tensor_count(g); i++) {
        const struct gguf_string *name = &gguf_tensor_at(g, i)->name;
        if (!tensor_known(name, layers))
            return error_set(err, ST_UNSUPPORTED,
                             "tensor '%.*s' is no part of a llama model of %d layers as served here "
                             "(no biases, no experts)",
                             (int)(name->size < 128 ? name->size : 128), name->data, layers);
    }
    return ST_OK;
}

/* --- binding ----------------------------------------------------------------------------------- */

struct binder {
    struct model *model;
    void (*on_progress)(void *ctx, double done);
    void *ctx;
    size_t bytes_done, bytes;
};

static enum status tensor_get(const struct gguf *g, const char *name, size_t cols, size_t rows,
                              const struct gguf_tensor **out, struct error *err)
{
    const struct gguf_tensor *t = gguf_tensor_find(g, name);
    if (!t) return error_set(err, ST_BAD_FORMAT, "tensor '%s' is missing", name);
    if (t->dim[0] != cols || t->dim[1] != rows || t->dim[2] != 1 || t->dim[3] != 1)
        return error_set(err, ST_BAD_FORMAT,
                         "tensor '%s' is %" PRIu64 " x %" PRIu64 "; the metadata ask for %zu x %zu",
                         name, t->dim[0], t->dim[1], cols, rows);
    *out = t;
    return ST_OK;
}

static void binder_advance(struct binder *b, size_t bytes)
{
    b->bytes_done += bytes;
    if (b->on_progress) b->on_progress(b->ctx, (double)b->bytes_done / (double)b->bytes);
}

static enum status matrix_bind(struct binder *b, const char *name, size_t cols, size_t rows,
                               struct weight **out, struct error *err)
{
    const struct gguf_tensor *t = NULL;
    enum status st = tensor_get(b->model->gguf, name, cols, rows, &t, err);
    if (st) return st;
    struct matrix m = {.type = t->type, .rows = rows, .cols = cols, .data = t->data};
    struct device *d = b->model->device;
    st = d->ops->weight_pack(d, &m, out);
    if (st)
        return error_set(err, st, "tensor '%s' (%s, %zu x %zu) on %s: %s", name,
                         dtype_name(t->type), cols, rows, d->name, status_text(st));
    binder_advance(b, t->bytes);
    return ST_OK;
}

static enum status norm_bind(struct binder *b, const char *name, float **out, struct error *err)
{
    const struct gguf_tensor *t = NULL;
    size_t n = b->model->shape.embed;
    enum status st = tensor_get(b->model->gguf, name, n, 1, &t, err);
    if (st) return st;
    struct device *d = b->model->device;
    float *host = malloc(n * sizeof *host);
    float *device = d->ops->alloc(d, n * sizeof *device);
    st = error_set(err, ST_NOMEM, "out of memory for tensor '%s'", name);
    if (!host || !device) goto done;
    dtype_decode(t->type, t->data, host, n);
    d->ops->write(d, device, host, n * sizeof *device);
    binder_advance(b, t->bytes);
    *out = device;
    device = NULL;
    st = ST_OK;
done:
    if (device) d->ops->free(d, device);
    free(host);
    return st;
}

static enum status layer_bind(struct binder *b, int layer, struct error *err)
{
    struct model_layer *l = &b->model->layers[layer];
    char name[64];
    snprintf(name, sizeof name, "blk.%d.attn_norm.weight", layer);
    enum status st = norm_bind(b, name, &l->attn_norm, err);
    if (st) return st;
    snprintf(name, sizeof name, "blk.%d.ffn_norm.weight", layer);
    st = norm_bind(b, name, &l->ffn_norm, err);
    for (int p = 0; p < PROJ_COUNT && !st; p++) {
        size_t d_in, d_out;
        model_shape_projection(&b->model->shape, (enum projection)p, &d_in, &d_out);
        snprintf(name, sizeof name, "blk.%d.%s.weight", layer, projection_tensor[p]);
        st = matrix_bind(b, name, d_in, d_out, &l->projection[p], err);
    }
    return st;
}

static enum status model_bind(struct binder *b, struct error *err)
{
    struct model *m = b->model;
    for (size_t i = 0; i < gguf_tensor_count(m->gguf); i++)
        b->bytes += gguf_tensor_at(m->gguf, i)->bytes;

    size_t embed = m->shape.embed, vocab = m->shape.vocab;
    enum status st = matrix_bind(b, "token_embd.weight", embed, vocab, &m->embed, err);
    if (st) return st;
    if (gguf_tensor_find(m->gguf, "output.weight"))
        st = matrix_bind(b, "output.weight", embed, vocab, &m->head, err);
    else
        m->head = m->embed;
    if (!st) st = norm_bind(b, "output_norm.weight", &m->output_norm, err);
    for (int l = 0; l < m->shape.layers && !st; l++) st = layer_bind(b, l, err);
    return st;
}

/* Decoded. */
static void tensor_row(const struct gguf_tensor *t, size_t row, float *out)
{
    size_t cols = (size_t)t->dim[0];
    dtype_decode(t->type, (const char *)t->data + row * dtype_row_bytes(t->type, cols), out, cols);
}

void model_weight_row(const struct model *m, int layer, enum projection p, size_t row, float *out)
{
    char name[64];
    snprintf(name, sizeof name, "blk.%d.%s.weight", layer, projection_tensor[p]);
    tensor_row(gguf_tensor_find(m->gguf, name), row, out);
}

void model_head_row(const struct model *m, size_t row, float *out)
{
    const struct gguf_tensor *t = gguf_tensor_find(m->gguf, "output.weight");
    tensor_row(t ? t : gguf_tensor_find(m->gguf, "token_embd.weight"), row, out);
}

/* --- opening ----------------------------------------------------------------------------------- */

/* Metadata and tensor table, that is all before the first tensor's data, and the file's size: two
 * files that agree in these are taken for the same model. */
static void fingerprint_make(const struct model *m, char out[17])
{
    const char *start = m->file.data;
    size_t head = m->file.size;
    for (size_t i = 0; i < gguf_tensor_count(m->gguf); i++) {
        size_t at = (size_t)((const char *)gguf_tensor_at(m->gguf, i)->data - start);
        if (at < head) head = at;
    }
    uint64_t size = m->file.size;
    unsigned char hash[crypto_generichash_BYTES_MIN];
    crypto_generichash_state state;
    crypto_generichash_init(&state, NULL, 0, sizeof hash);
    crypto_generichash_update(&state, m->file.data, head);
    crypto_generichash_update(&state, (const unsigned char *)&size, sizeof size);
    crypto_generichash_final(&state, hash, sizeof hash);
    sodium_bin2hex(out, 17, hash, 8);
}

static enum status model_load(struct model *m, const char *path, struct binder *b,
                              struct error *err)
{
    enum status st = file_map(path, &m->file, err);
    if (st) return st;
    st = gguf_parse(m->file.data, m->file.size, &m->gguf, err);
    if (st) return st;
    st = architecture_check(m->gguf, err);
    if (st) return st;
    st = shape_read(m->gguf, &m->shape, &m->rms_eps, err);
    if (st) return st;
    st = rope_read(m->gguf, (size_t)m->shape.head_dim, &m->rope, err);
    if (st) return st;
    st = tensors_check(m->gguf, m->shape.layers, err);
    if (st) return st;
    m->layers = calloc((size_t)m->shape.layers, sizeof *m->layers);
    if (!m->layers) return error_set(err, ST_NOMEM, "out of memory");
    fingerprint_make(m, m->shape.fingerprint);
    return model_bind(b, err);
}

enum status model_open(const char *path, struct device *device,
                       void (*on_progress)(void *ctx, double done), void *progress_ctx,
                       struct model **out, struct error *err)
{
    struct model *m = calloc(1, sizeof *m);
    if (!m) return error_set(err, ST_NOMEM, "out of memory");
    m->device = device;
    struct binder b = {.model = m, .on_progress = on_progress, .ctx = progress_ctx};
    enum status st = model_load(m, path, &b, err);
    if (st) {
        model_close(m);
        return st;
    }
    *out = m;
    return ST_OK;
}

void model_close(struct model *m)
{
    if (!m) return;
    struct device *d = m->device;
    for (int l = 0; m->layers && l < m->shape.layers; l++) {
        struct model_layer *layer = &m->layers[l];
        for (int p = 0; p < PROJ_COUNT; p++)
            if (layer->projection[p]) d->ops->weight_free(d, layer->projection[p]);
        if (layer->attn_norm) d->ops->free(d, layer->attn_norm);
        if (layer->ffn_norm) d->ops->free(d, layer->ffn_norm);
    }
    if (m->head && m->head != m->embed) d->ops->weight_free(d, m->head);
    if (m->embed) d->ops->weight_free(d, m->embed);
    if (m->output_norm) d->ops->free(d, m->output_norm);
    free(m->layers);
    rope_release(&m->rope);
    gguf_free(m->gguf);
    file_unmap(&m->file);
    free(m);
}

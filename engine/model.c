#include "engine/model.h"

#include "base/utf8.h"
#include "engine/metadata.h"
#include "engine/pack.h"

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

/* Matrices are noted first, then packed together. */
struct matrix_list {
    struct pack_item *items; /* [capacity] */
    size_t count, capacity;
};

static enum status matrix_bind(const struct model *m, struct matrix_list *list, const char *name,
                               size_t cols, size_t rows, struct weight **out, struct error *err)
{
    const struct gguf_tensor *t = NULL;
    enum status st = tensor_get(m->gguf, name, cols, rows, &t, err);
    if (st) return st;
    CHECK(list->count < list->capacity);
    struct pack_item *item = &list->items[list->count++];
    item->matrix = (struct matrix){.type = t->type, .rows = rows, .cols = cols, .data = t->data};
    item->weight = out;
    snprintf(item->name, sizeof item->name, "%s", name);
    return ST_OK;
}

static enum status norm_bind(struct model *m, const char *name, float **out, struct error *err)
{
    const struct gguf_tensor *t = NULL;
    size_t n = m->shape.embed;
    enum status st = tensor_get(m->gguf, name, n, 1, &t, err);
    if (st) return st;
    struct device *d = m->device;
    float *host = malloc(n * sizeof *host);
    float *device = d->ops->alloc(d, n * sizeof *device);
    st = error_set(err, ST_NOMEM, "out of memory for tensor '%s'", name);
    if (!host || !device) goto done;
    dtype_decode(t->type, t->data, host, n);
    d->ops->write(d, device, host, n * sizeof *device);
    *out = device;
    device = NULL;
    st = ST_OK;
done:
    if (device) d->ops->free(d, device);
    free(host);
    return st;
}

static enum status layer_bind(struct model *m, struct matrix_list *list, int layer, struct error *err)
{
    struct model_layer *l = &m->layers[layer];
    char name[64];
    snprintf(name, sizeof name, "blk.%d.attn_norm.weight", layer);
    enum status st = norm_bind(m, name, &l->attn_norm, err);
    if (st) return st;
    snprintf(name, sizeof name, "blk.%d.ffn_norm.weight", layer);
    st = norm_bind(m, name, &l->ffn_norm, err);
    for (int p = 0; p < PROJ_COUNT && !st; p++) {
        size_t d_in, d_out;
        model_shape_projection(&m->shape, (enum projection)p, &d_in, &d_out);
        snprintf(name, sizeof name, "blk.%d.%s.weight", layer, projection_tensor[p]);
        st = matrix_bind(m, list, name, d_in, d_out, &l->projection[p], err);
    }
    return st;
}

static enum status tensors_bind(struct model *m, struct matrix_list *list, struct error *err)
{
    size_t embed = m->shape.embed, vocab = m->shape.vocab;
    enum status st = matrix_bind(m, list, "token_embd.weight", embed, vocab, &m->embed, err);
    if (!st && gguf_tensor_find(m->gguf, "output.weight"))
        st = matrix_bind(m, list, "output.weight", embed, vocab, &m->head, err);
    if (!st) st = norm_bind(m, "output_norm.weight", &m->output_norm, err);
    for (int l = 0; l < m->shape.layers && !st; l++) st = layer_bind(m, list, l, err);
    return st;
}

static enum status model_bind(struct model *m, const struct model_config *config, struct error *err)
{
    struct matrix_list list = {.capacity = (size_t)m->shape.layers * PROJ_COUNT + 2};
    list.items = calloc(list.capacity, sizeof *list.items);
    if (!list.items) return error_set(err, ST_NOMEM, "out of memory");
    enum status st = tensors_bind(m, &list, err);
    if (st) {
        free(list.items);
        return st;
    }
    struct pack_config pack = {.device = m->device, .model = &m->file, .model_path = config->path,
                               .on_progress = config->on_progress,
                               .progress_ctx = config->progress_ctx};
    memcpy(pack.path, config->pack_path, sizeof pack.path);
    st = pack_open(&pack, list.items, list.count, &m->pack, err);
    if (!st && !m->head) m->head = m->embed;
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

static enum status model_load(struct model *m, const struct model_config *config,
                              struct error *err)
{
    enum status st = file_map(config->path, &m->file, err);
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
    return model_bind(m, config, err);
}

enum status model_open(const struct model_config *config, struct model **out, struct error *err)
{
    struct model *m = calloc(1, sizeof *m);
    if (!m) return error_set(err, ST_NOMEM, "out of memory");
    m->device = config->device;
    enum status st = model_load(m, config, err);
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
    pack_close(m->pack); /* first, since it clears the places of its weights, some in `layers` */
    struct device *d = m->device;
    for (int l = 0; m->layers && l < m->shape.layers; l++) {
        struct model_layer *layer = &m->layers[l];
        if (layer->attn_norm) d->ops->free(d, layer->attn_norm);
        if (layer->ffn_norm) d->ops->free(d, layer->ffn_norm);
    }
    if (m->output_norm) d->ops->free(d, m->output_norm);
    free(m->layers);
    rope_release(&m->rope);
    gguf_free(m->gguf);
    file_unmap(&m->file);
    free(m);
}

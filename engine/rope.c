#include "engine/rope.h"

#include "engine/metadata.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TWO_PI 6.283185307179586

enum scaling { SCALING_NONE, SCALING_LINEAR, SCALING_YARN };

struct rope_params {
    enum scaling scaling;
    double base, factor;
    double original_context, attention_factor, beta_fast, beta_slow; /* YaRN */
};

static enum status scaling_read(const struct gguf *g, enum scaling *out, struct error *err)
{
    static const char *const name[] = {"none", "linear", "yarn"};
    struct gguf_string s;
    enum status st = gguf_get_string(g, "llama.rope.scaling.type", &s, err);
    if (st == ST_NOT_FOUND) {
        *out = SCALING_LINEAR; /* older files: llama.rope.scale_linear alone; its default, 1, is none */
        return ST_OK;
    }
    if (st) return st;
    for (int i = SCALING_NONE; i <= SCALING_YARN; i++) {
        if (s.size == strlen(name[i]) && memcmp(s.data, name[i], s.size) == 0) {
            *out = (enum scaling)i;
            return ST_OK;
        }
    }
    return error_set(err, ST_UNSUPPORTED,
                     "metadata 'llama.rope.scaling.type' is '%.*s'; supported: none, linear, yarn",
                     (int)(s.size < 64 ? s.size : 64), s.data);
}

static enum status params_read(const struct gguf *g, struct rope_params *p, struct error *err)
{
    enum status st = scaling_read(g, &p->scaling, err);
    if (st) return st;
    struct metadata m = {.gguf = g, .err = err};
    p->base = metadata_f64(&m, "llama.rope.freq_base", 1.001, 1e12, 10000);
    double linear = metadata_f64(&m, "llama.rope.scale_linear", 1e-3, 1e6, 1);
    p->factor = metadata_f64(&m, "llama.rope.scaling.factor", 1e-3, 1e6, linear);
    double context = metadata_f64(&m, "llama.context_length", 1, 1e9, 1);
    p->original_context =
        metadata_f64(&m, "llama.rope.scaling.original_context_length", 1, 1e9, context);
    double yarn = metadata_f64(&m, "llama.rope.scaling.yarn_attn_factor", 1e-3, 1e3, 1);
    p->attention_factor = metadata_f64(&m, "llama.rope.scaling.attn_factor", 1e-3, 1e3, yarn);
    p->beta_fast = metadata_f64(&m, "llama.rope.scaling.yarn_beta_fast", 1e-3, 1e6, 32);
    p->beta_slow = metadata_f64(&m, "llama.rope.scaling.yarn_beta_slow", 1e-3, 1e6, 1);
    /* Variants that are not implemented, at the values that mean their absence. */
    metadata_f64(&m, "llama.rope.scaling.yarn_ext_factor", 1, 1, 1);
    metadata_f64(&m, "llama.rope.scaling.yarn_log_multiplier", 0, 0, 0);
    metadata_f64(&m, "llama.rope.scaling.alpha", 0, 0, 0);
    return m.status;
}

/* The pair, as a real number, that makes `turns` full turns over the original context
 * (YaRN, section 3.2). */
static double yarn_pair_of_turns(const struct rope_params *p, size_t dims, double turns)
{
    return (double)dims * log(p->original_context / (turns * TWO_PI)) / (2 * log(p->base));
}

static void yarn_scale(const struct rope_params *p, struct rope *r)
{
    size_t pairs = r->dims / 2;
    double low = floor(yarn_pair_of_turns(p, r->dims, p->beta_fast));
    double high = ceil(yarn_pair_of_turns(p, r->dims, p->beta_slow));
    low = fmax(low, 0);
    high = fmin(high, (double)r->dims - 1);
    for (size_t i = 0; i < pairs; i++) {
        double ramp = fmin(fmax(((double)i - low) / fmax(high - low, 0.001), 0), 1);
        double f = r->inv_freq[i];
        r->inv_freq[i] = (float)(f / p->factor * ramp + f * (1 - ramp));
    }
    r->magnitude = (float)(p->attention_factor * (1 + 0.1 * log(p->factor)));
}

/* Llama 3: the file carries a divisor for each pair. */
static enum status factors_apply(const struct gguf *g, struct rope *r, struct error *err)
{
    const struct gguf_tensor *t = gguf_tensor_find(g, "rope_freqs.weight");
    if (!t) return ST_OK;
    size_t pairs = r->dims / 2;
    if (t->type != DTYPE_F32 || t->dim_count != 1 || t->dim[0] != pairs)
        return error_set(err, ST_BAD_FORMAT,
                         "tensor 'rope_freqs.weight' must be F32 of %zu elements", pairs);
    for (size_t i = 0; i < pairs; i++) {
        float factor;
        memcpy(&factor, (const char *)t->data + i * sizeof factor, sizeof factor);
        if (!(factor > 0) || !isfinite(factor))
            return error_set(err, ST_BAD_FORMAT,
                             "tensor 'rope_freqs.weight': element %zu is not positive", i);
        r->inv_freq[i] /= factor;
    }
    return ST_OK;
}

enum status rope_read(const struct gguf *g, size_t head_dim, struct rope *out, struct error *err)
{
    struct rope_params p = {0};
    enum status st = params_read(g, &p, err);
    if (st) return st;
    struct metadata m = {.gguf = g, .err = err};
    struct rope r = {.magnitude = 1};
    r.dims = (size_t)metadata_u64(&m, "llama.rope.dimension_count", 2, head_dim, head_dim);
    if (m.status) return m.status;
    if (r.dims % 2)
        return error_set(err, ST_BAD_FORMAT, "%zu rotated elements of a head: must be even", r.dims);

    r.inv_freq = malloc(r.dims / 2 * sizeof *r.inv_freq);
    if (!r.inv_freq) return error_set(err, ST_NOMEM, "out of memory");
    for (size_t i = 0; i < r.dims / 2; i++)
        r.inv_freq[i] = (float)pow(p.base, -2.0 * (double)i / (double)r.dims);
    if (p.scaling == SCALING_LINEAR)
        for (size_t i = 0; i < r.dims / 2; i++) r.inv_freq[i] /= (float)p.factor;
    if (p.scaling == SCALING_YARN) yarn_scale(&p, &r);
    st = factors_apply(g, &r, err);
    if (st) {
        rope_release(&r);
        return st;
    }
    *out = r;
    return ST_OK;
}

void rope_release(struct rope *r)
{
    free(r->inv_freq);
    *r = (struct rope){0};
}

#include "tests/support/train_oracle.h"

#include "base/file.h"
#include "base/gguf.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"

#include <math.h>
#include <stdlib.h>

struct layer {
    double *attn_norm, *ffn_norm;
    double *projection[PROJ_COUNT]; /* (d_out, d_in) */
};

struct oracle {
    const struct params *params;
    struct file_map file;
    struct gguf *gguf;
    size_t layers, heads, kv_heads, head_dim, embed, ffn, vocab;
    double eps;
    double *frequency; /* (head_dim / 2) */
    double *embedding, *head, *output_norm;
    bool tied; /* head is embedding */
    struct layer *layer;

    /* Of the call under way. */
    const double *value;
    const struct pass_batch *batch;
    const struct pass_loss *loss;
    double balance, contrast; /* summed over sites */
};

static double *doubles(size_t count)
{
    double *x = calloc(count, sizeof *x);
    assert_non_null(x);
    return x;
}

/* --- the model --- */

static const struct gguf_tensor *tensor_find(const struct oracle *o, const char *name)
{
    return gguf_tensor_find(o->gguf, name);
}

static double *tensor_read(const struct oracle *o, const char *name, size_t count)
{
    const struct gguf_tensor *t = tensor_find(o, name);
    if (!t || t->type != DTYPE_F32 || t->bytes != count * sizeof(float))
        fail_msg("oracle: no F32 tensor %s", name);
    double *out = doubles(count);
    const float *from = t->data;
    for (size_t i = 0; i < count; i++) out[i] = (double)from[i];
    return out;
}

static double *layer_tensor(const struct oracle *o, size_t layer, const char *part, size_t count)
{
    return tensor_read(o, test_path("blk.%zu.%s.weight", layer, part).text, count);
}

static size_t number(const struct oracle *o, const char *key)
{
    uint64_t v;
    if (gguf_get_u64(o->gguf, key, &v, NULL)) fail_msg("oracle: no %s", key);
    return (size_t)v;
}

static void shape_read(struct oracle *o)
{
    o->layers = number(o, "llama.block_count");
    o->heads = number(o, "llama.attention.head_count");
    o->kv_heads = number(o, "llama.attention.head_count_kv");
    o->head_dim = number(o, "llama.attention.key_length");
    o->embed = number(o, "llama.embedding_length");
    o->ffn = number(o, "llama.feed_forward_length");
    o->vocab = number(o, "llama.vocab_size");
    assert_int_equal(gguf_get_f64(o->gguf, "llama.attention.layer_norm_rms_epsilon", &o->eps, NULL), ST_OK);
}

static void frequencies_read(struct oracle *o)
{
    double base;
    assert_int_equal(gguf_get_f64(o->gguf, "llama.rope.freq_base", &base, NULL), ST_OK);
    size_t half = o->head_dim / 2;
    double *divisor = tensor_find(o, "rope_freqs.weight") ? tensor_read(o, "rope_freqs.weight", half) : NULL;
    o->frequency = doubles(half);
    for (size_t i = 0; i < half; i++)
        o->frequency[i] = pow(base, -2.0 * (double)i / (double)o->head_dim) / (divisor ? divisor[i] : 1);
    free(divisor);
}

static void layer_read(struct oracle *o, size_t l)
{
    size_t q = o->heads * o->head_dim, kv = o->kv_heads * o->head_dim;
    const struct {
        const char *name;
        size_t out, in;
    } part[PROJ_COUNT] = {
        {"attn_q", q, o->embed},        {"attn_k", kv, o->embed},       {"attn_v", kv, o->embed},
        {"attn_output", o->embed, q},   {"ffn_gate", o->ffn, o->embed}, {"ffn_up", o->ffn, o->embed},
        {"ffn_down", o->embed, o->ffn},
    };
    struct layer *layer = &o->layer[l];
    layer->attn_norm = layer_tensor(o, l, "attn_norm", o->embed);
    layer->ffn_norm = layer_tensor(o, l, "ffn_norm", o->embed);
    for (int p = 0; p < PROJ_COUNT; p++)
        layer->projection[p] = layer_tensor(o, l, part[p].name, part[p].out * part[p].in);
}

struct oracle *oracle_open(const char *model_path, const struct params *params)
{
    struct oracle *o = calloc(1, sizeof *o);
    assert_non_null(o);
    o->params = params;
    struct error err;
    assert_ok(file_map(model_path, &o->file, &err), err);
    assert_ok(gguf_parse(o->file.data, o->file.size, &o->gguf, &err), err);
    shape_read(o);
    frequencies_read(o);
    o->embedding = tensor_read(o, "token_embd.weight", o->vocab * o->embed);
    o->output_norm = tensor_read(o, "output_norm.weight", o->embed);
    o->tied = !tensor_find(o, "output.weight");
    o->head = o->tied ? o->embedding : tensor_read(o, "output.weight", o->vocab * o->embed);
    o->layer = calloc(o->layers, sizeof *o->layer);
    assert_non_null(o->layer);
    for (size_t l = 0; l < o->layers; l++) layer_read(o, l);
    return o;
}

void oracle_close(struct oracle *o)
{
    for (size_t l = 0; l < o->layers; l++) {
        free(o->layer[l].attn_norm);
        free(o->layer[l].ffn_norm);
        for (int p = 0; p < PROJ_COUNT; p++) free(o->layer[l].projection[p]);
    }
    free(o->layer);
    if (!o->tied) free(o->head);
    free(o->embedding);
    free(o->output_norm);
    free(o->frequency);
    gguf_free(o->gguf);
    file_unmap(&o->file);
    free(o);
}

/* --- losses of a routed site --- */

static uint64_t splitmix64(uint64_t x)
{
    uint64_t z = x + 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* Whether fewer than `count` rows come before this one in the order of their hashes. */
static bool sampled(const struct oracle *o, const struct train_site *s, int row, int count)
{
    uint64_t site = (uint64_t)(s - o->params->site) << 32;
    uint64_t own = splitmix64(o->loss->seed ^ site ^ (uint64_t)row);
    int before = 0;
    for (int r = 0; r < o->batch->rows; r++) before += splitmix64(o->loss->seed ^ site ^ (uint64_t)r) < own;
    return before < count;
}

static void balance_add(struct oracle *o, const struct train_site *s, const double *p, const double *g)
{
    double rows = o->batch->rows, sum = 0;
    for (int e = 0; e < s->experts; e++) {
        double chosen = 0, probability = 0;
        for (int r = 0; r < o->batch->rows; r++) {
            chosen += g[r * s->experts + e] != 0;
            probability += p[r * s->experts + e];
        }
        sum += chosen / rows * (probability / rows);
    }
    o->balance += s->experts * sum;
}

/* A chosen expert's output at a sampled row, of length 1. */
struct pair {
    int expert;
    double *output; /* (d_out) */
};

static double dot(const double *a, const double *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* -1/|P| sum over positives of log(exp(s / t) / sum over all others); NaN for an anchor without positives. */
static double anchor_loss(const struct pair *pair, int count, int a, size_t d_out, double temperature)
{
    double all = 0, positive = 0;
    int positives = 0;
    for (int i = 0; i < count; i++) {
        if (i == a) continue;
        double s = dot(pair[a].output, pair[i].output, d_out) / temperature;
        all += exp(s);
        if (pair[i].expert != pair[a].expert) continue;
        positive += s;
        positives++;
    }
    return positives ? log(all) - positive / positives : (double)NAN;
}

/* outputs (rows, experts, d_out), unscaled. */
static void contrast_add(struct oracle *o, const struct train_site *s, const double *g, double *outputs)
{
    int chosen = s->rule == GATE_DENSE ? s->experts : s->top_k, count = 0, anchors = 0;
    int rows = o->loss->pairs / chosen > 1 ? o->loss->pairs / chosen : 1;
    struct pair *pair = malloc((size_t)o->batch->rows * (size_t)s->experts * sizeof *pair);
    assert_non_null(pair);
    for (int r = 0; r < o->batch->rows; r++) {
        for (int e = 0; e < s->experts; e++) {
            int i = r * s->experts + e;
            if (g[i] == 0 || !sampled(o, s, r, rows)) continue;
            double *output = outputs + (size_t)i * s->d_out, length = sqrt(dot(output, output, s->d_out));
            for (size_t k = 0; k < s->d_out; k++) output[k] /= length;
            pair[count++] = (struct pair){e, output};
        }
    }
    double sum = 0;
    for (int a = 0; a < count; a++) {
        double loss = anchor_loss(pair, count, a, s->d_out, o->loss->temperature);
        if (isnan(loss)) continue;
        sum += loss;
        anchors++;
    }
    free(pair);
    if (anchors) o->contrast += sum / anchors;
}

/* --- a site --- */

/* One row's p and g, (experts) each. */
static void route(const struct oracle *o, const struct train_site *s, const double *x, double *p, double *g)
{
    double sum = 0, kept = 0;
    for (int e = 0; e < s->experts; e++) {
        p[e] = exp(dot(o->value + s->router + (size_t)e * s->d_in, x, s->d_in) / (double)s->temperature);
        sum += p[e];
    }
    for (int e = 0; e < s->experts; e++) p[e] /= sum;
    for (int e = 0; e < s->experts; e++) {
        int above = 0;
        for (int i = 0; i < s->experts; i++) above += p[i] > p[e] || (p[i] == p[e] && i < e);
        g[e] = s->rule == GATE_DENSE || above < s->top_k ? p[e] : 0;
        kept += g[e];
    }
    if (s->rule == GATE_TOPK)
        for (int e = 0; e < s->experts; e++) g[e] /= kept;
}

/* out = B (A x) of one expert. */
static void expert_run(const struct oracle *o, const struct train_site *s, int expert, const double *x,
                       double *out)
{
    for (size_t k = 0; k < s->d_out; k++) out[k] = 0;
    for (size_t j = 0; j < (size_t)s->rank; j++) {
        size_t row = (size_t)expert * (size_t)s->rank + j;
        double z = dot(o->value + s->a + row * s->d_in, x, s->d_in);
        for (size_t k = 0; k < s->d_out; k++) out[k] += z * o->value[s->bt + row * s->d_out + k];
    }
}

/* y += delta(x) for all rows, and the site's share of the losses. */
static void site_add(struct oracle *o, const struct train_site *s, const double *x, double *y)
{
    size_t pairs = (size_t)o->batch->rows * (size_t)s->experts;
    double *p = doubles(pairs), *g = doubles(pairs), *outputs = doubles(pairs * s->d_out);
    for (size_t r = 0; r < (size_t)o->batch->rows; r++) {
        size_t first = r * (size_t)s->experts;
        if (s->rule == GATE_NONE)
            g[first] = 1;
        else
            route(o, s, x + r * s->d_in, p + first, g + first);
        for (int e = 0; e < s->experts; e++) {
            double *out = outputs + (first + (size_t)e) * s->d_out;
            expert_run(o, s, e, x + r * s->d_in, out);
            double scale = (double)s->scale_host[e] * g[first + (size_t)e];
            for (size_t k = 0; k < s->d_out; k++) y[r * s->d_out + k] += scale * out[k];
        }
    }
    if (o->loss && s->rule != GATE_NONE) {
        balance_add(o, s, p, g);
        contrast_add(o, s, g, outputs);
    }
    free(p);
    free(g);
    free(outputs);
}

/* --- the forward pass; all arrays (rows, ...) --- */

static void project(struct oracle *o, size_t layer, enum projection p, size_t d_in, size_t d_out,
                    const double *x, double *y)
{
    const double *w = o->layer[layer].projection[p];
    for (size_t r = 0; r < (size_t)o->batch->rows; r++)
        for (size_t k = 0; k < d_out; k++) y[r * d_out + k] = dot(w + k * d_in, x + r * d_in, d_in);
    const struct train_site *s = o->params->place[layer * PROJ_COUNT + p];
    if (s) site_add(o, s, x, y);
}

static void normalise(const struct oracle *o, const double *weight, size_t rows, const double *x, double *y)
{
    for (size_t r = 0; r < rows; r++) {
        const double *row = x + r * o->embed;
        double factor = 1 / sqrt(dot(row, row, o->embed) / (double)o->embed + o->eps);
        for (size_t i = 0; i < o->embed; i++) y[r * o->embed + i] = row[i] * factor * weight[i];
    }
}

/* Neighbours turn as pairs: the order of rows in a GGUF file. */
static void rotate(const struct oracle *o, size_t heads, double *x)
{
    for (int q = 0; q < o->batch->seq_count; q++) {
        int first = o->batch->first_row[q];
        for (int r = first; r < o->batch->first_row[q + 1]; r++) {
            for (size_t i = 0; i < heads * o->head_dim / 2; i++) {
                double angle = (r - first) * o->frequency[i % (o->head_dim / 2)];
                double *pair = x + (size_t)r * heads * o->head_dim + 2 * i, a = pair[0], b = pair[1];
                pair[0] = a * cos(angle) - b * sin(angle);
                pair[1] = a * sin(angle) + b * cos(angle);
            }
        }
    }
}

/* One row's attention with one head over rows first .. row. */
static void attend_row(const struct oracle *o, size_t head, int first, int row, const double *q,
                       const double *k, const double *v, double *y)
{
    size_t d = o->head_dim, kv_head = head / (o->heads / o->kv_heads);
    const double *query = q + ((size_t)row * o->heads + head) * d;
    double *out = y + ((size_t)row * o->heads + head) * d, sum = 0;
    for (size_t i = 0; i < d; i++) out[i] = 0;
    for (int r = first; r <= row; r++) {
        size_t at = ((size_t)r * o->kv_heads + kv_head) * d;
        double weight = exp(dot(query, k + at, d) / sqrt((double)d));
        sum += weight;
        for (size_t i = 0; i < d; i++) out[i] += weight * v[at + i];
    }
    for (size_t i = 0; i < d; i++) out[i] /= sum;
}

static void attend(const struct oracle *o, const double *q, const double *k, const double *v, double *y)
{
    for (int s = 0; s < o->batch->seq_count; s++)
        for (int r = o->batch->first_row[s]; r < o->batch->first_row[s + 1]; r++)
            for (size_t h = 0; h < o->heads; h++) attend_row(o, h, o->batch->first_row[s], r, q, k, v, y);
}

static void add(double *x, const double *y, size_t n)
{
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

static void attention_run(struct oracle *o, size_t l, double *x)
{
    size_t rows = (size_t)o->batch->rows, q_cols = o->heads * o->head_dim,
           kv_cols = o->kv_heads * o->head_dim;
    double *normed = doubles(rows * o->embed), *q = doubles(rows * q_cols), *k = doubles(rows * kv_cols),
           *v = doubles(rows * kv_cols), *attended = doubles(rows * q_cols);
    normalise(o, o->layer[l].attn_norm, rows, x, normed);
    project(o, l, PROJ_Q, o->embed, q_cols, normed, q);
    project(o, l, PROJ_K, o->embed, kv_cols, normed, k);
    project(o, l, PROJ_V, o->embed, kv_cols, normed, v);
    rotate(o, o->heads, q);
    rotate(o, o->kv_heads, k);
    attend(o, q, k, v, attended);
    project(o, l, PROJ_O, q_cols, o->embed, attended, normed);
    add(x, normed, rows * o->embed);
    free(normed);
    free(q);
    free(k);
    free(v);
    free(attended);
}

static void ffn_run(struct oracle *o, size_t l, double *x)
{
    size_t rows = (size_t)o->batch->rows;
    double *normed = doubles(rows * o->embed), *gate = doubles(rows * o->ffn), *up = doubles(rows * o->ffn);
    normalise(o, o->layer[l].ffn_norm, rows, x, normed);
    project(o, l, PROJ_GATE, o->embed, o->ffn, normed, gate);
    project(o, l, PROJ_UP, o->embed, o->ffn, normed, up);
    for (size_t i = 0; i < rows * o->ffn; i++) gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
    project(o, l, PROJ_DOWN, o->ffn, o->embed, gate, normed);
    add(x, normed, rows * o->embed);
    free(normed);
    free(gate);
    free(up);
}

/* -log p(target) of a row, from the last layer's output. */
static double row_loss(const struct oracle *o, const double *x, int target)
{
    double *normed = doubles(o->embed), sum = 0, wanted = 0;
    normalise(o, o->output_norm, 1, x, normed);
    for (size_t t = 0; t < o->vocab; t++) {
        double logit = dot(o->head + t * o->embed, normed, o->embed);
        sum += exp(logit);
        if ((int)t == target) wanted = logit;
    }
    free(normed);
    return log(sum) - wanted;
}

double oracle_loss(struct oracle *o, const double *value, const struct pass_batch *batch,
                   const struct pass_loss *loss)
{
    o->value = value;
    o->batch = batch;
    o->loss = loss;
    o->balance = o->contrast = 0;
    double *x = doubles((size_t)batch->rows * o->embed), ce = 0;
    for (int r = 0; r < batch->rows; r++)
        for (size_t i = 0; i < o->embed; i++)
            x[(size_t)r * o->embed + i] = o->embedding[(size_t)batch->token[r] * o->embed + i];
    for (size_t l = 0; l < o->layers; l++) {
        attention_run(o, l, x);
        ffn_run(o, l, x);
    }
    for (int r = 0; r < batch->rows; r++)
        if (batch->weight[r] != 0)
            ce += (double)batch->weight[r] * row_loss(o, x + (size_t)r * o->embed, batch->target[r]);
    free(x);
    if (!loss) return ce;
    int sites = o->params->routed_count;
    return ce + (loss->balance * o->balance + loss->contrast * o->contrast) / sites;
}

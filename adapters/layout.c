#include "adapters/layout.h"

#include "adapters/reader_int.h"

#include <math.h>
#include <string.h>

#define DORA_GAIN_MAX 1e4

/* --- matrices --- */

/* A part's matrix in the given type. The file's own bytes where it has that type already. */
static const void *part_as(struct adapter_bundle *b, const struct part *p, enum dtype type)
{
    if (p->type == type) return p->data;
    size_t n = p->rows * p->cols;
    float *copy = bundle_alloc(b, n, sizeof *copy);
    if (copy) dtype_decode(p->type, p->data, copy, n);
    return copy;
}

/* B with its rows in the order of a GGUF file of the llama architecture: within each head of d
 * rows, row s * d/2 + j of the Hugging Face order (s = 0, 1: the half; j: the pair) is row 2 j + s
 * there, because its rotation turns adjacent rows. */
static const void *rows_permuted(struct adapter_bundle *b, const void *data, size_t rows, size_t row_bytes,
                                 size_t heads)
{
    size_t d = rows / heads, half = d / 2;
    uint8_t *out = bundle_alloc(b, rows, row_bytes);
    if (!out) return NULL;
    for (size_t h = 0; h < heads; h++) {
        for (size_t i = 0; i < d; i++) {
            size_t from = h * d + (i % 2) * half + i / 2;
            memcpy(out + (h * d + i) * row_bytes, (const uint8_t *)data + from * row_bytes, row_bytes);
        }
    }
    return out;
}

/* Heads whose rows of this projection's B must be permuted; 0: as they stand. */
static size_t permuted_heads(const struct adapter_base *base, bool in_base_order, enum projection p)
{
    if (!base || !base->qk_permuted || in_base_order) return 0;
    return p == PROJ_Q ? (size_t)base->heads : p == PROJ_K ? (size_t)base->kv_heads : 0;
}

/* What belongs to B's rows, as (rows, cols) of that type in the base model's order. */
static const void *outputs_as(struct adapter_bundle *b, const struct part *p, enum dtype type, size_t heads)
{
    const void *data = part_as(b, p, type);
    if (!data || !heads) return data;
    return rows_permuted(b, data, p->rows, dtype_row_bytes(type, p->cols), heads);
}

/* The common type of the experts' matrices: their own if they share one that kernels take, else F32. */
static enum dtype common_type(const struct site_parts *s)
{
    enum dtype type = s->a->type;
    if (s->magnitude || (type != DTYPE_F16 && type != DTYPE_BF16)) return DTYPE_F32;
    for (int e = 0; e < s->a_count; e++)
        if (s->a[e].type != type) return DTYPE_F32;
    for (int e = 0; e < s->experts; e++)
        if (s->b[e].type != type) return DTYPE_F32;
    return type;
}

/* --- DoRA --- */

/* The norm of a row of W + s B A. w: (d_in), holds the row of W. */
static double direction_norm(float *w, size_t d_in, const float *a, const float *b_row, int rank, float scale)
{
    for (int r = 0; r < rank; r++) {
        float f = scale * b_row[r];
        const float *a_row = a + (size_t)r * d_in;
        for (size_t j = 0; j < d_in; j++) w[j] += f * a_row[j];
    }
    double sum = 0;
    for (size_t j = 0; j < d_in; j++) sum += (double)w[j] * w[j];
    return sqrt(sum);
}

/* DoRA (arXiv 2402.09353): y = m / |W + s B A| o (W x + s B A x), the norm by rows. With g = m / |...|
 * that is W x + (g - 1) o (W x) + s (g o B) A x: g goes into B, and g - 1 becomes the site's base_gain.
 * The site's B is F32 here. */
static enum status dora_fold(struct adapter_bundle *b, const struct adapter_base *base,
                             const struct site_parts *s, size_t heads, float scale,
                             struct lr_site_source *site, struct error *err)
{
    size_t rank = (size_t)site->rank, n = site->d_out;
    const struct module *module = &s->magnitude->module;
    const char *m = outputs_as(b, s->magnitude, DTYPE_F32, heads); /* floats, not aligned */
    float *a = bundle_alloc(b, rank * site->d_in, sizeof *a);
    float *folded = bundle_alloc(b, n * rank, sizeof *folded);
    float *gain = bundle_alloc(b, n, sizeof *gain);
    float *w = bundle_alloc(b, site->d_in, sizeof *w);
    const void **bs = bundle_alloc(b, 1, sizeof *bs);
    if (!m || !a || !folded || !gain || !w || !bs) return ST_NOMEM;
    dtype_decode(s->a->type, s->a->data, a, rank * site->d_in);
    memcpy(folded, site->b[0], n * rank * sizeof *folded);
    for (size_t i = 0; i < n; i++) {
        float magnitude, *row = folded + i * rank;
        memcpy(&magnitude, m + i * sizeof magnitude, sizeof magnitude);
        base->row(base->model, module->layer, module->projection, i, w);
        double g = magnitude / direction_norm(w, site->d_in, a, row, site->rank, scale);
        if (!(fabs(g) <= DORA_GAIN_MAX))
            return error_set(
                err, ST_REJECTED,
                "tensor '%s' makes row %zu of the base model's weights %g times as long; at most %g "
                "is sensible, so the adapter is for another base model",
                s->magnitude->name, i, g, DORA_GAIN_MAX);
        for (size_t r = 0; r < rank; r++) row[r] *= (float)g;
        gain[i] = (float)(g - 1);
    }
    bs[0] = folded;
    site->b = bs;
    site->base_gain = gain;
    return ST_OK;
}

/* --- sites --- */

int site_top_k(const struct site_rules *rules, int layer, int experts)
{
    const cJSON *k = rules->top_k_by_layer ? cJSON_GetArrayItem(rules->top_k_by_layer, layer) : NULL;
    if (k) return k->valueint;
    return rules->top_k ? rules->top_k : experts;
}

static void gate_fill(struct lr_site_source *site, const struct site_rules *rules, int layer, int experts)
{
    site->experts = experts;
    site->rule = rules->rule;
    site->top_k = site_top_k(rules, layer, experts);
    site->temperature = rules->temperature;
    site->top_p = rules->top_p;
    site->threshold =
        rules->rule == GATE_ADA_THRESHOLD && rules->threshold == 0 ? 1.0f / (float)experts : rules->threshold;
}

/* The router and its threshold row, which have one type. */
static enum status router_fill(struct adapter_bundle *b, const struct site_parts *s,
                               struct lr_site_source *site)
{
    if (!s->router) return ST_OK;
    const struct part *t = s->threshold;
    site->router_type = !t || t->type == s->router->type ? s->router->type : DTYPE_F32;
    site->router = part_as(b, s->router, site->router_type);
    if (t) site->threshold_row = part_as(b, t, site->router_type);
    if (s->threshold_bias)
        dtype_decode(s->threshold_bias->type, s->threshold_bias->data, &site->threshold_bias, 1);
    return site->router && (!t || site->threshold_row) ? ST_OK : ST_NOMEM;
}

static enum status bias_fill(struct adapter_bundle *b, const struct part *bias, size_t heads, float scale,
                             struct lr_site_source *site)
{
    const float *values = outputs_as(b, bias, DTYPE_F32, heads);
    float *scaled = bundle_alloc(b, site->d_out, sizeof *scaled);
    if (!values || !scaled) return ST_NOMEM;
    for (size_t i = 0; i < site->d_out; i++) {
        float x;
        memcpy(&x, (const char *)values + i * sizeof x, sizeof x);
        scaled[i] = scale * x;
    }
    site->bias = scaled;
    return ST_OK;
}

static enum status halves_fill(struct adapter_bundle *b, const struct site_parts *s, size_t heads,
                               float scale, struct lr_site_source *site)
{
    size_t n = (size_t)s->experts;
    const void **as = bundle_alloc(b, n, sizeof *as), **bs = bundle_alloc(b, n, sizeof *bs);
    float *scales = bundle_alloc(b, n, sizeof *scales);
    if (!as || !bs || !scales) return ST_NOMEM;
    for (size_t e = 0; e < n; e++) {
        as[e] = (int)e < s->a_count ? part_as(b, &s->a[e], site->type) : as[0];
        bs[e] = outputs_as(b, &s->b[e], site->type, heads);
        if (!as[e] || !bs[e]) return ST_NOMEM;
        scales[e] = scale;
    }
    site->a = as;
    site->b = bs;
    site->scale = scales;
    return ST_OK;
}

enum status site_layout(struct adapter_bundle *b, const struct adapter_base *base,
                        const struct format_rules *rules, const struct site_rules *site_rules,
                        const struct site_parts *s, float scale, struct lr_site_source **out,
                        struct error *err)
{
    const struct module *m = &s->a->module;
    size_t heads = permuted_heads(base, rules->in_base_order, m->projection);
    struct lr_site_source *site = bundle_alloc(b, 1, sizeof *site);
    if (!site) return ST_NOMEM;
    site->rank = (int)s->a->rows;
    site->d_in = s->a->cols;
    site->d_out = s->b->rows;
    site->type = common_type(s);
    site->shared_a = site_rules->shared_a;
    gate_fill(site, site_rules, m->layer, s->experts);
    enum status st = router_fill(b, s, site);
    if (!st) st = halves_fill(b, s, heads, scale, site);
    if (!st && s->bias) st = bias_fill(b, s->bias, heads, scale, site);
    b->dora |= s->magnitude != NULL;
    if (!st && s->magnitude && base) st = dora_fold(b, base, s, heads, scale, site, err);
    if (st) return st;
    *out = site;
    return ST_OK;
}

enum status router_layout(struct adapter_bundle *b, const struct site_rules *rules, const struct part *router,
                          struct lr_site_source **out)
{
    struct lr_site_source *site = bundle_alloc(b, 1, sizeof *site);
    if (!site) return ST_NOMEM;
    site->d_in = router->cols;
    site->type = DTYPE_F32;
    gate_fill(site, rules, router->module.layer, (int)router->rows);
    enum status st = router_fill(b, &(struct site_parts){.router = router}, site);
    if (!st) *out = site;
    return st;
}

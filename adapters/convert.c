#include "adapters/convert.h"

#include "adapters/package.h"
#include "adapters/parts.h"
#include "adapters/reader_int.h"
#include "base/safetensors.h"
#include "base/strbuf.h"

#include <stdio.h>
#include <string.h>

#define NAME_SIZE 160

struct conversion {
    const struct adapter_bundle *bundle;
    const struct convert_heads *heads;
    bool peft;
    const struct lr_site_source *first; /* whose settings the others share, or are exceptions to */
    struct adapter_block *memory;       /* owned: names, and rows in another order */
    struct safetensor *tensor;
    size_t count;
};

static const char *const gates[GATE_RULE_COUNT] = {
    [GATE_NONE] = "none",         [GATE_DENSE] = "dense",         [GATE_TOPK] = "topk",
    [GATE_TOPK_RAW] = "topk_raw", [GATE_THRESHOLD] = "threshold", [GATE_ADA_THRESHOLD] = "ada_threshold",
};

/* A site of the bundle, or NULL, and its module's name. */
static const struct lr_site_source *site_at(const struct adapter_bundle *b, int i,
                                            char name[MODULE_NAME_SIZE])
{
    struct module m = {i / PROJ_COUNT, (enum projection)(i % PROJ_COUNT), ""};
    module_name(&m, name);
    return b->sites[i];
}

/* --- what the formats cannot say --- */

static enum status refuse(struct error *err, const char *site, const char *why)
{
    return error_set(err, ST_UNSUPPORTED, "the adapter cannot be converted: %s %s", site, why);
}

/* What neither format has. */
static enum status site_check(const struct lr_site_source *s, const struct lr_site_source *first,
                              const char *name, struct error *err)
{
    if (s->rule == GATE_FFN) return refuse(err, name, "is routed with its whole FFN (MixLoRA)");
    if (!gates[s->rule]) return refuse(err, name, "has a gate that MoELoRA has not");
    if (s->bias) return refuse(err, name, "has a bias on B");
    for (int e = 1; e < s->experts; e++)
        if (s->scale[e] != s->scale[0]) return refuse(err, name, "has experts of different scales");
    if (s->rule != first->rule) return refuse(err, name, "has another gate than the first site");
    bool by_k = s->rule == GATE_TOPK || s->rule == GATE_TOPK_RAW;
    if (by_k && s->top_k != first->top_k) return refuse(err, name, "has another top_k than the first site");
    if (s->temperature != first->temperature || s->threshold != first->threshold)
        return refuse(err, name, "has another temperature or threshold than the first site");
    return ST_OK;
}

static enum status bundle_check(struct conversion *c, enum convert_format format, struct error *err)
{
    const struct adapter_bundle *b = c->bundle;
    char name[MODULE_NAME_SIZE];
    enum status st = ST_OK;
    if (b->dora) return refuse(err, "it", "is DoRA, whose magnitudes depend on the base model's weights");
    c->peft = format != CONVERT_MOELORA;
    for (int i = 0; i < b->layers * PROJ_COUNT && !st; i++) {
        const struct lr_site_source *s = site_at(b, i, name);
        if (!s) continue;
        if (!c->first) c->first = s;
        st = site_check(s, c->first, name, err);
        if (s->experts == 1 && s->rule == GATE_NONE) continue;
        if (!st && format == CONVERT_PEFT)
            st =
                refuse(err, name, "is a mixture of experts, which PEFT's LoRA is not; convert it to moelora");
        c->peft = false;
    }
    return st;
}

/* --- tensors --- */

static enum status tensor_add(struct conversion *c, const char *site, const char *part, enum dtype type,
                              size_t rows, size_t cols, const void *data)
{
    char *name = blocks_alloc(&c->memory, 1, NAME_SIZE);
    if (!name) return ST_NOMEM;
    snprintf(name, NAME_SIZE, "base_model.model.model.%s.%s", site, part);
    c->tensor[c->count++] = (struct safetensor){.name = name,
                                                .type = type,
                                                .dim_count = rows ? 2 : 1,
                                                .dim = {rows ? rows : cols, rows ? cols : 1, 1, 1},
                                                .data = data,
                                                .bytes = (rows ? rows : 1) * dtype_row_bytes(type, cols)};
    return ST_OK;
}

/* B in Hugging Face's order: row 2 j + s of a head's d rows goes back to row s * d/2 + j, as in layout.c. */
static enum status rows_restored(struct conversion *c, const struct lr_site_source *s, enum projection p,
                                 const char *site, const void **rows, struct error *err)
{
    if (!c->bundle->qk_permuted || p > PROJ_K) return ST_OK;
    size_t heads = (size_t)(p == PROJ_Q ? c->heads->heads : c->heads->kv_heads);
    size_t d = (size_t)c->heads->head_dim, bytes = dtype_row_bytes(s->type, (size_t)s->rank);
    if (!heads || !d)
        return error_set(err, ST_INVALID,
                         "rows of %s are in a GGUF file's order, which the base model's heads tell: "
                         "name it with --model",
                         site);
    if (d % 2 || s->d_out % d || s->d_out / d != heads)
        return error_set(err, ST_INVALID, "%s has %zu rows, but the model has %zu heads of %zu", site,
                         s->d_out, heads, d);
    uint8_t *out = blocks_alloc(&c->memory, s->d_out, bytes);
    if (!out) return ST_NOMEM;
    for (size_t i = 0; i < s->d_out; i++) {
        size_t in_head = i % d, to = i - in_head + in_head % 2 * (d / 2) + in_head / 2;
        memcpy(out + to * bytes, (const uint8_t *)*rows + i * bytes, bytes);
    }
    *rows = out;
    return ST_OK;
}

static enum status pair_add(struct conversion *c, const struct lr_site_source *s, int e, enum projection p,
                            const char *site, struct error *err)
{
    char part[48], expert[24] = "";
    const void *rows = s->b[e];
    enum status st = rows_restored(c, s, p, site, &rows, err);
    if (st) return st;
    if (!c->peft) snprintf(expert, sizeof expert, "experts.%d.", e);
    snprintf(part, sizeof part, "%slora_A.weight", expert);
    st = tensor_add(c, site, part, s->type, (size_t)s->rank, s->d_in, s->a[e]);
    if (st) return st;
    snprintf(part, sizeof part, "%slora_B.weight", expert);
    return tensor_add(c, site, part, s->type, s->d_out, (size_t)s->rank, rows);
}

static enum status site_add(struct conversion *c, const struct lr_site_source *s, enum projection p,
                            const char *site, struct error *err)
{
    enum status st = ST_OK;
    for (int e = 0; e < s->experts && !st; e++) st = pair_add(c, s, e, p, site, err);
    if (!st && s->router)
        st = tensor_add(c, site, "moe_gate.weight", s->router_type, (size_t)s->experts, s->d_in, s->router);
    if (st || !s->threshold_row) return st;
    st = tensor_add(c, site, "moe_threshold.weight", s->router_type, 1, s->d_in, s->threshold_row);
    return st ? st : tensor_add(c, site, "moe_threshold.bias", DTYPE_F32, 0, 1, &s->threshold_bias);
}

static enum status tensors_write(struct conversion *c, struct strbuf *out, struct error *err)
{
    const struct adapter_bundle *b = c->bundle;
    char name[MODULE_NAME_SIZE];
    size_t most = 0;
    for (int i = 0; i < b->layers * PROJ_COUNT; i++)
        if (b->sites[i]) most += 2 * (size_t)b->sites[i]->experts + 3;
    c->tensor = blocks_alloc(&c->memory, most, sizeof *c->tensor);
    enum status st = c->tensor ? ST_OK : ST_NOMEM;
    for (int i = 0; i < b->layers * PROJ_COUNT && !st; i++) {
        const struct lr_site_source *s = site_at(b, i, name);
        if (s) st = site_add(c, s, (enum projection)(i % PROJ_COUNT), name, err);
    }
    if (!st) safetensors_write(c->tensor, c->count, out);
    return st;
}

/* --- the configuration --- */

/* Exact in a double, so that alpha / rank is the scale again. */
static double alpha_of(const struct lr_site_source *s) { return (double)s->scale[0] * s->rank; }

static double rank_of(const struct lr_site_source *s) { return s->rank; }

/* "layers.3.self_attn.q_proj": 8 for each site that is an exception, in PEFT's spelling. */
static void pattern_put(const struct conversion *c, const char *key,
                        double (*value)(const struct lr_site_source *s), struct strbuf *out)
{
    char name[MODULE_NAME_SIZE];
    const char *comma = "";
    strbuf_printf(out, "  \"%s\": {", key);
    for (int i = 0; i < c->bundle->layers * PROJ_COUNT; i++) {
        const struct lr_site_source *s = site_at(c->bundle, i, name);
        if (!s || value(s) == value(c->first)) continue;
        strbuf_printf(out, "%s\n    \"%s\": %.17g", comma, name, value(s));
        comma = ",";
    }
    strbuf_puts(out, "},\n");
}

static void gate_put(const struct lr_site_source *s, struct strbuf *out)
{
    strbuf_printf(out, "  \"gate\": \"%s\",\n", gates[s->rule]);
    if (s->rule == GATE_NONE) return;
    strbuf_printf(out, "  \"temperature\": %.9g,\n", (double)s->temperature);
    if (s->rule == GATE_TOPK || s->rule == GATE_TOPK_RAW) strbuf_printf(out, "  \"top_k\": %d,\n", s->top_k);
    if (s->rule == GATE_THRESHOLD) strbuf_printf(out, "  \"threshold\": %.9g,\n", (double)s->threshold);
    if (s->rule == GATE_ADA_THRESHOLD)
        strbuf_printf(out, "  \"max_threshold\": %.9g,\n", (double)s->threshold);
}

/* Every module is named, with its layer: the base model may have more. */
static void config_write(const struct conversion *c, struct strbuf *out)
{
    char name[MODULE_NAME_SIZE];
    const char *comma = "";
    strbuf_printf(out, "{\n  \"peft_type\": \"%s\",\n  \"task_type\": \"CAUSAL_LM\",\n",
                  c->peft ? "LORA" : "MOELORA");
    strbuf_puts(out, "  \"base_model_name_or_path\": null,\n  \"inference_mode\": true,\n");
    strbuf_printf(out, "  \"r\": %d,\n  \"lora_alpha\": %.17g,\n", c->first->rank, alpha_of(c->first));
    if (!c->peft) gate_put(c->first, out);
    pattern_put(c, "rank_pattern", rank_of, out);
    pattern_put(c, "alpha_pattern", alpha_of, out);
    strbuf_puts(out, "  \"target_modules\": [");
    for (int i = 0; i < c->bundle->layers * PROJ_COUNT; i++) {
        if (!site_at(c->bundle, i, name)) continue;
        strbuf_printf(out, "%s\n    \"%s\"", comma, name);
        comma = ",";
    }
    strbuf_puts(out, "]\n}\n");
}

/* --- both --- */

enum status bundle_convert(const struct adapter_bundle *b, enum convert_format format,
                           const struct convert_heads *heads, struct strbuf *config, struct strbuf *tensors,
                           struct error *err)
{
    struct conversion c = {.bundle = b, .heads = heads};
    size_t config_at = config->size, tensors_at = tensors->size;
    struct adapter_bundle *again = NULL;
    enum status st = bundle_check(&c, format, err);
    if (!st) st = tensors_write(&c, tensors, err);
    if (!st) config_write(&c, config);
    if (config->failed || tensors->failed) st = ST_NOMEM;
    blocks_free(&c.memory);
    if (!st) /* limits of numbers and counts are the reader's to know */
        st = adapter_read(config->data + config_at, config->size - config_at, tensors->data + tensors_at,
                          tensors->size - tensors_at, NULL, &again, err);
    adapter_bundle_free(again);
    return st == ST_NOMEM ? error_set(err, st, "not enough memory to convert the adapter") : st;
}

enum status adapter_convert(const char *path, enum convert_format format, const struct convert_heads *heads,
                            struct strbuf *config, struct strbuf *tensors, struct error *err)
{
    struct package p = {0};
    struct adapter_bundle *b = NULL;
    enum status st = package_map_path(path, &p, err);
    if (!st) st = adapter_read(p.config.data, p.config.size, p.tensors.data, p.tensors.size, NULL, &b, err);
    if (!st) st = bundle_convert(b, format, heads, config, tensors, err);
    adapter_bundle_free(b);
    package_close(&p);
    return st;
}

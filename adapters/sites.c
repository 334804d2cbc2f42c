#include "adapters/layout.h"
#include "adapters/parts.h"
#include "adapters/reader_int.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- one site --- */

struct build {
    const struct format_rules *rules;
    const struct adapter_base *base; /* may be NULL */
    struct adapter_bundle *bundle;
};

static const struct site_rules *rules_of(const struct build *bd, enum projection p)
{
    return p < PROJ_GATE ? &bd->rules->attention : &bd->rules->mlp;
}

static const struct part *half_missing(const struct site_parts *s, int b_count)
{
    for (int e = 0; e < s->a_count || e < b_count; e++) {
        if (e == b_count || (e < s->a_count && s->a[e].expert < s->b[e].expert)) return &s->a[e];
        if (e == s->a_count || s->b[e].expert < s->a[e].expert) return &s->b[e];
    }
    return NULL;
}

/* Experts 0 to n - 1 must each have both halves, or a B each where A is shared. */
static enum status halves_check(const struct site_parts *s, int b_count, bool shared_a, struct error *err)
{
    const struct part *alone = shared_a ? (!b_count      ? s->a
                                           : !s->a_count ? s->b
                                                         : NULL)
                                        : half_missing(s, b_count);
    if (alone)
        return error_set(err, ST_REJECTED, "tensor '%s' has no matching %s", alone->name,
                         alone->kind == PART_A ? "B" : "A");
    for (int e = 0; e < b_count; e++)
        if (s->b[e].expert != e)
            return error_set(err, ST_REJECTED, "tensor '%s' is there, but expert %d of that site is missing",
                             s->b[e].name, e);
    return ST_OK;
}

/* A part that there must or must not be. `missing`: what to say of a site without it. */
static enum status presence_check(const struct site_parts *s, const struct part *part, bool wanted,
                                  const char *missing, const char *unwanted, struct error *err)
{
    if (wanted && !part)
        return error_set(err, ST_REJECTED, "tensor '%s' has no %s beside it", s->a->name, missing);
    if (!wanted && part) return error_set(err, ST_REJECTED, "tensor '%s' is %s", part->name, unwanted);
    return ST_OK;
}

static enum status presences_check(const struct site_parts *s, const struct site_rules *rules,
                                   struct error *err)
{
    bool ada = rules->rule == GATE_ADA_THRESHOLD;
    enum status st =
        presence_check(s, s->router, rules->rule != GATE_NONE && rules->rule != GATE_FFN, "router",
                       "a router, but the configuration's gate for this site is 'none'", err);
    if (!st)
        st = presence_check(s, s->threshold, ada, "threshold", "a threshold, which no gate here has", err);
    if (!st)
        st = presence_check(s, s->threshold_bias, ada, "threshold's bias",
                            "a threshold, which no gate here has", err);
    if (!st)
        st = presence_check(s, s->magnitude, rules->dora, "DoRA magnitude",
                            "of DoRA, but adapter_config.json does not set 'use_dora'", err);
    if (!st)
        st = presence_check(s, s->bias, rules->bias, "bias of B",
                            "a bias on B, but adapter_config.json does not set 'lora_bias'", err);
    return st;
}

static enum status site_split(const struct part *part, size_t count, const struct site_rules *rules,
                              struct site_parts *out, struct error *err)
{
    const struct part *first[PART_KIND_COUNT] = {NULL};
    int n[PART_KIND_COUNT] = {0};
    for (size_t i = 0; i < count; i++)
        if (!n[part[i].kind]++) first[part[i].kind] = &part[i];
    if (!n[PART_A] && !n[PART_B])
        return error_set(err, ST_REJECTED, "tensor '%s' %s", part->name,
                         part->kind == PART_ROUTER ? "routes to experts that are not there"
                                                   : "has no A and B beside it");
    struct site_parts s = {.a = first[PART_A],
                           .b = first[PART_B],
                           .bias = first[PART_BIAS],
                           .magnitude = first[PART_MAGNITUDE],
                           .router = first[PART_ROUTER],
                           .threshold = first[PART_THRESHOLD],
                           .threshold_bias = first[PART_THRESHOLD_BIAS],
                           .a_count = n[PART_A],
                           .experts = n[PART_B]};
    enum status st = halves_check(&s, n[PART_B], rules->shared_a, err);
    if (!st) st = presences_check(&s, rules, err);
    if (st) return st;
    *out = s;
    return ST_OK;
}

static enum status shape_check(const struct part *p, size_t rows, size_t cols, struct error *err)
{
    if (!p || (p->rows == rows && p->cols == cols)) return ST_OK;
    return error_set(err, ST_REJECTED, "tensor '%s' is %zu x %zu; it should be %zu x %zu", p->name, p->rows,
                     p->cols, rows, cols);
}

static enum status layer_check(const struct build *bd, const struct part *p, struct error *err)
{
    if (!bd->base || p->module.layer < bd->base->layers) return ST_OK;
    return error_set(err, ST_REJECTED, "tensor '%s' is of layer %d, but the base model has %d layers",
                     p->name, p->module.layer, bd->base->layers);
}

/* Shapes among the site's own tensors, and against the base model. */
static enum status shapes_check(const struct build *bd, const struct site_parts *s, struct error *err)
{
    enum projection p = s->a->module.projection;
    size_t rank = s->a->rows, d_in = bd->base ? bd->base->d_in[p] : s->a->cols;
    size_t d_out = bd->base ? bd->base->d_out[p] : s->b->rows;
    enum status st = layer_check(bd, s->a, err);
    for (int e = 0; e < s->a_count && !st; e++) st = shape_check(&s->a[e], rank, d_in, err);
    for (int e = 0; e < s->experts && !st; e++) st = shape_check(&s->b[e], d_out, rank, err);
    if (!st) st = shape_check(s->router, (size_t)s->experts, d_in, err);
    if (!st) st = shape_check(s->threshold, 1, d_in, err);
    if (!st) st = shape_check(s->threshold_bias, 1, 1, err);
    if (!st) st = shape_check(s->magnitude, d_out, 1, err);
    if (!st) st = shape_check(s->bias, d_out, 1, err);
    return st;
}

static int limit_of(int configured, int most)
{
    return configured > 0 && configured < most ? configured : most;
}

/* Experts and top-k of a site or an FFN's router against its rules and the limits. */
static enum status experts_check(const struct build *bd, const struct site_rules *rules, int layer,
                                 int experts, const char *module, struct error *err)
{
    int most = limit_of(bd->base ? bd->base->experts_max : 0, LR_EXPERTS_MAX);
    if (experts > most)
        return error_set(err, ST_REJECTED, "%s has %d experts; at most %d are allowed", module, experts,
                         most);
    if (rules->experts && rules->experts != experts)
        return error_set(err, ST_REJECTED, "%s has %d experts, but adapter_config.json says %d (%s)", module,
                         experts, rules->experts, rules->experts_key);
    if (rules->top_k_by_layer && layer >= cJSON_GetArraySize(rules->top_k_by_layer))
        return error_set(err, ST_REJECTED, "'top_k' has no number for layer %d", layer);
    int top_k = site_top_k(rules, layer, experts);
    if (top_k > experts)
        return error_set(err, ST_REJECTED, "'top_k' is %d, but %s has %d experts", top_k, module, experts);
    return ST_OK;
}

static enum status rank_check(const struct build *bd, const struct site_rules *rules,
                              const struct site_parts *s, const char *module, struct error *err)
{
    size_t most = (size_t)limit_of(bd->base ? bd->base->rank_max : 0, LR_RANK_MAX);
    if (s->a->rows > most)
        return error_set(err, ST_REJECTED, "tensor '%s' has rank %zu; at most %zu is allowed", s->a->name,
                         s->a->rows, most);
    int stated = 0;
    enum status st = lora_config_rank(rules->config, module, s->a->module.layer, &stated, err);
    if (st) return st;
    size_t rank = s->a->rows * (size_t)(rules->rank_total ? s->experts : 1);
    if (stated && (size_t)stated != rank)
        return error_set(err, ST_REJECTED,
                         "tensor '%s' has rank %zu%s, but adapter_config.json says %d for %s (%s)",
                         s->a->name, s->a->rows, rules->rank_total ? " for each expert" : "", stated, module,
                         "its rank, or rank_pattern");
    return ST_OK;
}

/* Does the configuration put an adapter on this module, by its name or the other name it may have? */
static enum status target_check(const struct build *bd, const struct module *m, bool *out, struct error *err)
{
    const struct lora_config *config = rules_of(bd, m->projection)->config;
    const char *alias = bd->rules->aliases ? bd->rules->aliases[m->projection] : NULL;
    char name[MODULE_NAME_SIZE];
    enum status st = lora_config_targets(config, module_name(m, name), m->layer, out, err);
    if (st || *out || !alias) return st;
    snprintf(name, sizeof name, "%slayers.%d.mlp.%s", m->root, m->layer, alias);
    return lora_config_targets(config, name, m->layer, out, err);
}

/* Without an early end, so that the compiler takes many values at once. */
static bool bits_finite_32(const uint8_t *bytes, size_t n)
{
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, bytes + 4 * i, sizeof u);
        bad |= (u & 0x7f800000u) == 0x7f800000u;
    }
    return !bad;
}

static bool bits_finite_16(const uint8_t *bytes, size_t n, uint16_t exponent)
{
    uint16_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        uint16_t u;
        memcpy(&u, bytes + 2 * i, sizeof u);
        bad |= (u & exponent) == exponent;
    }
    return !bad;
}

static bool all_finite(const struct part *p)
{
    size_t n = p->rows * p->cols;
    const uint8_t *bytes = p->data;
    if (p->type == DTYPE_F32) return bits_finite_32(bytes, n);
    if (p->type == DTYPE_F16) return bits_finite_16(bytes, n, 0x7c00);
    if (p->type == DTYPE_BF16) return bits_finite_16(bytes, n, 0x7f80);
    float block[256]; /* the largest block of any type */
    size_t elems = dtype_block_elems(p->type);
    for (size_t i = 0; i < n; i += elems, bytes += dtype_block_bytes(p->type)) {
        dtype_decode(p->type, bytes, block, elems);
        for (size_t k = 0; k < elems; k++)
            if (!isfinite(block[k])) return false;
    }
    return true;
}

static enum status values_check(const struct part *part, size_t count, struct error *err)
{
    for (size_t i = 0; i < count; i++)
        if (!all_finite(&part[i]))
            return error_set(err, ST_REJECTED, "tensor '%s' holds NaN or infinity", part[i].name);
    return ST_OK;
}

static enum status site_check(const struct build *bd, const struct part *part, size_t count,
                              const struct site_rules *rules, struct site_parts *s, float *scale,
                              struct error *err)
{
    char module[MODULE_NAME_SIZE];
    const struct module *m = &part->module;
    module_name(m, module);
    enum status st = site_split(part, count, rules, s, err);
    if (!st) st = shapes_check(bd, s, err);
    if (!st) st = rank_check(bd, rules, s, module, err);
    if (!st) st = experts_check(bd, rules, m->layer, s->experts, module, err);
    bool targeted = false;
    if (!st) st = target_check(bd, m, &targeted, err);
    if (!st && !targeted)
        st = error_set(err, ST_REJECTED,
                       "tensor '%s' is of a module that adapter_config.json does not target", s->a->name);
    if (!st) st = values_check(part, count, err);
    if (st) return st;
    int rank = (int)s->a->rows * (rules->rank_total ? s->experts : 1);
    return lora_config_scale(rules->config, module, rank, scale, err);
}

static enum status site_build(const struct build *bd, const struct part *part, size_t count,
                              struct error *err)
{
    const struct module *m = &part->module;
    const struct site_rules *rules = rules_of(bd, m->projection);
    struct site_parts s = {0};
    float scale = 0;
    enum status st = site_check(bd, part, count, rules, &s, &scale, err);
    if (st) return st;
    struct adapter_bundle *b = bd->bundle;
    struct lr_site_source **slot = &b->sites[m->layer * PROJ_COUNT + (int)m->projection];
    st = site_layout(b, bd->base, bd->rules, rules, &s, scale, slot, err);
    if (st) return st;
    b->site_count++;
    if ((*slot)->rank > b->rank_max) b->rank_max = (*slot)->rank;
    if ((*slot)->experts > b->experts_max) b->experts_max = (*slot)->experts;
    if ((*slot)->rule != GATE_FFN && (*slot)->top_k > b->top_k) b->top_k = (*slot)->top_k;
    for (size_t i = 0; i < count; i++) b->parameters += part[i].rows * part[i].cols;
    return ST_OK;
}

/* The router of a whole FFN, after the sites of its layer: gate, up and down must have its experts. */
static enum status router_build(const struct build *bd, const struct part *router, struct error *err)
{
    struct adapter_bundle *b = bd->bundle;
    int layer = router->module.layer, experts = (int)router->rows;
    char module[MODULE_NAME_SIZE];
    module_name(&router->module, module);
    enum status st = layer_check(bd, router, err);
    if (!st && bd->base) st = shape_check(router, router->rows, bd->base->d_in[PROJ_GATE], err);
    if (!st) st = experts_check(bd, &bd->rules->ffn, layer, experts, module, err);
    if (!st) st = values_check(router, 1, err);
    if (st) return st;
    bool any = false;
    for (int p = PROJ_GATE; p <= PROJ_DOWN; p++) {
        struct lr_site_source *site = b->sites[layer * PROJ_COUNT + p];
        any |= site != NULL;
        if (site && site->experts != experts)
            return error_set(err, ST_REJECTED, "tensor '%s' routes to %d experts, but layer %d's %s has %d",
                             router->name, experts, layer, projection_name((enum projection)p),
                             site->experts);
    }
    if (!any)
        return error_set(err, ST_REJECTED, "tensor '%s' routes to experts that are not there", router->name);
    st = router_layout(b, &bd->rules->ffn, router, &b->ffn[layer]);
    if (st) return st;
    b->top_k = b->ffn[layer]->top_k > b->top_k ? b->ffn[layer]->top_k : b->top_k;
    b->parameters += router->rows * router->cols;
    return ST_OK;
}

/* --- all sites --- */

static int part_compare(const void *x, const void *y)
{
    const struct part *a = x, *b = y;
    if (a->module.layer != b->module.layer) return a->module.layer < b->module.layer ? -1 : 1;
    if (a->module.projection != b->module.projection)
        return a->module.projection < b->module.projection ? -1 : 1;
    if (a->kind != b->kind) return a->kind < b->kind ? -1 : 1;
    return (a->expert > b->expert) - (a->expert < b->expert);
}

static bool same_site(const struct part *a, const struct part *b)
{
    return a->module.layer == b->module.layer && a->module.projection == b->module.projection;
}

static bool same_values(const struct part *a, const struct part *b)
{
    return a->type == b->type && a->rows == b->rows && a->cols == b->cols &&
           memcmp(a->data, b->data, a->rows * dtype_row_bytes(a->type, a->cols)) == 0;
}

/* Of two tensors for one part the second must be a copy under its format's other name, and is left out. */
static enum status twins_merge(struct parts *p, struct error *err)
{
    size_t kept = 1;
    for (size_t i = 1; i < p->count; i++) {
        const struct part *a = &p->part[kept - 1], *b = &p->part[i];
        if (part_compare(a, b) != 0) {
            p->part[kept++] = *b;
            continue;
        }
        if (a->copy == b->copy)
            return error_set(err, ST_REJECTED, "tensors '%s' and '%s' are the same part of one site", a->name,
                             b->name);
        if (!same_values(a, b))
            return error_set(err, ST_REJECTED,
                             "tensors '%s' and '%s' are one parameter, but their values differ", a->name,
                             b->name);
    }
    p->count = kept;
    return ST_OK;
}

/* A targeted module without tensors: PEFT would fill it with a fresh, idle adapter and only warn;
 * more likely the file is not the one the configuration was written for. */
static enum status targets_check(const struct build *bd, const char *root, struct error *err)
{
    if (!bd->rules->mlp.config->targets.given) return ST_OK;
    for (int layer = 0; layer < bd->bundle->layers; layer++) {
        for (int p = 0; p < PROJ_COUNT; p++) {
            if (bd->bundle->sites[layer * PROJ_COUNT + p]) continue;
            char name[MODULE_NAME_SIZE];
            struct module m = {.layer = layer, .projection = (enum projection)p, .root = root};
            bool targeted = false;
            enum status st = target_check(bd, &m, &targeted, err);
            if (st) return st;
            if (targeted)
                return error_set(err, ST_REJECTED,
                                 "adapter_config.json targets %s, but the file has no tensors for it",
                                 module_name(&m, name));
        }
    }
    return ST_OK;
}

static void targets_write(struct adapter_bundle *b)
{
    size_t n = 0;
    for (int p = 0; p < PROJ_COUNT; p++) {
        bool any = false;
        for (int layer = 0; layer < b->layers && !any; layer++) any = b->sites[layer * PROJ_COUNT + p];
        if (any)
            n += (size_t)snprintf(b->targets + n, sizeof b->targets - n, "%s%s", n ? ", " : "",
                                  projection_name((enum projection)p));
    }
}

static enum status sites_build(const struct build *bd, const struct parts *p, struct error *err)
{
    for (size_t first = 0, next; first < p->count; first = next) {
        for (next = first + 1; next < p->count && same_site(&p->part[first], &p->part[next]);) next++;
        const struct part *part = &p->part[first];
        enum status st = part->module.projection == PROJ_FFN ? router_build(bd, part, err)
                                                             : site_build(bd, part, next - first, err);
        if (st) return st;
    }
    return ST_OK;
}

/* A site that leaves its gates to its FFN's router must have one. */
static enum status routers_check(const struct build *bd, const struct parts *p, struct error *err)
{
    for (size_t i = 0; i < p->count; i++) {
        const struct module *m = &p->part[i].module;
        if (m->projection < PROJ_FFN && rules_of(bd, m->projection)->rule == GATE_FFN &&
            !bd->bundle->ffn[m->layer])
            return error_set(err, ST_REJECTED, "tensor '%s' has no router beside it", p->part[i].name);
    }
    return ST_OK;
}

static enum status bundle_build(const struct build *bd, const struct parts *p, struct error *err)
{
    struct adapter_bundle *b = bd->bundle;
    b->layers = bd->base ? bd->base->layers : p->part[p->count - 1].module.layer + 1;
    b->sites = bundle_alloc(b, (size_t)b->layers * PROJ_COUNT, sizeof *b->sites);
    if (!b->sites) return ST_NOMEM;
    if (bd->rules->mlp.rule == GATE_FFN) {
        b->ffn = bundle_alloc(b, (size_t)b->layers, sizeof *b->ffn);
        if (!b->ffn) return ST_NOMEM;
    }
    enum status st = sites_build(bd, p, err);
    if (!st) st = routers_check(bd, p, err);
    if (!st) st = targets_check(bd, p->part[0].module.root, err);
    if (st) return st;
    b->lr_width = lr_width(b->layers, b->sites, b->ffn);
    targets_write(b);
    return ST_OK;
}

enum status parts_build(struct parts *p, const char *format, const struct format_rules *rules,
                        const struct adapter_base *base, struct adapter_bundle **out, struct error *err)
{
    if (p->count == 0)
        return error_set(err, ST_REJECTED, "the file has no adapter tensors: the adapter would do nothing");
    qsort(p->part, p->count, sizeof *p->part, part_compare);
    enum status st = twins_merge(p, err);
    if (st) return st;

    struct adapter_bundle *b = calloc(1, sizeof *b);
    if (!b) return ST_NOMEM;
    struct build bd = {.rules = rules, .base = base, .bundle = b};
    snprintf(b->format, sizeof b->format, "%s", format);
    b->qk_permuted = rules->in_base_order || (base && base->qk_permuted);
    st = bundle_build(&bd, p, err);
    if (!st) {
        *out = b;
        b = NULL;
    }
    adapter_bundle_free(b);
    return st;
}

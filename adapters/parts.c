#include "adapters/parts.h"

#include "adapters/reader_int.h"
#include "base/memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const projection_paths[PROJ_COUNT] = {
    [PROJ_Q] = "self_attn.q_proj", [PROJ_K] = "self_attn.k_proj", [PROJ_V] = "self_attn.v_proj",
    [PROJ_O] = "self_attn.o_proj", [PROJ_GATE] = "mlp.gate_proj", [PROJ_UP] = "mlp.up_proj",
    [PROJ_DOWN] = "mlp.down_proj",
};

const char *projection_name(enum projection p) { return strchr(projection_paths[p], '.') + 1; }

#define MODULE_NAME_SIZE 64
static const char *module_name(const struct module *m, char buffer[MODULE_NAME_SIZE])
{
    snprintf(buffer, MODULE_NAME_SIZE, "%slayers.%d.%s", m->root, m->layer, projection_paths[m->projection]);
    return buffer;
}

/* Drops `prefix` from *s if it is there. */
static bool skip(const char **s, const char *prefix)
{
    size_t n = strlen(prefix);
    if (strncmp(*s, prefix, n) != 0) return false;
    *s += n;
    return true;
}

bool module_parse(const char *tensor_name, struct module *out)
{
    struct module m = {.root = ""};
    const char *s = tensor_name;
    (void)skip(&s, "base_model.model.");
    if (skip(&s, "model.")) m.root = "model.";
    if (!skip(&s, "layers.")) return false;

    const char *digits = s;
    for (; *s >= '0' && *s <= '9'; s++) {
        if (s - digits == 5) return false;
        m.layer = m.layer * 10 + (*s - '0');
    }
    if (s == digits || !skip(&s, ".")) return false;

    for (int p = 0; p < PROJ_COUNT; p++) {
        const char *rest = s;
        if (!skip(&rest, projection_paths[p]) || !skip(&rest, ".")) continue;
        m.projection = (enum projection)p;
        m.rest = rest;
        *out = m;
        return true;
    }
    return false;
}

/* --- collecting --- */

void parts_release(struct parts *p)
{
    free(p->part);
    *p = (struct parts){0};
}

static bool parts_grow(struct parts *p)
{
    size_t capacity = p->capacity ? 2 * p->capacity : 64;
    struct part *grown = realloc(p->part, capacity * sizeof *grown);
    if (!grown) return false;
    p->part = grown;
    p->capacity = capacity;
    return true;
}

enum status parts_claim(struct parts *p, const struct safetensor *t, const struct module *m,
                        enum part_kind kind, int expert, struct error *err)
{
    if (t->type != DTYPE_F32 && t->type != DTYPE_F16 && t->type != DTYPE_BF16)
        return error_set(err, ST_UNSUPPORTED, "tensor '%s' must be F32, F16 or BF16", t->name);
    if (t->dim_count != 2 || t->dim[0] == 0 || t->dim[1] == 0)
        return error_set(err, ST_REJECTED, "tensor '%s' must be a matrix; it has %d dimensions%s", t->name,
                         t->dim_count, t->dim_count == 2 ? ", one of them empty" : "");
    if (expert >= LR_EXPERTS_MAX)
        return error_set(err, ST_REJECTED, "tensor '%s' is of expert %d; at most %d experts are supported",
                         t->name, expert, LR_EXPERTS_MAX);
    if (p->count == p->capacity && !parts_grow(p)) return ST_NOMEM;
    p->part[p->count++] = (struct part){
        .name = t->name,
        .module = *m,
        .kind = kind,
        .expert = expert,
        .type = t->type,
        .rows = (size_t)t->dim[0],
        .cols = (size_t)t->dim[1],
        .data = t->data,
    };
    return ST_OK;
}

/* --- one site --- */

struct build {
    const struct lora_config *config;
    const struct gate *gate;
    const struct adapter_base *base; /* may be NULL */
    struct adapter_bundle *bundle;
};

/* The parts of one site: A of experts 0.., then B of experts 0.., then the router. */
struct site_parts {
    const struct part *a, *b, *router;
    int experts;
};

static int count_kind(const struct part *part, size_t count, enum part_kind kind)
{
    int n = 0;
    for (size_t i = 0; i < count; i++) n += part[i].kind == kind;
    return n;
}

static enum status half_alone(const struct part *p, struct error *err)
{
    return error_set(err, ST_REJECTED, "tensor '%s' has no matching %s", p->name,
                     p->kind == PART_A ? "B" : "A");
}

/* Experts 0 to n - 1 must each have both halves. */
static enum status halves_check(const struct site_parts *s, int b_count, struct error *err)
{
    for (int e = 0; e < s->experts || e < b_count; e++) {
        const struct part *a = &s->a[e], *b = &s->b[e];
        if (e == b_count || (e < s->experts && a->expert < b->expert)) return half_alone(a, err);
        if (e == s->experts || b->expert < a->expert) return half_alone(b, err);
        if (a->expert != e)
            return error_set(err, ST_REJECTED, "tensor '%s' is there, but expert %d of that site is missing",
                             a->name, e);
    }
    return ST_OK;
}

static enum status site_split(const struct part *part, size_t count, const struct gate *gate,
                              struct site_parts *out, struct error *err)
{
    struct site_parts s = {.a = part, .experts = count_kind(part, count, PART_A)};
    int b_count = count_kind(part, count, PART_B);
    s.b = part + s.experts;
    if ((size_t)(s.experts + b_count) < count) s.router = s.b + b_count;

    if (s.experts + b_count == 0)
        return error_set(err, ST_REJECTED, "tensor '%s' routes to experts that are not there", part->name);
    enum status st = halves_check(&s, b_count, err);
    if (st) return st;
    if (gate->rule != GATE_NONE && !s.router)
        return error_set(err, ST_REJECTED, "tensor '%s' has no router beside it", part->name);
    if (gate->rule == GATE_NONE && s.router)
        return error_set(err, ST_REJECTED, "tensor '%s' is a router, but the configuration's gate is 'none'",
                         s.router->name);
    *out = s;
    return ST_OK;
}

static enum status shape_error(const struct part *p, size_t rows, size_t cols, struct error *err)
{
    return error_set(err, ST_REJECTED, "tensor '%s' is %zu x %zu; it should be %zu x %zu", p->name, p->rows,
                     p->cols, rows, cols);
}

/* Shapes among the site's own tensors, and against the base model. */
static enum status shapes_check(const struct build *bd, const struct site_parts *s, struct error *err)
{
    const struct module *m = &s->a->module;
    size_t rank = s->a->rows, d_in = s->a->cols, d_out = s->b->rows;
    if (bd->base) {
        if (m->layer >= bd->base->layers)
            return error_set(err, ST_REJECTED, "tensor '%s' is of layer %d, but the base model has %d layers",
                             s->a->name, m->layer, bd->base->layers);
        d_in = bd->base->d_in[m->projection];
        d_out = bd->base->d_out[m->projection];
    }
    for (int e = 0; e < s->experts; e++) {
        if (s->a[e].rows != rank || s->a[e].cols != d_in) return shape_error(&s->a[e], rank, d_in, err);
        if (s->b[e].rows != d_out || s->b[e].cols != rank) return shape_error(&s->b[e], d_out, rank, err);
    }
    if (s->router && (s->router->rows != (size_t)s->experts || s->router->cols != d_in))
        return shape_error(s->router, (size_t)s->experts, d_in, err);
    return ST_OK;
}

static int limit_of(int configured, int most)
{
    return configured > 0 && configured < most ? configured : most;
}

/* Rank, experts and top-k against the configuration and the limits. */
static enum status numbers_check(const struct build *bd, const struct site_parts *s, const char *module,
                                 struct error *err)
{
    const struct gate *gate = bd->gate;
    size_t rank_max = (size_t)limit_of(bd->base ? bd->base->rank_max : 0, LR_RANK_MAX);
    int experts_max = limit_of(bd->base ? bd->base->experts_max : 0, LR_EXPERTS_MAX);
    if (s->a->rows > rank_max)
        return error_set(err, ST_REJECTED, "tensor '%s' has rank %zu; at most %zu is allowed", s->a->name,
                         s->a->rows, rank_max);
    if (s->experts > experts_max)
        return error_set(err, ST_REJECTED, "%s has %d experts; at most %d are allowed", module, s->experts,
                         experts_max);

    int stated = 0;
    enum status st = lora_config_rank(bd->config, module, &stated, err);
    if (st) return st;
    if (stated && (size_t)stated != s->a->rows)
        return error_set(
            err, ST_REJECTED,
            "tensor '%s' has rank %zu, but adapter_config.json says %d for %s (r or rank_pattern)",
            s->a->name, s->a->rows, stated, module);
    if (gate->experts && gate->experts != s->experts)
        return error_set(err, ST_REJECTED, "%s has %d experts, but adapter_config.json says %d (num_experts)",
                         module, s->experts, gate->experts);
    if (gate->top_k > s->experts)
        return error_set(err, ST_REJECTED, "'top_k' is %d, but %s has %d experts", gate->top_k, module,
                         s->experts);
    bool targeted = false;
    st = lora_config_targets(bd->config, module, s->a->module.layer, &targeted, err);
    if (st) return st;
    if (!targeted)
        return error_set(err, ST_REJECTED,
                         "tensor '%s' is of a module that adapter_config.json does not target", s->a->name);
    return ST_OK;
}

static bool all_finite(const struct part *p)
{
    size_t n = p->rows * p->cols;
    const uint8_t *bytes = p->data;
    if (p->type == DTYPE_F32) {
        for (size_t i = 0; i < n; i++) {
            uint32_t u;
            memcpy(&u, bytes + 4 * i, sizeof u);
            if ((u & 0x7f800000u) == 0x7f800000u) return false;
        }
        return true;
    }
    uint16_t exponent = p->type == DTYPE_F16 ? 0x7c00 : 0x7f80;
    for (size_t i = 0; i < n; i++) {
        uint16_t u;
        memcpy(&u, bytes + 2 * i, sizeof u);
        if ((u & exponent) == exponent) return false;
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

/* --- laying out --- */

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
static size_t permuted_heads(const struct adapter_base *base, enum projection p)
{
    if (!base || !base->qk_permuted) return 0;
    return p == PROJ_Q ? (size_t)base->heads : p == PROJ_K ? (size_t)base->kv_heads : 0;
}

/* The common type of the experts' matrices: their own if they share one, else F32. */
static enum dtype common_type(const struct site_parts *s)
{
    for (int e = 0; e < s->experts; e++)
        if (s->a[e].type != s->a->type || s->b[e].type != s->a->type) return DTYPE_F32;
    return s->a->type;
}

static enum status site_fill(const struct build *bd, const struct site_parts *s, float scale,
                             struct lr_site_source **out)
{
    struct adapter_bundle *b = bd->bundle;
    size_t n = (size_t)s->experts, heads = permuted_heads(bd->base, s->a->module.projection);
    struct lr_site_source *site = bundle_alloc(b, 1, sizeof *site);
    const void **as = bundle_alloc(b, n, sizeof *as), **bs = bundle_alloc(b, n, sizeof *bs);
    float *scales = bundle_alloc(b, n, sizeof *scales);
    if (!site || !as || !bs || !scales) return ST_NOMEM;

    *site = (struct lr_site_source){
        .experts = s->experts,
        .rank = (int)s->a->rows,
        .top_k = bd->gate->top_k ? bd->gate->top_k : s->experts,
        .d_in = s->a->cols,
        .d_out = s->b->rows,
        .rule = bd->gate->rule,
        .temperature = bd->gate->temperature,
        .type = common_type(s),
        .router_type = s->router ? s->router->type : DTYPE_F32,
        .router = s->router ? s->router->data : NULL,
        .a = as,
        .b = bs,
        .scale = scales,
    };
    for (size_t e = 0; e < n; e++) {
        as[e] = part_as(b, &s->a[e], site->type);
        bs[e] = part_as(b, &s->b[e], site->type);
        if (bs[e] && heads)
            bs[e] = rows_permuted(b, bs[e], site->d_out, dtype_row_bytes(site->type, s->a->rows), heads);
        if (!as[e] || !bs[e]) return ST_NOMEM;
        scales[e] = scale;
    }
    *out = site;
    return ST_OK;
}

static enum status site_build(const struct build *bd, const struct part *part, size_t count,
                              struct error *err)
{
    char module[MODULE_NAME_SIZE];
    module_name(&part->module, module);
    struct site_parts s = {0};
    float scale = 0;
    enum status st = site_split(part, count, bd->gate, &s, err);
    if (!st) st = shapes_check(bd, &s, err);
    if (!st) st = numbers_check(bd, &s, module, err);
    if (!st) st = values_check(part, count, err);
    if (!st) st = lora_config_scale(bd->config, module, (int)s.a->rows, &scale, err);
    if (st) return st;

    struct adapter_bundle *b = bd->bundle;
    struct lr_site_source **slot = &b->sites[part->module.layer * PROJ_COUNT + part->module.projection];
    st = site_fill(bd, &s, scale, slot);
    if (st) return st;
    b->site_count++;
    if ((*slot)->rank > b->rank_max) b->rank_max = (*slot)->rank;
    if ((*slot)->experts > b->experts_max) b->experts_max = (*slot)->experts;
    if ((*slot)->top_k > b->top_k) b->top_k = (*slot)->top_k;
    for (size_t i = 0; i < count; i++) b->parameters += part[i].rows * part[i].cols;
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

static enum status twins_check(const struct parts *p, struct error *err)
{
    for (size_t i = 1; i < p->count; i++)
        if (part_compare(&p->part[i - 1], &p->part[i]) == 0)
            return error_set(err, ST_REJECTED, "tensors '%s' and '%s' are the same part of one site",
                             p->part[i - 1].name, p->part[i].name);
    return ST_OK;
}

/* A targeted module without tensors: PEFT would fill it with a fresh, idle adapter and only warn;
 * more likely the file is not the one the configuration was written for. */
static enum status targets_check(const struct build *bd, const char *root, struct error *err)
{
    if (!bd->config->targets.given) return ST_OK;
    for (int layer = 0; layer < bd->bundle->layers; layer++) {
        for (int p = 0; p < PROJ_COUNT; p++) {
            if (bd->bundle->sites[layer * PROJ_COUNT + p]) continue;
            char name[MODULE_NAME_SIZE];
            struct module m = {.layer = layer, .projection = (enum projection)p, .root = root};
            bool targeted = false;
            enum status st = lora_config_targets(bd->config, module_name(&m, name), layer, &targeted, err);
            if (st) return st;
            if (targeted)
                return error_set(err, ST_REJECTED,
                                 "adapter_config.json targets %s, but the file has no tensors for it", name);
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
        enum status st = site_build(bd, &p->part[first], next - first, err);
        if (st) return st;
    }
    return ST_OK;
}

enum status parts_build(struct parts *p, const char *format, const struct lora_config *config,
                        const struct gate *gate, const struct adapter_base *base, struct adapter_bundle **out,
                        struct error *err)
{
    if (p->count == 0)
        return error_set(err, ST_REJECTED, "the file has no adapter tensors: the adapter would do nothing");
    qsort(p->part, p->count, sizeof *p->part, part_compare);
    enum status st = twins_check(p, err);
    if (st) return st;

    struct adapter_bundle *b = calloc(1, sizeof *b);
    if (!b) return ST_NOMEM;
    struct build bd = {.config = config, .gate = gate, .base = base, .bundle = b};
    snprintf(b->format, sizeof b->format, "%s", format);
    b->layers = base ? base->layers : p->part[p->count - 1].module.layer + 1;
    st = ST_NOMEM;
    b->sites = bundle_alloc(b, (size_t)b->layers * PROJ_COUNT, sizeof *b->sites);
    if (!b->sites) goto done;
    st = sites_build(&bd, p, err);
    if (!st) st = targets_check(&bd, p->part[0].module.root, err);
    if (st) goto done;
    b->lr_width = lr_width(b->layers, b->sites, b->ffn);
    targets_write(b);
    *out = b;
    b = NULL;
done:
    adapter_bundle_free(b);
    return st;
}

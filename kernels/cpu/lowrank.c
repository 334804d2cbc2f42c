#include "kernels/cpu/lowrank.h"

#include "base/memory.h"
#include "kernels/cpu/route.h"

#include <math.h>
#include <string.h>

static bool float_type(enum dtype t) { return t == DTYPE_F32 || t == DTYPE_F16 || t == DTYPE_BF16; }

static bool source_valid(const struct lr_site_source *src)
{
    bool top = src->rule == GATE_TOPK || src->rule == GATE_TOPK_RAW;
    if (src->experts < 1 || src->experts > LR_EXPERTS_MAX || src->rank < 1 || src->rank > LR_RANK_MAX)
        return false;
    if (src->d_in < 1 || src->d_out < 1 || !float_type(src->type) || src->rule >= GATE_RULE_COUNT)
        return false;
    if (top && (src->top_k < 1 || src->top_k > src->experts)) return false;
    if (src->rule == GATE_NONE) return true;
    return src->router && float_type(src->router_type) && isfinite(src->temperature) && src->temperature > 0;
}

static size_t panel_count(const struct lr_site *s) { return (s->d_out + LR_PANEL - 1) / LR_PANEL; }

/* Elements from the start of b to the panel of one expert. */
static size_t panel_offset(const struct lr_site *s, size_t expert, size_t panel)
{
    return (expert * panel_count(s) + panel) * (size_t)s->rank * LR_PANEL;
}

/* One expert's B (d_out, rank) into panels. */
static void pack_b(char *dst, const char *b, size_t d_out, size_t rank, size_t elem)
{
    for (size_t o = 0; o < d_out; o++) {
        char *column = dst + (o / LR_PANEL * rank * LR_PANEL + o % LR_PANEL) * elem;
        for (size_t i = 0; i < rank; i++)
            memcpy(column + i * LR_PANEL * elem, b + (o * rank + i) * elem, elem);
    }
}

static void fill_matrices(struct cpu_lr_site *s, const struct lr_site_source *src, size_t b_bytes)
{
    size_t elem = dtype_block_bytes(src->type), rank = (size_t)src->rank;
    size_t a_bytes = rank * src->d_in * elem;
    memset(s->b, 0, b_bytes);
    for (int e = 0; e < src->experts; e++) {
        memcpy((char *)s->a + (size_t)e * a_bytes, src->a[e], a_bytes);
        char *b = (char *)s->b + panel_offset(&s->base, (size_t)e, 0) * elem;
        pack_b(b, src->b[e], src->d_out, rank, elem);
    }
    memcpy(s->scale, src->scale, (size_t)src->experts * sizeof *s->scale);
}

enum status cpu_lr_site_pack(struct device *device, const struct lr_site_source *src, struct lr_site **out)
{
    (void)device;
    if (!source_valid(src)) return ST_INVALID;
    if (src->rule > GATE_TOPK_RAW || src->shared_a || src->base_gain || src->bias) return ST_UNSUPPORTED;

    bool routed = src->rule != GATE_NONE;
    size_t elem = dtype_block_bytes(src->type), experts = (size_t)src->experts;
    size_t stacked = experts * (size_t)src->rank;
    size_t padded_out = size_round_up(src->d_out, LR_PANEL);
    size_t head = size_round_up(sizeof(struct cpu_lr_site), MEMORY_ALIGN);
    size_t scale_bytes = size_round_up(experts * sizeof(float), MEMORY_ALIGN);
    size_t router_elems = routed ? size_mul(experts, src->d_in) : 0;
    size_t router_bytes = router_elems ? size_mul(router_elems, dtype_block_bytes(src->router_type)) : 0;
    size_t router_space = size_round_up(router_bytes, MEMORY_ALIGN);
    size_t a_space = size_round_up(size_mul(size_mul(stacked, src->d_in), elem), MEMORY_ALIGN);
    size_t b_space = size_round_up(size_mul(size_mul(stacked, padded_out), elem), MEMORY_ALIGN);
    size_t bytes = size_add(size_add(head + scale_bytes, router_space), size_add(a_space, b_space));

    struct cpu_lr_site *s = memory_alloc(bytes);
    if (!s) return ST_NOMEM;
    char *at = (char *)s + head;
    *s = (struct cpu_lr_site){
        .base = {.experts = src->experts,
                 .rank = src->rank,
                 .top_k = src->top_k,
                 .d_in = src->d_in,
                 .d_out = src->d_out,
                 .rule = src->rule,
                 .temperature = src->temperature,
                 .bytes = bytes},
        .type = src->type,
        .router_type = src->router_type,
        .router = routed ? at + scale_bytes : NULL,
        .a = at + scale_bytes + router_space,
        .b = at + scale_bytes + router_space + a_space,
        .scale = (float *)(void *)at,
    };
    if (routed) memcpy(s->router, src->router, router_bytes);
    fill_matrices(s, src, b_space);
    *out = &s->base;
    return ST_OK;
}

void cpu_lr_site_free(struct device *device, struct lr_site *s)
{
    (void)device;
    memory_free(s);
}

size_t lr_record_width(const struct lr_site *s)
{
    return (size_t)route_chosen_count(s) * ((size_t)s->rank + 1);
}

/* The router runs first, so that only the chosen experts' A is read: for distinct adapters the bytes
 * are what a step waits for. */
void lr_record_fill(const struct cpu_kernels *k, const struct lr_site *site, float weight, const float *x,
                    float *record)
{
    const struct cpu_lr_site *s = (const struct cpu_lr_site *)site;
    float logits[LR_EXPERTS_MAX], gate[LR_EXPERTS_MAX];
    int32_t chosen[LR_EXPERTS_MAX];
    int count = route_chosen_count(site), rank = site->rank;
    size_t expert_bytes = (size_t)rank * site->d_in * dtype_block_bytes(s->type);

    if (s->router) k->lr_shrink(s->router, s->router_type, site->d_in, site->experts, x, logits);
    route_gates(site, logits, chosen, gate);
    memcpy(record, chosen, (size_t)count * sizeof *chosen);

    float *z = record + count;
    for (int j = 0; j < count; j++, z += rank) {
        k->lr_shrink((const char *)s->a + (size_t)chosen[j] * expert_bytes, s->type, site->d_in, rank, x, z);
        float factor = gate[j] * s->scale[chosen[j]] * weight;
        for (int i = 0; i < rank; i++) z[i] *= factor;
    }
}

void lr_record_prefetch(const struct lr_site *site, const float *record, size_t begin, size_t cols)
{
    const struct cpu_lr_site *s = (const struct cpu_lr_site *)site;
    size_t elem = dtype_block_bytes(s->type), first = begin / LR_PANEL,
           end = (begin + cols - 1) / LR_PANEL + 1;
    int count = route_chosen_count(site);
    int32_t chosen[LR_EXPERTS_MAX];
    memcpy(chosen, record, (size_t)count * sizeof *chosen);
    for (int j = 0; j < count; j++) {
        const char *from = (const char *)s->b + panel_offset(site, (size_t)chosen[j], first) * elem;
        size_t bytes = (end - first) * (size_t)site->rank * LR_PANEL * elem;
        for (size_t i = 0; i < bytes; i += MEMORY_ALIGN) __builtin_prefetch(from + i);
    }
}

void lr_record_apply(const struct cpu_kernels *k, const struct lr_site *site, const float *record,
                     size_t begin, size_t cols, float *y)
{
    const struct cpu_lr_site *s = (const struct cpu_lr_site *)site;
    size_t elem = dtype_block_bytes(s->type), rank = (size_t)site->rank;
    int count = route_chosen_count(site);
    int32_t chosen[LR_EXPERTS_MAX];
    memcpy(chosen, record, (size_t)count * sizeof *chosen);

    const float *z = record + count;
    for (int j = 0; j < count; j++, z += rank) {
        for (size_t c = begin, n; c < begin + cols; c += n) {
            size_t inside = c % LR_PANEL, left = begin + cols - c;
            n = LR_PANEL - inside < left ? LR_PANEL - inside : left;
            size_t offset = panel_offset(site, (size_t)chosen[j], c / LR_PANEL) + inside;
            k->lr_expand((const char *)s->b + offset * elem, s->type, LR_PANEL, site->rank, z, n,
                         y + (c - begin));
        }
    }
}

#include "kernels/cpu/lowrank.h"

#include "base/memory.h"
#include "kernels/cpu/route.h"

#include <math.h>
#include <string.h>

/* --- packing --- */

static bool float_type(enum dtype t) { return t == DTYPE_F32 || t == DTYPE_F16 || t == DTYPE_BF16; }

static bool within(float v, float low, float high) { return v >= low && v <= high; } /* false for NaN */

static bool has_router(enum gate_rule rule) { return rule != GATE_NONE && rule != GATE_FFN; }

static bool router_valid(const struct lr_site_source *src)
{
    if (!has_router(src->rule)) return src->rank > 0;
    if (!src->router || !float_type(src->router_type)) return false;
    if (!isfinite(src->temperature) || src->temperature <= 0) return false;
    switch (src->rule) {
    case GATE_TOPK:
    case GATE_TOPK_RAW: return src->top_k >= 1 && src->top_k <= src->experts;
    case GATE_TOP_P: return within(src->top_p, 0, 1);
    case GATE_THRESHOLD: return within(src->threshold, 0, INFINITY);
    case GATE_ADA_THRESHOLD:
        return within(src->threshold, 0, INFINITY) && isfinite(src->threshold_bias) && src->threshold_row;
    default: return true;
    }
}

static bool source_valid(const struct lr_site_source *src)
{
    bool matrices = src->a || src->b;
    if (src->experts < 1 || src->experts > LR_EXPERTS_MAX || src->rank < matrices || src->rank > LR_RANK_MAX)
        return false;
    if (src->rank > 0 && !(src->a && src->b && src->scale && float_type(src->type))) return false;
    if (src->d_in < 1 || (src->d_out < 1 && src->rank > 0) || src->rule >= GATE_RULE_COUNT) return false;
    if ((src->base_gain || src->bias) && (src->rank == 0 || src->rule == GATE_FFN)) return false;
    return router_valid(src);
}

static size_t panel_count(const struct lr_site *s) { return (s->d_out + LR_PANEL - 1) / LR_PANEL; }

/* Elements from the start of b to the panel of one expert. */
static size_t panel_offset(const struct lr_site *s, size_t expert, size_t panel)
{
    return (expert * panel_count(s) + panel) * (size_t)s->rank * LR_PANEL;
}

/* One expert's B (d_out, rank) into panels, of elements of `elem` bytes. Inlined, so that `elem` is a constant
 * in the innermost copy: a call for every element took a seventh of an upload's time. */
static inline void pack_b_of(char *dst, const char *b, size_t d_out, size_t rank, size_t elem)
{
    for (size_t o = 0; o < d_out; o++) {
        char *column = dst + (o / LR_PANEL * rank * LR_PANEL + o % LR_PANEL) * elem;
        for (size_t i = 0; i < rank; i++)
            memcpy(column + i * LR_PANEL * elem, b + (o * rank + i) * elem, elem);
    }
}

static void pack_b(char *dst, const char *b, size_t d_out, size_t rank, enum dtype type)
{
    if (type == DTYPE_F32)
        pack_b_of(dst, b, d_out, rank, 4);
    else
        pack_b_of(dst, b, d_out, rank, 2);
}

/* Where the parts of a site stand in its block, and the bytes of each. */
struct layout {
    size_t router_row, router, router_at;
    size_t a_expert, a, a_at;
    size_t b, b_at;
    size_t scale, scale_at;
    size_t vector, gain_at, bias_at;
    size_t count, count_at;
    size_t bytes; /* of all */
};

static size_t place(struct layout *l, size_t bytes)
{
    size_t at = l->bytes;
    l->bytes = size_add(l->bytes, size_round_up(bytes, MEMORY_ALIGN));
    return at;
}

static struct layout lay_out(const struct lr_site_source *src)
{
    size_t experts = (size_t)src->experts, rank = (size_t)src->rank;
    size_t elem = rank ? dtype_block_bytes(src->type) : 0;
    size_t rows = has_router(src->rule) ? experts + (src->rule == GATE_ADA_THRESHOLD) : 0;
    struct layout l = {0};
    if (rows) l.router_row = size_mul(src->d_in, dtype_block_bytes(src->router_type));
    l.router = size_mul(rows, l.router_row);
    l.a_expert = size_mul(size_mul(rank, src->d_in), elem);
    l.a = size_mul(src->shared_a ? 1 : experts, l.a_expert);
    l.b = size_mul(size_mul(experts * rank, size_round_up(src->d_out, LR_PANEL)), elem);
    l.scale = rank ? experts * sizeof(float) : 0;
    l.vector = size_mul(src->d_out, sizeof(float));
    l.count = rows ? (experts + 1) * sizeof(struct lr_count) : 0;

    place(&l, sizeof(struct cpu_lr_site));
    l.scale_at = place(&l, l.scale);
    l.gain_at = place(&l, src->base_gain ? l.vector : 0);
    l.bias_at = place(&l, src->bias ? l.vector : 0);
    l.router_at = place(&l, l.router);
    l.a_at = place(&l, l.a);
    l.b_at = place(&l, l.b);
    l.count_at = place(&l, l.count); /* in cache lines of its own */
    return l;
}

static void fill_site(struct cpu_lr_site *s, const struct lr_site_source *src, const struct layout *l)
{
    size_t elem = dtype_block_bytes(src->type), experts = (size_t)src->experts;
    if (s->router) memcpy(s->router, src->router, experts * l->router_row);
    for (size_t e = 0; s->count && e <= experts; e++) {
        atomic_init(&s->count[e].chosen, 0);
        atomic_init(&s->count[e].gate, 0);
    }
    if (src->rule == GATE_ADA_THRESHOLD)
        memcpy((char *)s->router + experts * l->router_row, src->threshold_row, l->router_row);
    if (s->gain) memcpy(s->gain, src->base_gain, l->vector);
    if (s->bias) memcpy(s->bias, src->bias, l->vector);
    if (src->rank == 0) return;
    memcpy(s->scale, src->scale, l->scale);
    memset(s->b, 0, l->b);
    for (size_t e = 0; e < experts; e++) {
        if (e == 0 || !src->shared_a) memcpy((char *)s->a + e * l->a_expert, src->a[e], l->a_expert);
        pack_b((char *)s->b + panel_offset(&s->base, e, 0) * elem, src->b[e], src->d_out, (size_t)src->rank,
               src->type);
    }
}

enum status cpu_lr_site_pack(struct device *device, const struct lr_site_source *src, struct lr_site **out)
{
    (void)device;
    if (!source_valid(src)) return ST_INVALID;

    struct layout l = lay_out(src);
    char *block = memory_alloc(l.bytes);
    if (!block) return ST_NOMEM;
    struct cpu_lr_site *s = (struct cpu_lr_site *)(void *)block;
    *s = (struct cpu_lr_site){
        .base = {.experts = src->experts,
                 .rank = src->rank,
                 .top_k = src->top_k,
                 .d_in = src->d_in,
                 .d_out = src->d_out,
                 .rule = src->rule,
                 .temperature = src->temperature,
                 .top_p = src->top_p,
                 .threshold = src->threshold,
                 .threshold_bias = src->threshold_bias,
                 .bytes = l.bytes},
        .shared_a = src->shared_a,
        .type = src->type,
        .router_type = src->router_type,
        .router = l.router ? block + l.router_at : NULL,
        .a = block + l.a_at,
        .b = block + l.b_at,
        .scale = (float *)(void *)(block + l.scale_at),
        .gain = src->base_gain ? (float *)(void *)(block + l.gain_at) : NULL,
        .bias = src->bias ? (float *)(void *)(block + l.bias_at) : NULL,
        .count = l.count ? (struct lr_count *)(void *)(block + l.count_at) : NULL,
    };
    fill_site(s, src, &l);
    *out = &s->base;
    return ST_OK;
}

void cpu_lr_site_free(struct device *device, struct lr_site *s)
{
    (void)device;
    memory_free(s);
}

/* --- who is chosen --- */

#define GATE_UNITS 0x1p24 /* to 1 */

/* Of the rows that are computed together, before they are added to the site's. */
struct tally {
    int rows, experts;
    uint32_t chosen[LR_EXPERTS_MAX];
    uint64_t gate[LR_EXPERTS_MAX];
};

static void tally_begin(struct tally *t, const struct cpu_lr_site *s)
{
    t->rows = 0;
    t->experts = s->count ? s->base.experts : 0;
    for (int e = 0; e < t->experts; e++) t->chosen[e] = 0, t->gate[e] = 0;
}

static void tally_add(struct tally *t, const struct lr_choice *c)
{
    for (int j = 0; j < c->count && t->experts; j++) {
        float gate = c->gate[j];
        t->chosen[c->expert[j]]++;
        if (gate > 0 && gate < 0x1p16f) t->gate[c->expert[j]] += (uint64_t)((double)gate * GATE_UNITS);
    }
    t->rows++;
}

static void add(_Atomic uint64_t *to, uint64_t n)
{
    if (n) atomic_fetch_add_explicit(to, n, memory_order_relaxed);
}

static void tally_end(const struct tally *t, const struct cpu_lr_site *s)
{
    if (!t->experts) return;
    for (int e = 0; e < t->experts; e++) {
        add(&s->count[e].chosen, t->chosen[e]);
        add(&s->count[e].gate, t->gate[e]);
    }
    add(&s->count[t->experts].chosen, (uint64_t)t->rows);
}

void cpu_lr_site_usage(struct device *device, const struct lr_site *site, struct lr_usage *out)
{
    (void)device;
    const struct cpu_lr_site *s = (const struct cpu_lr_site *)site;
    CHECK(s->count);
    for (int e = 0; e < site->experts; e++) {
        out->chosen[e] = atomic_load_explicit(&s->count[e].chosen, memory_order_relaxed);
        out->gate[e] = (double)atomic_load_explicit(&s->count[e].gate, memory_order_relaxed) / GATE_UNITS;
    }
    out->rows = atomic_load_explicit(&s->count[site->experts].chosen, memory_order_relaxed);
}

/* --- records --- */

static int32_t expert_at(const struct lr_record *r, int j)
{
    int32_t expert;
    memcpy(&expert, r->data + j, sizeof expert);
    return expert;
}

int lr_record_count(const struct lr_record *r)
{
    int count = 0;
    while (count < r->chosen_max && expert_at(r, count) >= 0) count++;
    return count;
}

/* --- the first half --- */

static int router_rows(const struct lr_site *s) { return s->experts + (s->rule == GATE_ADA_THRESHOLD); }

void lr_route(const struct cpu_kernels *k, const struct lr_site *site, const float *x, struct lr_choice *out)
{
    const struct cpu_lr_site *s = (const struct cpu_lr_site *)site;
    float logits[LR_EXPERTS_MAX + 1];
    float *z = logits;
    if (s->router) k->lr_shrink(s->router, s->router_type, site->d_in, router_rows(site), 1, &x, &z);
    out->count = route_gates(site, logits, out->expert, out->gate);
    struct tally t;
    tally_begin(&t, s);
    tally_add(&t, out);
    tally_end(&t, s);
}

size_t lr_record_width(const struct lr_site *s, int chosen_max)
{
    return (size_t)chosen_max * ((size_t)s->rank + 1);
}

void lr_record_choose(const struct lr_record *r, const struct lr_choice *choice)
{
    static const int32_t end = -1;
    memcpy(r->data, choice->expert, (size_t)choice->count * sizeof *choice->expert);
    if (choice->count < r->chosen_max) memcpy(r->data + choice->count, &end, sizeof end);
}

static size_t expert_a_bytes(const struct cpu_lr_site *s)
{
    return (size_t)s->base.rank * s->base.d_in * dtype_block_bytes(s->type);
}

static const void *expert_a(const struct cpu_lr_site *s, size_t expert)
{
    return (const char *)s->a + (s->shared_a ? 0 : expert * expert_a_bytes(s));
}

static void scale_z(float *z, const float *from, int rank, float factor)
{
    for (int i = 0; i < rank; i++) z[i] = from[i] * factor;
}

void lr_record_fill(const struct cpu_kernels *k, const struct lr_record *r, const struct lr_choice *choice,
                    float weight, const float *x, size_t x_step)
{
    const struct cpu_lr_site *s = (const struct cpu_lr_site *)r->site;
    int rank = r->site->rank;
    lr_record_choose(r, choice);
    float *z = r->data + r->chosen_max;
    for (int j = 0; j < choice->count; j++, z += rank, x += x_step) {
        size_t e = (size_t)choice->expert[j];
        k->lr_shrink(expert_a(s, e), s->type, r->site->d_in, rank, 1, &x, &z);
        scale_z(z, z, rank, choice->gate[j] * s->scale[e] * weight);
    }
}

static struct lr_record record_of(const struct lr_records *r, int row)
{
    struct lr_record record = r->first;
    record.data += (size_t)row * r->stride;
    return record;
}

static float *record_z(const struct lr_records *r, int row, int j)
{
    return r->first.data + (size_t)row * r->stride + r->first.chosen_max + (size_t)j * (size_t)r->first.site->rank;
}

/* Which rows chose each expert, and as which of their choices. */
struct rows_by_expert {
    int count[LR_EXPERTS_MAX];
    uint8_t row[LR_EXPERTS_MAX][LR_ROWS], choice[LR_EXPERTS_MAX][LR_ROWS];
};

static void sort_by_expert(const struct lr_records *r, struct rows_by_expert *out)
{
    memset(out->count, 0, (size_t)r->first.site->experts * sizeof *out->count);
    for (int i = 0; i < r->count; i++) {
        struct lr_record record = record_of(r, i);
        int32_t e;
        for (int j = 0; j < record.chosen_max && (e = expert_at(&record, j)) >= 0; j++) {
            int at = out->count[e]++;
            out->row[e][at] = (uint8_t)i;
            out->choice[e][at] = (uint8_t)j;
        }
    }
}

/* z of every choice, unscaled: each expert's A is read once for the rows that chose it. */
static void shrink_by_expert(const struct cpu_kernels *k, const struct lr_records *r, const float *x,
                             size_t x_stride)
{
    const struct cpu_lr_site *s = (const struct cpu_lr_site *)r->first.site;
    struct rows_by_expert by;
    sort_by_expert(r, &by);
    for (int e = 0; e < s->base.experts; e++) {
        const float *from[LR_ROWS];
        float *z[LR_ROWS];
        for (int i = 0; i < by.count[e]; i++) {
            from[i] = x + by.row[e][i] * x_stride;
            z[i] = record_z(r, by.row[e][i], by.choice[e][i]);
        }
        if (by.count[e] > 0)
            k->lr_shrink(expert_a(s, (size_t)e), s->type, s->base.d_in, s->base.rank, by.count[e], from, z);
    }
}

/* The same where all experts have one A: into the z of each row's first choice, if it has one. */
static void shrink_shared(const struct cpu_kernels *k, const struct lr_records *r, const float *x, size_t x_stride)
{
    const struct cpu_lr_site *s = (const struct cpu_lr_site *)r->first.site;
    const float *from[LR_ROWS];
    float *z[LR_ROWS];
    int rows = 0;
    for (int i = 0; i < r->count; i++) {
        if (expert_at(&(struct lr_record){.data = r->first.data + (size_t)i * r->stride}, 0) < 0) continue;
        from[rows] = x + (size_t)i * x_stride;
        z[rows++] = record_z(r, i, 0);
    }
    k->lr_shrink(s->a, s->type, s->base.d_in, s->base.rank, rows, from, z);
}

void lr_records_fill(const struct cpu_kernels *k, const struct lr_records *r, float weight, const float *x,
                     size_t x_stride)
{
    const struct cpu_lr_site *s = (const struct cpu_lr_site *)r->first.site;
    const struct lr_site *site = r->first.site;
    float logits[LR_ROWS][LR_EXPERTS_MAX + 1], *out[LR_ROWS];
    const float *from[LR_ROWS];
    CHECK(r->count <= LR_ROWS);
    for (int i = 0; i < r->count; i++) {
        from[i] = x + (size_t)i * x_stride;
        out[i] = logits[i];
    }
    if (s->router)
        k->lr_shrink(s->router, s->router_type, site->d_in, router_rows(site), r->count, from, out);
    struct tally tally;
    tally_begin(&tally, s);
    for (int i = 0; i < r->count; i++) {
        struct lr_record record = record_of(r, i);
        struct lr_choice choice;
        choice.count = route_gates(site, logits[i], choice.expert, choice.gate);
        tally_add(&tally, &choice);
        lr_record_choose(&record, &choice);
        memcpy(logits[i], choice.gate, (size_t)choice.count * sizeof *choice.gate); /* gates from here on */
    }
    tally_end(&tally, s);
    (s->shared_a ? shrink_shared : shrink_by_expert)(k, r, x, x_stride);
    for (int i = 0; i < r->count; i++) {
        struct lr_record record = record_of(r, i);
        for (int j = lr_record_count(&record) - 1; j >= 0; j--) /* the first last: it may be everyone's */
            scale_z(record_z(r, i, j), record_z(r, i, s->shared_a ? 0 : j), site->rank,
                    logits[i][j] * s->scale[expert_at(&record, j)] * weight);
    }
}

/* --- what they read --- */

static void lines_add(struct lr_lines *l, const void *from, size_t bytes)
{
    size_t inside = (uintptr_t)from % MEMORY_ALIGN,
           lines = (inside + bytes + MEMORY_ALIGN - 1) / MEMORY_ALIGN;
    const char *first = (const char *)from - inside;
    size_t begin = l->skip > l->seen ? l->skip - l->seen : 0, left = l->room - l->count;
    size_t n = begin < lines ? lines - begin : 0;
    if (n > left) n = left;
    for (size_t i = 0; i < n; i++) l->line[l->count + i] = first + (begin + i) * MEMORY_ALIGN;
    l->count += n;
    l->seen += lines;
}

/* Router and A are neighbours. A row that chooses few of many experts reads little of A, and nobody knows
 * what. */
void lr_lines_fill(struct lr_lines *l, const struct lr_site *site, int rows)
{
    const struct cpu_lr_site *s = (const struct cpu_lr_site *)site;
    int most = lr_chosen_max(site->rule, site->experts, site->top_k);
    size_t a = site->rank ? (size_t)(s->shared_a ? 1 : site->experts) * expert_a_bytes(s) : 0;
    size_t router =
        s->router ? (size_t)router_rows(site) * site->d_in * dtype_block_bytes(s->router_type) : 0;
    if (!s->shared_a && (size_t)rows * (size_t)most < (size_t)site->experts) a = 0;
    if (router) lines_add(l, s->router, router);
    if (a) lines_add(l, s->a, a);
}

void lr_lines_apply(struct lr_lines *l, const struct lr_records *r, size_t begin, size_t cols)
{
    const struct cpu_lr_site *s = (const struct cpu_lr_site *)r->first.site;
    size_t elem = dtype_block_bytes(s->type), first = begin / LR_PANEL,
           end = (begin + cols - 1) / LR_PANEL + 1;
    size_t bytes = (end - first) * (size_t)s->base.rank * LR_PANEL * elem;
    bool added[LR_EXPERTS_MAX];
    memset(added, 0, (size_t)s->base.experts);
    for (int i = 0; i < r->count; i++) {
        struct lr_record record = record_of(r, i);
        int32_t e;
        for (int j = 0; j < record.chosen_max && (e = expert_at(&record, j)) >= 0; j++) {
            if (!added[e])
                lines_add(l, (const char *)s->b + panel_offset(&s->base, (size_t)e, first) * elem, bytes);
            added[e] = true;
        }
    }
}

/* --- the second half --- */

void lr_record_chosen(const struct lr_record *r, struct lr_choice *out)
{
    out->count = lr_record_count(r);
    memcpy(out->expert, r->data, (size_t)out->count * sizeof *out->expert);
}

/* What one expert adds to rows of y, panel by panel. */
static void expand_rows(const struct cpu_kernels *k, const struct cpu_lr_site *s, size_t expert, int rows,
                        const float *const *z, size_t begin, size_t cols, float *const *y)
{
    size_t elem = dtype_block_bytes(s->type);
    for (size_t c = begin, n; c < begin + cols; c += n) {
        size_t inside = c % LR_PANEL, left = begin + cols - c;
        n = LR_PANEL - inside < left ? LR_PANEL - inside : left;
        size_t offset = panel_offset(&s->base, expert, c / LR_PANEL) + inside;
        k->lr_expand((const char *)s->b + offset * elem, s->type, LR_PANEL, s->base.rank, rows, z, n, y, c - begin);
    }
}

void lr_record_apply(const struct cpu_kernels *k, const struct lr_record *r, int j, size_t begin, size_t cols,
                     float *y)
{
    const struct cpu_lr_site *s = (const struct cpu_lr_site *)r->site;
    const float *z = r->data + r->chosen_max + (size_t)j * (size_t)r->site->rank;
    expand_rows(k, s, (size_t)expert_at(r, j), 1, &z, begin, cols, &y);
}

void lr_records_apply(const struct cpu_kernels *k, const struct lr_records *r, size_t begin, size_t cols, float *y,
                      size_t y_stride)
{
    const struct cpu_lr_site *s = (const struct cpu_lr_site *)r->first.site;
    if (r->count == 1) {
        int count = lr_record_count(&r->first);
        for (int j = 0; j < count; j++) lr_record_apply(k, &r->first, j, begin, cols, y);
        return;
    }
    CHECK(r->count <= LR_ROWS);
    struct rows_by_expert by;
    sort_by_expert(r, &by);
    for (int e = 0; e < s->base.experts; e++) {
        const float *z[LR_ROWS];
        float *to[LR_ROWS];
        for (int i = 0; i < by.count[e]; i++) {
            z[i] = record_z(r, by.row[e][i], by.choice[e][i]);
            to[i] = y + by.row[e][i] * y_stride;
        }
        if (by.count[e] > 0) expand_rows(k, s, (size_t)e, by.count[e], z, begin, cols, to);
    }
}

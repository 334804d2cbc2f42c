/* FFNs that an adapter routes as a whole (MixLoRA), through the groups of gate and up and of down, against
 * double precision; alone and in sets; and that a row's result depends on nothing but the row. */
#include "kernels/device.h"
#include "tests/support/check.h"
#include "tests/support/sites.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define EMBED_MAX   64
#define INNER_MAX   96
#define ROWS        24
#define MEMBERS_MAX 3

/* Roundings of fp32 sums of INNER_MAX terms, three products deep, against the row's largest output. */
#define TOLERANCE 3e-5

struct world {
    struct device *d;
    struct test_random random;
    size_t embed, inner;
    struct test_weight gate, up, down;
    float x[ROWS * EMBED_MAX];
};

/* Block types want multiples of 32; floats show what ragged ends do. */
static void world_init(struct world *w, enum cpu_level level, int threads, enum dtype type)
{
    bool blocks = dtype_block_elems(type) > 1;
    *w = (struct world){.random = {7}, .embed = blocks ? 64 : 45, .inner = blocks ? 96 : 75};
    struct cpu_device_config config = {.level = level, .threads = threads};
    assert_int_equal(cpu_device_open(&config, &w->d, NULL), ST_OK);
    test_weight_make(w->d, &w->random, type, w->inner, w->embed, &w->gate);
    test_weight_make(w->d, &w->random, type, w->inner, w->embed, &w->up);
    test_weight_make(w->d, &w->random, type, w->embed, w->inner, &w->down);
    test_fill(&w->random, w->x, ROWS * w->embed);
}

static void world_release(struct world *w)
{
    test_weight_release(w->d, &w->gate);
    test_weight_release(w->d, &w->up);
    test_weight_release(w->d, &w->down);
    w->d->ops->close(w->d);
}

/* An adapter of one layer's FFN: a router for all of it, or sites that have their own. */
struct kind {
    struct test_site_shape router; /* experts 0: none */
    struct test_site_shape site;
    bool gate, up, down;
};

static const struct kind kinds[] = {
    {{8, 0, 2, GATE_TOPK, 1, DTYPE_F32, DTYPE_F32}, {8, 4, 0, GATE_FFN, 1, DTYPE_BF16}, true, true, true},
    {{4, 0, 0, GATE_TOP_P, 2, DTYPE_F32, DTYPE_BF16, .top_p = 0.75f},
     {4, 7, 0, GATE_FFN, 1, DTYPE_F16},
     true,
     true,
     true},
    {{64, 0, 8, GATE_TOPK, 1, DTYPE_F32, DTYPE_F16, true},
     {64, 1, 0, GATE_FFN, 1, DTYPE_F32},
     true,
     true,
     true},
    {{1, 0, 1, GATE_TOPK, 1, DTYPE_F32, DTYPE_F32}, {1, 16, 0, GATE_FFN, 1, DTYPE_F32}, true, true, true},
    {{3, 0, 0, GATE_DENSE, 1, DTYPE_F32, DTYPE_F32}, {3, 3, 0, GATE_FFN, 1, DTYPE_BF16}, false, true, true},
    {{5, 0, 2, GATE_TOPK_RAW, 1, DTYPE_F32, DTYPE_F32},
     {5, 4, 0, GATE_FFN, 1, DTYPE_BF16},
     true,
     false,
     false},
    {{6, 0, 2, GATE_TOPK, 1, DTYPE_F32, DTYPE_F32}, {6, 128, 0, GATE_FFN, 1, DTYPE_BF16}, false, false, true},
    /* often none, never none but 1 of 4, and one A for all */
    {{8, 0, 0, GATE_THRESHOLD, 2, DTYPE_F32, DTYPE_F32, .threshold = 0.4f},
     {8, 4, 0, GATE_FFN, 1, DTYPE_BF16},
     true,
     true,
     true},
    {{4, 0, 0, GATE_ADA_THRESHOLD, 2, DTYPE_F32, DTYPE_F32, .threshold = 0.25f},
     {4, 4, 0, GATE_FFN, 1, DTYPE_F16},
     true,
     true,
     true},
    {{4, 0, 2, GATE_TOPK, 1, DTYPE_F32, DTYPE_F32},
     {4, 4, 0, GATE_FFN, 1, DTYPE_BF16, .shared_a = true},
     true,
     true,
     true},
    /* what other members of a set may be */
    {{0}, {1, 16, 0, GATE_NONE, 1, DTYPE_BF16, DTYPE_F32}, true, true, true},
    {{0}, {8, 4, 2, GATE_TOPK, 1, DTYPE_BF16, DTYPE_F32}, true, true, true},
    {{0}, {1, 4, 0, GATE_NONE, 1, DTYPE_BF16, DTYPE_F32, .gain = true, .bias = true}, true, false, true},
};
#define KIND_COUNT  ((int)(sizeof kinds / sizeof *kinds))
#define FIRST_OTHER (KIND_COUNT - 3)

struct ffn {
    struct lr_adapter lr;
    const struct kind *kind;
    const struct lr_site *packed[PROJ_COUNT], *packed_router[1];
    struct test_site site[PROJ_COUNT], router;
};

static void ffn_make(struct world *w, const struct kind *kind, struct ffn *out)
{
    const bool has[PROJ_COUNT] = {[PROJ_GATE] = kind->gate, [PROJ_UP] = kind->up, [PROJ_DOWN] = kind->down};
    struct lr_site_source source[PROJ_COUNT], *sources[PROJ_COUNT] = {0}, router_source,
                                              *router_sources[1] = {0};
    *out = (struct ffn){.kind = kind};
    for (int p = PROJ_GATE; p <= PROJ_DOWN; p++) {
        if (!has[p]) continue;
        size_t d_in = p == PROJ_DOWN ? w->inner : w->embed, d_out = p == PROJ_DOWN ? w->embed : w->inner;
        test_site_make(w->d, &w->random, &kind->site, d_in, d_out, &out->site[p], &out->packed[p]);
        source[p] = (struct lr_site_source){
            .experts = kind->site.experts, .rank = kind->site.rank, .d_in = d_in, .d_out = d_out};
        sources[p] = &source[p];
    }
    if (kind->router.experts > 0) {
        test_site_make(w->d, &w->random, &kind->router, w->embed, 0, &out->router, &out->packed_router[0]);
        router_source = (struct lr_site_source){
            .rule = kind->router.rule, .experts = kind->router.experts, .top_k = kind->router.top_k};
        router_sources[0] = &router_source;
    }
    out->lr = (struct lr_adapter){.layers = 1,
                                  .sites = out->packed,
                                  .width = lr_width(1, sources, router_sources),
                                  .ffn = kind->router.experts > 0 ? out->packed_router : NULL};
}

static void ffn_release(struct world *w, struct ffn *f)
{
    for (int p = 0; p < PROJ_COUNT; p++)
        if (f->packed[p]) test_site_release(w->d, &f->site[p], f->packed[p]);
    if (f->packed_router[0]) test_site_release(w->d, &f->router, f->packed_router[0]);
}

static void all_make(struct world *w, struct ffn *f)
{
    for (int i = 0; i < KIND_COUNT; i++) ffn_make(w, &kinds[i], &f[i]);
}

static void all_release(struct world *w, struct ffn *f)
{
    for (int i = 0; i < KIND_COUNT; i++) ffn_release(w, &f[i]);
    world_release(w);
}

/* As much scratch as the widest set says that it needs, and not a float more. */
static void reserve_for(struct world *w, const struct lr_segment *segments, int count)
{
    size_t widest = 0;
    for (int i = 0; i < count; i++) {
        size_t width = 0;
        for (int m = 0; m < segments[i].member_count; m++) width += segments[i].members[m].adapter->width;
        if (width > widest) widest = width;
    }
    struct device_limits limits = {.rows = ROWS, .cols = INNER_MAX, .lr_width = (int)widest};
    assert_int_equal(w->d->ops->reserve(w->d, &limits), ST_OK);
}

/* y (rows, embed) of rows of x from first_row on. */
static void run(struct world *w, int first_row, int rows, const struct lr_segment *segments,
                int segment_count, float *y)
{
    static float active[ROWS * INNER_MAX];
    reserve_for(w, segments, segment_count);
    struct site_group_args gate_up = {
        .rows = rows,
        .x = w->x + (size_t)first_row * w->embed,
        .x_stride = w->embed,
        .site_count = 2,
        .site = {{PROJ_GATE, w->gate.packed, active, w->inner}, {PROJ_UP, w->up.packed, NULL, 0}},
        .epilogue = EPILOGUE_SILU_MUL,
        .segment_count = segment_count,
        .segments = segments,
    };
    struct site_group_args down = {
        .rows = rows,
        .x = active,
        .x_stride = w->inner,
        .site_count = 1,
        .site = {{PROJ_DOWN, w->down.packed, y, w->embed}},
        .epilogue = EPILOGUE_ADD,
        .segment_count = segment_count,
        .segments = segments,
    };
    memset(y, 0, (size_t)rows * w->embed * sizeof *y);
    w->d->ops->site_group(w->d, &gate_up);
    w->d->ops->site_group(w->d, &down);
    assert_int_equal(w->d->ops->sync(w->d), ST_OK);
}

/* --- the oracle --- */

struct set {
    int count;
    const struct ffn *ffn[MEMBERS_MAX];
    struct lr_member member[MEMBERS_MAX];
};

static struct set set_of(int count, const struct ffn *const *ffn, const float *weight)
{
    struct set s = {.count = count};
    for (int m = 0; m < count; m++) {
        s.ffn[m] = ffn[m];
        s.member[m] = (struct lr_member){&ffn[m]->lr, weight[m]};
    }
    return s;
}

static double silu(double t) { return t / (1 + exp(-t)); }

/* W x and the deltas of the members that do not route this projection's FFN. */
static void with_others(const struct test_weight *w, enum projection p, const struct set *set, const float *x,
                        double *y)
{
    double base[INNER_MAX], none[INNER_MAX] = {0}, bound[INNER_MAX] = {0};
    for (size_t o = 0; o < w->file.rows; o++) {
        base[o] = 0;
        for (size_t k = 0; k < w->file.cols; k++)
            base[o] += (double)w->values[o * w->file.cols + k] * (double)x[k];
        y[o] = base[o];
    }
    for (int m = 0; m < set->count; m++)
        if (set->ffn[m]->packed[p] && set->ffn[m]->kind->router.experts == 0)
            test_site_add_delta(&set->ffn[m]->site[p], (double)set->member[m].weight, x, base, none, y,
                                bound);
}

/* The activation of one expert, given gate and up without experts. */
static void expert_activation(const struct world *w, const struct ffn *f, int i, const float *x,
                              const double *gate, const double *up, double *a)
{
    double own_gate[INNER_MAX], own_up[INNER_MAX], xd[EMBED_MAX];
    for (size_t k = 0; k < w->embed; k++) xd[k] = (double)x[k];
    memcpy(own_gate, gate, w->inner * sizeof *gate);
    memcpy(own_up, up, w->inner * sizeof *up);
    if (f->packed[PROJ_GATE]) test_site_add_expert(&f->site[PROJ_GATE], i, 1, xd, own_gate);
    if (f->packed[PROJ_UP]) test_site_add_expert(&f->site[PROJ_UP], i, 1, xd, own_up);
    for (size_t c = 0; c < w->inner; c++) a[c] = silu(own_gate[c]) * own_up[c];
}

/* One row's y; false where rounding may choose other experts, or weigh them much otherwise: the share of an
 * expert right above an adaptive threshold. */
static bool oracle(const struct world *w, const struct set *set, int row, double *y)
{
    const float *x = w->x + (size_t)row * w->embed;
    double gate[INNER_MAX], up[INNER_MAX], plain[INNER_MAX], h[INNER_MAX], low_rank[EMBED_MAX] = {0};
    bool sure = true;
    with_others(&w->gate, PROJ_GATE, set, x, gate);
    with_others(&w->up, PROJ_UP, set, x, up);
    for (size_t c = 0; c < w->inner; c++) h[c] = plain[c] = silu(gate[c]) * up[c];
    for (int m = 0; m < set->count; m++) {
        const struct ffn *f = set->ffn[m];
        double g[LR_EXPERTS_MAX], error[LR_EXPERTS_MAX], a[INNER_MAX], weight = (double)set->member[m].weight;
        bool any = false;
        if (f->kind->router.experts == 0) continue;
        test_site_gates(&f->router, x, g, error);
        for (int i = 0; i < f->kind->router.experts; i++) {
            sure = sure && error[i] < 1e-3;
            if (g[i] == 0) continue;
            any = true;
            expert_activation(w, f, i, x, gate, up, a);
            for (size_t c = 0; c < w->inner; c++) h[c] += weight * g[i] * a[c];
            if (f->packed[PROJ_DOWN]) test_site_add_expert(&f->site[PROJ_DOWN], i, weight * g[i], a, low_rank);
        }
        for (size_t c = 0; c < w->inner && any; c++) h[c] -= weight * plain[c];
    }
    float rounded[INNER_MAX];
    for (size_t c = 0; c < w->inner; c++) rounded[c] = (float)h[c];
    with_others(&w->down, PROJ_DOWN, set, rounded, y);
    for (size_t o = 0; o < w->embed; o++) y[o] += low_rank[o];
    return sure;
}

/* MixLoRA as published, for an adapter alone: sum_i g_i W_d,i (silu(W_g,i x) * (W_u,i x)). */
static void oracle_mixlora(const struct world *w, const struct ffn *f, int row, double *y)
{
    const float *x = w->x + (size_t)row * w->embed;
    const struct set none = {0};
    double gate[INNER_MAX], up[INNER_MAX], a[INNER_MAX], g[LR_EXPERTS_MAX], error[LR_EXPERTS_MAX];
    with_others(&w->gate, PROJ_GATE, &none, x, gate);
    with_others(&w->up, PROJ_UP, &none, x, up);
    test_site_gates(&f->router, x, g, error);
    memset(y, 0, w->embed * sizeof *y);
    for (int i = 0; i < f->kind->router.experts; i++) {
        if (g[i] == 0) continue;
        expert_activation(w, f, i, x, gate, up, a);
        for (size_t o = 0; o < w->embed; o++)
            for (size_t c = 0; c < w->inner; c++)
                y[o] += g[i] * (double)w->down.values[o * w->inner + c] * a[c];
        if (f->packed[PROJ_DOWN]) test_site_add_expert(&f->site[PROJ_DOWN], i, g[i], a, y);
    }
}

static void expect_row(const struct world *w, const char *what, int row, const float *got, const double *y)
{
    double most = 0;
    for (size_t o = 0; o < w->embed; o++) most = fmax(most, fabs(y[o]));
    for (size_t o = 0; o < w->embed; o++)
        if (!(fabs((double)got[o] - y[o]) <= TOLERANCE * most))
            fail_msg("%s, row %d output %zu: %.9g, not %.9g; the row's largest is %.3g", what, row, o,
                     (double)got[o], y[o], most);
}

/* Rows 2.. of a batch in segments of `rows` each. */
static void expect_oracle(struct world *w, const char *what, const struct set *set)
{
    static float y[ROWS * EMBED_MAX];
    static const struct set none = {0};
    struct lr_segment segments[2] = {{2, 9, set->count, set->member}, {12, 10, set->count, set->member}};
    run(w, 0, ROWS, segments, 2, y);
    int unsure = 0;
    for (int r = 0; r < ROWS; r++) {
        double expected[EMBED_MAX];
        bool with = (r >= 2 && r < 11) || (r >= 12 && r < 22);
        if (oracle(w, with ? set : &none, r, expected))
            expect_row(w, what, r, y + (size_t)r * w->embed, expected);
        else
            unsure++;
    }
    assert_true(unsure <= 2); /* rounding decides in very few rows */
}

static void matches_double_precision(enum cpu_level level)
{
    struct world w;
    struct ffn f[KIND_COUNT];
    world_init(&w, level, 2, DTYPE_F32);
    all_make(&w, f);
    for (int i = 0; i < KIND_COUNT; i++) {
        char what[64];
        snprintf(what, sizeof what, "kind %d", i);
        for (int weight = 0; weight < 2; weight++) {
            struct set one =
                set_of(1, (const struct ffn *[]){&f[i]}, weight ? (float[]){-0.5f} : (float[]){1});
            expect_oracle(&w, what, &one);
        }
        snprintf(what, sizeof what, "kind %d in sets", i);
        struct set pair =
            set_of(2, (const struct ffn *[]){&f[i], &f[FIRST_OTHER + i % 3]}, (float[]){0.75f, 1});
        expect_oracle(&w, what, &pair);
        struct set three =
            set_of(3, (const struct ffn *[]){&f[FIRST_OTHER + 1], &f[i], &f[(i + 1) % KIND_COUNT]},
                   (float[]){-1, 0.5f, 0.25f});
        expect_oracle(&w, what, &three);
    }
    all_release(&w, f);
}

static void reference_matches_double_precision(void **state)
{
    (void)state;
    matches_double_precision(CPU_REFERENCE);
}

static void best_level_matches_double_precision(void **state)
{
    (void)state;
    matches_double_precision(CPU_LEVEL_BEST);
}

static void alone_it_is_mixlora(void **state)
{
    (void)state;
    static float y[ROWS * EMBED_MAX];
    struct world w;
    struct ffn f;
    for (int i = 0; i < 2; i++) {
        world_init(&w, CPU_LEVEL_BEST, 2, DTYPE_F32);
        ffn_make(&w, &kinds[i], &f);
        struct lr_member member = {&f.lr, 1};
        struct lr_segment segment = {0, ROWS, 1, &member};
        run(&w, 0, ROWS, &segment, 1, y);
        for (int r = 0; r < ROWS; r++) {
            double expected[EMBED_MAX];
            oracle_mixlora(&w, &f, r, expected);
            expect_row(&w, "MixLoRA", r, y + (size_t)r * w.embed, expected);
        }
        ffn_release(&w, &f);
        world_release(&w);
    }
}

/* A batch of every kind, in sets of one to three, and rows of the base. */
struct crowd {
    struct lr_member member[ROWS][MEMBERS_MAX];
    struct lr_segment segment[ROWS];
    int count;
};

static void crowd_make(struct crowd *c, const struct ffn *f)
{
    c->count = 0;
    for (int r = 0; r < ROWS; r++) {
        for (int m = 0; m < MEMBERS_MAX; m++)
            c->member[r][m] = (struct lr_member){&f[(r + m * 4) % KIND_COUNT].lr, m ? -0.5f : 1};
        if (r % 7 != 5) c->segment[c->count++] = (struct lr_segment){r, 1, 1 + r % MEMBERS_MAX, c->member[r]};
    }
}

static void a_row_is_the_same_in_any_batch(void **state)
{
    (void)state;
    static const enum dtype types[] = {DTYPE_F32, DTYPE_Q4_1};
    static float all[ROWS * EMBED_MAX], one[ROWS * EMBED_MAX];
    for (int t = 0; t < 2; t++)
        for (int level = 0; level < CPU_LEVEL_COUNT; level++) {
            if (!cpu_level_usable((enum cpu_level)level)) continue;
            struct world w;
            struct ffn f[KIND_COUNT];
            struct crowd c;
            world_init(&w, (enum cpu_level)level, 3, types[t]);
            all_make(&w, f);
            crowd_make(&c, f);
            run(&w, 0, ROWS, c.segment, c.count, all);
            for (int r = 0; r < ROWS; r++) {
                struct lr_segment alone = {0, 1, 1 + r % MEMBERS_MAX, c.member[r]};
                run(&w, r, 1, &alone, r % 7 != 5, one);
                assert_memory_equal(all + (size_t)r * w.embed, one, w.embed * sizeof *one);
            }
            all_release(&w, f);
        }
}

static void threads_do_not_matter(void **state)
{
    (void)state;
    static float first[ROWS * EMBED_MAX], other[ROWS * EMBED_MAX];
    for (int threads = 1; threads <= 4; threads++) {
        struct world w;
        struct ffn f[KIND_COUNT];
        struct crowd c;
        world_init(&w, CPU_LEVEL_BEST, threads, DTYPE_Q4_1);
        all_make(&w, f);
        crowd_make(&c, f);
        run(&w, 0, ROWS, c.segment, c.count, threads == 1 ? first : other);
        if (threads > 1) assert_memory_equal(first, other, ROWS * w.embed * sizeof *first);
        all_release(&w, f);
    }
}

static void no_expert_is_the_base(void **state)
{
    (void)state;
    static const struct kind never = {{4, 0, 0, GATE_THRESHOLD, 1, DTYPE_F32, DTYPE_F32, .threshold = 1.5f},
                                      {4, 4, 0, GATE_FFN, 1, DTYPE_BF16},
                                      true,
                                      true,
                                      true};
    static float base[ROWS * EMBED_MAX], with[ROWS * EMBED_MAX];
    struct world w;
    struct ffn f;
    world_init(&w, CPU_LEVEL_BEST, 2, DTYPE_Q4_1);
    ffn_make(&w, &never, &f);
    struct lr_member member = {&f.lr, 1};
    struct lr_segment segment = {1, ROWS - 2, 1, &member};
    run(&w, 0, ROWS, NULL, 0, base);
    run(&w, 0, ROWS, &segment, 1, with);
    assert_memory_equal(base, with, ROWS * w.embed * sizeof *base);
    ffn_release(&w, &f);
    world_release(&w);
}

static void nan_stays_in_its_row(void **state)
{
    (void)state;
    static float clean[ROWS * EMBED_MAX], dirty[ROWS * EMBED_MAX];
    struct world w;
    struct ffn f[KIND_COUNT];
    world_init(&w, CPU_LEVEL_BEST, 2, DTYPE_F32);
    all_make(&w, f);
    for (int i = 0; i < KIND_COUNT; i++) {
        struct lr_member member = {&f[i].lr, 1};
        struct lr_segment segment = {0, ROWS, 1, &member};
        float sound = w.x[7 * w.embed];
        run(&w, 0, ROWS, &segment, 1, clean);
        w.x[7 * w.embed] = NAN;
        run(&w, 0, ROWS, &segment, 1, dirty);
        w.x[7 * w.embed] = sound;
        for (size_t r = 0; r < ROWS; r++) {
            if (r != 7)
                assert_memory_equal(clean + r * w.embed, dirty + r * w.embed, w.embed * sizeof *clean);
            else
                assert_true(isnan(dirty[r * w.embed]));
        }
    }
    all_release(&w, f);
}

/* The same adapters on attention alone take no part of an FFN's scratch. */
static void the_width_is_the_widest_group(void **state)
{
    (void)state;
    struct lr_site_source small = {.experts = 4, .rank = 3, .d_in = 10, .d_out = 100};
    struct lr_site_source big = {.experts = 8, .rank = 3, .d_in = 100, .d_out = 10};
    struct lr_site_source router = {.experts = 4, .top_k = 2, .rule = GATE_TOPK, .d_in = 10, .d_out = 100};
    struct lr_site_source *sites[2 * PROJ_COUNT] = {[PROJ_Q] = &small, [PROJ_V] = &small, [PROJ_O] = &small};
    struct lr_site_source *ffn[2] = {NULL, &router};
    assert_int_equal(lr_width(1, sites, NULL), 2 * 4 * 4);
    sites[PROJ_COUNT + PROJ_GATE] = sites[PROJ_COUNT + PROJ_UP] = &small;
    sites[PROJ_COUNT + PROJ_DOWN] = &big;
    assert_int_equal(lr_width(2, sites, NULL), 2 * 4 * 4);
    assert_int_equal(lr_width(2, sites, ffn), 2 * (100 + 2) + 2 * 4 * 4);
    sites[PROJ_COUNT + PROJ_GATE] = sites[PROJ_COUNT + PROJ_UP] = NULL;
    assert_int_equal(lr_width(2, sites, ffn), 2 * (100 + 2) + 8 * 4);
    router.rule = GATE_TOP_P;
    assert_int_equal(lr_width(2, sites, ffn), 4 * (100 + 2) + 8 * 4);
    assert_int_equal(lr_width(0, NULL, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reference_matches_double_precision),
        cmocka_unit_test(best_level_matches_double_precision),
        cmocka_unit_test(alone_it_is_mixlora),
        cmocka_unit_test(a_row_is_the_same_in_any_batch),
        cmocka_unit_test(threads_do_not_matter),
        cmocka_unit_test(no_expert_is_the_base),
        cmocka_unit_test(nan_stays_in_its_row),
        cmocka_unit_test(the_width_is_the_widest_group),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

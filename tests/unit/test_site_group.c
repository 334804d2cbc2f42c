/* The site group: base products, routed deltas and epilogues, against double precision; and that a row's
 * result depends on nothing but the row. */
#include "kernels/device.h"
#include "tests/support/sites.h"

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define D_IN     96
#define ROWS_MAX 40
#define OUT_MAX  80
#define LR_WIDTH 65536
#define BATCH    32 /* rows of a batch that mixes all kinds */
#define Y_GAP    3  /* columns between rows of y that nobody may touch */

/* The groups of a layer. */
struct group_shape {
    int site_count;
    enum projection projection[SITE_GROUP_MAX];
    size_t d_out[SITE_GROUP_MAX];
    enum epilogue epilogue;
};
static const struct group_shape groups[] = {
    {3, {PROJ_Q, PROJ_K, PROJ_V}, {80, 33, 17}, EPILOGUE_STORE},
    {1, {PROJ_O}, {70}, EPILOGUE_ADD},
    {2, {PROJ_GATE, PROJ_UP}, {67, 67}, EPILOGUE_SILU_MUL},
    {1, {PROJ_DOWN}, {65}, EPILOGUE_ADD},
};
#define GROUP_COUNT 4

static const size_t all_sites[PROJ_COUNT] = {80, 33, 17, 70, 67, 67, 65};
static const size_t few_sites[PROJ_COUNT] = {80, 0, 17, 0, 0, 67, 65};

struct world {
    struct device *d;
    struct test_random random;
    struct test_weight weight[PROJ_COUNT];
    float x[ROWS_MAX * (D_IN + 1)];
};

static struct device *device_open(enum cpu_level level, int threads, int lr_width)
{
    struct cpu_device_config config = {.level = level, .threads = threads};
    struct device *d;
    assert_int_equal(cpu_device_open(&config, &d, NULL), ST_OK);
    struct device_limits limits = {.rows = ROWS_MAX, .cols = D_IN, .lr_width = lr_width};
    assert_int_equal(d->ops->reserve(d, &limits), ST_OK);
    return d;
}

static void world_init(struct world *w, enum cpu_level level, int threads, enum dtype type)
{
    w->d = device_open(level, threads, LR_WIDTH);
    w->random.state = 11;
    for (int p = 0; p < PROJ_COUNT; p++)
        test_weight_make(w->d, &w->random, type, all_sites[p], D_IN, &w->weight[p]);
    test_fill(&w->random, w->x, ROWS_MAX * (D_IN + 1));
}

static void world_release(struct world *w)
{
    for (int p = 0; p < PROJ_COUNT; p++) test_weight_release(w->d, &w->weight[p]);
    w->d->ops->close(w->d);
}

/* The outputs of a group, (rows, d_out + Y_GAP) each. EPILOGUE_ADD adds to `residual`. */
struct outputs {
    float y[SITE_GROUP_MAX][ROWS_MAX * (OUT_MAX + Y_GAP)];
    size_t stride[SITE_GROUP_MAX];
};

static float residual(int row, size_t column) { return (float)((row * 7 + (int)column * 3) % 11) - 5; }

/* rows of x from first_row on, as the batch (row 0 of the outputs is first_row's). */
static void run_group(struct world *w, const struct group_shape *g, int first_row, int rows,
                      const struct lr_segment *segments, int segment_count, struct outputs *out)
{
    struct site_group_args a = {
        .rows = rows,
        .x = w->x + (size_t)first_row * (D_IN + 1),
        .x_stride = D_IN + 1,
        .site_count = g->site_count,
        .epilogue = g->epilogue,
        .layer = 0,
        .segment_count = segment_count,
        .segments = segments,
    };
    for (int s = 0; s < g->site_count; s++) {
        out->stride[s] = g->d_out[s] + Y_GAP;
        for (int r = 0; r < rows; r++)
            for (size_t c = 0; c < out->stride[s]; c++)
                out->y[s][(size_t)r * out->stride[s] + c] = residual(first_row + r, c);
        a.site[s].projection = g->projection[s];
        a.site[s].weight = w->weight[g->projection[s]].packed;
        a.site[s].y = out->y[s];
        a.site[s].y_stride = out->stride[s];
    }
    w->d->ops->site_group(w->d, &a);
    assert_int_equal(w->d->ops->sync(w->d), ST_OK);
    for (int s = 0; s < g->site_count; s++)
        for (int r = 0; r < rows; r++)
            for (size_t c = g->d_out[s]; c < out->stride[s]; c++)
                assert_true(out->y[s][(size_t)r * out->stride[s] + c] == residual(first_row + r, c));
}

static int output_count(const struct group_shape *g)
{
    return g->epilogue == EPILOGUE_SILU_MUL ? 1 : g->site_count;
}

/* The adapters of a test; segments name them by address. */
struct test_set {
    int count;
    const struct test_adapter *adapter[3];
    struct lr_member member[3];
};

static void set_make(struct test_set *s, int count, const struct test_adapter *const *adapters,
                     const float *weights)
{
    s->count = count;
    for (int m = 0; m < count; m++) {
        s->adapter[m] = adapters[m];
        s->member[m] = (struct lr_member){&adapters[m]->lr, weights[m]};
    }
}

/* One row of one site in double precision: W x and the deltas of its set (which may be NULL). */
static void oracle_site(struct world *w, enum projection p, int row, const struct test_set *set, double *y,
                        double *bound)
{
    const float *x = w->x + (size_t)row * (D_IN + 1);
    for (size_t o = 0; o < all_sites[p]; o++) {
        double magnitude = 0;
        y[o] = 0;
        for (size_t k = 0; k < D_IN; k++) {
            double term = (double)w->weight[p].values[o * D_IN + k] * x[k];
            y[o] += term;
            magnitude += fabs(term);
        }
        bound[o] = magnitude * FLT_EPSILON * D_IN / 4;
    }
    double base[OUT_MAX], base_bound[OUT_MAX];
    memcpy(base, y, all_sites[p] * sizeof *y);
    memcpy(base_bound, bound, all_sites[p] * sizeof *bound);
    for (int m = 0; set && m < set->count; m++)
        if (set->adapter[m]->packed[p])
            test_site_add_delta(&set->adapter[m]->site[p], (double)set->member[m].weight, x, base, base_bound,
                                y, bound);
}

static double silu(double t) { return t / (1 + exp(-t)); }

/* Output `site` of one row: what the epilogue makes of it. */
static void oracle_row(struct world *w, const struct group_shape *g, int site, int row,
                       const struct test_set *set, double *y, double *bound)
{
    oracle_site(w, g->projection[site], row, set, y, bound);
    if (g->epilogue == EPILOGUE_ADD) {
        for (size_t o = 0; o < g->d_out[site]; o++) {
            y[o] += residual(row, o);
            bound[o] += FLT_EPSILON * (fabs(y[o]) + 5);
        }
    } else if (g->epilogue == EPILOGUE_SILU_MUL) {
        double up[OUT_MAX], up_bound[OUT_MAX];
        oracle_site(w, g->projection[1], row, set, up, up_bound);
        for (size_t o = 0; o < g->d_out[0]; o++) {
            double act = silu(y[o]);
            /* silu's slope is at most 1.1; its own rounding is 8 units */
            bound[o] = (1.1 * bound[o] + 8 * FLT_EPSILON * fabs(act)) * (fabs(up[o]) + up_bound[o]) +
                       fabs(act) * up_bound[o] + 1e-30;
            y[o] = act * up[o];
        }
    }
}

/* Which set a row has: rows of segments in order, the others none. */
static const struct test_set *set_of_row(const struct lr_segment *segments, int count,
                                         const struct test_set *sets, int row)
{
    for (int i = 0; i < count; i++)
        if (row >= segments[i].first_row && row < segments[i].first_row + segments[i].row_count)
            return &sets[i];
    return NULL;
}

static void expect_oracle(struct world *w, const struct lr_segment *segments, int segment_count,
                          const struct test_set *sets, int rows)
{
    static struct outputs out;
    for (int i = 0; i < GROUP_COUNT; i++) {
        const struct group_shape *g = &groups[i];
        run_group(w, g, 0, rows, segments, segment_count, &out);
        for (int s = 0; s < output_count(g); s++)
            for (int r = 0; r < rows; r++) {
                double y[OUT_MAX], bound[OUT_MAX];
                oracle_row(w, g, s, r, set_of_row(segments, segment_count, sets, r), y, bound);
                for (size_t o = 0; o < g->d_out[s]; o++) {
                    double got = out.y[s][(size_t)r * out.stride[s] + o];
                    if (!(fabs(got - y[o]) <= bound[o]))
                        fail_msg("group %d site %d row %d output %zu: %.9g, not %.9g within %.3g", i, s, r, o,
                                 got, y[o], bound[o]);
                }
            }
    }
}

static const struct test_site_shape shapes[] = {
    {1, 4, 0, GATE_NONE, 1, DTYPE_BF16, DTYPE_F32, false},
    {1, 16, 0, GATE_NONE, 1, DTYPE_F16, DTYPE_F32, false},
    {1, 128, 0, GATE_NONE, 1, DTYPE_F32, DTYPE_F32, false},
    {3, 7, 0, GATE_NONE, 1, DTYPE_F32, DTYPE_F32, false},
    {8, 4, 2, GATE_TOPK, 1, DTYPE_BF16, DTYPE_F32, false},
    {8, 4, 2, GATE_TOPK, 1, DTYPE_BF16, DTYPE_F32, true},
    {8, 3, 8, GATE_TOPK, 0.5f, DTYPE_F16, DTYPE_F16, false},
    {2, 1, 1, GATE_TOPK, 1, DTYPE_F32, DTYPE_BF16, false},
    {64, 1, 8, GATE_TOPK_RAW, 2, DTYPE_F16, DTYPE_BF16, false},
    {5, 16, 3, GATE_TOPK_RAW, 1, DTYPE_BF16, DTYPE_BF16, true},
    {4, 7, 0, GATE_DENSE, 1, DTYPE_F32, DTYPE_F16, false},
    {1, 3, 1, GATE_DENSE, 1, DTYPE_BF16, DTYPE_F32, false},
    {64, 3, 1, GATE_TOPK, 1, DTYPE_BF16, DTYPE_F32, false},
    {8, 4, 0, GATE_TOP_P, 2, DTYPE_BF16, DTYPE_F32, false, .top_p = 0.8f},
    {64, 3, 0, GATE_TOP_P, 4, DTYPE_F16, DTYPE_F16, true, .top_p = 0.6f},
    {1, 16, 0, GATE_TOP_P, 1, DTYPE_F32, DTYPE_F32, false, .top_p = 0.5f},
    {8, 7, 0, GATE_THRESHOLD, 2, DTYPE_BF16, DTYPE_BF16, false, .threshold = 0.4f}, /* often none */
    {2, 128, 0, GATE_THRESHOLD, 1, DTYPE_F16, DTYPE_F32, false, .threshold = 0.2f},
    {8, 4, 0, GATE_ADA_THRESHOLD, 3, DTYPE_BF16, DTYPE_F32, false, .threshold = 0.25f,
     .threshold_bias = 0.5f},
    {64, 1, 0, GATE_ADA_THRESHOLD, 4, DTYPE_F32, DTYPE_F16, true, .threshold = 0.1f},
    {4, 16, 0, GATE_DENSE, 1, DTYPE_BF16, DTYPE_F32, false, .shared_a = true},
    {64, 3, 8, GATE_TOPK, 1, DTYPE_F16, DTYPE_F32, false, .shared_a = true},
    {8, 4, 0, GATE_THRESHOLD, 2, DTYPE_F32, DTYPE_F32, false, .shared_a = true, .threshold = 0.4f},
    {1, 16, 0, GATE_NONE, 1, DTYPE_BF16, DTYPE_F32, false, .gain = true},
    {1, 7, 0, GATE_NONE, 1, DTYPE_F32, DTYPE_F32, false, .gain = true, .bias = true},
    {8, 4, 2, GATE_TOPK, 1, DTYPE_BF16, DTYPE_F32, false, .bias = true},
};
#define SHAPE_COUNT ((int)(sizeof shapes / sizeof *shapes))

static void adapters_make(struct world *w, struct test_adapter *adapters)
{
    for (int i = 0; i < SHAPE_COUNT; i++)
        test_adapter_make(w->d, &w->random, &shapes[i], D_IN, i % 3 == 2 ? few_sites : all_sites,
                          &adapters[i]);
}

static void adapters_release(struct world *w, struct test_adapter *adapters)
{
    for (int i = 0; i < SHAPE_COUNT; i++) test_adapter_release(w->d, &adapters[i]);
}

static void matches_double_precision(enum cpu_level level)
{
    struct world w;
    struct test_adapter adapters[SHAPE_COUNT];
    world_init(&w, level, 2, DTYPE_F32);
    adapters_make(&w, adapters);
    expect_oracle(&w, NULL, 0, NULL, 1);
    expect_oracle(&w, NULL, 0, NULL, ROWS_MAX);

    /* every kind alone, on the middle rows of a batch */
    for (int i = 0; i < SHAPE_COUNT; i++) {
        struct test_set set;
        set_make(&set, 1, (const struct test_adapter *[]){&adapters[i]}, (float[]){1});
        struct lr_segment segment = {2, 5, set.count, set.member};
        expect_oracle(&w, &segment, 1, &set, 9);
    }
    /* sets of several, side by side, with rows of the base between them: each kind is in one with its
     * neighbours, and the last with the first */
    struct test_set sets[8];
    struct lr_segment segments[8];
    for (int next = 0; next < SHAPE_COUNT; next += 8) {
        for (int i = 0; i < 8; i++) {
            const struct test_adapter *members[3];
            float weights[3];
            for (int m = 0; m < 3; m++) {
                members[m] = &adapters[(next + i + m) % SHAPE_COUNT];
                weights[m] = random_f32(&w.random, -1, 1);
            }
            set_make(&sets[i], 3 - i % 2, members, weights);
            segments[i] = (struct lr_segment){i * 5, 1 + i % 5, sets[i].count, sets[i].member};
        }
        expect_oracle(&w, segments, 8, sets, ROWS_MAX);
    }
    adapters_release(&w, adapters);
    world_release(&w);
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

static void expect_same_row(const struct group_shape *g, const struct outputs *a, int a_row,
                            const struct outputs *b, int b_row)
{
    for (int s = 0; s < output_count(g); s++)
        assert_memory_equal(a->y[s] + (size_t)a_row * a->stride[s], b->y[s] + (size_t)b_row * b->stride[s],
                            g->d_out[s] * sizeof(float));
}

/* Each of 32 rows with adapters of every kind, one or two to a row, and the bare base among them: in the
 * batch, alone, and in a batch in reverse order, bit for bit. */
static void rows_are_independent(enum cpu_level level, int threads, enum dtype type)
{
    static struct outputs all, one, reversed;
    struct world w;
    struct test_adapter adapters[SHAPE_COUNT];
    world_init(&w, level, threads, type);
    adapters_make(&w, adapters);

    struct lr_member member[BATCH][2];
    struct lr_segment segments[BATCH], backward[BATCH];
    int count = 0, backward_count = 0;
    for (int r = 0; r < BATCH; r++) {
        member[r][0] = (struct lr_member){&adapters[r % SHAPE_COUNT].lr, r % 2 ? 1 : 0.5f};
        member[r][1] = (struct lr_member){&adapters[(r * 5 + 1) % SHAPE_COUNT].lr, -0.25f};
    }
    for (int r = 0; r < BATCH; r++) {
        int other = BATCH - 1 - r;
        if (r % 5 != 3) segments[count++] = (struct lr_segment){r, 1, 1 + r % 2, member[r]};
        if (other % 5 != 3)
            backward[backward_count++] = (struct lr_segment){r, 1, 1 + other % 2, member[other]};
    }

    for (int i = 0; i < GROUP_COUNT; i++) {
        const struct group_shape *g = &groups[i];
        run_group(&w, g, 0, BATCH, segments, count, &all);
        for (int r = 0; r < BATCH; r++) {
            struct lr_segment alone = {0, 1, 1 + r % 2, member[r]};
            run_group(&w, g, r, 1, &alone, r % 5 != 3, &one);
            expect_same_row(g, &all, r, &one, 0);
        }
        if (g->epilogue == EPILOGUE_ADD) continue; /* its residual is told by the row's number */
        float forward_x[ROWS_MAX * (D_IN + 1)];
        memcpy(forward_x, w.x, sizeof forward_x);
        for (int r = 0; r < BATCH; r++)
            memcpy(w.x + r * (D_IN + 1), forward_x + (BATCH - 1 - r) * (D_IN + 1), D_IN * sizeof *w.x);
        run_group(&w, g, 0, BATCH, backward, backward_count, &reversed);
        memcpy(w.x, forward_x, sizeof forward_x);
        for (int r = 0; r < BATCH; r++) expect_same_row(g, &all, r, &reversed, BATCH - 1 - r);
    }
    adapters_release(&w, adapters);
    world_release(&w);
}

static void a_row_is_the_same_in_any_batch(void **state)
{
    (void)state;
    static const enum dtype types[] = {DTYPE_F32, DTYPE_BF16, DTYPE_Q4_1, DTYPE_Q8_0};
    for (int t = 0; t < 4; t++) {
        rows_are_independent(CPU_REFERENCE, 2, types[t]);
        rows_are_independent(CPU_LEVEL_BEST, 3, types[t]);
    }
}

/* All groups for one set on rows 1..30 of 32, into out[GROUP_COUNT]. */
static void run_all(struct world *w, const struct lr_segment *segments, int count, struct outputs *out)
{
    for (int i = 0; i < GROUP_COUNT; i++) run_group(w, &groups[i], 0, 32, segments, count, &out[i]);
}

static void expect_same(const struct outputs *a, const struct outputs *b)
{
    for (int i = 0; i < GROUP_COUNT; i++)
        for (int r = 0; r < 32; r++) expect_same_row(&groups[i], &a[i], r, &b[i], r);
}

static void threads_do_not_matter(void **state)
{
    (void)state;
    static struct outputs first[GROUP_COUNT], other[GROUP_COUNT];
    for (int level = 0; level < CPU_LEVEL_COUNT; level++)
        if (cpu_level_usable((enum cpu_level)level))
            for (int threads = 1; threads <= 4; threads++) {
                struct world w;
                struct test_adapter adapters[SHAPE_COUNT];
                world_init(&w, (enum cpu_level)level, threads, DTYPE_Q4_1);
                adapters_make(&w, adapters);
                /* every kind in a set with the next, two rows each */
                struct lr_member members[SHAPE_COUNT + 1];
                struct lr_segment segments[16];
                for (int i = 0; i <= SHAPE_COUNT; i++)
                    members[i] = (struct lr_member){&adapters[i % SHAPE_COUNT].lr, i % 3 ? 1 : -0.5f};
                for (int i = 0; i < 16; i++)
                    segments[i] = (struct lr_segment){i * 2, 1 + (i > 2), 2, &members[i * 2 % SHAPE_COUNT]};
                run_all(&w, segments, 16, threads == 1 ? first : other);
                if (threads > 1) expect_same(first, other);
                adapters_release(&w, adapters);
                world_release(&w);
            }
}

static void a_set_without_sites_is_the_base(void **state)
{
    (void)state;
    static struct outputs base[GROUP_COUNT], with[GROUP_COUNT];
    struct world w;
    struct test_adapter empty;
    world_init(&w, CPU_LEVEL_BEST, 2, DTYPE_Q4_1);
    test_adapter_make(w.d, &w.random, &shapes[0], D_IN, (const size_t[PROJ_COUNT]){0}, &empty);
    struct lr_member members[2] = {{&empty.lr, 1}, {&(struct lr_adapter){.layers = 0}, 1}};
    struct lr_segment segments[2] = {{0, 10, 2, members}, {12, 3, 0, NULL}};
    run_all(&w, NULL, 0, base);
    run_all(&w, segments, 2, with);
    expect_same(base, with);
    test_adapter_release(w.d, &empty);
    world_release(&w);
}

/* Rules that may choose no expert, in rows where they do not. */
static void no_expert_is_the_base(void **state)
{
    (void)state;
    static const struct test_site_shape never[] = {
        {8, 4, 0, GATE_THRESHOLD, 1, DTYPE_BF16, DTYPE_F32, false, .threshold = 1.5f},
        {8, 4, 0, GATE_ADA_THRESHOLD, 1, DTYPE_BF16, DTYPE_F32, false, .threshold = 3, .threshold_bias = 80},
    };
    static struct outputs base[GROUP_COUNT], with[GROUP_COUNT];
    struct world w;
    struct test_adapter adapters[2];
    world_init(&w, CPU_LEVEL_BEST, 2, DTYPE_Q4_1);
    for (int i = 0; i < 2; i++) test_adapter_make(w.d, &w.random, &never[i], D_IN, all_sites, &adapters[i]);
    struct lr_member members[2] = {{&adapters[0].lr, 1}, {&adapters[1].lr, -2}};
    struct lr_segment segments[3] = {{0, 10, 1, &members[0]}, {12, 3, 1, &members[1]}, {15, 9, 2, members}};
    run_all(&w, NULL, 0, base);
    run_all(&w, segments, 3, with);
    expect_same(base, with);
    for (int i = 0; i < 2; i++) test_adapter_release(w.d, &adapters[i]);
    world_release(&w);
}

/* Rows that are not finite touch no other row, routing included. */
static void nan_stays_in_its_row(void **state)
{
    (void)state;
    static struct outputs clean[GROUP_COUNT], dirty[GROUP_COUNT];
    struct world w;
    struct test_adapter adapters[SHAPE_COUNT];
    world_init(&w, CPU_LEVEL_BEST, 2, DTYPE_Q4_1);
    adapters_make(&w, adapters);
    float sound[D_IN];
    memcpy(sound, w.x + 7 * (D_IN + 1), sizeof sound);
    for (int kind = 0; kind < SHAPE_COUNT; kind++) {
        struct lr_member member = {&adapters[kind].lr, 1};
        struct lr_segment segment = {0, 32, 1, &member};
        run_all(&w, &segment, 1, clean);
        for (size_t k = 0; k < D_IN; k++) w.x[7 * (D_IN + 1) + k] = k % 2 ? NAN : INFINITY;
        run_all(&w, &segment, 1, dirty);
        memcpy(w.x + 7 * (D_IN + 1), sound, sizeof sound);
        for (int i = 0; i < GROUP_COUNT; i++)
            for (int r = 0; r < 32; r++)
                if (r != 7) expect_same_row(&groups[i], &clean[i], r, &dirty[i], r);
    }
    adapters_release(&w, adapters);
    world_release(&w);
}

/* Sites of one group in different types: one of blocks, one of floats. */
static void types_mix_in_a_group(void **state)
{
    (void)state;
    static struct outputs alone, mixed;
    struct world quantised, plain;
    world_init(&quantised, CPU_LEVEL_BEST, 2, DTYPE_Q4_1);
    world_init(&plain, CPU_LEVEL_BEST, 2, DTYPE_F32);
    memcpy(plain.x, quantised.x, sizeof plain.x);

    const struct group_shape *qkv = &groups[0];
    struct weight *own_k = quantised.weight[PROJ_K].packed;
    run_group(&plain, qkv, 0, 20, NULL, 0, &alone);
    quantised.weight[PROJ_K].packed =
        plain.weight[PROJ_K].packed; /* the same backend's: only its layout counts */
    run_group(&quantised, qkv, 0, 20, NULL, 0, &mixed);
    quantised.weight[PROJ_K].packed = own_k;
    assert_memory_equal(alone.y[1], mixed.y[1], 20 * alone.stride[1] * sizeof(float));
    run_group(&quantised, qkv, 0, 20, NULL, 0, &alone);
    assert_memory_equal(alone.y[0], mixed.y[0], 20 * alone.stride[0] * sizeof(float));
    assert_memory_equal(alone.y[2], mixed.y[2], 20 * alone.stride[2] * sizeof(float));
    world_release(&quantised);
    world_release(&plain);
}

static void impossible_sites_are_refused(void **state)
{
    (void)state;
    struct device *d = device_open(CPU_REFERENCE, 1, 0);
    float ones[64];
    for (int i = 0; i < 64; i++) ones[i] = 1;
    const void *matrices[2] = {ones, ones};
    const struct lr_site_source good = {.experts = 2,
                                        .rank = 2,
                                        .top_k = 1,
                                        .d_in = 8,
                                        .d_out = 8,
                                        .rule = GATE_TOPK,
                                        .temperature = 1,
                                        .type = DTYPE_F32,
                                        .router_type = DTYPE_F32,
                                        .router = ones,
                                        .a = matrices,
                                        .b = matrices,
                                        .scale = ones};
    struct lr_site_source bad[23];
    for (int i = 0; i < 23; i++) bad[i] = good;
    bad[0].experts = 0;
    bad[1].experts = LR_EXPERTS_MAX + 1;
    bad[2].rank = LR_RANK_MAX + 1;
    bad[3].top_k = 3;
    bad[4].top_k = 0;
    bad[5].router = NULL;
    bad[6].type = DTYPE_Q8_0;
    bad[7].temperature = 0;
    bad[8].temperature = NAN;
    bad[9].rule = GATE_RULE_COUNT;
    for (int i = 10; i < 12; i++) bad[i].rule = GATE_TOP_P;
    bad[10].top_p = 1.01f;
    bad[11].top_p = NAN;
    bad[12].rule = GATE_THRESHOLD;
    bad[12].threshold = -0.1f;
    for (int i = 13; i < 16; i++) {
        bad[i].rule = GATE_ADA_THRESHOLD;
        bad[i].threshold_row = i == 13 ? NULL : ones;
        bad[i].threshold_bias = i == 14 ? INFINITY : 0;
        bad[i].threshold = i == 15 ? NAN : 1;
    }
    /* what only makes sense with matrices, and a routed FFN's sites, which have the router's gates alone */
    bad[16].rank = 0;
    for (int i = 17; i < 20; i++) {
        bad[i].rank = 0;
        bad[i].a = bad[i].b = NULL;
    }
    bad[17].rule = GATE_FFN;
    bad[18].bias = ones;
    bad[19].router = NULL;
    for (int i = 20; i < 22; i++) bad[i].rule = GATE_FFN;
    bad[20].base_gain = ones;
    bad[21].bias = ones;
    bad[22].scale = NULL;
    struct lr_site *site = NULL;
    for (int i = 0; i < 23; i++) assert_int_equal(d->ops->lr_site_pack(d, &bad[i], &site), ST_INVALID);
    assert_null(site);
    assert_int_equal(d->ops->lr_site_pack(d, &good, &site), ST_OK);
    assert_true(site->bytes >= (2 * 8 + 2 * 2 * 8 + 2 * 2 * 8) * sizeof(float));
    d->ops->lr_site_free(d, site);
    d->ops->lr_site_free(d, NULL);
    d->ops->close(d);
}

/* Two batches of 32 rows, in one segment and in segments of one row, by several threads. */
static void choices_are_counted(void **state)
{
    (void)state;
    static const struct test_site_shape shape = {8, 2, 3, GATE_TOPK, 8, DTYPE_F32, DTYPE_F32};
    static struct outputs out;
    struct world w;
    struct test_adapter adapter;
    world_init(&w, CPU_LEVEL_BEST, 4, DTYPE_Q8_0);
    test_adapter_make(w.d, &w.random, &shape, D_IN, all_sites, &adapter);
    struct lr_member member = {&adapter.lr, 0.5f};
    struct lr_segment whole = {0, BATCH, 1, &member}, rows[BATCH];
    for (int r = 0; r < BATCH; r++) rows[r] = (struct lr_segment){r, 1, 1, &member};
    run_group(&w, &groups[0], 0, BATCH, &whole, 1, &out);
    run_group(&w, &groups[0], 0, BATCH, rows, BATCH, &out);

    for (int p = PROJ_Q; p <= PROJ_V; p++) {
        uint64_t chosen[8], expected[8] = {0}, unsure = 0;
        double gate[8], expected_gate[8] = {0}, one[8], error[8];
        for (int r = 0; r < BATCH; r++) {
            bool sure = true;
            test_site_gates(&adapter.site[p], w.x + r * (D_IN + 1), one, error);
            for (int e = 0; e < 8; e++) sure &= isfinite(error[e]) != 0;
            for (int e = 0; e < 8 && sure; e++) {
                expected[e] += one[e] > 0 ? 2 : 0;
                expected_gate[e] += 2 * one[e];
            }
            unsure += sure ? 0 : 2; /* a near tie: rounding may choose otherwise */
        }
        struct lr_usage usage = {.chosen = chosen, .gate = gate};
        uint64_t all = 0;
        w.d->ops->lr_site_usage(w.d, adapter.packed[p], &usage);
        assert_int_equal(usage.rows, 2 * BATCH);
        assert_true(unsure <= 4);
        for (int e = 0; e < 8; e++) {
            all += chosen[e];
            assert_in_range(chosen[e], expected[e], expected[e] + unsure);
            /* fp32 gates, rounded to 2^-24 */
            assert_true(gate[e] >= expected_gate[e] - 2 * BATCH * 1e-5 &&
                        gate[e] <= expected_gate[e] + 2 * BATCH * 1e-5 + (double)unsure);
        }
        assert_int_equal(all, 2 * BATCH * 3);
    }
    test_adapter_release(w.d, &adapter);
    world_release(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reference_matches_double_precision),
        cmocka_unit_test(best_level_matches_double_precision),
        cmocka_unit_test(a_row_is_the_same_in_any_batch),
        cmocka_unit_test(threads_do_not_matter),
        cmocka_unit_test(a_set_without_sites_is_the_base),
        cmocka_unit_test(no_expert_is_the_base),
        cmocka_unit_test(nan_stays_in_its_row),
        cmocka_unit_test(types_mix_in_a_group),
        cmocka_unit_test(choices_are_counted),
        cmocka_unit_test(impossible_sites_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

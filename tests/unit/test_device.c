/* The CPU device's other ops: embedding, norm, rotation, paged attention and logits, against double
 * precision; weights of every type; and packing while ops run. */
#include "kernels/device.h"

#include "base/memory.h"
#include "tests/support/sites.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define ROWS_MAX 64

static struct device *device_open(enum cpu_level level, int threads, size_t cols)
{
    struct cpu_device_config config = {.level = level, .threads = threads};
    struct device *d;
    assert_int_equal(cpu_device_open(&config, &d, NULL), ST_OK);
    struct device_limits limits = {.rows = ROWS_MAX, .cols = cols, .lr_width = 256};
    assert_int_equal(d->ops->reserve(d, &limits), ST_OK);
    return d;
}

static void levels_have_names(void **state)
{
    (void)state;
    enum cpu_level level = CPU_LEVEL_BEST;
    for (int i = 0; i < CPU_LEVEL_COUNT; i++) {
        assert_int_equal(cpu_level_parse(cpu_level_name((enum cpu_level)i), &level), ST_OK);
        assert_int_equal(level, i);
    }
    assert_int_equal(cpu_level_parse("sse9", &level), ST_INVALID);
    assert_int_equal(cpu_level_parse("", &level), ST_INVALID);
    assert_int_equal(level, CPU_LEVEL_COUNT - 1);

    struct error err = {0};
    struct device *d = NULL;
    for (int i = 0; i < CPU_LEVEL_COUNT; i++) {
        if (cpu_level_usable((enum cpu_level)i)) continue;
        struct cpu_device_config config = {.level = (enum cpu_level)i, .threads = 1};
        assert_int_equal(cpu_device_open(&config, &d, &err), ST_UNSUPPORTED);
        assert_non_null(strstr(err.message, cpu_level_name((enum cpu_level)i)));
    }
    assert_null(d);
    d = device_open(CPU_REFERENCE, 0, 8);
    assert_string_equal(d->name, "cpu reference");
    d->ops->close(d);
}

static void memory_is_zeroed_and_aligned(void **state)
{
    (void)state;
    struct device *d = device_open(CPU_LEVEL_BEST, 1, 8);
    uint8_t *p = d->ops->alloc(d, 1000), zero[1000] = {0}, data[1000];
    assert_non_null(p);
    assert_int_equal((uintptr_t)p % 64, 0);
    assert_memory_equal(p, zero, 1000);
    memset(data, 7, sizeof data);
    d->ops->write(d, p, data, 1000);
    d->ops->read(d, zero, p, 1000);
    assert_memory_equal(zero, data, 1000);
    d->ops->free(d, p);
    assert_null(d->ops->alloc(d, SIZE_MAX));
    static const struct device_limits absurd[] = {{INT32_MAX, 8, 1}, {0, 8, 1}, {8, 0, 1}, {8, 8, -1}};
    for (int i = 0; i < 4; i++) assert_int_equal(d->ops->reserve(d, &absurd[i]), ST_INVALID);
    d->ops->close(d);
}

static void shapes_that_cannot_be_are_refused(void **state)
{
    (void)state;
    struct device *d = device_open(CPU_LEVEL_BEST, 1, 8);
    float ones[64] = {0};
    struct weight *w = NULL;
    const struct matrix bad[] = {{DTYPE_F32, 0, 8, ones},
                                 {DTYPE_F32, 8, 0, ones},
                                 {DTYPE_Q8_0, 1, 31, ones},
                                 {DTYPE_Q4_K, 1, 32, ones},
                                 {(enum dtype)4, 1, 32, ones}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(d->ops->weight_pack(d, &bad[i], &w), ST_INVALID);
    assert_null(w);
    d->ops->weight_free(d, NULL);
    d->ops->close(d);
}

static const enum dtype types[] = {DTYPE_F32,  DTYPE_F16,  DTYPE_BF16, DTYPE_Q4_0, DTYPE_Q4_1, DTYPE_Q5_0,
                                   DTYPE_Q5_1, DTYPE_Q8_0, DTYPE_Q4_K, DTYPE_Q5_K, DTYPE_Q6_K};
#define TYPE_COUNT ((int)(sizeof types / sizeof *types))

/* Packed in parts or at once, by any number of threads: the same bytes, in which a changed one is noticed. */
static void weights_may_be_packed_in_parts(void **state)
{
    (void)state;
    enum { ROWS = 200, COLS = 512 };
    struct device *d = device_open(CPU_LEVEL_BEST, 3, COLS);
    struct test_random random = {6};
    for (int t = 0; t < TYPE_COUNT; t++) {
        struct matrix m = {types[t], ROWS, COLS, NULL};
        size_t bytes, file_bytes = ROWS * dtype_row_bytes(types[t], COLS);
        const char *name = NULL;
        assert_int_equal(d->ops->weight_layout(d, &m, &name, &bytes), ST_OK);
        assert_true(name && *name);
        if (!bytes) continue;
        void *data = malloc(file_bytes);
        random_bytes(&random, data, file_bytes);
        m.data = data;
        unsigned char *whole = aligned_alloc(64, size_round_up(bytes, 64)), *parts = calloc(1, bytes + 64);
        unsigned char *aligned = (unsigned char *)size_round_up((uintptr_t)parts, 64);
        d->ops->weight_fill(d, &m, whole, 0, ROWS);
        d->ops->weight_fill(d, &m, aligned, 2 * WEIGHT_FILL_ROWS, ROWS);
        d->ops->weight_fill(d, &m, aligned, 0, 2 * WEIGHT_FILL_ROWS);
        assert_memory_equal(whole, aligned, bytes);
        for (size_t row = 0; row < ROWS; row += 33) assert_true(d->ops->weight_filled(d, &m, whole, row));
        whole[bytes - 1] ^= 1;
        assert_false(d->ops->weight_filled(d, &m, whole, ROWS - 1));
        assert_true(d->ops->weight_filled(d, &m, whole, 0));
        whole[0] ^= 1;
        assert_false(d->ops->weight_filled(d, &m, whole, 0));
        free(data);
        free(whole);
        free(parts);
    }
    d->ops->close(d);
}

static void embedding_is_exact(void **state)
{
    (void)state;
    static float y[ROWS_MAX * 512];
    struct device *d = device_open(CPU_LEVEL_BEST, 2, 512);
    struct test_random random = {5};
    for (int t = 0; t < TYPE_COUNT; t++) {
        struct test_weight w;
        test_weight_make(d, &random, types[t], 37, 512, &w);
        int32_t id[ROWS_MAX];
        for (int i = 0; i < ROWS_MAX; i++) id[i] = (int32_t)random_below(&random, 37);
        d->ops->embed(d, w.packed, ROWS_MAX, id, y);
        for (int i = 0; i < ROWS_MAX; i++)
            assert_memory_equal(y + i * 512, w.values + (size_t)id[i] * 512, 512 * sizeof *y);
        test_weight_release(d, &w);
    }
    d->ops->close(d);
}

/* Row `row` of x, normed in double precision. */
static void oracle_norm(const float *x, const float *weight, size_t n, float eps, double *y)
{
    double squares = 0;
    for (size_t i = 0; i < n; i++) squares += (double)x[i] * x[i];
    for (size_t i = 0; i < n; i++) y[i] = x[i] / sqrt(squares / (double)n + (double)eps) * weight[i];
}

/* Every type's product, through norm and gathering. 8-bit activations are off by half a step each, of
 * which the step is the block's largest over 127; roundings are independent, and 8 standard
 * deviations of their sum are allowed. */
static void logits_match(enum cpu_level level)
{
    enum { COLS = 512, OUTPUTS = 70, COUNT = 19 };
    static float x[ROWS_MAX * COLS], norm_weight[COLS], y[COUNT * OUTPUTS];
    struct device *d = device_open(level, 2, COLS);
    struct test_random random = {6};
    test_fill(&random, x, ROWS_MAX * COLS);
    test_fill(&random, norm_weight, COLS);
    for (int t = 0; t < TYPE_COUNT; t++) {
        struct test_weight w;
        test_weight_make(d, &random, types[t], OUTPUTS, COLS, &w);
        int32_t row[COUNT];
        for (int i = 0; i < COUNT; i++) row[i] = (i * 23 + 5) % ROWS_MAX;
        struct logits_args a = {.count = COUNT,
                                .row = row,
                                .x = x,
                                .x_stride = COLS,
                                .norm_weight = norm_weight,
                                .eps = 1e-5f,
                                .head = w.packed,
                                .y = y};
        d->ops->logits(d, &a);
        bool floats = dtype_block_elems(types[t]) == 1;
        for (int i = 0; i < COUNT; i++) {
            double normed[COLS], largest = 0;
            oracle_norm(x + row[i] * COLS, norm_weight, COLS, 1e-5f, normed);
            for (int k = 0; k < COLS; k++) largest = fmax(largest, fabs(normed[k]));
            for (int o = 0; o < OUTPUTS; o++) {
                double want = 0, magnitude = 0, squares = 0;
                for (int k = 0; k < COLS; k++) {
                    double value = w.values[o * COLS + k];
                    want += value * normed[k];
                    magnitude += fabs(value * normed[k]);
                    squares += value * value;
                }
                double tol = magnitude * FLT_EPSILON * COLS / 4;
                if (!floats) tol += 8 * largest / 127 / sqrt(12) * sqrt(squares);
                assert_true(fabs(y[i * OUTPUTS + o] - want) <= tol);
            }
        }
        test_weight_release(d, &w);
    }
    d->ops->logits(d, &(struct logits_args){.count = 0});
    d->ops->close(d);
}

static void logits_are_normed_rows_times_the_head(void **state)
{
    (void)state;
    logits_match(CPU_REFERENCE);
    logits_match(CPU_LEVEL_BEST);
}

static void rmsnorm_matches_and_may_be_in_place(void **state)
{
    (void)state;
    enum { COLS = 333 };
    static float x[ROWS_MAX * COLS], weight[COLS], y[ROWS_MAX * COLS];
    struct device *d = device_open(CPU_LEVEL_BEST, 3, COLS);
    struct test_random random = {7};
    test_fill(&random, x, ROWS_MAX * COLS);
    test_fill(&random, weight, COLS);
    struct rmsnorm_args a = {.rows = ROWS_MAX, .cols = COLS, .x = x, .weight = weight, .eps = 1e-6f, .y = y};
    d->ops->rmsnorm(d, &a);
    for (int r = 0; r < ROWS_MAX; r++) {
        double want[COLS];
        oracle_norm(x + r * COLS, weight, COLS, 1e-6f, want);
        for (int i = 0; i < COLS; i++)
            assert_true(fabs(y[r * COLS + i] - want[i]) <= fabs(want[i]) * FLT_EPSILON * (COLS / 8 + 8));
    }
    a.y = x;
    d->ops->rmsnorm(d, &a);
    assert_memory_equal(x, y, sizeof x);
    d->ops->close(d);
}

/* A model's attention: two sequences whose pages lie mixed, over two layers. */
#define HEADS    6
#define KV_HEADS 2
#define DIM      16
#define ROPE     12
#define LAYERS   2
#define PAGES    9
#define TOKENS   40
#define LAYER    1

struct attention_world {
    struct device *d;
    struct kv_cache cache;
    float inv_freq[ROPE / 2];
    float q[2][TOKENS * HEADS * DIM], k[2][TOKENS * KV_HEADS * DIM],
        v[2][TOKENS * KV_HEADS * DIM]; /* by sequence */
    float y[2][TOKENS * HEADS * DIM];
    bool adjacent;
};
static const int32_t pages_of[2][3] = {{4, 0, 7}, {2, 8, 1}};

static void attention_world_init(struct attention_world *w, enum cpu_level level, int threads,
                                 enum dtype type, bool adjacent)
{
    struct test_random random = {9};
    w->d = device_open(level, threads, HEADS * DIM);
    w->adjacent = adjacent;
    w->cache = (struct kv_cache){type, LAYERS, KV_HEADS, DIM, PAGES, NULL, NULL};
    size_t bytes = kv_cache_bytes(type, LAYERS, KV_HEADS, DIM, PAGES);
    assert_int_equal(bytes * 2, kv_page_bytes(type, LAYERS, KV_HEADS, DIM) * PAGES);
    w->cache.k = w->d->ops->alloc(w->d, bytes);
    w->cache.v = w->d->ops->alloc(w->d, bytes);
    memset(w->cache.k, 0xff, bytes); /* NaN: what nobody wrote must not be read */
    memset(w->cache.v, 0xff, bytes);
    for (int i = 0; i < ROPE / 2; i++) w->inv_freq[i] = powf(10000, -2.0f * (float)i / ROPE);
    for (int s = 0; s < 2; s++) {
        test_fill(&random, w->q[s], TOKENS * HEADS * DIM);
        test_fill(&random, w->k[s], TOKENS * KV_HEADS * DIM);
        test_fill(&random, w->v[s], TOKENS * KV_HEADS * DIM);
    }
}

static void attention_world_release(struct attention_world *w)
{
    w->d->ops->free(w->d, w->cache.k);
    w->d->ops->free(w->d, w->cache.v);
    w->d->ops->close(w->d);
}

/* One step: rows [from[s], to[s]) of each sequence s, the second sequence first. */
static void attention_step(struct attention_world *w, const int from[2], const int to[2])
{
    static float q[ROWS_MAX * HEADS * DIM], k[ROWS_MAX * KV_HEADS * DIM], v[ROWS_MAX * KV_HEADS * DIM];
    static float y[ROWS_MAX * HEADS * DIM];
    struct seq_rows seqs[2];
    int rows = 0, count = 0;
    for (int s = 1; s >= 0; s--) {
        int n = to[s] - from[s];
        if (n == 0) continue;
        memcpy(q + rows * HEADS * DIM, w->q[s] + from[s] * HEADS * DIM, (size_t)n * HEADS * DIM * sizeof *q);
        memcpy(k + rows * KV_HEADS * DIM, w->k[s] + from[s] * KV_HEADS * DIM,
               (size_t)n * KV_HEADS * DIM * sizeof *k);
        memcpy(v + rows * KV_HEADS * DIM, w->v[s] + from[s] * KV_HEADS * DIM,
               (size_t)n * KV_HEADS * DIM * sizeof *v);
        seqs[count++] = (struct seq_rows){rows, n, from[s], pages_of[s]};
        rows += n;
    }
    struct rope_kv_args rope = {.rows = rows,
                                .heads = HEADS,
                                .layer = LAYER,
                                .q = q,
                                .k = k,
                                .v = v,
                                .rope_dims = ROPE,
                                .inv_freq = w->inv_freq,
                                .magnitude = 1.25f,
                                .adjacent_pairs = w->adjacent,
                                .seq_count = count,
                                .seqs = seqs,
                                .cache = &w->cache};
    struct attention_args attention = {.rows = rows,
                                       .heads = HEADS,
                                       .layer = LAYER,
                                       .q = q,
                                       .y = y,
                                       .scale = 0.25f,
                                       .seq_count = count,
                                       .seqs = seqs,
                                       .cache = &w->cache};
    w->d->ops->rope_kv(w->d, &rope);
    w->d->ops->attention(w->d, &attention);
    assert_int_equal(w->d->ops->sync(w->d), ST_OK);
    for (int i = 0, s = 1; i < count; s--) {
        if (to[s] == from[s]) continue;
        memcpy(w->y[s] + from[s] * HEADS * DIM, y + seqs[i].first_row * HEADS * DIM,
               (size_t)seqs[i].row_count * HEADS * DIM * sizeof *y);
        i++;
    }
}

/* Both sequences whole, in steps of `chunk` and `other_chunk` rows. */
static void attention_run(struct attention_world *w, int chunk, int other_chunk)
{
    int from[2] = {0, 0}, to[2];
    while (from[0] < TOKENS || from[1] < TOKENS) {
        to[0] = from[0] + chunk < TOKENS ? from[0] + chunk : TOKENS;
        to[1] = from[1] + other_chunk < TOKENS ? from[1] + other_chunk : TOKENS;
        attention_step(w, from, to);
        from[0] = to[0];
        from[1] = to[1];
    }
}

static void oracle_rotate(const struct attention_world *w, const float *x, int position, double *y)
{
    for (int i = 0; i < DIM; i++) y[i] = x[i];
    for (int i = 0; i < ROPE / 2; i++) {
        int a = w->adjacent ? 2 * i : i, b = w->adjacent ? 2 * i + 1 : i + ROPE / 2;
        double angle = (double)position * w->inv_freq[i];
        y[a] = 1.25 * (x[a] * cos(angle) - x[b] * sin(angle));
        y[b] = 1.25 * (x[a] * sin(angle) + x[b] * cos(angle));
    }
}

static void oracle_attention(const struct attention_world *w, int s, int position, int head, double *y)
{
    double q[DIM], k[DIM], score[TOKENS], total = 0;
    int kv_head = head / (HEADS / KV_HEADS);
    oracle_rotate(w, w->q[s] + (position * HEADS + head) * DIM, position, q);
    for (int t = 0; t <= position; t++) {
        oracle_rotate(w, w->k[s] + (t * KV_HEADS + kv_head) * DIM, t, k);
        score[t] = 0;
        for (int i = 0; i < DIM; i++) score[t] += 0.25 * q[i] * k[i];
        score[t] = exp(score[t]);
        total += score[t];
    }
    for (int i = 0; i < DIM; i++) y[i] = 0;
    for (int t = 0; t <= position; t++)
        for (int i = 0; i < DIM; i++) y[i] += score[t] / total * w->v[s][(t * KV_HEADS + kv_head) * DIM + i];
}

static void expect_attention_oracle(const struct attention_world *w)
{
    /* F32: scores below 6 with sums of 16 terms and angles below 40 radians, of which a rounding is
     * 40 eps; F16 keeps 11 bits of k and v, so scores are off by 6 * 2^-11 at the very most. */
    double tol = w->cache.type == DTYPE_F32 ? 2e-5 : 6e-3;
    for (int s = 0; s < 2; s++)
        for (int t = 0; t < TOKENS; t++)
            for (int h = 0; h < HEADS; h++) {
                double want[DIM];
                oracle_attention(w, s, t, h, want);
                for (int i = 0; i < DIM; i++)
                    assert_true(fabs(w->y[s][(t * HEADS + h) * DIM + i] - want[i]) <= tol);
            }
}

static void attention_matches_double_precision(void **state)
{
    (void)state;
    static struct attention_world w;
    for (int level = 0; level < CPU_LEVEL_COUNT; level++)
        if (cpu_level_usable((enum cpu_level)level))
            for (int variant = 0; variant < 4; variant++) {
                enum dtype type = variant & 1 ? DTYPE_F32 : DTYPE_F16;
                attention_world_init(&w, (enum cpu_level)level, 2, type, variant & 2);
                attention_run(&w, 17, 5);
                expect_attention_oracle(&w);
                attention_world_release(&w);
            }
}

static void attention_is_the_same_in_any_chunks(void **state)
{
    (void)state;
    static struct attention_world whole, other;
    static const int chunks[][3] = {{1, 1, 1}, {1, 40, 2}, {7, 3, 3}, {16, 16, 4}, {40, 1, 2}};
    for (int level = 0; level < CPU_LEVEL_COUNT; level++)
        if (cpu_level_usable((enum cpu_level)level))
            for (int t = 0; t < 2; t++) {
                enum dtype type = t ? DTYPE_F32 : DTYPE_F16;
                attention_world_init(&whole, (enum cpu_level)level, 1, type, true);
                attention_run(&whole, 24, 40);
                for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
                    attention_world_init(&other, (enum cpu_level)level, chunks[i][2], type, true);
                    attention_run(&other, chunks[i][0], chunks[i][1]);
                    assert_memory_equal(whole.y, other.y, sizeof whole.y);
                    attention_world_release(&other);
                }
                attention_world_release(&whole);
            }
}

/* A sequence long enough that its softmax is computed in several parts, on several threads where rows are few. */
#define LONG_TOKENS 1700
#define LONG_PAGES  ((LONG_TOKENS + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS)

struct long_world {
    struct kv_cache cache;
    float k[LONG_TOKENS * KV_HEADS * DIM], v[LONG_TOKENS * KV_HEADS * DIM], q[LONG_TOKENS * HEADS * DIM];
    float y[LONG_TOKENS * HEADS * DIM];
    int32_t pages[LONG_PAGES];
};

static void long_world_init(struct long_world *w, struct device *d)
{
    struct test_random random = {11};
    test_fill(&random, w->k, LONG_TOKENS * KV_HEADS * DIM);
    test_fill(&random, w->v, LONG_TOKENS * KV_HEADS * DIM);
    test_fill(&random, w->q, LONG_TOKENS * HEADS * DIM);
    w->cache = (struct kv_cache){DTYPE_F32, 1, KV_HEADS, DIM, LONG_PAGES, NULL, NULL};
    size_t bytes = kv_cache_bytes(DTYPE_F32, 1, KV_HEADS, DIM, LONG_PAGES);
    w->cache.k = d->ops->alloc(d, bytes);
    w->cache.v = d->ops->alloc(d, bytes);
    for (int p = 0; p < LONG_PAGES; p++) w->pages[p] = LONG_PAGES - 1 - p;
    for (int t = 0; t < LONG_TOKENS; t++)
        for (int h = 0; h < KV_HEADS; h++) {
            size_t page = (size_t)w->pages[t / KV_PAGE_TOKENS];
            size_t at = (((size_t)h * LONG_PAGES + page) * KV_PAGE_TOKENS + (size_t)t % KV_PAGE_TOKENS) * DIM;
            memcpy((float *)w->cache.k + at, w->k + (t * KV_HEADS + h) * DIM, DIM * sizeof(float));
            memcpy((float *)w->cache.v + at, w->v + (t * KV_HEADS + h) * DIM, DIM * sizeof(float));
        }
}

static void long_world_attend(struct long_world *w, struct device *d, int from, int count)
{
    struct seq_rows seq = {0, count, from, w->pages};
    struct attention_args args = {.rows = count,
                                  .heads = HEADS,
                                  .q = w->q + from * HEADS * DIM,
                                  .y = w->y + from * HEADS * DIM,
                                  .scale = 0.25f,
                                  .seq_count = 1,
                                  .seqs = &seq,
                                  .cache = &w->cache};
    d->ops->attention(d, &args);
    assert_int_equal(d->ops->sync(d), ST_OK);
}

static void expect_long_oracle(const struct long_world *w, int position, int head)
{
    static double score[LONG_TOKENS];
    double want[DIM] = {0}, total = 0;
    int kv_head = head / (HEADS / KV_HEADS);
    for (int t = 0; t <= position; t++) {
        score[t] = 0;
        for (int i = 0; i < DIM; i++)
            score[t] += 0.25 * w->q[(position * HEADS + head) * DIM + i] * w->k[(t * KV_HEADS + kv_head) * DIM + i];
        score[t] = exp(score[t]);
        total += score[t];
    }
    for (int t = 0; t <= position; t++)
        for (int i = 0; i < DIM; i++) want[i] += score[t] / total * w->v[(t * KV_HEADS + kv_head) * DIM + i];
    /* scores below 6 with sums of 16 terms; sums of 1700 weights in parts of 8 or more */
    for (int i = 0; i < DIM; i++)
        assert_true(fabs(w->y[(position * HEADS + head) * DIM + i] - want[i]) <= 2e-5);
}

static void long_attention_is_the_same_in_parts(void **state)
{
    (void)state;
    static struct long_world w;
    static float whole[LONG_TOKENS * HEADS * DIM];
    static const int positions[] = {0, 511, 512, 1023, 1024, 1030, 1536, LONG_TOKENS - 4};
    for (int level = 0; level < CPU_LEVEL_COUNT; level++) {
        if (!cpu_level_usable((enum cpu_level)level)) continue;
        struct device *d = device_open((enum cpu_level)level, 1, HEADS * DIM);
        long_world_init(&w, d);
        for (int t = 0; t < LONG_TOKENS; t += ROWS_MAX)
            long_world_attend(&w, d, t, LONG_TOKENS - t < ROWS_MAX ? LONG_TOKENS - t : ROWS_MAX);
        for (size_t i = 0; i < sizeof positions / sizeof *positions; i++) expect_long_oracle(&w, positions[i], 4);
        memcpy(whole, w.y, sizeof whole);
        for (int threads = 2; threads <= 4; threads++) {
            struct device *other = device_open((enum cpu_level)level, threads, HEADS * DIM);
            for (size_t i = 0; i < sizeof positions / sizeof *positions; i++) {
                size_t at = (size_t)positions[i] * HEADS * DIM;
                int count = 1 + (int)i % 4;
                memset(w.y + at, 0xff, (size_t)count * HEADS * DIM * sizeof *w.y);
                long_world_attend(&w, other, positions[i], count);
                assert_memory_equal(w.y + at, whole + at, (size_t)count * HEADS * DIM * sizeof *w.y);
            }
            other->ops->close(other);
        }
        d->ops->free(d, w.cache.k);
        d->ops->free(d, w.cache.v);
        d->ops->close(d);
    }
}

/* The tables of angles are kept from layer to layer, and must not outlive a change of model. */
static void rotation_follows_its_frequencies(void **state)
{
    (void)state;
    static struct attention_world w;
    attention_world_init(&w, CPU_LEVEL_BEST, 2, DTYPE_F32, false);
    attention_run(&w, 40, 24);
    for (int i = 0; i < ROPE / 2; i++) w.inv_freq[i] *= 0.5f;
    attention_run(&w, 40, 24);
    expect_attention_oracle(&w);
    attention_world_release(&w);
}

struct packer {
    struct device *d;
    int failures;
};

static void *pack_beside(void *arg)
{
    struct packer *p = arg;
    struct test_random random = {3};
    struct test_site_shape shape = {4, 3, 2, GATE_TOPK, 1, DTYPE_F16, DTYPE_F32, false};
    for (int i = 0; i < 20; i++) {
        struct test_weight w;
        struct test_adapter a;
        test_weight_make(p->d, &random, DTYPE_Q4_1, 100, 96, &w);
        test_adapter_make(p->d, &random, &shape, 96, (const size_t[PROJ_COUNT]){[PROJ_Q] = 50}, &a);
        void *memory = p->d->ops->alloc(p->d, 1000);
        p->failures += !memory;
        p->d->ops->free(p->d, memory);
        test_adapter_release(p->d, &a);
        test_weight_release(p->d, &w);
    }
    return NULL;
}

static void others_pack_while_ops_run(void **state)
{
    (void)state;
    enum { COLS = 96, OUTPUTS = 100 };
    static float x[ROWS_MAX * COLS], first[ROWS_MAX * OUTPUTS], y[ROWS_MAX * OUTPUTS];
    struct device *d = device_open(CPU_LEVEL_BEST, 3, COLS);
    struct test_random random = {4};
    struct test_weight w;
    test_weight_make(d, &random, DTYPE_Q4_1, OUTPUTS, COLS, &w);
    test_fill(&random, x, ROWS_MAX * COLS);
    struct site_group_args a = {.rows = ROWS_MAX,
                                .x = x,
                                .x_stride = COLS,
                                .site_count = 1,
                                .site = {{PROJ_Q, w.packed, first, OUTPUTS}}};
    d->ops->site_group(d, &a);

    struct packer packers[2] = {{d, 0}, {d, 0}};
    pthread_t thread[2];
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, pack_beside, &packers[i]), 0);
    a.site[0].y = y;
    for (int i = 0; i < 200; i++) {
        d->ops->site_group(d, &a);
        assert_memory_equal(y, first, sizeof y);
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(thread[i], NULL);
        assert_int_equal(packers[i].failures, 0);
    }
    test_weight_release(d, &w);
    d->ops->close(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(levels_have_names),
        cmocka_unit_test(memory_is_zeroed_and_aligned),
        cmocka_unit_test(shapes_that_cannot_be_are_refused),
        cmocka_unit_test(weights_may_be_packed_in_parts),
        cmocka_unit_test(embedding_is_exact),
        cmocka_unit_test(logits_are_normed_rows_times_the_head),
        cmocka_unit_test(rmsnorm_matches_and_may_be_in_place),
        cmocka_unit_test(attention_matches_double_precision),
        cmocka_unit_test(attention_is_the_same_in_any_chunks),
        cmocka_unit_test(long_attention_is_the_same_in_parts),
        cmocka_unit_test(rotation_follows_its_frequencies),
        cmocka_unit_test(others_pack_while_ops_run),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

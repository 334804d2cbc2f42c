/* Paged attention. */
#include "tests/kernels/check.h"

#include "base/memory.h"

#include <math.h>
#include <string.h>

struct shape {
    int row_count, group, first_position;
    size_t head_dim;
    enum dtype type;
    float q_scale;
};

struct cache {
    int32_t *pages;
    void *k, *v;
    size_t page_stride;
    float k_max, v_max; /* largest magnitudes */
};

/* Pages in random order among others. What no position of the sequence has written is NaN. */
static void make_cache(struct cache *c, const struct shape *s)
{
    size_t tokens = (size_t)(s->first_position + s->row_count), elem = dtype_block_bytes(s->type);
    size_t used = (tokens + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS, pages = used + 2;
    c->page_stride = 2 * KV_PAGE_TOKENS * s->head_dim; /* as with two kv heads */
    size_t bytes = (pages * c->page_stride - KV_PAGE_TOKENS * s->head_dim) * elem;
    c->k = check_buffer(bytes, elem);
    c->v = check_buffer(bytes, elem);
    c->pages = check_buffer(used * sizeof *c->pages, sizeof *c->pages);
    size_t shift = check_below(pages);
    for (size_t p = 0; p < used; p++) c->pages[p] = (int32_t)((shift + pages - p) % pages);

    float *values = check_floats(s->head_dim);
    c->k_max = c->v_max = 0;
    for (size_t t = 0; t < 2 * tokens; t++) {
        bool key = t < tokens;
        size_t token = key ? t : t - tokens;
        size_t at =
            (size_t)c->pages[token / KV_PAGE_TOKENS] * c->page_stride + token % KV_PAGE_TOKENS * s->head_dim;
        check_fill_type(s->type, (char *)(key ? c->k : c->v) + at * elem, s->head_dim, 1);
        dtype_decode(s->type, (char *)(key ? c->k : c->v) + at * elem, values, s->head_dim);
        float *most = key ? &c->k_max : &c->v_max;
        for (size_t i = 0; i < s->head_dim; i++) *most = fmaxf(*most, fabsf(values[i]));
    }
}

/* Rows [row, row + row_count) and heads [head, head + group) over positions from `begin` on; y is divided by the sum
 * of weights, and untouched where nothing is seen. */
static void attend_from(const struct cpu_kernels *k, const struct shape *s, const struct cache *c, const float *q,
                        size_t q_stride, float *y, size_t y_stride, int row, int row_count, int head, int group,
                        int begin)
{
    size_t queries = (size_t)(row_count * group);
    float *max = check_floats(queries), *sum = check_floats(queries);
    struct cpu_attention_part part = {
        .row_count = row_count,
        .group = group,
        .first_position = s->first_position + row,
        .begin = begin,
        .end = s->first_position + s->row_count,
        .head_dim = s->head_dim,
        .scale = 1 / sqrtf((float)s->head_dim),
        .q = q + (size_t)row * q_stride + (size_t)head * s->head_dim,
        .q_stride = q_stride,
        .y = y,
        .y_stride = y_stride,
        .max = max,
        .sum = sum,
        .k = c->k,
        .v = c->v,
        .type = s->type,
        .page_stride = c->page_stride,
        .pages = c->pages,
    };
    k->attention(&part);
    for (int i = 0; i < row_count * group; i++) {
        bool sees = s->first_position + row + i / group >= begin;
        if (!sees && (max[i] != -INFINITY || sum[i] != 0)) check_fail("a query that sees nothing has %g", (double)sum[i]);
        float *out = y + (size_t)(i / group) * y_stride + (size_t)(i % group) * s->head_dim;
        for (size_t d = 0; sees && d < s->head_dim; d++) out[d] /= sum[i];
    }
}

static void attend(const struct cpu_kernels *k, const struct shape *s, const struct cache *c, const float *q,
                   size_t q_stride, float *y, size_t y_stride, int row, int row_count, int head, int group)
{
    attend_from(k, s, c, q, q_stride, y, y_stride, row, row_count, head, group, 0);
}

static void check_shape(const struct check *c, struct shape s)
{
    check_begin(c, "attention, %d rows from %d, group %d, head_dim %zu, %s, q scale %g", s.row_count,
                s.first_position, s.group, s.head_dim, dtype_name(s.type), (double)s.q_scale);
    struct cache cache;
    make_cache(&cache, &s);
    size_t width = (size_t)s.group * s.head_dim, stride = width + 5, rows = (size_t)s.row_count;
    float *q = check_floats((rows - 1) * stride + width);
    for (size_t r = 0; r < rows; r++) check_fill_normal(q + r * stride, width, s.q_scale);

    float *want = check_floats(rows * stride), *got = check_floats(rows * stride), *tol = check_floats(width);
    attend(c->reference, &s, &cache, q, stride, want, stride, 0, s.row_count, 0, s.group);
    attend(c->table, &s, &cache, q, stride, got, stride, 0, s.row_count, 0, s.group);

    /* A score of magnitude s = scale |q| |k| is off by s eps times the depth of its sum; that is the
     * relative error of its weight, and the result is an average of v by weights. */
    float depth = 8 + (float)s.head_dim / 8, q_max = 0;
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < width; i++) q_max = fmaxf(q_max, fabsf(q[r * stride + i]));
    float score = sqrtf((float)s.head_dim) * q_max * cache.k_max;
    float tokens = (float)(s.first_position + s.row_count);
    for (size_t i = 0; i < width; i++)
        tol[i] = cache.v_max * CHECK_EPS * (2 * score * depth / 4 + tokens / 8 + 24);
    for (size_t r = 0; r < rows; r++) {
        check_near("y", got + r * stride, want + r * stride, tol, width);
        check_untouched("between rows of y", got + r * stride + width, 5 * sizeof *got);
    }

    /* A part that begins later, where some rows see nothing perhaps. */
    int pages = (s.first_position + s.row_count + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    int begin = (int)check_below((size_t)pages) * KV_PAGE_TOKENS;
    float *part = check_floats(rows * stride), *part_want = check_floats(rows * stride);
    attend_from(c->reference, &s, &cache, q, stride, part_want, stride, 0, s.row_count, 0, s.group, begin);
    attend_from(c->table, &s, &cache, q, stride, part, stride, 0, s.row_count, 0, s.group, begin);
    for (size_t r = 0; r < rows; r++) check_near("y of a part", part + r * stride, part_want + r * stride, tol, width);

    int row = (int)check_below(rows), head = (int)check_below((size_t)s.group);
    float *one = check_floats(s.head_dim);
    attend(c->table, &s, &cache, q, stride, one, stride, row, 1, head, 1);
    check_equal("one row and head alone", one, got + (size_t)row * stride + (size_t)head * s.head_dim,
                s.head_dim * sizeof *one);
    int first = (int)check_below(rows);
    float *rest = check_floats((rows - (size_t)first) * stride);
    attend(c->table, &s, &cache, q, stride, rest, stride, first, s.row_count - first, 0, s.group);
    for (size_t r = (size_t)first; r < rows; r++)
        check_equal("the last rows alone", rest + (r - (size_t)first) * stride, got + r * stride,
                    width * sizeof *got);
    check_end();
}

void check_attention(const struct check *c)
{
    static const int rows[] = {1, 2, 3, 5, 8, 16}, groups[] = {1, 2, 3, 4, 7, 8};
    static const int positions[] = {0, 1, 14, 15, 16, 17, 63, 100, 300};
    static const size_t dims[] = {8, 16, 20, 32, 64, 80, 96, 128, 256};
    static const enum dtype types[] = {DTYPE_F16, DTYPE_F32};
    for (size_t d = 0; d < 9; d++)
        for (size_t p = 0; p < 9; p++)
            for (size_t t = 0; t < 2; t++) {
                struct shape s = {
                    rows[check_below(6)], groups[check_below(6)], positions[p], dims[d], types[t], 1};
                check_shape(c, s);
                s.q_scale = 30; /* scores in the hundreds: all weight on few tokens */
                s.row_count = 1 + (int)check_below(16);
                check_shape(c, s);
            }
}

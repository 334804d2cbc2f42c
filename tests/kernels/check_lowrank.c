/* The thin products of adapters. */
#include "tests/kernels/check.h"

#include <math.h>

#define COUNT_OF(a) (sizeof(a) / sizeof *(a))

static const enum dtype types[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};

#define ROWS_MAX 7

/* count * width floats, and pointers to its rows, in an order that is not theirs in memory: rows are gathered. */
static float **check_rows(float *values, size_t count, size_t width)
{
    float **rows = check_buffer(count * sizeof *rows, sizeof *rows);
    for (size_t r = 0; r < count; r++) rows[r] = values + (count - 1 - r) * width;
    return rows;
}

static void shrink(const struct cpu_kernels *k, const void *a, enum dtype type, size_t d_in, int n, int rows,
                   float *const *x, float *const *z)
{
    k->lr_shrink(a, type, d_in, n, rows, (const float *const *)x, z);
}

static void expand(const struct cpu_kernels *k, const void *bt, enum dtype type, size_t stride, int n, int rows,
                   float *const *z, size_t cols, float *const *y, size_t at)
{
    k->lr_expand(bt, type, stride, n, rows, (const float *const *)z, cols, y, at);
}

static void check_shrink(const struct check *c, enum dtype type, size_t d_in, int n)
{
    size_t elem = dtype_block_bytes(type), width = (size_t)n, rows = 1 + check_below(ROWS_MAX);
    check_begin(c, "lr_shrink, %s, %zu inputs, %d rows of %zu", dtype_name(type), d_in, n, rows);
    char *a = check_buffer(width * d_in * elem, elem);
    float *x_values = check_floats(rows * d_in), *tol = check_floats(width), *row = check_floats(d_in);
    float **x = check_rows(x_values, rows, d_in), **want = check_rows(check_floats(rows * width), rows, width),
          **got = check_rows(check_floats(rows * width), rows, width);
    check_fill_type(type, a, width * d_in, 1);
    check_fill_normal(x_values, rows * d_in, 1);
    shrink(c->reference, a, type, d_in, n, (int)rows, x, want);
    shrink(c->table, a, type, d_in, n, (int)rows, x, got);
    for (size_t r = 0; r < rows; r++) {
        for (size_t i = 0; i < width; i++) {
            float magnitude = 0;
            dtype_decode(type, a + i * d_in * elem, row, d_in);
            for (size_t k = 0; k < d_in; k++) magnitude += fabsf(row[k] * x[r][k]);
            /* both sums are kept in eight parts or more */
            tol[i] = magnitude * CHECK_EPS * (8 + (float)d_in / 8);
        }
        check_near("z", got[r], want[r], tol, width);
    }

    size_t first = check_below(width), one = check_below(rows);
    float *rest = check_floats(width - first);
    shrink(c->table, a + first * d_in * elem, type, d_in, n - (int)first, 1, &x[one], &rest);
    check_equal("the last z of one row alone", rest, got[one] + first, (width - first) * sizeof *rest);
    check_end();
}

static void check_expand(const struct check *c, enum dtype type, size_t cols, int n)
{
    size_t elem = dtype_block_bytes(type), width = (size_t)n, stride = cols + check_below(20),
           rows = 1 + check_below(ROWS_MAX), at = check_below(5), y_width = at + cols;
    check_begin(c, "lr_expand, %s, %zu columns, rank %d, %zu rows", dtype_name(type), cols, n, rows);
    char *bt = check_buffer(((width - 1) * stride + cols) * elem, elem);
    for (size_t i = 0; i < width; i++) check_fill_type(type, bt + i * stride * elem, cols, 1);
    float *z_values = check_floats(rows * width), *base = check_floats(rows * y_width), *tol = check_floats(cols),
          *row = check_floats(cols);
    check_fill_normal(z_values, rows * width, 1);
    check_fill_normal(base, rows * y_width, 1);
    size_t bytes = rows * y_width * sizeof(float);
    float **z = check_rows(z_values, rows, width), **before = check_rows(base, rows, y_width),
          **want = check_rows(check_copy(base, bytes, sizeof(float)), rows, y_width),
          **got = check_rows(check_copy(base, bytes, sizeof(float)), rows, y_width);
    expand(c->reference, bt, type, stride, n, (int)rows, z, cols, want, at);
    expand(c->table, bt, type, stride, n, (int)rows, z, cols, got, at);

    for (size_t r = 0; r < rows; r++) {
        for (size_t j = 0; j < cols; j++) tol[j] = fabsf(before[r][at + j]);
        for (size_t i = 0; i < width; i++) {
            dtype_decode(type, bt + i * stride * elem, row, cols);
            for (size_t j = 0; j < cols; j++) tol[j] += fabsf(z[r][i] * row[j]);
        }
        for (size_t j = 0; j < cols; j++) tol[j] *= CHECK_EPS * (2 + (float)n);
        check_near("y", got[r] + at, want[r] + at, tol, cols);
        check_equal("before y", got[r], before[r], at * sizeof(float));
    }

    /* The device's chunks of columns may begin anywhere. */
    size_t begin = check_below(cols), count = 1 + check_below(cols - begin), one = check_below(rows);
    float *part = check_copy(before[one] + at + begin, count * sizeof *part, sizeof *part);
    expand(c->table, bt + begin * elem, type, stride, n, 1, &z[one], count, &part, 0);
    check_equal("some columns of one row alone", part, got[one] + at + begin, count * sizeof *part);
    check_end();
}

void check_lowrank(const struct check *c)
{
    static const size_t widths[] = {1, 3, 7, 8, 15, 16, 31, 32, 33, 64, 100, 192, 576, 1537};
    static const int ranks[] = {1, 2, 3, 4, 5, 7, 8, 16, 17, 64};
    for (size_t t = 0; t < COUNT_OF(types); t++)
        for (size_t w = 0; w < COUNT_OF(widths); w++)
            for (size_t r = 0; r < COUNT_OF(ranks); r++) {
                check_shrink(c, types[t], widths[w], ranks[r]);
                check_expand(c, types[t], widths[w], ranks[r]);
            }
}

/* The thin products of adapters. */
#include "tests/kernels/check.h"

#include <math.h>

#define COUNT_OF(a) (sizeof(a) / sizeof *(a))

static const enum dtype types[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};

static void check_shrink(const struct check *c, enum dtype type, size_t d_in, int n)
{
    check_begin(c, "lr_shrink, %s, %zu inputs, %d rows", dtype_name(type), d_in, n);
    size_t elem = dtype_block_bytes(type), rows = (size_t)n;
    char *a = check_buffer(rows * d_in * elem, elem);
    float *x = check_floats(d_in), *want = check_floats(rows), *got = check_floats(rows),
          *tol = check_floats(rows);
    float *row = check_floats(d_in);
    check_fill_type(type, a, rows * d_in, 1);
    check_fill_normal(x, d_in, 1);
    c->reference->lr_shrink(a, type, d_in, n, x, want);
    c->table->lr_shrink(a, type, d_in, n, x, got);
    for (size_t i = 0; i < rows; i++) {
        float magnitude = 0;
        dtype_decode(type, a + i * d_in * elem, row, d_in);
        for (size_t k = 0; k < d_in; k++) magnitude += fabsf(row[k] * x[k]);
        /* both sums are kept in eight parts or more */
        tol[i] = magnitude * CHECK_EPS * (8 + (float)d_in / 8);
    }
    check_near("z", got, want, tol, rows);

    size_t first = check_below(rows);
    float *rest = check_floats(rows - first);
    c->table->lr_shrink(a + first * d_in * elem, type, d_in, n - (int)first, x, rest);
    check_equal("the last rows alone", rest, got + first, (rows - first) * sizeof *rest);
    check_end();
}

static void check_expand(const struct check *c, enum dtype type, size_t cols, int n)
{
    check_begin(c, "lr_expand, %s, %zu columns, rank %d", dtype_name(type), cols, n);
    size_t elem = dtype_block_bytes(type), rows = (size_t)n, stride = cols + check_below(20);
    char *bt = check_buffer(((rows - 1) * stride + cols) * elem, elem);
    for (size_t i = 0; i < rows; i++) check_fill_type(type, bt + i * stride * elem, cols, 1);
    float *z = check_floats(rows), *base = check_floats(cols), *tol = check_floats(cols),
          *row = check_floats(cols);
    check_fill_normal(z, rows, 1);
    check_fill_normal(base, cols, 1);
    size_t bytes = cols * sizeof(float);
    float *want = check_copy(base, bytes, sizeof(float)), *got = check_copy(base, bytes, sizeof(float));
    c->reference->lr_expand(bt, type, stride, n, z, cols, want);
    c->table->lr_expand(bt, type, stride, n, z, cols, got);

    for (size_t j = 0; j < cols; j++) tol[j] = fabsf(base[j]);
    for (size_t i = 0; i < rows; i++) {
        dtype_decode(type, bt + i * stride * elem, row, cols);
        for (size_t j = 0; j < cols; j++) tol[j] += fabsf(z[i] * row[j]);
    }
    for (size_t j = 0; j < cols; j++) tol[j] *= CHECK_EPS * (2 + (float)n);
    check_near("y", got, want, tol, cols);

    /* The device's chunks of columns may begin anywhere. */
    size_t begin = check_below(cols), count = 1 + check_below(cols - begin);
    float *part = check_copy(base + begin, count * sizeof *part, sizeof *part);
    c->table->lr_expand(bt + begin * elem, type, stride, n, z, count, part);
    check_equal("some columns alone", part, got + begin, count * sizeof *part);
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

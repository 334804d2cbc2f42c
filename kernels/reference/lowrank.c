/* The two thin products of a low-rank site. */
#include "kernels/reference/reference.h"

static void shrink_row(const void *a, enum dtype type, size_t d_in, int n, const float *x, float *z)
{
    size_t elem = dtype_block_bytes(type);
    float row[REF_SPAN];

    for (int i = 0; i < n; i++) {
        const char *a_row = (const char *)a + (size_t)i * d_in * elem;
        float sum[REF_LANES] = {0};
        for (size_t k = 0; k < d_in; k += REF_SPAN) {
            size_t count = d_in - k < REF_SPAN ? d_in - k : REF_SPAN;
            dtype_decode(type, a_row + k * elem, row, count);
            ref_dot_span(row, x + k, count, sum);
        }
        z[i] = ref_dot_total(sum);
    }
}

void ref_lr_shrink(const void *a, enum dtype type, size_t d_in, int n, int rows, const float *const *x,
                   float *const *z)
{
    for (int r = 0; r < rows; r++) shrink_row(a, type, d_in, n, x[r], z[r]);
}

static void expand_row(const void *bt, enum dtype type, size_t bt_stride, int n, const float *z, size_t cols,
                       float *y)
{
    size_t elem = dtype_block_bytes(type);
    float row[REF_SPAN];

    for (int i = 0; i < n; i++) {
        const char *b_row = (const char *)bt + (size_t)i * bt_stride * elem;
        for (size_t c = 0; c < cols; c += REF_SPAN) {
            size_t count = cols - c < REF_SPAN ? cols - c : REF_SPAN;
            dtype_decode(type, b_row + c * elem, row, count);
            for (size_t j = 0; j < count; j++) y[c + j] += z[i] * row[j];
        }
    }
}

void ref_lr_expand(const void *bt, enum dtype type, size_t bt_stride, int n, int rows, const float *const *z,
                   size_t cols, float *const *y, size_t at)
{
    for (int r = 0; r < rows; r++) expand_row(bt, type, bt_stride, n, z[r], cols, y[r] + at);
}

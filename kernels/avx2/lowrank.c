/* The adapters' thin products. One row is bound by memory (or by L2): what matters is to have several streams and
 * sums under way. Several rows share each weight that is loaded and made fp32, in tiles of twelve sums. */
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/math.h"

#include <math.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* Eight elements from index i of an array of `type`. */
INLINE __m256 load8(enum dtype type, const void *p, size_t i)
{
    if (type == DTYPE_F32) return _mm256_loadu_ps((const float *)p + i);
    __m128i half = _mm_loadu_si128((const void *)((const uint16_t *)p + i));
    if (type == DTYPE_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE float load1(enum dtype type, const void *p, size_t i)
{
    if (type == DTYPE_F32) return ((const float *)p)[i];
    uint16_t half = ((const uint16_t *)p)[i];
    return type == DTYPE_F16 ? f16_to_f32(half) : bf16_to_f32(half);
}

/* ---- shrink ---- */

#define TILE_ROWS 3 /* of x */

/* `n` rows of a from row `first`, for `rows` rows of x. Each z has two sums, of alternate groups of eight
 * inputs, whatever the tile. */
INLINE void shrink(enum dtype type, int n, int rows, const void *a, size_t first, size_t d_in,
                   const float *const *x, float *const *z)
{
    __m256 s[4][TILE_ROWS][2];
    UNROLL for (int i = 0; i < n; i++) UNROLL for (int r = 0; r < rows; r++) s[i][r][0] = s[i][r][1] =
        _mm256_setzero_ps();
    size_t k = 0;
    for (; k + 16 <= d_in; k += 16) {
        UNROLL for (int h = 0; h < 2; h++)
        {
            __m256 v[TILE_ROWS];
            UNROLL for (int r = 0; r < rows; r++) v[r] = _mm256_loadu_ps(x[r] + k + 8 * h);
            UNROLL for (int i = 0; i < n; i++)
            {
                __m256 w = load8(type, a, (first + (size_t)i) * d_in + k + 8 * (size_t)h);
                UNROLL for (int r = 0; r < rows; r++) s[i][r][h] = _mm256_fmadd_ps(w, v[r], s[i][r][h]);
            }
        }
    }
    UNROLL for (int i = 0; i < n; i++) UNROLL for (int r = 0; r < rows; r++)
    {
        float sum = sum_ps(_mm256_add_ps(s[i][r][0], s[i][r][1]));
        for (size_t j = k; j < d_in; j++)
            sum = fmaf(load1(type, a, (first + (size_t)i) * d_in + j), x[r][j], sum);
        z[r][first + (size_t)i] = sum;
    }
}

/* Wide in a for few rows, since a comes from memory. */
INLINE void shrink_rows(enum dtype type, int rows, const void *a, size_t d_in, int n, const float *const *x,
                        float *const *z)
{
    const int step = rows == 1 ? 4 : rows == 2 ? 3 : 2;
    int i = 0;
    for (; i + step <= n; i += step) shrink(type, step, rows, a, (size_t)i, d_in, x, z);
    for (; i < n; i++) shrink(type, 1, rows, a, (size_t)i, d_in, x, z);
}

INLINE void shrink_all(enum dtype type, const void *a, size_t d_in, int n, int rows, const float *const *x,
                       float *const *z)
{
    int r = 0;
    for (; rows - r >= 3 && rows - r != 4; r += 3) shrink_rows(type, 3, a, d_in, n, x + r, z + r);
    for (; rows - r >= 2; r += 2) shrink_rows(type, 2, a, d_in, n, x + r, z + r); /* four are two and two */
    if (r < rows) shrink_rows(type, 1, a, d_in, n, x + r, z + r);
}

static void lr_shrink(const void *a, enum dtype type, size_t d_in, int n, int rows, const float *const *x,
                      float *const *z)
{
    switch (type) {
    case DTYPE_F32: shrink_all(DTYPE_F32, a, d_in, n, rows, x, z); break;
    case DTYPE_F16: shrink_all(DTYPE_F16, a, d_in, n, rows, x, z); break;
    default: shrink_all(DTYPE_BF16, a, d_in, n, rows, x, z); break;
    }
}

/* ---- expand ---- */

/* 8 * width columns from column c of bt, all its rows in order, into y[r] + c */
INLINE void expand(enum dtype type, int width, int rows, const void *bt, size_t stride, int n,
                   const float *const *z, size_t c, float *const *y, size_t at)
{
    __m256 s[TILE_ROWS][8];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < width; j++) s[r][j] =
        _mm256_loadu_ps(y[r] + at + c + 8 * j);
    for (int i = 0; i < n; i++) {
        __m256 f[TILE_ROWS];
        UNROLL for (int r = 0; r < rows; r++) f[r] = _mm256_broadcast_ss(z[r] + i);
        UNROLL for (int j = 0; j < width; j++)
        {
            __m256 w = load8(type, bt, (size_t)i * stride + c + 8 * (size_t)j);
            UNROLL for (int r = 0; r < rows; r++) s[r][j] = _mm256_fmadd_ps(f[r], w, s[r][j]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < width; j++)
        _mm256_storeu_ps(y[r] + at + c + 8 * j, s[r][j]);
}

INLINE void expand_rows(enum dtype type, int rows, const void *bt, size_t stride, int n, const float *const *z,
                        size_t cols, float *const *y, size_t at)
{
    size_t c = 0;
    for (; rows == 1 && c + 64 <= cols; c += 64) expand(type, 8, rows, bt, stride, n, z, c, y, at);
    for (; c + 32 <= cols; c += 32) /* a panel of cpu/lowrank.h */
        expand(type, 4, rows, bt, stride, n, z, c, y, at);
    for (; c + 8 <= cols; c += 8) expand(type, 1, rows, bt, stride, n, z, c, y, at);
    for (; c < cols; c++)
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < n; i++)
                y[r][at + c] = fmaf(z[r][i], load1(type, bt, (size_t)i * stride + c), y[r][at + c]);
}

INLINE void expand_all(enum dtype type, const void *bt, size_t stride, int n, int rows, const float *const *z,
                       size_t cols, float *const *y, size_t at)
{
    int r = 0;
    for (; rows - r >= 3 && rows - r != 4; r += 3) expand_rows(type, 3, bt, stride, n, z + r, cols, y + r, at);
    for (; rows - r >= 2; r += 2) expand_rows(type, 2, bt, stride, n, z + r, cols, y + r, at);
    if (r < rows) expand_rows(type, 1, bt, stride, n, z + r, cols, y + r, at);
}

static void lr_expand(const void *bt, enum dtype type, size_t bt_stride, int n, int rows, const float *const *z,
                      size_t cols, float *const *y, size_t at)
{
    switch (type) {
    case DTYPE_F32: expand_all(DTYPE_F32, bt, bt_stride, n, rows, z, cols, y, at); break;
    case DTYPE_F16: expand_all(DTYPE_F16, bt, bt_stride, n, rows, z, cols, y, at); break;
    default: expand_all(DTYPE_BF16, bt, bt_stride, n, rows, z, cols, y, at); break;
    }
}

void avx2_lowrank_fill(struct cpu_kernels *k)
{
    k->lr_shrink = lr_shrink;
    k->lr_expand = lr_expand;
}

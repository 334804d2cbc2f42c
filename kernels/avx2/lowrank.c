/* The adapters' thin products. Both read every weight once, so they are bound by memory (or by L2);
 * what matters is to have several streams and sums under way. */
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

#define SHRINK_ROWS 4

/* `rows` rows from row `first`. Each has two sums, of alternate groups of eight inputs. */
INLINE void shrink(enum dtype type, int rows, const void *a, size_t first, size_t d_in, const float *x,
                   float *z)
{
    __m256 s[SHRINK_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = _mm256_setzero_ps();
    size_t k = 0;
    for (; k + 16 <= d_in; k += 16) {
        UNROLL for (int h = 0; h < 2; h++)
        {
            __m256 v = _mm256_loadu_ps(x + k + 8 * h);
            UNROLL for (int r = 0; r < rows; r++) s[r][h] =
                _mm256_fmadd_ps(load8(type, a, (first + (size_t)r) * d_in + k + 8 * (size_t)h), v, s[r][h]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
    {
        float sum = sum_ps(_mm256_add_ps(s[r][0], s[r][1]));
        for (size_t i = k; i < d_in; i++)
            sum = fmaf(load1(type, a, (first + (size_t)r) * d_in + i), x[i], sum);
        z[r] = sum;
    }
}

INLINE void shrink_all(enum dtype type, const void *a, size_t d_in, int n, const float *x, float *z)
{
    int i = 0;
    for (; i + SHRINK_ROWS <= n; i += SHRINK_ROWS) shrink(type, SHRINK_ROWS, a, (size_t)i, d_in, x, z + i);
    for (; i < n; i++) shrink(type, 1, a, (size_t)i, d_in, x, z + i);
}

static void lr_shrink(const void *a, enum dtype type, size_t d_in, int n, const float *x, float *z)
{
    switch (type) {
    case DTYPE_F32: shrink_all(DTYPE_F32, a, d_in, n, x, z); break;
    case DTYPE_F16: shrink_all(DTYPE_F16, a, d_in, n, x, z); break;
    default: shrink_all(DTYPE_BF16, a, d_in, n, x, z); break;
    }
}

/* ---- expand ---- */

/* 8 * width columns from column c, all rows of bt in order */
INLINE void expand(enum dtype type, int width, const void *bt, size_t stride, int n, const float *z, size_t c,
                   float *y)
{
    __m256 s[8];
    UNROLL for (int j = 0; j < width; j++) s[j] = _mm256_loadu_ps(y + c + 8 * j);
    for (int i = 0; i < n; i++) {
        __m256 f = _mm256_set1_ps(z[i]);
        UNROLL for (int j = 0; j < width; j++) s[j] =
            _mm256_fmadd_ps(f, load8(type, bt, (size_t)i * stride + c + 8 * (size_t)j), s[j]);
    }
    UNROLL for (int j = 0; j < width; j++) _mm256_storeu_ps(y + c + 8 * j, s[j]);
}

INLINE void expand_all(enum dtype type, const void *bt, size_t stride, int n, const float *z, size_t cols,
                       float *y)
{
    size_t c = 0;
    for (; c + 64 <= cols; c += 64) expand(type, 8, bt, stride, n, z, c, y);
    for (; c + 32 <= cols; c += 32) expand(type, 4, bt, stride, n, z, c, y); /* a panel of cpu/lowrank.h */
    for (; c + 8 <= cols; c += 8) expand(type, 1, bt, stride, n, z, c, y);
    for (; c < cols; c++)
        for (int i = 0; i < n; i++) y[c] = fmaf(z[i], load1(type, bt, (size_t)i * stride + c), y[c]);
}

static void lr_expand(const void *bt, enum dtype type, size_t bt_stride, int n, const float *z, size_t cols,
                      float *y)
{
    switch (type) {
    case DTYPE_F32: expand_all(DTYPE_F32, bt, bt_stride, n, z, cols, y); break;
    case DTYPE_F16: expand_all(DTYPE_F16, bt, bt_stride, n, z, cols, y); break;
    default: expand_all(DTYPE_BF16, bt, bt_stride, n, z, cols, y); break;
    }
}

void avx2_lowrank_fill(struct cpu_kernels *k)
{
    k->lr_shrink = lr_shrink;
    k->lr_expand = lr_expand;
}

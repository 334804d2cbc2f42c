/* Products of fp32 matrices for training. B is packed, COLS columns and DEEP rows of it at a time, into
 * panels of 16 columns with zeros beyond its edge, and C is computed by tiles of a panel and up to six rows,
 * kept in twelve registers; of a last panel of eight columns or fewer, of half a panel and up to twelve rows. A is
 * read where it stands: a tile's broadcasts go along its rows, or down its columns where it is transposed. */
#include "kernels/avx2/avx2.h"

#include <immintrin.h>
#include <string.h>

#define INLINE    static inline __attribute__((always_inline))
#define UNROLL    _Pragma("GCC unroll 16")
#define PANEL     16
#define COLS      CPU_MATMUL_COLS
#define DEEP      (CPU_MATMUL_FLOATS / COLS / 8 * 8)
#define WIDE_ROWS 6
#define SLIM_ROWS 12
#define AHEAD     8 /* rows of B that are on their way while one is packed */

/* One tile's share of C = alpha A B + beta C. */
struct tile {
    const float *a;
    size_t row_step, step; /* from row to row of op(A), from column to column */
    int deep, cols;        /* cols <= PANEL, or half of it */
    const float *panel;
    float alpha, beta;
    float *c;
    size_t c_stride;
};

INLINE __m256i first_lanes(int count)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE void store(__m256 sum, __m256 alpha, float beta, bool whole, __m256i mask, float *c)
{
    sum = _mm256_mul_ps(sum, alpha);
    if (beta != 0) {
        __m256 old = whole ? _mm256_loadu_ps(c) : _mm256_maskload_ps(c, mask);
        sum = _mm256_fmadd_ps(old, _mm256_set1_ps(beta), sum);
    }
    if (whole)
        _mm256_storeu_ps(c, sum);
    else
        _mm256_maskstore_ps(c, mask, sum);
}

INLINE void tile_run(bool transposed, int vectors, int rows, const struct tile *t)
{
    __m256 sum[SLIM_ROWS][2];
    float *c = t->c;
    size_t c_stride = t->c_stride;
    UNROLL for (int i = 0; i < rows; i++)
    {
        sum[i][0] = sum[i][1] = _mm256_setzero_ps();
        _mm_prefetch((const char *)(c + (size_t)(i + rows) * c_stride), _MM_HINT_T0);
    }
    size_t row_step = transposed ? 1 : t->row_step, step = transposed ? t->step : 1;
    const float *a = t->a, *panel = t->panel;
    for (int l = t->deep; l > 0; l--, a += step, panel += PANEL) {
        __m256 low = _mm256_load_ps(panel), high = low;
        if (vectors == 2) high = _mm256_load_ps(panel + 8);
        UNROLL for (int i = 0; i < rows; i++)
        {
            __m256 v = _mm256_broadcast_ss(a + (size_t)i * row_step);
            sum[i][0] = _mm256_fmadd_ps(v, low, sum[i][0]);
            if (vectors == 2) sum[i][1] = _mm256_fmadd_ps(v, high, sum[i][1]);
        }
    }

    __m256 alpha = _mm256_set1_ps(t->alpha);
    __m256i low_lanes = first_lanes(t->cols), high_lanes = first_lanes(t->cols - 8);
    float beta = t->beta;
    bool whole = t->cols == 8 * vectors;
    UNROLL for (int i = 0; i < rows; i++)
    {
        store(sum[i][0], alpha, beta, whole, low_lanes, c + (size_t)i * c_stride);
        if (vectors == 2) store(sum[i][1], alpha, beta, whole, high_lanes, c + (size_t)i * c_stride + 8);
    }
}

typedef void tile_fn(const struct tile *t);
#define TILE_FN(n)                                                                 \
    static void slim_along_##n(const struct tile *t) { tile_run(false, 1, n, t); } \
    static void slim_down_##n(const struct tile *t) { tile_run(true, 1, n, t); }
#define WIDE_TILE_FN(n)                                                            \
    TILE_FN(n)                                                                     \
    static void wide_along_##n(const struct tile *t) { tile_run(false, 2, n, t); } \
    static void wide_down_##n(const struct tile *t) { tile_run(true, 2, n, t); }
WIDE_TILE_FN(1)
WIDE_TILE_FN(2)
WIDE_TILE_FN(3)
WIDE_TILE_FN(4)
WIDE_TILE_FN(5)
WIDE_TILE_FN(6)
TILE_FN(7)
TILE_FN(8)
TILE_FN(9)
TILE_FN(10)
TILE_FN(11)
TILE_FN(12)
#define SIX(name)    NULL, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6
#define TWELVE(name) SIX(name), name##_7, name##_8, name##_9, name##_10, name##_11, name##_12
static tile_fn *const wide_fns[2][WIDE_ROWS + 1] = {{SIX(wide_along)}, {SIX(wide_down)}};
static tile_fn *const slim_fns[2][SLIM_ROWS + 1] = {{TWELVE(slim_along)}, {TWELVE(slim_down)}};

/* dst[l * PANEL + j] = rows[j * stride + l] for eight of each */
INLINE void transpose_8(const float *rows, size_t stride, float *dst)
{
    __m256 r[8], s[8];
    UNROLL for (size_t j = 0; j < 8; j++) r[j] = _mm256_loadu_ps(rows + j * stride);
    UNROLL for (size_t j = 0; j < 8; j += 2)
    {
        s[j] = _mm256_unpacklo_ps(r[j], r[j + 1]);
        s[j + 1] = _mm256_unpackhi_ps(r[j], r[j + 1]);
    }
    UNROLL for (size_t j = 0; j < 8; j += 4)
    {
        r[j] = _mm256_shuffle_ps(s[j], s[j + 2], 0x44);
        r[j + 1] = _mm256_shuffle_ps(s[j], s[j + 2], 0xEE);
        r[j + 2] = _mm256_shuffle_ps(s[j + 1], s[j + 3], 0x44);
        r[j + 3] = _mm256_shuffle_ps(s[j + 1], s[j + 3], 0xEE);
    }
    UNROLL for (size_t j = 0; j < 4; j++)
    {
        _mm256_store_ps(dst + j * PANEL, _mm256_permute2f128_ps(r[j], r[j + 4], 0x20));
        _mm256_store_ps(dst + (j + 4) * PANEL, _mm256_permute2f128_ps(r[j], r[j + 4], 0x31));
    }
}

/* `cols` columns of op(B), whose rows (of B) they are. */
static void pack_transposed(const float *b, size_t stride, int deep, int cols, float *panel)
{
    for (int j = 0; j < PANEL; j += 8) {
        int l = 0;
        if (cols - j >= 8)
            for (; l + 8 <= deep; l += 8)
                transpose_8(b + (size_t)j * stride + l, stride, panel + l * PANEL + j);
        for (; l < deep; l++)
            for (int i = j; i < j + 8; i++)
                panel[l * PANEL + i] = i < cols ? b[(size_t)i * stride + (size_t)l] : 0;
    }
}

/* Row by row through all panels, so that B is read in straight lines. */
static void pack_plain(const float *b, size_t stride, int deep, int cols, float *packed)
{
    for (int l = 0; l < deep; l++, b += stride, packed += PANEL) {
        float *panel = packed;
        int j = 0;
        for (; j + PANEL <= cols; j += PANEL, panel += deep * PANEL) {
            _mm_prefetch((const char *)(b + AHEAD * stride + j), _MM_HINT_T0);
            _mm256_store_ps(panel, _mm256_loadu_ps(b + j));
            _mm256_store_ps(panel + 8, _mm256_loadu_ps(b + j + 8));
        }
        if (j < cols) {
            memset(panel, 0, PANEL * sizeof *panel);
            memcpy(panel, b + j, (size_t)(cols - j) * sizeof *panel);
        }
    }
}

/* Rows [first, first + deep) and columns [col, col + cols) of op(B). */
static void pack(const struct matmul_args *p, int first, int deep, int col, int cols, float *packed)
{
    if (!p->b_transposed) {
        pack_plain(p->b + (size_t)first * p->b_stride + col, p->b_stride, deep, cols, packed);
        return;
    }
    for (int j = 0; j < cols; j += PANEL, packed += deep * PANEL)
        pack_transposed(p->b + (size_t)(col + j) * p->b_stride + first, p->b_stride, deep,
                        cols - j < PANEL ? cols - j : PANEL, packed);
}

/* Panels [begin, end) of C's columns from `col` on, of which `cols` there are, over this part of the depth. */
static void multiply_panels(const struct matmul_args *p, struct tile t, int first, int col, int cols, int begin,
                            int end, const float *packed)
{
    bool slim = cols - begin * PANEL <= PANEL / 2;
    tile_fn *const *fns = slim ? slim_fns[p->a_transposed] : wide_fns[p->a_transposed];
    int most = slim ? SLIM_ROWS : WIDE_ROWS;
    /* Tiles as even as they can be: a low one does not fill the multipliers. */
    for (int row = 0, tiles = (p->m + most - 1) / most, rows; tiles > 0; row += rows, tiles--) {
        rows = (p->m - row + tiles - 1) / tiles;
        t.a = p->a + (size_t)row * t.row_step + (size_t)first * t.step;
        for (int panel = begin; panel < end; panel++) {
            int j = panel * PANEL;
            t.panel = packed + j * t.deep;
            t.cols = cols - j < PANEL ? cols - j : PANEL;
            t.c = p->c + (size_t)row * p->c_stride + (col + j);
            fns[rows](&t);
        }
    }
}

/* All rows of C in these columns, over this part of the depth. A last panel of a few columns goes alone, by tiles of
 * half its width. */
static void multiply(const struct matmul_args *p, int first, int deep, int col, int cols, const float *packed)
{
    struct tile t = {.row_step = p->a_transposed ? 1 : p->a_stride,
                     .step = p->a_transposed ? p->a_stride : 1,
                     .deep = deep,
                     .alpha = p->alpha,
                     .beta = first ? 1 : p->beta,
                     .c_stride = p->c_stride};
    int rest = cols % PANEL, wide = cols / PANEL + (rest > PANEL / 2);
    if (wide) multiply_panels(p, t, first, col, cols, 0, wide, packed);
    if (wide * PANEL < cols) multiply_panels(p, t, first, col, cols, wide, wide + 1, packed);
}

static void matmul(const struct matmul_args *p, float *scratch)
{
    for (int col = 0; col < p->n; col += COLS) {
        int cols = p->n - col < COLS ? p->n - col : COLS, first = 0;
        do { /* once even for k = 0: C = beta C */
            int deep = p->k - first < DEEP ? p->k - first : DEEP;
            pack(p, first, deep, col, cols, scratch);
            multiply(p, first, deep, col, cols, scratch);
            first += deep;
        } while (first < p->k);
    }
}

void avx2_grad_matmul_fill(struct cpu_kernels *k) { k->matmul = matmul; }

/* Products of block-quantised weights and int8 activations; layouts in panel.h.
 *
 * vpmaddubsw multiplies unsigned quants by signed activations and adds pairs in 16 bits. A sum of
 * several groups still fits: 8 groups of 4-bit quants (8 * 2 * 15 * 127 = 30480), 4 of 5-bit
 * ones (31496), 2 of 6-bit ones (32004), and one of |8-bit| ones (32512). Integer sums are
 * exact; per block and output the fp32 sum takes
 *
 *     y = fma(min, sum, y);  y = fma(dot, scale_w * scale_x, y)
 *
 * in this order of blocks, whatever the number of rows. */
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/panel.h"

#include <immintrin.h>

#define UNROLL  _Pragma("GCC unroll 8")
#define VECTORS 2 /* of 8 outputs in a panel */

INLINE __m256i load(const void *p) { return _mm256_load_si256(p); }

/* Group g of vector v, one quant a byte; bits below 8. */
INLINE __m256i quants_load(int bits, const uint8_t *q, int g, int v)
{
    q += v * 32;
    __m256i w = load(q + g % 4 * 64);
    if (g >= 4) w = _mm256_srli_epi16(w, 4);
    w = _mm256_and_si256(w, _mm256_set1_epi8(15));
    if (bits == 4) return w;
    /* Shifting 16-bit lanes moves bits between bytes, but never into those kept. */
    __m256i high = load(q + 256 + (bits == 6 ? g / 4 * 64 : 0));
    int up = 4 - (bits == 5 ? g : g % 4 * 2);
    high = up >= 0 ? _mm256_slli_epi16(high, up) : _mm256_srli_epi16(high, -up);
    return _mm256_or_si256(w, _mm256_and_si256(high, _mm256_set1_epi8(bits == 5 ? 0x10 : 0x30)));
}

/* Keeps a sum where it stands. Without this gcc takes the additions of a block for one big sum,
 * makes all products first and spills them: half the speed. */
INLINE __m256i in_order(__m256i sum)
{
    __asm__("" : "+x"(sum));
    return sum;
}

INLINE __m256i add16(bool first, __m256i sum, __m256i v)
{
    return in_order(first ? v : _mm256_add_epi16(sum, v));
}

/* dot[r][v] = sum over groups [g0, g1) of quants times activations; bits below 8 */
INLINE void block_dot(int bits, int rows, const uint8_t *q, const struct tile_block *t, int g0, int g1,
                      __m256i dot[TILE_ROWS][VECTORS])
{
    const int limit = bits == 4 ? 8 : bits == 5 ? 4 : 2; /* groups that fit 16 bits */
    __m256i c[TILE_ROWS][VECTORS];
    UNROLL for (int g = g0; g < g1; g++)
    {
        __m256i w0 = quants_load(bits, q, g, 0), w1 = quants_load(bits, q, g, 1);
        UNROLL for (int r = 0; r < rows; r++)
        {
            __m256i x = _mm256_set1_epi32(t->q[g][r]);
            c[r][0] = add16(g % limit == 0, c[r][0], _mm256_maddubs_epi16(w0, x));
            c[r][1] = add16(g % limit == 0, c[r][1], _mm256_maddubs_epi16(w1, x));
        }
        if ((g + 1) % limit && g + 1 < g1) continue;
        UNROLL for (int r = 0; r < rows; r++)
        {
            UNROLL for (int v = 0; v < VECTORS; v++)
            {
                __m256i s = _mm256_madd_epi16(c[r][v], _mm256_set1_epi16(1));
                dot[r][v] = in_order(g - g0 < limit ? s : _mm256_add_epi32(dot[r][v], s));
            }
        }
    }
}

/* The same for 8-bit quants, which are signed: the sign moves to the activations, and each group is
 * widened at once, since |w x| of a pair may be 2 * 128 * 127. */
INLINE void block_dot8(int rows, const uint8_t *q, const struct tile_block *t,
                       __m256i dot[TILE_ROWS][VECTORS])
{
    UNROLL for (int g = 0; g < 8; g++)
    {
        __m256i w[VECTORS], size[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++)
        {
            w[v] = load(q + g * 64 + v * 32);
            size[v] = _mm256_abs_epi8(w[v]);
        }
        UNROLL for (int r = 0; r < rows; r++)
        {
            __m256i x = _mm256_set1_epi32(t->q[g][r]);
            UNROLL for (int v = 0; v < VECTORS; v++)
            {
                __m256i pairs = _mm256_maddubs_epi16(size[v], _mm256_sign_epi8(x, w[v]));
                __m256i s = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                dot[r][v] = in_order(g == 0 ? s : _mm256_add_epi32(dot[r][v], s));
            }
        }
    }
}

INLINE __m256 load_f16(const uint8_t *p) { return _mm256_cvtph_ps(_mm_load_si128((const __m128i *)p)); }
INLINE __m256 load_u8(const uint8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE __m256 load_s8(const uint8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

/* Scale and minimum of vector v, of the block or of its half h. */
INLINE void scales_load(struct panel_format f, const uint8_t *head, const uint8_t *block, int v, int h,
                        __m256 *scale, __m256 *min)
{
    if (!f.super)
        *scale = load_f16(block + v * 16);
    else if (f.halves)
        *scale = _mm256_mul_ps(load_f16(head + v * 16), load_s8(block + h * 16 + v * 8));
    else
        *scale = _mm256_mul_ps(load_f16(head + v * 16), load_u8(block + v * 8));

    if (!f.min)
        *min = _mm256_mul_ps(*scale, _mm256_set1_ps((float)-f.offset));
    else if (!f.super)
        *min = load_f16(block + 32 + v * 16);
    else
        *min = _mm256_mul_ps(load_f16(head + 32 + v * 16), load_u8(block + 16 + v * 8));
}

INLINE void block_multiply(struct panel_format f, int rows, const uint8_t *head, const uint8_t *block,
                           const struct tile_block *t, __m256 y[TILE_ROWS][VECTORS])
{
    const uint8_t *q = block + panel_scale_bytes(f);
    const int halves = f.halves ? 2 : 1;
    UNROLL for (int h = 0; h < halves; h++)
    {
        __m256i dot[TILE_ROWS][VECTORS];
        if (f.bits == 8)
            block_dot8(rows, q, t, dot);
        else
            block_dot(f.bits, rows, q, t, h * 4, f.halves ? h * 4 + 4 : 8, dot);
        const float *sum = f.halves ? t->half_sum[h] : t->sum;
        UNROLL for (int v = 0; v < VECTORS; v++)
        {
            __m256 scale, min;
            scales_load(f, head, block, v, h, &scale, &min);
            UNROLL for (int r = 0; r < rows; r++)
            {
                __m256 s = _mm256_mul_ps(scale, _mm256_set1_ps(t->scale[r]));
                if (f.min || f.offset) y[r][v] = _mm256_fmadd_ps(min, _mm256_set1_ps(sum[r]), y[r][v]);
                y[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[r][v]), s, y[r][v]);
            }
        }
    }
}

/* One panel times one tile. */
INLINE void panel_times_tile(struct panel_format f, int rows, const uint8_t *w, const struct tile_block *t,
                             size_t inputs, float *y, size_t y_stride, const uint8_t *ahead, size_t lines)
{
    __m256 sums[TILE_ROWS][VECTORS];
    UNROLL for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
    for (const struct tile_block *end = t + inputs / PANEL_BLOCK; t < end;) {
        const uint8_t *head = w;
        w += panel_head_bytes(f);
        for (size_t b = 0; b < panel_super_blocks(f); b++, t++, w += panel_block_bytes(f)) {
            ahead = panel_fetch(ahead, lines);
            block_multiply(f, rows, head, w, t, sums);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
    {
        _mm256_storeu_ps(y + (size_t)r * y_stride, sums[r][0]);
        _mm256_storeu_ps(y + (size_t)r * y_stride + 8, sums[r][1]);
    }
}

#define PANEL_FN(type, rows)                                                                         \
    static void type##_##rows(const uint8_t *w, const struct tile_block *t, size_t inputs, float *y, \
                              size_t y_stride, const uint8_t *ahead, size_t lines)                   \
    {                                                                                                \
        panel_times_tile(PANEL_##type, rows, w, t, inputs, y, y_stride, ahead, lines);               \
    }
#define X(type, ...) PANEL_FN(type, 1) PANEL_FN(type, 2) PANEL_FN(type, 3) PANEL_FN(type, 4)
PANEL_FORMATS(X)
#undef X

static panel_fn *const panel_fns[DTYPE_COUNT][TILE_ROWS + 1] = {
#define X(type, ...) [DTYPE_##type] = {NULL, type##_1, type##_2, type##_3, type##_4},
    PANEL_FORMATS(X)
#undef X
};

static void multiply(const void *w, enum dtype type, const void *act, size_t inputs, size_t outputs, int rows,
                     size_t begin, size_t end, float *y, size_t y_stride)
{
    panel_multiply(panel_fns[type], w, type, act, inputs, outputs, rows, begin, end, y, y_stride);
}

static const struct cpu_product product = {
    .layout = PANEL_LAYOUT,
    .panel_outputs = PANEL_OUTPUTS,
    .tile_rows = TILE_ROWS,
    .weight_bytes = panel_weight_bytes,
    .weight_pack = panel_weight_pack,
    .act_bytes = panel_act_bytes,
    .act_pack = panel_act_pack,
    .multiply = multiply,
};

void avx2_product_int8_fill(struct cpu_kernels *k)
{
#define X(type, ...) k->product[DTYPE_##type] = &product;
    PANEL_FORMATS(X)
#undef X
}

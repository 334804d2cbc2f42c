/* Products of block-quantised weights and int8 activations with VNNI; layouts in kernels/avx2/panel.h.
 *
 * One zmm is a group of four inputs of a panel's 16 outputs. vpdpbusd multiplies unsigned quants by
 * signed activations, broadcast from memory, and adds all four in 32 bits. Signed 8-bit quants have
 * 128 added, which the accumulator's start, -128 * total, takes back. Dots are exact and the fp32
 * sums are those of the AVX2 product in the same order, so both give the same bits. */
#include "kernels/avx512/avx512.h"

#include "kernels/avx2/panel.h"
#include "kernels/avx512/intrinsics.h"

INLINE __m512i load(const void *p) { return _mm512_loadu_si512(p); }

/* Group g, one unsigned quant a byte. */
INLINE __m512i quants_load(int bits, const uint8_t *q, int g)
{
    if (bits == 8) return _mm512_xor_si512(load(q + g * 64), _mm512_set1_epi32((int)0x80808080));
    __m512i w = load(q + g % 4 * 64);
    if (g >= 4) w = _mm512_srli_epi16(w, 4);
    w = _mm512_and_si512(w, _mm512_set1_epi32(0x0F0F0F0F));
    if (bits == 4) return w;
    /* Shifting 16-bit lanes moves bits between bytes, but never into those kept. */
    __m512i high = load(q + 256 + (bits == 6 ? g / 4 * 64 : 0));
    int up = 4 - (bits == 5 ? g : g % 4 * 2);
    high = up >= 0 ? _mm512_slli_epi16(high, (unsigned)up) : _mm512_srli_epi16(high, (unsigned)-up);
    int kept = bits == 5 ? 0x10101010 : 0x30303030;
    return _mm512_or_si512(w, _mm512_and_si512(high, _mm512_set1_epi32(kept)));
}

/* dot[r] = sum over groups [g0, g1) of quants times activations */
INLINE void block_dot(int bits, int rows, const uint8_t *q, const struct tile_block *t, int g0, int g1,
                      __m512i dot[TILE_ROWS])
{
    UNROLL for (int r = 0; r < rows; r++)
    {
        dot[r] = _mm512_setzero_si512();
        if (bits == 8) dot[r] = _mm512_set1_epi32(-128 * t->total[r]);
    }
    UNROLL for (int g = g0; g < g1; g++)
    {
        __m512i w = quants_load(bits, q, g);
        UNROLL for (int r = 0; r < rows; r++) dot[r] =
            _mm512_dpbusd_epi32(dot[r], w, _mm512_set1_epi32(t->q[g][r]));
    }
}

INLINE __m512 load_f16(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE __m512 load_u8(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)));
}
INLINE __m512 load_s8(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
}

/* Scales and minima of the block, or of its half h. */
INLINE void scales_load(struct panel_format f, const uint8_t *head, const uint8_t *block, int h,
                        __m512 *scale, __m512 *min)
{
    if (!f.super)
        *scale = load_f16(block);
    else if (f.halves)
        *scale = _mm512_mul_ps(load_f16(head), load_s8(block + h * 16));
    else
        *scale = _mm512_mul_ps(load_f16(head), load_u8(block));

    if (!f.min)
        *min = _mm512_mul_ps(*scale, _mm512_set1_ps((float)-f.offset));
    else if (!f.super)
        *min = load_f16(block + 32);
    else
        *min = _mm512_mul_ps(load_f16(head + 32), load_u8(block + 16));
}

INLINE void block_multiply(struct panel_format f, int rows, const uint8_t *head, const uint8_t *block,
                           const struct tile_block *t, __m512 y[TILE_ROWS])
{
    const int halves = f.halves ? 2 : 1;
    UNROLL for (int h = 0; h < halves; h++)
    {
        __m512i dot[TILE_ROWS];
        block_dot(f.bits, rows, block + panel_scale_bytes(f), t, h * 4, f.halves ? h * 4 + 4 : 8, dot);
        const float *sum = f.halves ? t->half_sum[h] : t->sum;
        __m512 scale, min;
        scales_load(f, head, block, h, &scale, &min);
        UNROLL for (int r = 0; r < rows; r++)
        {
            __m512 s = _mm512_mul_ps(scale, _mm512_set1_ps(t->scale[r]));
            if (f.min || f.offset) y[r] = _mm512_fmadd_ps(min, _mm512_set1_ps(sum[r]), y[r]);
            y[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r]), s, y[r]);
        }
    }
}

/* One panel times one tile. */
INLINE void panel_times_tile(struct panel_format f, int rows, const uint8_t *w, const struct tile_block *t,
                             size_t inputs, float *y, size_t y_stride, const uint8_t *ahead, size_t lines)
{
    __m512 sums[TILE_ROWS];
    UNROLL for (int r = 0; r < rows; r++) sums[r] = _mm512_setzero_ps();
    for (const struct tile_block *end = t + inputs / PANEL_BLOCK; t < end;) {
        const uint8_t *head = w;
        w += panel_head_bytes(f);
        for (size_t b = 0; b < panel_super_blocks(f); b++, t++, w += panel_block_bytes(f)) {
            ahead = panel_fetch(ahead, lines);
            block_multiply(f, rows, head, w, t, sums);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) _mm512_storeu_ps(y + (size_t)r * y_stride, sums[r]);
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

void avx512_product_int8_fill(struct cpu_kernels *k)
{
#define X(type, ...) k->product[DTYPE_##type] = &product;
    PANEL_FORMATS(X)
#undef X
}

/* Products of block-quantised weights and int8 activations with VNNI.
 *
 * One zmm is a group of four inputs of a panel's 16 outputs. vpdpbusd multiplies unsigned quants by
 * signed activations, broadcast from memory, and adds all four in 32 bits. Signed 8-bit quants have
 * 128 added, which the accumulator's start, -128 * total, takes back. */
#include "kernels/avx512/avx512.h"
#include "kernels/avx512/vec512.h"

/* Group g, one unsigned quant a byte. */
INLINE __m512i unsigned_quants(int bits, const uint8_t *q, int g)
{
    if (bits == 8) return _mm512_xor_si512(vec_load(q + g * 64), _mm512_set1_epi32((int)0x80808080));
    __m512i w = vec_load(q + g % 4 * 64);
    if (g >= 4) w = _mm512_srli_epi16(w, 4);
    w = _mm512_and_si512(w, _mm512_set1_epi32(0x0F0F0F0F));
    if (bits == 4) return w;
    /* Shifting 16-bit lanes moves bits between bytes, but never into those kept. */
    __m512i high = vec_load(q + 256 + (bits == 6 ? g / 4 * 64 : 0));
    int up = 4 - (bits == 5 ? g : g % 4 * 2);
    high = up >= 0 ? _mm512_slli_epi16(high, (unsigned)up) : _mm512_srli_epi16(high, (unsigned)-up);
    int kept = bits == 5 ? 0x10101010 : 0x30303030;
    return _mm512_or_si512(w, _mm512_and_si512(high, _mm512_set1_epi32(kept)));
}

INLINE void block_dot(int bits, int rows, const uint8_t *q, const struct tile_block *t, int g0, int g1,
                      __m512i dot[TILE_ROWS][VECTORS])
{
    UNROLL for (int r = 0; r < rows; r++)
    {
        dot[r][0] = _mm512_setzero_si512();
        if (bits == 8) dot[r][0] = _mm512_set1_epi32(-128 * t->total[r]);
    }
    UNROLL for (int g = g0; g < g1; g++)
    {
        __m512i w = unsigned_quants(bits, q, g);
        UNROLL for (int r = 0; r < rows; r++) dot[r][0] =
            _mm512_dpbusd_epi32(dot[r][0], w, _mm512_set1_epi32(t->q[g][r]));
    }
}

#include "kernels/avx2/panel_product.inc"

void avx512_product_int8_fill(struct cpu_kernels *k) { panel_product_fill(k); }

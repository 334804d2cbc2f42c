/* Products of block-quantised weights and int8 activations with vpdpbusd of 256 bits, which multiplies
 * unsigned quants by signed activations and adds four products in 32 bits. Signed 8-bit quants have 128
 * added, which the accumulator's start, -128 * total, takes back. */
#include "kernels/avxvnni/avxvnni.h"

#include "kernels/avx2/vec256.h"

#ifdef KERNELS_EMULATE

/* Even bytes and odd ones, widened to 16 bits: each madd's sums of two products are exact. */
INLINE __m256i dpbusd(__m256i sum, __m256i u, __m256i s)
{
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(0xFF)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}

#else

INLINE __m256i dpbusd(__m256i sum, __m256i u, __m256i s) { return _mm256_dpbusd_avx_epi32(sum, u, s); }

#endif

/* Group g of vector v, one unsigned quant a byte. */
INLINE __m256i unsigned_quants(int bits, const uint8_t *q, int g, int v)
{
    if (bits == 8) return _mm256_xor_si256(vec_load(q + g * 64 + v * 32), _mm256_set1_epi8(-128));
    return vec_quants(bits, q, g, v);
}

INLINE void block_dot(int bits, int rows, const uint8_t *q, const struct tile_block *t, int g0, int g1,
                      __m256i dot[TILE_ROWS][VECTORS])
{
    UNROLL for (int r = 0; r < rows; r++)
    {
        __m256i start = bits == 8 ? _mm256_set1_epi32(-128 * t->total[r]) : _mm256_setzero_si256();
        dot[r][0] = dot[r][1] = start;
    }
    UNROLL for (int g = g0; g < g1; g++)
    {
        __m256i w0 = unsigned_quants(bits, q, g, 0), w1 = unsigned_quants(bits, q, g, 1);
        UNROLL for (int r = 0; r < rows; r++)
        {
            __m256i x = _mm256_set1_epi32(t->q[g][r]);
            dot[r][0] = dpbusd(dot[r][0], w0, x);
            dot[r][1] = dpbusd(dot[r][1], w1, x);
        }
    }
}

#include "kernels/avx2/panel_product.inc"

void avxvnni_product_int8_fill(struct cpu_kernels *k) { panel_product_fill(k); }

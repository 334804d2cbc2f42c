/* Vectors of 8 lanes, under the names that panel_product.inc and float_product.inc are written in. */
#ifndef KERNELS_AVX2_VEC256_H
#define KERNELS_AVX2_VEC256_H

#include "kernels/avx2/panel.h"

#include <immintrin.h>

#define UNROLL  _Pragma("GCC unroll 8")
#define LANES   8
#define VECTORS 2 /* in a panel */

typedef __m256 vec_f;
typedef __m256i vec_i;

INLINE vec_f vec_zero(void) { return _mm256_setzero_ps(); }
INLINE vec_f vec_set1(float v) { return _mm256_set1_ps(v); }
INLINE vec_f vec_mul(vec_f a, vec_f b) { return _mm256_mul_ps(a, b); }
INLINE vec_f vec_fma(vec_f a, vec_f b, vec_f c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec_f vec_of_int(vec_i v) { return _mm256_cvtepi32_ps(v); }
INLINE void vec_store(float *p, vec_f v) { _mm256_storeu_ps(p, v); }

/* From panels, whose vectors are aligned to their size. */
INLINE vec_i vec_load(const void *p) { return _mm256_load_si256(p); }
INLINE vec_f vec_load_f16(const uint8_t *p) { return _mm256_cvtph_ps(_mm_load_si128((const __m128i *)p)); }
INLINE vec_f vec_load_u8(const uint8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE vec_f vec_load_s8(const uint8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE vec_f vec_load_f32(const uint8_t *p) { return _mm256_load_ps((const float *)(const void *)p); }
/* Pairs of bf16: the first of each pair, or the second. */
INLINE vec_f vec_load_bf16(const uint8_t *p, bool second)
{
    __m256i both = vec_load(p);
    return _mm256_castsi256_ps(second ? _mm256_and_si256(both, _mm256_set1_epi32((int)0xFFFF0000))
                                      : _mm256_slli_epi32(both, 16));
}

/* Group g of vector v of a block, one quant a byte; bits below 8. */
INLINE vec_i vec_quants(int bits, const uint8_t *q, int g, int v)
{
    q += v * 32;
    __m256i w = vec_load(q + g % 4 * 64);
    if (g >= 4) w = _mm256_srli_epi16(w, 4);
    w = _mm256_and_si256(w, _mm256_set1_epi8(15));
    if (bits == 4) return w;
    /* Shifting 16-bit lanes moves bits between bytes, but never into those kept. */
    __m256i high = vec_load(q + 256 + (bits == 6 ? g / 4 * 64 : 0));
    int up = 4 - (bits == 5 ? g : g % 4 * 2);
    high = up >= 0 ? _mm256_slli_epi16(high, up) : _mm256_srli_epi16(high, -up);
    return _mm256_or_si256(w, _mm256_and_si256(high, _mm256_set1_epi8(bits == 5 ? 0x10 : 0x30)));
}

#endif

/* Vectors of 16 lanes, a whole panel, under the names that panel_product.inc and float_product.inc are
 * written in. */
#ifndef KERNELS_AVX512_VEC512_H
#define KERNELS_AVX512_VEC512_H

#include "kernels/avx2/panel.h"
#include "kernels/avx512/intrinsics.h"

#define LANES   16
#define VECTORS 1 /* in a panel */

typedef __m512 vec_f;
typedef __m512i vec_i;

INLINE vec_f vec_zero(void) { return _mm512_setzero_ps(); }
INLINE vec_f vec_set1(float v) { return _mm512_set1_ps(v); }
INLINE vec_f vec_mul(vec_f a, vec_f b) { return _mm512_mul_ps(a, b); }
INLINE vec_f vec_fma(vec_f a, vec_f b, vec_f c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec_f vec_of_int(vec_i v) { return _mm512_cvtepi32_ps(v); }
INLINE void vec_store(float *p, vec_f v) { _mm512_storeu_ps(p, v); }

INLINE vec_i vec_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE vec_f vec_load_f16(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE vec_f vec_load_u8(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)));
}
INLINE vec_f vec_load_s8(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
}
INLINE vec_f vec_load_f32(const uint8_t *p) { return _mm512_loadu_ps((const float *)(const void *)p); }
/* Pairs of bf16: the first of each pair, or the second. */
INLINE vec_f vec_load_bf16(const uint8_t *p, bool second)
{
    __m512i both = vec_load(p);
    return _mm512_castsi512_ps(second ? _mm512_and_si512(both, _mm512_set1_epi32((int)0xFFFF0000))
                                      : _mm512_slli_epi32(both, 16));
}

#endif

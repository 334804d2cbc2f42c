/* What quantising activations for the products of 8 and of 16 bits has in common. */
#ifndef KERNELS_AVX2_TILE_H
#define KERNELS_AVX2_TILE_H

#include "kernels/avx2/panel.h"

#include <immintrin.h>

/* Largest of the absolute values of PANEL_BLOCK floats. They are compared as integers, which orders floats
 * alike and lets a NaN win, so that it reaches the result instead of vanishing. */
static inline float tile_max_abs(const float *x)
{
    const __m256i abs = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i m = _mm256_setzero_si256();
    for (int i = 0; i < PANEL_BLOCK; i += 8)
        m = _mm256_max_epu32(m, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(x + i)), abs));
    m = _mm256_max_epu32(m, _mm256_permute2x128_si256(m, m, 1));
    m = _mm256_max_epu32(m, _mm256_shuffle_epi32(m, 0x4E));
    m = _mm256_max_epu32(m, _mm256_shuffle_epi32(m, 0xB1));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm256_castsi256_si128(m)));
}

/* Below it a reciprocal overflows, and a block is zero for all purposes. */
#define TILE_TINY 1e-30f

/* 4 rows of 8 lanes to 8 groups of 4 lanes */
static inline void tile_interleave(const __m256i r[TILE_ROWS], int32_t q[8][TILE_ROWS])
{
    __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
    __m256i c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
    __m256i g[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                    _mm256_unpackhi_epi64(b, d)};
    for (int i = 0; i < 4; i++) {
        _mm_store_si128((__m128i *)q[i], _mm256_castsi256_si128(g[i]));
        _mm_store_si128((__m128i *)q[i + 4], _mm256_extracti128_si256(g[i], 1));
    }
}

#endif

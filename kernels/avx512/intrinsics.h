/* AVX-512 intrinsics, from the compiler or, where KERNELS_EMULATE is defined, in portable C.
 *
 * The folder is compiled twice: natively, for the server, and emulated (SIMDe), for checkkernels, so
 * that a machine without AVX-512 checks the same source. The few intrinsics SIMDe lacks are made of two
 * AVX2 halves here. */
#ifndef KERNELS_AVX512_INTRINSICS_H
#define KERNELS_AVX512_INTRINSICS_H

#include <immintrin.h>

/* Unrolled emulation would take the compiler minutes. */
#ifdef KERNELS_EMULATE
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

#ifdef KERNELS_EMULATE

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

static inline __m256 emulated_low(__m512 v)
{
    float lanes[16];
    _mm512_storeu_ps(lanes, v);
    return _mm256_loadu_ps(lanes);
}

static inline __m256 emulated_high(__m512 v)
{
    float lanes[16];
    _mm512_storeu_ps(lanes, v);
    return _mm256_loadu_ps(lanes + 8);
}

static inline __m512 emulated_join(__m256 low, __m256 high)
{
    float lanes[16];
    _mm256_storeu_ps(lanes, low);
    _mm256_storeu_ps(lanes + 8, high);
    return _mm512_loadu_ps(lanes);
}

static inline __m512i emulated_join_i(__m256i low, __m256i high)
{
    return _mm512_castps_si512(emulated_join(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)));
}

static inline __m512 emulated_cvtph_ps(__m256i h)
{
    return emulated_join(_mm256_cvtph_ps(_mm256_castsi256_si128(h)),
                         _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)));
}

static inline __m512 emulated_cvtepi32_ps(__m512i v)
{
    __m512 f = _mm512_castsi512_ps(v);
    return emulated_join(_mm256_cvtepi32_ps(_mm256_castps_si256(emulated_low(f))),
                         _mm256_cvtepi32_ps(_mm256_castps_si256(emulated_high(f))));
}

static inline __m512i emulated_cvtepu8_epi32(__m128i v)
{
    return emulated_join_i(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}

static inline __m512i emulated_cvtepi8_epi32(__m128i v)
{
    return emulated_join_i(_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)));
}

#define _mm512_cvtph_ps(v)      emulated_cvtph_ps(v)
#define _mm512_cvtepi32_ps(v)   emulated_cvtepi32_ps(v)
#define _mm512_cvtepu8_epi32(v) emulated_cvtepu8_epi32(v)
#define _mm512_cvtepi8_epi32(v) emulated_cvtepi8_epi32(v)

#endif
#endif

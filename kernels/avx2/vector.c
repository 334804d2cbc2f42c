/* Norms, activation, rotation and the cache's stores: one row each, eight elements at a time. */
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/math.h"

#include <math.h>
#include <string.h>

static void rmsnorm(const float *x, const float *weight, float eps, size_t n, float *y)
{
    __m256 s[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    size_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (size_t j = 0; j < 4; j++) {
            __m256 v = _mm256_loadu_ps(x + i + 8 * j);
            s[j] = _mm256_fmadd_ps(v, v, s[j]);
        }
    float sum = sum_ps(_mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3])));
    for (; i < n; i++) sum = fmaf(x[i], x[i], sum);

    float factor = 1.0f / sqrtf(sum / (float)n + eps);
    __m256 f = _mm256_set1_ps(factor);
    for (i = 0; i + 8 <= n; i += 8) {
        __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), f);
        _mm256_storeu_ps(y + i, _mm256_mul_ps(v, _mm256_loadu_ps(weight + i)));
    }
    for (; i < n; i++) y[i] = x[i] * factor * weight[i];
}

static __m256 silu_mul_ps(__m256 g, __m256 u)
{
    const __m256 one = _mm256_set1_ps(1);
    __m256 e = exp_ps(_mm256_sub_ps(_mm256_setzero_ps(), g));
    return _mm256_mul_ps(_mm256_div_ps(g, _mm256_add_ps(one, e)), u);
}

static void silu_mul(const float *gate, const float *up, size_t n, float *y)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, silu_mul_ps(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i)));
    if (i == n) return;
    float g[8] = {0}, u[8] = {0};
    memcpy(g, gate + i, (n - i) * sizeof *g);
    memcpy(u, up + i, (n - i) * sizeof *u);
    _mm256_storeu_ps(g, silu_mul_ps(_mm256_loadu_ps(g), _mm256_loadu_ps(u)));
    memcpy(y + i, g, (n - i) * sizeof *g);
}

static void add(float *x, const float *y, size_t n)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
    for (; i < n; i++) x[i] += y[i];
}

/* (a, b) -> (a cos - b sin, b cos + a sin) */
static void rotate(float *a, float *b, float c, float s)
{
    float x = *a, y = *b;
    *a = fmaf(x, c, -(y * s));
    *b = fmaf(y, c, x * s);
}

static void rope_adjacent(float *x, size_t pairs, const float *cos, const float *sin)
{
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    size_t i = 0;
    for (; i + 4 <= pairs; i += 4) {
        __m256 v = _mm256_loadu_ps(x + 2 * i);
        __m256 c = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(cos + i)), twice);
        __m256 s = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(sin + i)), twice);
        __m256 cross = _mm256_mul_ps(_mm256_permute_ps(v, 0xB1), s);
        _mm256_storeu_ps(x + 2 * i, _mm256_fmaddsub_ps(v, c, cross));
    }
    for (; i < pairs; i++) rotate(x + 2 * i, x + 2 * i + 1, cos[i], sin[i]);
}

static void rope_halves(float *x, size_t pairs, const float *cos, const float *sin)
{
    size_t i = 0;
    for (; i + 8 <= pairs; i += 8) {
        __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + pairs + i);
        __m256 c = _mm256_loadu_ps(cos + i), s = _mm256_loadu_ps(sin + i);
        _mm256_storeu_ps(x + i, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
        _mm256_storeu_ps(x + pairs + i, _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)));
    }
    for (; i < pairs; i++) rotate(x + i, x + pairs + i, cos[i], sin[i]);
}

static void rope(float *x, size_t rope_dims, const float *cos, const float *sin, bool adjacent_pairs)
{
    if (adjacent_pairs)
        rope_adjacent(x, rope_dims / 2, cos, sin);
    else
        rope_halves(x, rope_dims / 2, cos, sin);
}

static void kv_store(void *dst, enum dtype type, const float *src, size_t n)
{
    if (type == DTYPE_F32) {
        memcpy(dst, src, n * sizeof *src);
        return;
    }
    uint16_t *to = dst;
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_NINT));
    for (; i < n; i++) to[i] = f32_to_f16(src[i]);
}

void avx2_vector_fill(struct cpu_kernels *k)
{
    k->rmsnorm = rmsnorm;
    k->silu_mul = silu_mul;
    k->add = add;
    k->rope = rope;
    k->kv_store = kv_store;
}

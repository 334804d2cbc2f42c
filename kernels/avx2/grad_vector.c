/* Training's kernels on one row: backward activation and norm, softmax, and sums of squares. */
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/math.h"

#include <math.h>
#include <string.h>

#define SUMMED_IN_FLOAT 64 /* exponentials, before the sum goes on in double */

/* The last elements of a row, fewer than eight, with `fill` after them. */
static __m256 load_rest(const float *x, size_t n, float fill)
{
    float buffer[8];
    for (size_t i = 0; i < 8; i++) buffer[i] = i < n ? x[i] : fill;
    return _mm256_loadu_ps(buffer);
}

static void store_rest(float *y, size_t n, __m256 v)
{
    float buffer[8];
    _mm256_storeu_ps(buffer, v);
    memcpy(y, buffer, n * sizeof *y);
}

static double sum_pd(__m256d v)
{
    __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(half) + _mm_cvtsd_f64(_mm_unpackhi_pd(half, half));
}

static __m256d low_pd(__m256 v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
static __m256d high_pd(__m256 v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }

/* With s = 1 / (1 + exp(-t)): silu(t) = t s, silu'(t) = s (1 + t (1 - s)). */
static void silu_mul_backward_ps(__m256 t, __m256 u, __m256 d_y, __m256 *d_gate, __m256 *d_up)
{
    const __m256 one = _mm256_set1_ps(1);
    __m256 s = _mm256_div_ps(one, _mm256_add_ps(one, exp_ps(_mm256_sub_ps(_mm256_setzero_ps(), t))));
    __m256 slope = _mm256_mul_ps(s, _mm256_fmadd_ps(t, _mm256_sub_ps(one, s), one));
    *d_gate = _mm256_mul_ps(_mm256_mul_ps(d_y, u), slope);
    *d_up = _mm256_mul_ps(d_y, _mm256_mul_ps(t, s));
}

static void silu_mul_backward(const float *gate, const float *up, const float *d_y, size_t n, float *d_gate,
                              float *d_up)
{
    __m256 g, u;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        silu_mul_backward_ps(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i), _mm256_loadu_ps(d_y + i), &g,
                             &u);
        _mm256_storeu_ps(d_gate + i, g);
        _mm256_storeu_ps(d_up + i, u);
    }
    if (i == n) return;
    silu_mul_backward_ps(load_rest(gate + i, n - i, 0), load_rest(up + i, n - i, 0),
                         load_rest(d_y + i, n - i, 0), &g, &u);
    store_rest(d_gate + i, n - i, g);
    store_rest(d_up + i, n - i, u);
}

/* y = f x w with f = (mean(x^2) + eps)^(-1/2): dx = f w dy - x f^3 / n sum(w dy x). */
static void rmsnorm_backward(const float *x, const float *weight, float eps, size_t n, const float *d_y,
                             float *d_x)
{
    __m256 squares[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, along[2] = {squares[0], squares[0]};
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (size_t j = 0; j < 2; j++) {
            __m256 v = _mm256_loadu_ps(x + i + 8 * j);
            __m256 d = _mm256_mul_ps(_mm256_loadu_ps(weight + i + 8 * j), _mm256_loadu_ps(d_y + i + 8 * j));
            squares[j] = _mm256_fmadd_ps(v, v, squares[j]);
            along[j] = _mm256_fmadd_ps(v, d, along[j]);
        }
    double square_sum = sum_ps(_mm256_add_ps(squares[0], squares[1]));
    double along_sum = sum_ps(_mm256_add_ps(along[0], along[1]));
    for (; i < n; i++) {
        square_sum += (double)x[i] * x[i];
        along_sum += (double)weight[i] * d_y[i] * x[i];
    }

    double factor = 1 / sqrt(square_sum / (double)n + eps);
    float f = (float)factor, back = (float)(factor * factor * factor / (double)n * along_sum);
    __m256 f8 = _mm256_set1_ps(f), back8 = _mm256_set1_ps(back);
    for (i = 0; i + 8 <= n; i += 8) {
        __m256 d = _mm256_mul_ps(_mm256_loadu_ps(weight + i), _mm256_loadu_ps(d_y + i));
        __m256 sum = _mm256_fmadd_ps(f8, d, _mm256_loadu_ps(d_x + i));
        _mm256_storeu_ps(d_x + i, _mm256_fnmadd_ps(back8, _mm256_loadu_ps(x + i), sum));
    }
    for (; i < n; i++) d_x[i] += f * weight[i] * d_y[i] - back * x[i];
}

/* NaN is passed over here: its exponential shows it. */
static float row_max(const float *x, size_t n, float scale)
{
    __m256 max[2] = {_mm256_set1_ps(-INFINITY), _mm256_set1_ps(-INFINITY)}, s = _mm256_set1_ps(scale);
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (size_t j = 0; j < 2; j++)
            max[j] = _mm256_max_ps(_mm256_mul_ps(s, _mm256_loadu_ps(x + i + 8 * j)), max[j]);
    float most = max_ps(_mm256_max_ps(max[0], max[1]));
    for (; i < n; i++) most = fmaxf(most, scale * x[i]);
    return most;
}

/* y = exp(scale x - max), where y is not NULL. Returns the sum. */
static double exp_row(const float *x, size_t n, float scale, float max, float *y)
{
    __m256 s = _mm256_set1_ps(scale), m = _mm256_set1_ps(max);
    __m256d total = _mm256_setzero_pd();
    size_t i = 0;
    while (i + 8 <= n) {
        __m256 sum = _mm256_setzero_ps();
        for (size_t end = i + SUMMED_IN_FLOAT; i < end && i + 8 <= n; i += 8) {
            __m256 e = exp_ps(_mm256_fmsub_ps(s, _mm256_loadu_ps(x + i), m));
            if (y) _mm256_storeu_ps(y + i, e);
            sum = _mm256_add_ps(sum, e);
        }
        total = _mm256_add_pd(total, _mm256_add_pd(low_pd(sum), high_pd(sum)));
    }
    if (i < n) {
        /* Behind the end they are as good as 0 beside the maximum's 1. */
        __m256 e = exp_ps(_mm256_sub_ps(_mm256_mul_ps(s, load_rest(x + i, n - i, -INFINITY)), m));
        if (y) store_rest(y + i, n - i, e);
        total = _mm256_add_pd(total, _mm256_add_pd(low_pd(e), high_pd(e)));
    }
    return sum_pd(total);
}

static float softmax(const float *x, size_t n, float scale, float factor, float *y)
{
    float max = row_max(x, n, scale);
    double sum = exp_row(x, n, scale, max, y);
    if (y) {
        float f = (float)(factor / sum);
        __m256 f8 = _mm256_set1_ps(f);
        size_t i = 0;
        for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, _mm256_mul_ps(f8, _mm256_loadu_ps(y + i)));
        for (; i < n; i++) y[i] *= f;
    }
    return (float)(max + log(sum));
}

static double sum_squares(const float *x, size_t n)
{
    __m256d sum[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        __m256d low = low_pd(v), high = high_pd(v);
        sum[0] = _mm256_fmadd_pd(low, low, sum[0]);
        sum[1] = _mm256_fmadd_pd(high, high, sum[1]);
    }
    double total = sum_pd(_mm256_add_pd(sum[0], sum[1]));
    for (; i < n; i++) total += (double)x[i] * x[i];
    return total;
}

void avx2_grad_vector_fill(struct cpu_kernels *k)
{
    k->silu_mul_backward = silu_mul_backward;
    k->rmsnorm_backward = rmsnorm_backward;
    k->softmax = softmax;
    k->sum_squares = sum_squares;
}

/* Training's kernels: products, backward activation and norm, softmax, the optimiser and sums. */
#include "tests/kernels/check.h"

#include <math.h>
#include <string.h>

#define COUNT_OF(a) (sizeof(a) / sizeof *(a))

static const size_t lengths[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 576, 1536, 2049};

/* A matrix of floats, rows `stride` apart, flush with the guard page. */
static float *matrix(int rows, int cols, size_t stride, float scale)
{
    float *x = check_floats(rows > 0 && cols > 0 ? (size_t)(rows - 1) * stride + (size_t)cols : 0);
    for (int r = 0; r < rows && cols > 0; r++) check_fill_normal(x + (size_t)r * stride, (size_t)cols, scale);
    return x;
}

static void check_matmul(const struct check *c, int m, int n, int k, bool at, bool bt, float beta)
{
    float alpha = check_uniform(-2, 2);
    check_begin(c, "matmul %d x %d x %d%s%s, %g, %g", m, n, k, at ? ", A^T" : "", bt ? ", B^T" : "",
                (double)alpha, (double)beta);
    size_t gap = check_below(4), a_stride = (size_t)(at ? m : k) + gap, b_stride = (size_t)(bt ? k : n) + gap;
    size_t c_stride = (size_t)n + gap, c_floats = m ? (size_t)(m - 1) * c_stride + (size_t)n : 0;
    float *a = at ? matrix(k, m, a_stride, 1) : matrix(m, k, a_stride, 1);
    float *b = bt ? matrix(n, k, b_stride, 1) : matrix(k, n, b_stride, 1);
    float *got = matrix(m, n, c_stride, beta == 0 ? NAN : 1);
    float *want = check_copy(got, c_floats * sizeof *got, sizeof *got), *tol = check_floats((size_t)n);
    float *scratch = check_buffer(CPU_MATMUL_FLOATS * sizeof *scratch, 64);
    struct matmul_args args = {m, n, k, at, bt, a, b, a_stride, b_stride, alpha, beta, want, c_stride};
    c->reference->matmul(&args, scratch);
    args.c = got;
    c->table->matmul(&args, scratch);
    /* k roundings of each of the two sums, of terms that are at most some five deviations each */
    float magnitude = fabsf(alpha) * 25 * (float)(k + 1);
    for (int j = 0; j < n; j++) tol[j] = CHECK_EPS * (magnitude * (float)(k + 4) / 8 + 30 * fabsf(beta));
    for (int i = 0; i < m; i++) {
        check_near("c", got + (size_t)i * c_stride, want + (size_t)i * c_stride, tol, (size_t)n);
        if (i + 1 < m) check_untouched("c's gap", got + (size_t)i * c_stride + n, gap * sizeof *got);
    }
    float *again = matrix(m, n, c_stride, 0);
    args.c = again;
    args.beta = 0;
    c->table->matmul(&args, scratch);
    float *twice = matrix(m, n, c_stride, NAN);
    args.c = twice;
    c->table->matmul(&args, scratch);
    for (int i = 0; i < m; i++)
        check_equal("c again", again + (size_t)i * c_stride, twice + (size_t)i * c_stride,
                    (size_t)n * sizeof *again);
    check_end();
}

static void check_silu_mul_backward(const struct check *c, size_t n)
{
    check_begin(c, "silu_mul_backward of %zu", n);
    static const float special[] = {0, -0.0f, 1e-30f, 80, -80, 104, -104, 1000, -1000, NAN};
    float *gate = check_floats(n), *up = check_floats(n), *d_y = check_floats(n), *tol = check_floats(n);
    float *want[2] = {check_floats(n), check_floats(n)}, *got[2] = {check_floats(n), check_floats(n)};
    for (size_t i = 0; i < n; i++)
        gate[i] = n < 16 || i % 3 ? 8 * check_normal() : special[check_below(COUNT_OF(special))];
    check_fill_normal(up, n, 1);
    check_fill_normal(d_y, n, 1);
    c->reference->silu_mul_backward(gate, up, d_y, n, want[0], want[1]);
    c->table->silu_mul_backward(gate, up, d_y, n, got[0], got[1]);
    /* Ten roundings; around its minimum the slope is a difference of terms up to 1, and far below zero it is
     * near the smallest normal number, times t. */
    for (size_t i = 0; i < n; i++) tol[i] = fabsf(d_y[i] * up[i]) * 16 * CHECK_EPS + 1e-34f;
    check_near("d_gate", got[0], want[0], tol, n);
    for (size_t i = 0; i < n; i++) tol[i] = fabsf(want[1][i]) * 16 * CHECK_EPS + 1e-33f;
    check_near("d_up", got[1], want[1], tol, n);
    c->table->silu_mul_backward(gate, up, d_y, n, gate, up);
    check_equal("d_gate in place", gate, got[0], n * sizeof *gate);
    check_equal("d_up in place", up, got[1], n * sizeof *up);
    check_end();
}

static void check_rmsnorm_backward(const struct check *c, size_t n, float scale)
{
    check_begin(c, "rmsnorm_backward of %zu, scale %g", n, (double)scale);
    float *x = check_floats(n), *weight = check_floats(n), *d_y = check_floats(n), *got = check_floats(n);
    float *tol = check_floats(n);
    check_fill_normal(x, n, scale);
    check_fill_normal(weight, n, 1);
    check_fill_normal(d_y, n, 1);
    check_fill_normal(got, n, 1);
    double squares = 0, terms = 0;
    for (size_t i = 0; i < n; i++) {
        squares += (double)x[i] * x[i];
        terms += fabs((double)weight[i] * d_y[i] * x[i]);
    }
    double f = 1 / sqrt(squares / (double)n + 1e-5);
    /* Two sums in sixteen parts, and a few roundings of each of the terms. */
    for (size_t i = 0; i < n; i++)
        tol[i] = (float)(CHECK_EPS * (12 + (double)n / 16) * 2 *
                         (fabs(got[i]) + f * fabs(weight[i] * d_y[i]) +
                          f * f * f / (double)n * terms * fabs(x[i])));
    float *want = check_copy(got, n * sizeof *got, sizeof *got);
    c->reference->rmsnorm_backward(x, weight, 1e-5f, n, d_y, want);
    c->table->rmsnorm_backward(x, weight, 1e-5f, n, d_y, got);
    check_near("d_x", got, want, tol, n);
    check_end();
}

static void check_softmax(const struct check *c, size_t n, float spread, float scale)
{
    check_begin(c, "softmax of %zu, spread %g, scale %g", n, (double)spread, (double)scale);
    float *x = check_floats(n), *want = check_floats(n), *got = check_floats(n), *tol = check_floats(n);
    check_fill_normal(x, n, spread);
    float lse[2], largest = 0;
    lse[0] = c->reference->softmax(x, n, scale, 0.5f, want);
    lse[1] = c->table->softmax(x, n, scale, 0.5f, got);
    for (size_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(scale * x[i]));
    /* An exponent is right to a rounding of itself, and the sum to that of the largest terms; eight terms a
     * lane add up in fp32. Clamped exponentials are 1.2e-38 of the maximum. */
    for (size_t i = 0; i < n; i++) tol[i] = want[i] * CHECK_EPS * (4 * largest + 24) + 1e-37f;
    check_near("y", got, want, tol, n);
    float lse_tol = CHECK_EPS * (4 * largest + 24);
    check_near("log of the sum", &lse[1], &lse[0], &lse_tol, 1);
    float alone = c->table->softmax(x, n, scale, 0.5f, NULL);
    check_equal("the sum alone", &alone, &lse[1], sizeof alone);
    c->table->softmax(x, n, scale, 0.5f, x);
    check_equal("y in place of x", x, got, n * sizeof *x);
    check_end();
}

static void check_softmax_of(const struct check *c, float special)
{
    check_begin(c, "softmax with %g", (double)special);
    float x[21], y[21], none = -INFINITY;
    for (size_t n = 1; n <= 21; n++) {
        check_fill_normal(x, n, 1);
        x[check_below(n)] = special;
        float sum = c->table->softmax(x, n, 1, 1, y);
        if (special != none && !isnan(sum)) check_fail("of %zu, the sum is %g", n, (double)sum);
        if (special == none && n > 1 && !isfinite(sum)) check_fail("of %zu, the sum is %g", n, (double)sum);
    }
    check_end();
}

static void check_adamw(const struct check *c, size_t n)
{
    check_begin(c, "adamw of %zu", n);
    float *part[2][4], *tol = check_floats(n);
    for (int p = 0; p < 4; p++) {
        part[0][p] = check_floats(n);
        check_fill_normal(part[0][p], n, 1);
        if (p == 3)
            for (size_t i = 0; i < n; i++) part[0][p][i] = fabsf(part[0][p][i]);
        part[1][p] = check_copy(part[0][p], n * sizeof(float), sizeof(float));
    }
    for (int t = 0; t < 2; t++)
        (t ? c->table : c->reference)
            ->adamw(&(struct adamw_args){n, part[t][0], part[t][1], part[t][2], part[t][3], 0.01f, 0.9f,
                                         0.95f, 1e-8f, 0.1f, 0.5f, 0.25f, 0.75f});
    for (int p = 0; p < 4; p++) {
        for (size_t i = 0; i < n; i++)
            tol[i] = CHECK_EPS * 16 * (1 + fabsf(part[0][p][i])); /* ten roundings */
        static const char *const names[] = {"value", "grad", "m", "v"};
        check_near(names[p], part[1][p], part[0][p], tol, n);
    }
    check_end();
}

static void check_sum_squares(const struct check *c, size_t n)
{
    check_begin(c, "sum_squares of %zu", n);
    float *x = check_floats(n);
    check_fill_normal(x, n, 1e3f);
    double want = c->reference->sum_squares(x, n), got = c->table->sum_squares(x, n);
    /* in double, whatever the order */
    if (!(fabs(got - want) <= 1e-12 * want)) check_fail("%.17g, not %.17g", got, want);
    check_end();
}

void check_grad(const struct check *c)
{
    static const int sizes[] = {1, 2, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 33, 95, 97};
    static const int depths[] = {1, 2, 8, 15, 64, 159, 169, 340};
    for (int i = 0; i < 120; i++)
        check_matmul(c, sizes[check_below(COUNT_OF(sizes))], sizes[check_below(COUNT_OF(sizes))],
                     depths[check_below(COUNT_OF(depths))], i & 1, i & 2, i % 3 ? 0 : check_uniform(-1, 1));
    for (int i = 0; i < 4; i++) {
        check_matmul(c, 3, 5, 0, i & 1, i & 2, 0.5f);
        check_matmul(c, 0, 5, 3, i & 1, i & 2, 0.5f);
        check_matmul(c, 130, 200, 7, i & 1, i & 2, 1);
    }
    for (size_t i = 0; i < COUNT_OF(lengths); i++) {
        check_silu_mul_backward(c, lengths[i]);
        check_rmsnorm_backward(c, lengths[i], 1);
        check_rmsnorm_backward(c, lengths[i], 1e-3f);
        check_softmax(c, lengths[i], 1, 1);
        check_softmax(c, lengths[i], 30, 2);
        check_adamw(c, lengths[i]);
        check_sum_squares(c, lengths[i]);
    }
    check_softmax(c, 49155, 5, 1);
    check_softmax_of(c, NAN);
    check_softmax_of(c, INFINITY);
    check_softmax_of(c, -INFINITY);
}

/* Norm, activation, residual, rotation and the cache's stores. */
#include "tests/kernels/check.h"

#include <math.h>
#include <string.h>

#define COUNT_OF(a) (sizeof(a) / sizeof *(a))

static const size_t lengths[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 576, 1536, 2049};

static void check_rmsnorm(const struct check *c, size_t n, float scale)
{
    check_begin(c, "rmsnorm of %zu, scale %g", n, (double)scale);
    float *x = check_floats(n), *weight = check_floats(n), *want = check_floats(n), *got = check_floats(n);
    float *tol = check_floats(n);
    check_fill_normal(x, n, scale);
    check_fill_normal(weight, n, 1);
    c->reference->rmsnorm(x, weight, 1e-5f, n, want);
    c->table->rmsnorm(x, weight, 1e-5f, n, got);
    /* half the relative error of the sum of squares, kept in eight parts or more, and five roundings */
    for (size_t i = 0; i < n; i++) tol[i] = fabsf(want[i]) * CHECK_EPS * (10 + (float)n / 8) + 1e-37f;
    check_near("y", got, want, tol, n);
    c->table->rmsnorm(x, weight, 1e-5f, n, x);
    check_equal("y in place of x", x, got, n * sizeof *x);
    check_end();
}

static void check_silu_mul(const struct check *c, size_t n)
{
    check_begin(c, "silu_mul of %zu", n);
    float *gate = check_floats(n), *up = check_floats(n), *want = check_floats(n), *got = check_floats(n);
    float *tol = check_floats(n);
    static const float special[] = {0, -0.0f, 1e-30f, 88, -88, 89, -89, 104, -104, 1000, -1000, NAN};
    for (size_t i = 0; i < n; i++) {
        bool plain = n < 16 || i % 3;
        gate[i] = plain ? 8 * check_normal() : special[check_below(COUNT_OF(special))];
        up[i] = check_normal();
    }
    c->reference->silu_mul(gate, up, n, want);
    c->table->silu_mul(gate, up, n, got);
    /* an exponential within 2 units and four roundings; far below zero the result itself is near the
     * smallest normal number, where an exponential may be clamped */
    for (size_t i = 0; i < n; i++) tol[i] = fabsf(want[i]) * CHECK_EPS * 12 + 1e-34f;
    check_near("y", got, want, tol, n);
    c->table->silu_mul(gate, up, n, gate);
    check_equal("y in place of gate", gate, got, n * sizeof *got);
    check_end();
}

static void check_add(const struct check *c, size_t n)
{
    check_begin(c, "add of %zu", n);
    float *x = check_floats(n), *y = check_floats(n);
    check_fill_normal(x, n, 1);
    check_fill_normal(y, n, 1);
    float *want = check_copy(x, n * sizeof *x, sizeof *x);
    c->reference->add(want, y, n);
    c->table->add(x, y, n);
    check_equal("x", x, want, n * sizeof *x);
    check_end();
}

static void check_rope(const struct check *c, size_t head_dim, size_t rope_dims, bool adjacent)
{
    check_begin(c, "rope of %zu in %zu, %s pairs", rope_dims, head_dim, adjacent ? "adjacent" : "split");
    size_t half = rope_dims / 2;
    float *x = check_floats(head_dim), *cosines = check_floats(half), *sines = check_floats(half);
    float *tol = check_floats(head_dim);
    check_fill_normal(x, head_dim, 1);
    for (size_t i = 0; i < half; i++) {
        float angle = check_uniform(0, 1000);
        cosines[i] = cosf(angle);
        sines[i] = sinf(angle);
    }
    float *want = check_copy(x, head_dim * sizeof *x, sizeof *x), largest = 0;
    for (size_t i = 0; i < head_dim; i++) largest = fmaxf(largest, fabsf(x[i]));
    for (size_t i = 0; i < head_dim; i++) tol[i] = i < rope_dims ? 4 * CHECK_EPS * largest : 0;
    c->reference->rope(want, rope_dims, cosines, sines, adjacent);
    c->table->rope(x, rope_dims, cosines, sines, adjacent);
    check_near("x", x, want, tol, head_dim);
    check_end();
}

static void check_kv_store(const struct check *c, enum dtype type, size_t n)
{
    check_begin(c, "kv_store of %zu as %s", n, dtype_name(type));
    static const float special[] = {0,     -0.0f,     1e-8f, 6e-8f, 5.9604645e-8f,
                                    65504, 65519.99f, 65520, -1e6f, INFINITY};
    float *x = check_floats(n);
    for (size_t i = 0; i < n; i++) x[i] = i % 3 ? check_normal() : special[check_below(COUNT_OF(special))];
    size_t bytes = n * dtype_block_bytes(type);
    void *want = check_buffer(bytes, dtype_block_bytes(type)),
         *got = check_buffer(bytes, dtype_block_bytes(type));
    c->reference->kv_store(want, type, x, n);
    c->table->kv_store(got, type, x, n);
    check_equal("dst", got, want, bytes);
    check_end();
}

void check_elementwise(const struct check *c)
{
    for (size_t i = 0; i < COUNT_OF(lengths); i++) {
        size_t n = lengths[i];
        check_rmsnorm(c, n, 1);
        check_rmsnorm(c, n, 1e-4f);
        check_rmsnorm(c, n, 1e4f);
        check_silu_mul(c, n);
        check_add(c, n);
        check_kv_store(c, DTYPE_F32, n);
        check_kv_store(c, DTYPE_F16, n);
    }
    static const size_t dims[][2] = {{2, 2},   {16, 8},  {20, 20},  {64, 64},
                                     {80, 32}, {96, 96}, {128, 64}, {256, 256}};
    for (size_t i = 0; i < COUNT_OF(dims); i++)
        for (int adjacent = 0; adjacent < 2; adjacent++) check_rope(c, dims[i][0], dims[i][1], adjacent);
}

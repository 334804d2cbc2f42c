/* Speed of training's kernels, in the shapes of a step: some thousand rows, low-rank products of all experts.
 */
#include "tests/kernels/check.h"

#include <stdio.h>
#include <string.h>

#define ROWS 2048

struct grad_bench {
    const struct cpu_kernels *k;
    struct matmul_args product;
    struct adamw_args adamw;
    float *x, *y, *z, *scratch;
    size_t n;
};

static void run_matmul(void *ctx)
{
    const struct grad_bench *b = ctx;
    b->k->matmul(&b->product, b->scratch);
}

static void run_silu(void *ctx)
{
    const struct grad_bench *b = ctx;
    b->k->silu_mul_backward(b->x, b->y, b->z, b->n, b->x, b->y);
}

static void run_rmsnorm(void *ctx)
{
    const struct grad_bench *b = ctx;
    b->k->rmsnorm_backward(b->x, b->y, 1e-5f, b->n, b->z, b->z);
}

static void run_softmax(void *ctx)
{
    const struct grad_bench *b = ctx;
    b->k->softmax(b->x, b->n, 1, 1, b->y);
}

static void run_adamw(void *ctx)
{
    const struct grad_bench *b = ctx;
    b->k->adamw(&b->adamw);
}

static void run_sum_squares(void *ctx)
{
    const struct grad_bench *b = ctx;
    b->k->sum_squares(b->x, b->n);
}

/* The three products of a low-rank matrix in training, and two of attention's strips. */
static void bench_matmul(const struct check *c, const char *what, int m, int n, int k, bool at, bool bt)
{
    check_begin(c, "bench of matmul");
    size_t a = (size_t)m * (size_t)k, b = (size_t)k * (size_t)n, out = (size_t)m * (size_t)n;
    struct grad_bench bench = {
        .k = c->table, .x = check_floats(a), .y = check_floats(b), .z = check_floats(out)};
    bench.scratch = check_buffer(CPU_MATMUL_FLOATS * sizeof(float), 64);
    check_fill_normal(bench.x, a, 1);
    check_fill_normal(bench.y, b, 1);
    memset(bench.z, 0, out * sizeof *bench.z);
    bench.product = (struct matmul_args){
        m, n,          k,       at,       bt, bench.x, bench.y, (size_t)(at ? m : k), (size_t)(bt ? k : n),
        1, bt ? 0 : 1, bench.z, (size_t)n};
    char line[96];
    snprintf(line, sizeof line, "matmul %d x %d x %d, %s", m, n, k, what);
    bench_report(c, line, bench_measure(run_matmul, &bench), 4.0 * (double)(a + b + out),
                 2.0 * (double)a * n);
    check_end();
}

static void bench_vectors(const struct check *c, size_t n)
{
    check_begin(c, "bench of training's rows");
    struct grad_bench b = {
        .k = c->table, .n = n, .x = check_floats(n), .y = check_floats(n), .z = check_floats(n)};
    check_fill_normal(b.x, n, 1);
    check_fill_normal(b.y, n, 1);
    memset(b.z, 0, n * sizeof *b.z);
    float *v = check_copy(b.z, n * sizeof *v, sizeof *v);
    b.adamw = (struct adamw_args){n, b.x, b.z, b.y, v, 1e-3f, 0.9f, 0.95f, 1e-8f, 0, 1, 1, 1};
    char line[96];
    double elems = (double)n;
    snprintf(line, sizeof line, "silu_mul_backward of %zu", n);
    bench_report(c, line, bench_measure(run_silu, &b), 20 * elems, 10 * elems);
    snprintf(line, sizeof line, "rmsnorm_backward of %zu", n);
    bench_report(c, line, bench_measure(run_rmsnorm, &b), 16 * elems, 9 * elems);
    snprintf(line, sizeof line, "softmax of %zu", n);
    bench_report(c, line, bench_measure(run_softmax, &b), 8 * elems, 4 * elems);
    memset(b.y, 0, n * sizeof *b.y);
    snprintf(line, sizeof line, "adamw of %zu", n);
    bench_report(c, line, bench_measure(run_adamw, &b), 32 * elems, 14 * elems);
    snprintf(line, sizeof line, "sum_squares of %zu", n);
    bench_report(c, line, bench_measure(run_sum_squares, &b), 4 * elems, 2 * elems);
    check_end();
}

void bench_grad(const struct check *c)
{
    static const int widths[] = {8, 16, 64}, dims[] = {576, 1536};
    for (int w = 0; w < 3; w++)
        for (int d = 0; d < 2; d++) {
            bench_matmul(c, "x A^T", ROWS, widths[w], dims[d], false, true);
            bench_matmul(c, "z B", ROWS, dims[d], widths[w], false, false);
            bench_matmul(c, "z^T x", widths[w], dims[d], ROWS, true, false);
        }
    bench_matmul(c, "scores", 48, 256, 64, false, true);
    bench_matmul(c, "keys", 256, 64, 48, true, false);
    bench_vectors(c, 576);
    bench_vectors(c, 49152);
}

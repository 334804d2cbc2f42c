/* Speed of the kernels of one table, on one thread: the best of several rounds, since anything else that
 * runs here only ever makes a round slower. */
#include "tests/kernels/check.h"

#include "base/memory.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define ROUNDS        5
#define ROUND_SECONDS 0.02

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Seconds of one call of fn. */
static double measure(void (*fn)(void *ctx), void *ctx)
{
    double best = INFINITY;
    fn(ctx);
    for (int round = 0; round < ROUNDS; round++) {
        double start = now(), end;
        int calls = 0;
        do {
            fn(ctx);
            calls++;
            end = now();
        } while (end - start < ROUND_SECONDS);
        best = fmin(best, (end - start) / calls);
    }
    return best;
}

static void report(const struct check *c, const char *what, double seconds, double bytes, double operations)
{
    printf("%-10s %-44s %10.2f us %7.1f GB/s %8.1f GOP/s\n", c->name, what, 1e6 * seconds,
           1e-9 * bytes / seconds, 1e-9 * operations / seconds);
}

struct product_bench {
    const struct cpu_product *p;
    enum dtype type;
    size_t outputs, inputs, x_stride;
    int rows;
    const void *w;
    void *act;
    const float *x;
    float *y;
};

static void run_multiply(void *ctx)
{
    const struct product_bench *b = ctx;
    b->p->multiply(b->w, b->type, b->act, b->inputs, b->outputs, b->rows, 0, b->outputs, b->y, b->outputs,
                   NULL);
}

static void run_act_pack(void *ctx)
{
    const struct product_bench *b = ctx;
    b->p->act_pack(b->act, b->x, b->inputs, b->inputs, b->rows, 0, b->rows);
}

static void bench_product(const struct check *c, enum dtype type, size_t outputs, size_t inputs, int rows)
{
    struct product_bench b = {c->table->product[type], type, outputs, inputs, inputs, rows};
    size_t file_bytes = outputs * dtype_row_bytes(type, inputs),
           bytes = b.p->weight_bytes(type, outputs, inputs);
    if (bytes == SIZE_MAX) return;
    check_begin(c, "bench of %s", dtype_name(type));
    char *data = check_buffer(file_bytes, MEMORY_ALIGN);
    check_fill_type(type, data, outputs * inputs, 1);
    struct matrix m = {type, outputs, inputs, data};
    b.w = data;
    if (bytes) {
        void *packed = check_buffer(bytes, MEMORY_ALIGN);
        b.p->weight_pack(packed, &m, 0, outputs);
        b.w = packed;
    }
    float *x = check_floats((size_t)rows * inputs);
    check_fill_normal(x, (size_t)rows * inputs, 1);
    b.x = x;
    b.act = check_buffer(b.p->act_bytes(rows, inputs), MEMORY_ALIGN);
    b.y = check_buffer((size_t)rows * outputs * sizeof(float), MEMORY_ALIGN);

    char what[96];
    snprintf(what, sizeof what, "pack %d x %zu for %s", rows, inputs, dtype_name(type));
    report(c, what, measure(run_act_pack, &b), 4.0 * rows * (double)inputs, rows * (double)inputs);
    snprintf(what, sizeof what, "%s %zu x %zu, %d rows", dtype_name(type), outputs, inputs, rows);
    report(c, what, measure(run_multiply, &b), (double)(bytes ? bytes : file_bytes),
           2.0 * rows * (double)(outputs * inputs));
    check_end();
}

struct row_bench {
    const struct cpu_kernels *k;
    float *x, *y, *z;
    void *a, *v;
    int32_t *pages;
    enum dtype type;
    size_t n, head_dim, page_stride;
    int count, group, position;
};

static void run_rmsnorm(void *ctx)
{
    const struct row_bench *b = ctx;
    b->k->rmsnorm(b->x, b->z, 1e-5f, b->n, b->y);
}

static void run_silu_mul(void *ctx)
{
    const struct row_bench *b = ctx;
    b->k->silu_mul(b->x, b->z, b->n, b->y);
}

static void run_add(void *ctx)
{
    const struct row_bench *b = ctx;
    b->k->add(b->y, b->x, b->n);
}

#define LOWRANK_ROWS 32

static void run_shrink(void *ctx)
{
    const struct row_bench *b = ctx;
    const float *x[LOWRANK_ROWS];
    float *z[LOWRANK_ROWS];
    for (int r = 0; r < b->group; r++) {
        x[r] = b->x + (size_t)r * b->n;
        z[r] = b->z + r * b->count;
    }
    b->k->lr_shrink(b->a, b->type, b->n, b->count, b->group, x, z);
}

static void run_expand(void *ctx)
{
    const struct row_bench *b = ctx;
    const float *z[LOWRANK_ROWS];
    float *y[LOWRANK_ROWS];
    for (int r = 0; r < b->group; r++) {
        z[r] = b->z + r * b->count;
        y[r] = b->y + (size_t)r * b->n;
    }
    b->k->lr_expand(b->a, b->type, b->n, b->count, b->group, z, b->n, y, 0);
}

static void run_attention(void *ctx)
{
    const struct row_bench *b = ctx;
    size_t stride = (size_t)b->group * b->head_dim;
    struct cpu_attention_part part = {
        .row_count = b->count,
        .group = b->group,
        .first_position = b->position,
        .end = b->position + b->count,
        .head_dim = b->head_dim,
        .scale = 0.125f,
        .q = b->x,
        .q_stride = stride,
        .y = b->y,
        .y_stride = stride,
        .max = b->z,
        .sum = b->z + b->count * b->group,
        .k = b->a,
        .v = b->v,
        .type = b->type,
        .page_stride = b->page_stride,
        .pages = b->pages,
    };
    b->k->attention(&part);
}

static void bench_rows(const struct check *c, size_t n)
{
    check_begin(c, "bench of rows");
    struct row_bench b = {
        .k = c->table, .n = n, .x = check_floats(n), .y = check_floats(n), .z = check_floats(n)};
    check_fill_normal(b.x, n, 1);
    check_fill_normal(b.z, n, 1);
    memset(b.y, 0, n * sizeof *b.y);
    char what[96];
    double elems = (double)n;
    snprintf(what, sizeof what, "rmsnorm of %zu", n);
    report(c, what, measure(run_rmsnorm, &b), 12 * elems, 4 * elems);
    snprintf(what, sizeof what, "silu_mul of %zu", n);
    report(c, what, measure(run_silu_mul, &b), 12 * elems, 4 * elems);
    snprintf(what, sizeof what, "add of %zu", n);
    b.x[0] = 0;
    report(c, what, measure(run_add, &b), 12 * elems, elems);
    check_end();
}

static void bench_lowrank(const struct check *c, enum dtype type, size_t n, int rank, int rows)
{
    check_begin(c, "bench of adapters");
    size_t count = (size_t)rows;
    struct row_bench b = {.k = c->table,
                          .n = n,
                          .count = rank,
                          .group = rows,
                          .type = type,
                          .x = check_floats(count * n),
                          .y = check_floats(count * n),
                          .z = check_floats(count * (size_t)rank)};
    size_t elems = n * (size_t)rank, bytes = elems * dtype_block_bytes(type);
    b.a = check_buffer(bytes, MEMORY_ALIGN);
    check_fill_type(type, b.a, elems, 1e-3f);
    check_fill_normal(b.x, count * n, 1);
    memset(b.y, 0, count * n * sizeof *b.y);
    char what[96];
    double operations = 2.0 * (double)(elems * count);
    snprintf(what, sizeof what, "lr_shrink %s, rank %d, %zu inputs, %d rows", dtype_name(type), rank, n, rows);
    report(c, what, measure(run_shrink, &b), (double)bytes, operations);
    snprintf(what, sizeof what, "lr_expand %s, rank %d, %zu outputs, %d rows", dtype_name(type), rank, n, rows);
    report(c, what, measure(run_expand, &b), (double)bytes, operations);
    check_end();
}

static void bench_attention(const struct check *c, enum dtype type, int rows, int group, size_t head_dim,
                            int tokens)
{
    check_begin(c, "bench of attention");
    size_t width = (size_t)rows * (size_t)group * head_dim, pages = (size_t)tokens / KV_PAGE_TOKENS;
    struct row_bench b = {.k = c->table,
                          .type = type,
                          .head_dim = head_dim,
                          .count = rows,
                          .group = group,
                          .position = tokens - rows,
                          .page_stride = KV_PAGE_TOKENS * head_dim};
    size_t elems = pages * b.page_stride, bytes = elems * dtype_block_bytes(type);
    b.x = check_floats(width);
    b.y = check_floats(width);
    b.a = check_buffer(bytes, MEMORY_ALIGN);
    b.v = check_buffer(bytes, MEMORY_ALIGN);
    b.pages = check_buffer(pages * sizeof *b.pages, sizeof *b.pages);
    b.z = check_floats((size_t)(2 * rows * group));
    for (size_t p = 0; p < pages; p++) b.pages[p] = (int32_t)p;
    check_fill_normal(b.x, width, 1);
    check_fill_type(type, b.a, elems, 1);
    check_fill_type(type, b.v, elems, 1);
    char what[96];
    snprintf(what, sizeof what, "attention %s, %d rows x %d x %zu, %d tokens", dtype_name(type), rows, group,
             head_dim, tokens);
    report(c, what, measure(run_attention, &b), 2.0 * (double)bytes, 4.0 * (double)width * tokens);
    check_end();
}

void bench_table(const struct check *c)
{
    static const enum dtype types[] = {DTYPE_F32,  DTYPE_F16,  DTYPE_BF16, DTYPE_Q8_0, DTYPE_Q4_0, DTYPE_Q4_1,
                                       DTYPE_Q5_0, DTYPE_Q5_1, DTYPE_Q4_K, DTYPE_Q5_K, DTYPE_Q6_K};
    static const int rows[] = {1, 8, 32, 128};
    for (size_t t = 0; t < sizeof types / sizeof *types; t++)
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
            bench_product(c, types[t], 576, 1536, rows[r]);
    bench_rows(c, 576);
    bench_rows(c, 1536);
    for (int rank = 4; rank <= 64; rank *= 4) {
        bench_lowrank(c, DTYPE_BF16, 576, rank, 1);
        bench_lowrank(c, DTYPE_BF16, 576, rank, LOWRANK_ROWS);
        bench_lowrank(c, DTYPE_F32, 1536, rank, 1);
    }
    for (int r = 1; r <= 16; r *= 16) {
        bench_attention(c, DTYPE_F16, r, 3, 64, 256);
        bench_attention(c, DTYPE_F16, r, 3, 64, 2048);
        bench_attention(c, DTYPE_F32, r, 3, 64, 256);
    }
}

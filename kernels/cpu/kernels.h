/* The CPU's kernel table: what one thread does for a few rows or columns.
 *
 * kernels/cpu/ owns threads, scratch and the order of work; the arithmetic is here, behind
 * function pointers. reference/ fills every entry in plain C. A faster table (avx2/, avx512/) starts as a
 * copy of the one below it and overrides what it does better, chosen once when the device opens.
 *
 * Rules for every entry: no allocation, no global state, no alignment assumed beyond what is said,
 * nothing read or written outside the stated ranges, and the arithmetic of one output element
 * is in one fixed order, whatever the other rows or columns of the call (batch invariance). */
#ifndef KERNELS_CPU_KERNELS_H
#define KERNELS_CPU_KERNELS_H

#include "base/dtype.h"
#include "kernels/device.h"
#include "kernels/grad.h"

#include <stddef.h>
#include <stdint.h>

/* Cache lines that will be read after a product, [line, line + count), first those that are read first. The
 * product asks for them spread evenly over its work: a core has some twenty requests under way and drops most
 * of a burst. */
struct cpu_ahead {
    const void *const *line;
    size_t count;
};

/* The product y = W x for one weight type: how weights and activations are laid out, and the
 * multiplication itself. */
struct cpu_product {
    /* The name of the packed weights' layout: changed whenever their bytes do, since they are kept on disk. */
    const char *layout;
    /* Output columns are shared out between threads in multiples of this, a power of two. */
    int panel_outputs;
    /* Activation rows are packed in tiles of this many, a power of two: products of a group that pack
     * differently are given the same split of rows. */
    int tile_rows;

    /* Bytes of a packed weight, or 0: the file's rows are used in place. Panels follow one another, all of
     * one size, each made of its own outputs only (a last one may lack some). SIZE_MAX if the shape
     * is not one this product takes (the next lower table's product is used then). */
    size_t (*weight_bytes)(enum dtype type, size_t outputs, size_t inputs);
    /* Packs outputs [begin, end) (multiples of panel_outputs, or the end) into dst, which is the start of the
     * whole packed weight, 64-byte aligned. */
    void (*weight_pack)(void *dst, const struct matrix *m, size_t begin, size_t end);

    /* Bytes of `rows` packed activation rows; a multiple of 64. */
    size_t (*act_bytes)(int rows, size_t inputs);
    /* Packs rows [begin, end) (begin a multiple of tile_rows) of x into dst, the start of all of
     * them, 64-byte aligned. What fills up a last,
     * partial tile beyond `rows` is the packing's to choose: its products are not stored. */
    void (*act_pack)(void *dst, const float *x, size_t x_stride, size_t inputs, int rows, int begin, int end);

    /* y[r * y_stride + o - begin] = (W x_r)[o] for rows [0, rows) and outputs [begin, end): y points at
     * output `begin` of row 0, so that a caller may keep the columns of one chunk only. w is the
     * packed weight, or the matrix's own data where weight_bytes is 0. `ahead` is a hint that may be ignored.
     */
    void (*multiply)(const void *w, enum dtype type, const void *act, size_t inputs, size_t outputs, int rows,
                     size_t begin, size_t end, float *y, size_t y_stride, const struct cpu_ahead *ahead);
};

/* Rows [0, row_count) of one sequence against positions [begin, end) of one kv head, for the `group` query heads that
 * share it. Row i sees those that are at most first_position + i. */
struct cpu_attention_part {
    int row_count, group, first_position;
    int begin, end; /* begin a multiple of KV_PAGE_TOKENS */
    size_t head_dim;
    float scale;
    const float *q; /* the first such head of the first row */
    float *y;       /* likewise: sum of exp(score - max) value */
    size_t q_stride, y_stride;
    float *max, *sum; /* (row_count, group): of the scores seen, of exp(score - max); -INFINITY and 0 where none is */
    const void *k, *v; /* at (layer, kv_head, page 0, 0, 0), page_stride elements from page to page */
    enum dtype type;
    size_t page_stride;
    const int32_t *pages;
};

struct cpu_kernels {
    const char *name;

    /* By weight type. */
    const struct cpu_product *product[DTYPE_COUNT];

    void (*rmsnorm)(const float *x, const float *weight, float eps, size_t n, float *y);
    /* y = silu(gate) * up, silu(t) = t / (1 + exp(-t)); y may be gate */
    void (*silu_mul)(const float *gate, const float *up, size_t n, float *y);
    /* x += y */
    void (*add)(float *x, const float *y, size_t n);

    /* One head: rotates x (head_dim) by cos/sin tables of rope_dims/2 entries. */
    void (*rope)(float *x, size_t rope_dims, const float *cos, const float *sin, bool adjacent_pairs);
    /* n elements to the cache's type */
    void (*kv_store)(void *dst, enum dtype type, const float *src, size_t n);
    /* Softmax over the positions of a part, online, over whole pages in order. What comes out for a query does not
     * depend on the others. */
    void (*attention)(const struct cpu_attention_part *p);

    /* Low-rank products, of `rows` rows that share a matrix, which is read once for a few of them. What comes out for
     * a row does not depend on the others.
     * z[r][i] = sum_k a[i, k] x[r][k] for n rows of a (stride d_in elements of `type`); each is summed in an order
     * that depends on d_in only. */
    void (*lr_shrink)(const void *a, enum dtype type, size_t d_in, int n, int rows, const float *const *x,
                      float *const *z);
    /* y[r][at + c] += sum_i z[r][i] bt[i, c] for c in [0, cols), i in order; rows of bt are bt_stride
     * elements apart: B is kept transposed, by panels of columns (LR_PANEL as a rule). */
    void (*lr_expand)(const void *bt, enum dtype type, size_t bt_stride, int n, int rows, const float *const *z,
                      size_t cols, float *const *y, size_t at);

    /* Training: what one thread does of the ops of kernels/grad.h. */

    /* The product of gradients with frozen weights in F32: it may round both as grad.h's weight_pack says.
     * Its act_bytes are no more than those of F32's product. */
    const struct cpu_product *grad_product;
    /* A block of a product, as the op, of any shape. scratch: CPU_MATMUL_FLOATS, 64-byte aligned. */
    void (*matmul)(const struct matmul_args *a, float *scratch);
    /* d_gate may be gate, d_up may be up */
    void (*silu_mul_backward)(const float *gate, const float *up, const float *d_y, size_t n, float *d_gate,
                              float *d_up);
    /* One row: d_x += J^T d_y of rmsnorm at x. */
    void (*rmsnorm_backward)(const float *x, const float *weight, float eps, size_t n, const float *d_y,
                             float *d_x);
    /* y = factor * softmax(scale * x); y may be x, or NULL. Returns log(sum(exp(scale * x))). What is far
     * below the maximum may come out as 0 or as up to 2e-38 of `factor`. scale > 0, n >= 1. NaN or infinity in x
     * gives NaN. */
    float (*softmax)(const float *x, size_t n, float scale, float factor, float *y);
    /* a->n of the op's elements */
    void (*adamw)(const struct adamw_args *a);
    double (*sum_squares)(const float *x, size_t n);
};

/* Of a product's packed operands, which columns of C are best for: blocks of so many. */
#define CPU_MATMUL_FLOATS 16384
#define CPU_MATMUL_COLS   96

/* The tables, complete ones: entries a level does not override come from the level below. */
void cpu_kernels_reference(struct cpu_kernels *k);
void cpu_kernels_avx2(struct cpu_kernels *k);   /* on top of reference */
void cpu_kernels_avxvnni(struct cpu_kernels *k); /* on top of avx2 */
void cpu_kernels_avx512(struct cpu_kernels *k);  /* on top of avx2 */
/* One of them; a level this build has not aborts. */
void cpu_level_kernels(enum cpu_level level, struct cpu_kernels *out);

#endif

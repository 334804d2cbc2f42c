/* The plain C kernels, shared between the files of this folder: see kernels/cpu/kernels.h for what
 * each computes. They run everywhere and are the oracle of every faster table. */
#ifndef KERNELS_REFERENCE_REFERENCE_H
#define KERNELS_REFERENCE_REFERENCE_H

#include "kernels/cpu/kernels.h"

/* Every sum over inputs is kept in this many parts, element k in part k % REF_LANES, which are added
 * pairwise at the end: a fixed order which a compiler can still turn into vector code. */
#define REF_LANES 8
/* Elements decoded at a time: a multiple of every type's block. */
#define REF_SPAN 256

/* sum[k % REF_LANES] += a[k] * b[k] for k in [0, n), n <= REF_SPAN. */
void ref_dot_span(const float *a, const float *b, size_t n, float sum[REF_LANES]);
float ref_dot_total(const float sum[REF_LANES]);

extern const struct cpu_product ref_product;

void ref_attention(const struct cpu_attention_part *p);
void ref_lr_shrink(const void *a, enum dtype type, size_t d_in, int n, int rows, const float *const *x,
                   float *const *z);
void ref_lr_expand(const void *bt, enum dtype type, size_t bt_stride, int n, int rows, const float *const *z,
                   size_t cols, float *const *y, size_t at);
void ref_matmul(const struct matmul_args *p, float *scratch);
void ref_silu_mul_backward(const float *gate, const float *up, const float *d_y, size_t n, float *d_gate,
                           float *d_up);
void ref_rmsnorm_backward(const float *x, const float *weight, float eps, size_t n, const float *d_y,
                          float *d_x);
float ref_softmax(const float *x, size_t n, float scale, float factor, float *y);
void ref_adamw(const struct adamw_args *a);
double ref_sum_squares(const float *x, size_t n);

#endif

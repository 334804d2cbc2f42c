/* The parts of the AVX2 table, each filled by its file. */
#ifndef KERNELS_AVX2_AVX2_H
#define KERNELS_AVX2_AVX2_H

#include "kernels/cpu/kernels.h"

void avx2_product_int8_fill(struct cpu_kernels *k);
void avx2_product_float_fill(struct cpu_kernels *k);
void avx2_vector_fill(struct cpu_kernels *k);
void avx2_attention_fill(struct cpu_kernels *k);
void avx2_lowrank_fill(struct cpu_kernels *k);
void avx2_grad_matmul_fill(struct cpu_kernels *k);
void avx2_grad_product_fill(struct cpu_kernels *k);
void avx2_grad_vector_fill(struct cpu_kernels *k);

#endif

/* The parts of the AVX-512 table. Emulated objects are linked beside the native ones, so their names
 * differ. */
#ifndef KERNELS_AVX512_AVX512_H
#define KERNELS_AVX512_AVX512_H

#ifdef KERNELS_EMULATE
#define cpu_kernels_avx512        cpu_kernels_avx512_emulated
#define avx512_product_int8_fill  avx512_product_int8_fill_emulated
#define avx512_product_float_fill avx512_product_float_fill_emulated
#define avx512_grad_product_fill  avx512_grad_product_fill_emulated
#endif

#include "kernels/cpu/kernels.h"

void avx512_product_int8_fill(struct cpu_kernels *k);
void avx512_product_float_fill(struct cpu_kernels *k);
void avx512_grad_product_fill(struct cpu_kernels *k);

#endif

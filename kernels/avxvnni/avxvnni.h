/* The parts of the AVX-VNNI table. Emulated objects are linked beside the native ones, so their names
 * differ. */
#ifndef KERNELS_AVXVNNI_AVXVNNI_H
#define KERNELS_AVXVNNI_AVXVNNI_H

#ifdef KERNELS_EMULATE
#define cpu_kernels_avxvnni       cpu_kernels_avxvnni_emulated
#define avxvnni_product_int8_fill avxvnni_product_int8_fill_emulated
#endif

#include "kernels/cpu/kernels.h"

void avxvnni_product_int8_fill(struct cpu_kernels *k);

#endif

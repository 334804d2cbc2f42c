#include "kernels/avx512/avx512.h"

void cpu_kernels_avx512(struct cpu_kernels *k)
{
    cpu_kernels_avx2(k);
    k->name = "avx512";
    avx512_product_int8_fill(k);
    avx512_product_float_fill(k);
    avx512_grad_product_fill(k);
}

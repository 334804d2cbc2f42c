#include "kernels/avx2/avx2.h"

void cpu_kernels_avx2(struct cpu_kernels *k)
{
    cpu_kernels_reference(k);
    k->name = "avx2";
    avx2_product_int8_fill(k);
    avx2_product_float_fill(k);
    avx2_vector_fill(k);
    avx2_attention_fill(k);
    avx2_lowrank_fill(k);
    avx2_grad_matmul_fill(k);
    avx2_grad_product_fill(k);
    avx2_grad_vector_fill(k);
}

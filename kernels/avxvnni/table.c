#include "kernels/avxvnni/avxvnni.h"

void cpu_kernels_avxvnni(struct cpu_kernels *k)
{
    cpu_kernels_avx2(k);
    k->name = "avxvnni";
    avxvnni_product_int8_fill(k);
}

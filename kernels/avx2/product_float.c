/* Products of float weights by fma. */
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/float_panel.h"
#include "kernels/avx2/vec256.h"

/* Eight sums are under way, as many as hide the latency of an fma, and no more than 16 registers hold. */
#define PANELS_OF_1 4
#define PANELS_OF_2 2
#define PANELS_OF_3 2
#define PANELS_OF_4 1
#include "kernels/avx2/float_product.inc"

void avx2_product_float_fill(struct cpu_kernels *k) { float_product_fill(k); }

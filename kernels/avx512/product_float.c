/* Products of float weights: a zmm is one panel. */
#include "kernels/avx512/avx512.h"

#include "kernels/avx2/float_panel.h"
#include "kernels/avx512/vec512.h"

/* All with four, so that the rows of a last tile find the panels together as well; at least eight sums
 * are under way from two rows on. */
#define PANELS_OF_1 4
#define PANELS_OF_2 4
#define PANELS_OF_3 4
#define PANELS_OF_4 4
#include "kernels/avx2/float_product.inc"

void avx512_product_float_fill(struct cpu_kernels *k) { float_product_fill(k); }

/* Products of gradients in fixed point: vpmaddwd multiplies pairs of int16 and adds each pair in 32 bits. */
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/grad_panel.h"
#include "kernels/avx2/vec256.h"

#define GRAD_PANELS  1
#define UNROLL_LINES _Pragma("GCC unroll 16")

INLINE vec_i vec_pairs(const int32_t *pair) { return _mm256_set1_epi32(*pair); }
INLINE vec_i vec_first16(vec_i w, vec_i x) { return _mm256_madd_epi16(w, x); }
/* The addition is written out, as gcc would make all products of a line first and spill them, or move each
 * sum from register to register. */
INLINE vec_i vec_dot16(vec_i sum, vec_i w, vec_i x)
{
    __m256i products = _mm256_madd_epi16(w, x);
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
    return sum;
}

#include "kernels/avx2/grad_product.inc"

void avx2_grad_product_fill(struct cpu_kernels *k) { k->grad_product = &grad_product; }

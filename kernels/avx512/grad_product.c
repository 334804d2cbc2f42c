/* Products of gradients in fixed point: vpdpwssd multiplies pairs of int16 and adds them in 32 bits. */
#include "kernels/avx512/avx512.h"

#include "kernels/avx2/grad_panel.h"
#include "kernels/avx512/vec512.h"

#define GRAD_PANELS  2
#define UNROLL_LINES UNROLL

INLINE vec_i vec_pairs(const int32_t *pair) { return _mm512_set1_epi32(*pair); }
INLINE vec_i vec_first16(vec_i w, vec_i x) { return _mm512_dpwssd_epi32(_mm512_setzero_si512(), w, x); }
INLINE vec_i vec_dot16(vec_i sum, vec_i w, vec_i x) { return _mm512_dpwssd_epi32(sum, w, x); }

#include "kernels/avx2/grad_product.inc"

void avx512_grad_product_fill(struct cpu_kernels *k) { k->grad_product = &grad_product; }

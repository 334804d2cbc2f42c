/* Products of block-quantised weights and int8 activations.
 *
 * vpmaddubsw multiplies unsigned quants by signed activations and adds pairs in 16 bits. A sum of
 * several groups still fits: 8 groups of 4-bit quants (8 * 2 * 15 * 127 = 30480), 4 of 5-bit
 * ones (31496), 2 of 6-bit ones (32004), and one of |8-bit| ones (32512). */
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/vec256.h"

/* Keeps a sum where it stands. Without this gcc takes the additions of a block for one big sum,
 * makes all products first and spills them: half the speed. */
INLINE __m256i in_order(__m256i sum)
{
    __asm__("" : "+x"(sum));
    return sum;
}

INLINE __m256i add16(bool first, __m256i sum, __m256i v)
{
    return in_order(first ? v : _mm256_add_epi16(sum, v));
}

/* As block_dot; bits below 8. */
INLINE void unsigned_dot(int bits, int rows, const uint8_t *q, const struct tile_block *t, int g0, int g1,
                         __m256i dot[TILE_ROWS][VECTORS])
{
    const int limit = bits == 4 ? 8 : bits == 5 ? 4 : 2; /* groups that fit 16 bits */
    __m256i c[TILE_ROWS][VECTORS];
    UNROLL for (int g = g0; g < g1; g++)
    {
        __m256i w0 = vec_quants(bits, q, g, 0), w1 = vec_quants(bits, q, g, 1);
        UNROLL for (int r = 0; r < rows; r++)
        {
            __m256i x = _mm256_set1_epi32(t->q[g][r]);
            c[r][0] = add16(g % limit == 0, c[r][0], _mm256_maddubs_epi16(w0, x));
            c[r][1] = add16(g % limit == 0, c[r][1], _mm256_maddubs_epi16(w1, x));
        }
        if ((g + 1) % limit && g + 1 < g1) continue;
        UNROLL for (int r = 0; r < rows; r++)
        {
            UNROLL for (int v = 0; v < VECTORS; v++)
            {
                __m256i s = _mm256_madd_epi16(c[r][v], _mm256_set1_epi16(1));
                dot[r][v] = in_order(g - g0 < limit ? s : _mm256_add_epi32(dot[r][v], s));
            }
        }
    }
}

/* The same for 8-bit quants, which are signed: the sign moves to the activations, and each group is
 * widened at once, since |w x| of a pair may be 2 * 128 * 127. */
INLINE void signed_dot(int rows, const uint8_t *q, const struct tile_block *t,
                       __m256i dot[TILE_ROWS][VECTORS])
{
    UNROLL for (int g = 0; g < 8; g++)
    {
        __m256i w[VECTORS], size[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++)
        {
            w[v] = vec_load(q + g * 64 + v * 32);
            size[v] = _mm256_abs_epi8(w[v]);
        }
        UNROLL for (int r = 0; r < rows; r++)
        {
            __m256i x = _mm256_set1_epi32(t->q[g][r]);
            UNROLL for (int v = 0; v < VECTORS; v++)
            {
                __m256i pairs = _mm256_maddubs_epi16(size[v], _mm256_sign_epi8(x, w[v]));
                __m256i s = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                dot[r][v] = in_order(g == 0 ? s : _mm256_add_epi32(dot[r][v], s));
            }
        }
    }
}

INLINE void block_dot(int bits, int rows, const uint8_t *q, const struct tile_block *t, int g0, int g1,
                      __m256i dot[TILE_ROWS][VECTORS])
{
    if (bits == 8)
        signed_dot(rows, q, t, dot);
    else
        unsigned_dot(bits, rows, q, t, g0, g1, dot);
}

#include "kernels/avx2/panel_product.inc"

void avx2_product_int8_fill(struct cpu_kernels *k) { panel_product_fill(k); }

/* Products of float weights; layouts in kernels/avx2/float_panel.h. A zmm is one panel, and several panels
 * go together so that at least eight sums are under way. Sums are those of the AVX2 product, in
 * the same order. */
#include "kernels/avx512/avx512.h"

#include "kernels/avx2/float_panel.h"
#include "kernels/avx512/intrinsics.h"

/* Input k of a panel; k even or odd is known after unrolling. */
INLINE __m512 weight_load(enum dtype type, const uint8_t *w, int k)
{
    if (type == DTYPE_F32) return _mm512_loadu_ps((const float *)(const void *)(w + k * 64));
    if (type == DTYPE_F16) return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(w + k * 32)));
    __m512i both = _mm512_loadu_si512(w + k / 2 * 64);
    return _mm512_castsi512_ps(k % 2 ? _mm512_and_si512(both, _mm512_set1_epi32((int)0xFFFF0000))
                                     : _mm512_slli_epi32(both, 16));
}

/* y[row][panel] of `panels` neighbouring panels and `rows` rows of a tile */
INLINE void multiply_tile(enum dtype type, int rows, int panels, const uint8_t *w, const float *t,
                          size_t inputs, float y[TILE_ROWS][FLOAT_PANELS_MAX][PANEL_OUTPUTS])
{
    const size_t bytes = float_panel_bytes(type, inputs),
                 step = 2 * PANEL_OUTPUTS * (type == DTYPE_F32 ? 4 : 2);
    __m512 s[TILE_ROWS][FLOAT_PANELS_MAX];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int p = 0; p < panels; p++) s[r][p] =
        _mm512_setzero_ps();
    for (size_t k = 0; k < inputs; k += 2, w += step, t += 2 * TILE_ROWS) {
        UNROLL for (int i = 0; i < 2; i++)
        {
            __m512 x[FLOAT_PANELS_MAX];
            UNROLL for (int p = 0; p < panels; p++)
            {
                const uint8_t *panel = w + (size_t)p * bytes;
                if (i == 0) __builtin_prefetch(panel + 1024);
                x[p] = weight_load(type, panel, i);
            }
            UNROLL for (int r = 0; r < rows; r++)
            {
                __m512 a = _mm512_set1_ps(t[i * TILE_ROWS + r]);
                UNROLL for (int p = 0; p < panels; p++) s[r][p] = _mm512_fmadd_ps(x[p], a, s[r][p]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int p = 0; p < panels; p++)
        _mm512_storeu_ps(y[r][p], s[r][p]);
}

#define TILE_FN(type, rows, panels)                                                           \
    static void type##_##rows##_##panels(const uint8_t *w, const float *t, size_t inputs,     \
                                         float y[TILE_ROWS][FLOAT_PANELS_MAX][PANEL_OUTPUTS]) \
    {                                                                                         \
        multiply_tile(DTYPE_##type, rows, panels, w, t, inputs, y);                           \
    }
/* All with four, so that the rows of a last tile find the panels together as well. */
#define TILE_FNS(type)                                                                         \
    TILE_FN(type, 1, 1)                                                                        \
    TILE_FN(type, 2, 1)                                                                        \
    TILE_FN(type, 3, 1)                                                                        \
    TILE_FN(type, 4, 1)                                                                        \
    TILE_FN(type, 1, 4)                                                                        \
    TILE_FN(type, 2, 4)                                                                        \
    TILE_FN(type, 3, 4)                                                                        \
    TILE_FN(type, 4, 4)                                                                        \
    static const struct float_step steps_##type[TILE_ROWS + 1] = {{0},                         \
                                                                  {type##_1_1, type##_1_4, 4}, \
                                                                  {type##_2_1, type##_2_4, 4}, \
                                                                  {type##_3_1, type##_3_4, 4}, \
                                                                  {type##_4_1, type##_4_4, 4}};
TILE_FNS(F32)
TILE_FNS(F16)
TILE_FNS(BF16)

static void multiply(const void *w, enum dtype type, const void *act, size_t inputs, size_t outputs, int rows,
                     size_t begin, size_t end, float *y, size_t y_stride)
{
    (void)outputs;
    const struct float_step *steps = type == DTYPE_F32   ? steps_F32
                                     : type == DTYPE_F16 ? steps_F16
                                                         : steps_BF16;
    float_multiply(steps, w, type, act, inputs, rows, begin, end, y, y_stride);
}

static const struct cpu_product product = {
    .layout = FLOAT_PANEL_LAYOUT,
    .panel_outputs = PANEL_OUTPUTS,
    .tile_rows = TILE_ROWS,
    .weight_bytes = float_weight_bytes,
    .weight_pack = float_weight_pack,
    .act_bytes = float_act_bytes,
    .act_pack = float_act_pack,
    .multiply = multiply,
};

void avx512_product_float_fill(struct cpu_kernels *k)
{
    k->product[DTYPE_F32] = k->product[DTYPE_F16] = k->product[DTYPE_BF16] = &product;
}

/* Products of float weights; layouts in float_panel.h. */
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/float_panel.h"

#include <immintrin.h>

#define UNROLL  _Pragma("GCC unroll 8")
#define VECTORS 2 /* of 8 outputs in a panel */

/* Input k of vector v; k even or odd is known after unrolling. */
INLINE __m256 weight_load(enum dtype type, const uint8_t *w, int k, int v)
{
    if (type == DTYPE_F32) return _mm256_load_ps((const float *)(const void *)(w + k * 64 + v * 32));
    if (type == DTYPE_F16) return _mm256_cvtph_ps(_mm_load_si128((const void *)(w + k * 32 + v * 16)));
    __m256i both = _mm256_load_si256((const void *)(w + k / 2 * 64 + v * 32));
    return _mm256_castsi256_ps(k % 2 ? _mm256_and_si256(both, _mm256_set1_epi32((int)0xFFFF0000))
                                     : _mm256_slli_epi32(both, 16));
}

/* y[row][panel] of `panels` neighbouring panels and `rows` rows of a tile */
INLINE void multiply_tile(enum dtype type, int rows, int panels, const uint8_t *w, const float *t,
                          size_t inputs, float y[TILE_ROWS][FLOAT_PANELS_MAX][PANEL_OUTPUTS])
{
    const size_t bytes = float_panel_bytes(type, inputs),
                 step = 2 * PANEL_OUTPUTS * (type == DTYPE_F32 ? 4 : 2);
    __m256 s[TILE_ROWS][FLOAT_PANELS_MAX * VECTORS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < panels * VECTORS; v++) s[r][v] =
        _mm256_setzero_ps();
    for (size_t k = 0; k < inputs; k += 2, w += step, t += 2 * TILE_ROWS) {
        UNROLL for (int i = 0; i < 2; i++)
        {
            __m256 x[FLOAT_PANELS_MAX * VECTORS];
            UNROLL for (int v = 0; v < panels * VECTORS; v++)
            {
                const uint8_t *panel = w + (size_t)(v / VECTORS) * bytes;
                if (i == 0 && v % VECTORS == 0) _mm_prefetch((const char *)panel + 1024, _MM_HINT_T0);
                x[v] = weight_load(type, panel, i, v % VECTORS);
            }
            UNROLL for (int r = 0; r < rows; r++)
            {
                __m256 a = _mm256_set1_ps(t[i * TILE_ROWS + r]);
                UNROLL for (int v = 0; v < panels * VECTORS; v++) s[r][v] = _mm256_fmadd_ps(x[v], a, s[r][v]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < panels * VECTORS; v++)
        _mm256_storeu_ps(&y[r][v / VECTORS][v % VECTORS * 8], s[r][v]);
}

#define TILE_FN(type, rows, panels)                                                           \
    static void type##_##rows##_##panels(const uint8_t *w, const float *t, size_t inputs,     \
                                         float y[TILE_ROWS][FLOAT_PANELS_MAX][PANEL_OUTPUTS]) \
    {                                                                                         \
        multiply_tile(DTYPE_##type, rows, panels, w, t, inputs, y);                           \
    }
#define TILE_FNS(type)                                                                     \
    TILE_FN(type, 1, 1)                                                                    \
    TILE_FN(type, 2, 1)                                                                    \
    TILE_FN(type, 3, 1) TILE_FN(type, 4, 1) TILE_FN(type, 1, 4) TILE_FN(type, 2, 2)        \
        TILE_FN(type, 3, 2) static const struct float_step steps_##type[TILE_ROWS + 1] = { \
            {0},                                                                           \
            {type##_1_1, type##_1_4, 4},                                                   \
            {type##_2_1, type##_2_2, 2},                                                   \
            {type##_3_1, type##_3_2, 2},                                                   \
            {type##_4_1, type##_4_1, 1}};
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

void avx2_product_float_fill(struct cpu_kernels *k)
{
    k->product[DTYPE_F32] = k->product[DTYPE_F16] = k->product[DTYPE_BF16] = &product;
}

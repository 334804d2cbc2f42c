/* Products of F32, F16 and BF16 weights with fp32 activations.
 *
 * A panel is 16 outputs; for each pair of inputs it holds both, for all outputs (an odd last
 * input gets a zero beside it):
 *
 *   F32, F16   element [input][output]
 *   BF16       element [pair][output][input of the pair]: a 32-bit lane holds both, and becomes
 *              either of them as fp32 with one instruction
 *
 * A tile is TILE_ROWS rows: x[input][row]. Each output is one fp32 sum over inputs in order, by fma. */
#include "kernels/avx2/avx2.h"

#include "base/memory.h"

#include <immintrin.h>
#include <string.h>

#define INLINE        static inline __attribute__((always_inline))
#define UNROLL        _Pragma("GCC unroll 8")
#define PANEL_OUTPUTS 16
#define VECTORS       2
#define TILE_ROWS     4
#define PANELS_MAX    4 /* at once, so that few rows still have enough sums under way */

static size_t padded(size_t inputs) { return inputs + inputs % 2; }
static size_t panel_bytes(enum dtype type, size_t inputs)
{
    return padded(inputs) * PANEL_OUTPUTS * dtype_block_bytes(type);
}

static size_t weight_bytes(enum dtype type, size_t outputs, size_t inputs)
{
    size_t elements = size_mul(size_round_up(outputs, PANEL_OUTPUTS), size_round_up(inputs, 2));
    return size_mul(elements, dtype_block_bytes(type));
}

static void panel_pack(const struct matrix *m, size_t first, uint8_t *dst)
{
    size_t size = dtype_block_bytes(m->type), pair = m->type == DTYPE_BF16 ? 2 : 1;
    memset(dst, 0, panel_bytes(m->type, m->cols));
    for (size_t o = 0; o < PANEL_OUTPUTS && first + o < m->rows; o++) {
        const uint8_t *row = (const uint8_t *)m->data + (first + o) * m->cols * size;
        for (size_t k = 0; k < m->cols; k++) {
            size_t at = k / pair * pair * PANEL_OUTPUTS + o * pair + k % pair;
            memcpy(dst + at * size, row + k * size, size);
        }
    }
}

static void weight_pack(void *dst, const struct matrix *m, size_t begin, size_t end)
{
    for (size_t o = begin; o < end; o += PANEL_OUTPUTS)
        panel_pack(m, o, (uint8_t *)dst + o / PANEL_OUTPUTS * panel_bytes(m->type, m->cols));
}

/* Rounded up so that every tile starts on a cache line. */
static size_t tile_floats(size_t inputs) { return size_round_up(padded(inputs) * TILE_ROWS, 16); }

static size_t act_bytes(int rows, size_t inputs)
{
    return (size_t)(rows + TILE_ROWS - 1) / TILE_ROWS * tile_floats(inputs) * sizeof(float);
}

static void act_pack(void *dst, const float *x, size_t x_stride, size_t inputs, int rows, int begin, int end)
{
    for (int r = begin; r < end; r += TILE_ROWS) {
        float *t = (float *)dst + (size_t)(r / TILE_ROWS) * tile_floats(inputs);
        if (rows - r < TILE_ROWS || inputs % 2) memset(t, 0, tile_floats(inputs) * sizeof *t);
        for (int i = 0; i < TILE_ROWS && r + i < rows; i++)
            for (size_t k = 0; k < inputs; k++)
                t[k * TILE_ROWS + (size_t)i] = x[(size_t)(r + i) * x_stride + k];
    }
}

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
                          size_t inputs, float y[TILE_ROWS][PANELS_MAX][PANEL_OUTPUTS])
{
    const size_t bytes = panel_bytes(type, inputs), step = 2 * PANEL_OUTPUTS * (type == DTYPE_F32 ? 4 : 2);
    __m256 s[TILE_ROWS][PANELS_MAX * VECTORS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < panels * VECTORS; v++) s[r][v] =
        _mm256_setzero_ps();
    for (size_t k = 0; k < inputs; k += 2, w += step, t += 2 * TILE_ROWS) {
        UNROLL for (int i = 0; i < 2; i++)
        {
            __m256 x[PANELS_MAX * VECTORS];
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

typedef void tile_fn(const uint8_t *w, const float *t, size_t inputs,
                     float y[TILE_ROWS][PANELS_MAX][PANEL_OUTPUTS]);

#define TILE_FN(type, rows, panels)                                                       \
    static void type##_##rows##_##panels(const uint8_t *w, const float *t, size_t inputs, \
                                         float y[TILE_ROWS][PANELS_MAX][PANEL_OUTPUTS])   \
    {                                                                                     \
        multiply_tile(DTYPE_##type, rows, panels, w, t, inputs, y);                       \
    }
#define TILE_FNS(type)  \
    TILE_FN(type, 1, 1) \
    TILE_FN(type, 2, 1) \
    TILE_FN(type, 3, 1) TILE_FN(type, 4, 1) TILE_FN(type, 1, 4) TILE_FN(type, 2, 2) TILE_FN(type, 3, 2)
TILE_FNS(F32)
TILE_FNS(F16)
TILE_FNS(BF16)

/* How many panels go together for a number of rows, and by which function. */
static const int panels_together[TILE_ROWS + 1] = {0, 4, 2, 2, 1};
#define TILE_ROW(type)                          \
    [DTYPE_##type] = {{0},                      \
                      {type##_1_1, type##_1_4}, \
                      {type##_2_1, type##_2_2}, \
                      {type##_3_1, type##_3_2}, \
                      {type##_4_1, type##_4_1}}
static tile_fn *const tile_fns[DTYPE_COUNT][TILE_ROWS + 1][2] = {TILE_ROW(F32), TILE_ROW(F16),
                                                                 TILE_ROW(BF16)};

/* One tile (n rows) times outputs [0, outputs), at most `panels` panels' worth. */
static void tile_times_panels(enum dtype type, int n, int panels, const uint8_t *w, const float *t,
                              size_t inputs, size_t outputs, float *y, size_t y_stride)
{
    float sums[TILE_ROWS][PANELS_MAX][PANEL_OUTPUTS];
    tile_fns[type][n][panels > 1](w, t, inputs, sums);
    for (int r = 0; r < n; r++) memcpy(y + (size_t)r * y_stride, sums[r], outputs * sizeof *y);
}

static void multiply(const void *w, enum dtype type, const void *act, size_t inputs, size_t outputs, int rows,
                     size_t begin, size_t end, float *y, size_t y_stride)
{
    (void)outputs;
    size_t bytes = panel_bytes(type, inputs);
    int together = rows < TILE_ROWS ? panels_together[rows] : 1;
    for (size_t o = begin; o < end;) {
        int panels = end - o > (size_t)(together - 1) * PANEL_OUTPUTS ? together : 1;
        size_t count = (size_t)panels * PANEL_OUTPUTS;
        if (count > end - o) count = end - o;
        const uint8_t *panel = (const uint8_t *)w + o / PANEL_OUTPUTS * bytes;
        for (int r = 0; r < rows; r += TILE_ROWS) {
            int n = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
            const float *t = (const float *)act + (size_t)(r / TILE_ROWS) * tile_floats(inputs);
            tile_times_panels(type, n, panels, panel, t, inputs, count,
                              y + (size_t)r * y_stride + (o - begin), y_stride);
        }
        o += count;
    }
}

static const struct cpu_product product = {
    .panel_outputs = PANEL_OUTPUTS,
    .tile_rows = TILE_ROWS,
    .weight_bytes = weight_bytes,
    .weight_pack = weight_pack,
    .act_bytes = act_bytes,
    .act_pack = act_pack,
    .multiply = multiply,
};

void avx2_product_float_fill(struct cpu_kernels *k)
{
    k->product[DTYPE_F32] = k->product[DTYPE_F16] = k->product[DTYPE_BF16] = &product;
}

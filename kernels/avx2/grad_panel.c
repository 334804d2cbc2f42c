/* Packing for products in fixed point, and their order of work. */
#include "kernels/avx2/grad_panel.h"

#include "base/memory.h"
#include "kernels/avx2/tile.h"
#include "kernels/avx2/vec256.h"

#include <string.h>

static size_t blocks_of(size_t inputs) { return (inputs + PANEL_BLOCK - 1) / PANEL_BLOCK; }
static size_t panel_size(size_t inputs) { return blocks_of(inputs) * GRAD_BLOCK_BYTES; }

/* PANEL_BLOCK floats as pairs of int16, eight in each of q. Returns their scale. */
INLINE float quantise(const float *x, __m256i q[2])
{
    float largest = tile_max_abs(x);
    bool tiny = largest < TILE_TINY;
    __m256 inverse = _mm256_set1_ps(tiny ? 0 : GRAD_QUANT_MAX / largest);
    const __m256i least = _mm256_set1_epi32(-GRAD_QUANT_MAX);
    __m256i v[4];
    /* What is not finite becomes INT32_MIN: kept within the bits that sums have room for, it is the scale's
     * to tell. */
    for (int i = 0; i < 4; i++)
        v[i] =
            _mm256_max_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse)), least);
    /* packs works by halves of a vector, whose middle quarters then change places */
    for (int i = 0; i < 2; i++)
        q[i] = _mm256_permute4x64_epi64(_mm256_packs_epi32(v[2 * i], v[2 * i + 1]), 0xD8);
    return tiny ? 0 : largest / GRAD_QUANT_MAX;
}

/* --- weights --- */

size_t grad_weight_bytes(enum dtype type, size_t outputs, size_t inputs)
{
    if (type != DTYPE_F32) return SIZE_MAX;
    return size_mul(size_round_up(outputs, PANEL_OUTPUTS) / PANEL_OUTPUTS, panel_size(inputs));
}

static void panel_fill(const struct matrix *m, size_t first, uint8_t *dst)
{
    if (m->rows - first < PANEL_OUTPUTS) memset(dst, 0, panel_size(m->cols));
    for (size_t k = 0; k < m->cols; k += PANEL_BLOCK, dst += GRAD_BLOCK_BYTES)
        for (size_t o = 0; o < PANEL_OUTPUTS && first + o < m->rows; o++) {
            float x[PANEL_BLOCK] = {0};
            size_t n = m->cols - k < PANEL_BLOCK ? m->cols - k : PANEL_BLOCK;
            memcpy(x, (const char *)m->data + ((first + o) * m->cols + k) * sizeof *x, n * sizeof *x);
            __m256i q[2];
            float scale = quantise(x, q);
            int32_t pair[GRAD_PAIRS];
            memcpy(pair, q, sizeof pair);
            memcpy(dst + o * sizeof scale, &scale, sizeof scale);
            uint8_t *line = dst + PANEL_OUTPUTS * sizeof scale + o * sizeof *pair;
            for (size_t i = 0; i < GRAD_PAIRS; i++) memcpy(line + i * GRAD_LINE, &pair[i], sizeof *pair);
        }
}

void grad_weight_pack(void *dst, const struct matrix *m, size_t begin, size_t end)
{
    for (size_t o = begin; o < end; o += PANEL_OUTPUTS)
        panel_fill(m, o, (uint8_t *)dst + o / PANEL_OUTPUTS * panel_size(m->cols));
}

/* --- gradients --- */

static size_t tile_size(size_t inputs) { return blocks_of(inputs) * sizeof(struct grad_tile_block); }

size_t grad_act_bytes(int rows, size_t inputs)
{
    size_t tiles = (size_t)(rows + TILE_ROWS - 1) / TILE_ROWS;
    return size_round_up(size_mul(tiles, tile_size(inputs)), MEMORY_ALIGN);
}

/* A block of each row; four at once, since one alone waits for its own largest value. */
INLINE void tile_block_pack(struct grad_tile_block *t, const float *const row[TILE_ROWS], size_t k)
{
    __m256i low[TILE_ROWS], high[TILE_ROWS];
    UNROLL for (int r = 0; r < TILE_ROWS; r++)
    {
        __m256i q[2];
        t->scale[r] = quantise(row[r] + k, q);
        low[r] = q[0];
        high[r] = q[1];
    }
    tile_interleave(low, t->q);
    tile_interleave(high, t->q + GRAD_PAIRS / 2);
}

static void tile_pack(struct grad_tile_block *t, const float *const row[TILE_ROWS], size_t inputs)
{
    size_t k = 0;
    for (; k + PANEL_BLOCK <= inputs; k += PANEL_BLOCK) tile_block_pack(t++, row, k);
    if (k == inputs) return;
    float rest[TILE_ROWS][PANEL_BLOCK] = {0};
    for (int r = 0; r < TILE_ROWS; r++) memcpy(rest[r], row[r] + k, (inputs - k) * sizeof **rest);
    tile_block_pack(t, (const float *const[]){rest[0], rest[1], rest[2], rest[3]}, 0);
}

/* Rows beyond `rows` are made of the last one's, and nobody reads what comes of them. */
void grad_act_pack(void *dst, const float *x, size_t x_stride, size_t inputs, int rows, int begin, int end)
{
    for (int first = begin; first < end; first += TILE_ROWS) {
        const float *row[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; r++)
            row[r] = x + (size_t)(first + r < rows ? first + r : rows - 1) * x_stride;
        tile_pack((void *)((uint8_t *)dst + (size_t)(first / TILE_ROWS) * tile_size(inputs)), row, inputs);
    }
}

/* --- the product's order of work --- */

/* `panels` panels from w on times the tiles of rows [0, rows), which together fetch as many panels after them, up to
 * w_end. Of the outputs, `outputs` are wanted. */
static void panels_times_rows(const struct grad_tile_fns *fns, int panels, const uint8_t *w, const uint8_t *w_end,
                              const uint8_t *act, size_t inputs, int rows, size_t outputs, float *y,
                              size_t y_stride)
{
    size_t width = (size_t)panels * PANEL_OUTPUTS, blocks = blocks_of(inputs), bytes = panel_size(inputs);
    size_t tiles = (size_t)(rows + TILE_ROWS - 1) / TILE_ROWS;
    size_t lines = ((size_t)panels * bytes / 64 + tiles * blocks - 1) / (tiles * blocks);
    const uint8_t *ahead = w + (size_t)panels * bytes;
    grad_tile_fn *fn = panels > 1 ? fns->several : fns->one;
    for (int r = 0; r < rows; r += TILE_ROWS, act += tile_size(inputs), ahead += lines * 64 * blocks) {
        const struct grad_tile_block *t = (const void *)act;
        float *to = y + (size_t)r * y_stride;
        if (ahead >= w_end) lines = 0;
        if (rows - r >= TILE_ROWS && outputs >= width) {
            fn(w, bytes, t, blocks, to, y_stride, ahead, lines);
            continue;
        }
        float whole[TILE_ROWS][GRAD_PANELS_MAX * PANEL_OUTPUTS];
        fn(w, bytes, t, blocks, whole[0], GRAD_PANELS_MAX * PANEL_OUTPUTS, ahead, lines);
        for (int i = 0; i < TILE_ROWS && i < rows - r; i++)
            memcpy(to + (size_t)i * y_stride, whole[i], (outputs < width ? outputs : width) * sizeof *y);
    }
}

/* Rows whose tiles stay in L2 while panels pass. */
static int rows_at_once(size_t inputs)
{
    size_t tiles = (256u << 10) / tile_size(inputs);
    return (int)(tiles ? tiles : 1) * TILE_ROWS;
}

void grad_multiply(const struct grad_tile_fns *fns, const void *w, const void *act, size_t inputs, int rows,
                   size_t begin, size_t end, float *y, size_t y_stride)
{
    int group = rows_at_once(inputs);
    size_t bytes = panel_size(inputs), step = (size_t)fns->panels * PANEL_OUTPUTS;
    const uint8_t *w_end = (const uint8_t *)w + (end + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS * bytes;
    for (int r = 0; r < rows; r += group) {
        const uint8_t *tiles = (const uint8_t *)act + (size_t)(r / TILE_ROWS) * tile_size(inputs);
        for (size_t o = begin, width; o < end; o += width) {
            int panels = end - o > step - PANEL_OUTPUTS ? fns->panels : 1;
            width = (size_t)panels * PANEL_OUTPUTS;
            panels_times_rows(fns, panels, (const uint8_t *)w + o / PANEL_OUTPUTS * bytes, w_end, tiles, inputs,
                              rows - r < group ? rows - r : group, end - o,
                              y + (size_t)r * y_stride + (o - begin), y_stride);
        }
    }
}

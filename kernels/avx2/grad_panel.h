/* How frozen weights and gradients lie in memory for dx = W^T dy in fixed point.
 *
 * Both are rounded to 14 bits in blocks of PANEL_BLOCK inputs, value = scale * q with |q| <= GRAD_QUANT_MAX:
 * so many that the sum of a block's products fits 32 bits. A pair of neighbouring inputs stands in a 32-bit
 * lane.
 *
 *   panel   of PANEL_OUTPUTS outputs, by blocks: f32 scale[16], then 16 lines, one for each pair of inputs:
 *           s16 [output][input of the pair]
 *   tile    of TILE_ROWS rows, by blocks: struct grad_tile_block */
#ifndef KERNELS_AVX2_GRAD_PANEL_H
#define KERNELS_AVX2_GRAD_PANEL_H

#include "kernels/avx2/panel.h"

#define GRAD_QUANT_MAX   8191
#define GRAD_PAIRS       (PANEL_BLOCK / 2)
#define GRAD_LINE        (PANEL_OUTPUTS * 2 * sizeof(int16_t))
#define GRAD_BLOCK_BYTES (PANEL_OUTPUTS * sizeof(float) + GRAD_PAIRS * GRAD_LINE)
#define GRAD_LAYOUT      "grad panel 1"

struct grad_tile_block {
    int32_t q[GRAD_PAIRS][TILE_ROWS]; /* two int16 each */
    float scale[TILE_ROWS];
};

/* y[row][output] of a tile and neighbouring panels, `bytes` apart. y_stride in floats. With every block, `lines`
 * cache lines from `ahead` on are fetched: a share of the panels that follow. */
typedef void grad_tile_fn(const uint8_t *w, size_t bytes, const struct grad_tile_block *t, size_t blocks,
                          float *y, size_t y_stride, const uint8_t *ahead, size_t lines);

/* How many panels go together, so that enough sums are under way. */
#define GRAD_PANELS_MAX 2
struct grad_tile_fns {
    grad_tile_fn *one, *several;
    int panels; /* of `several` */
};

/* The parts of struct cpu_product that AVX2 and AVX-512 share; weights come in F32. */
size_t grad_weight_bytes(enum dtype type, size_t outputs, size_t inputs);
void grad_weight_pack(void *dst, const struct matrix *m, size_t begin, size_t end);
size_t grad_act_bytes(int rows, size_t inputs);
void grad_act_pack(void *dst, const float *x, size_t x_stride, size_t inputs, int rows, int begin, int end);
void grad_multiply(const struct grad_tile_fns *fns, const void *w, const void *act, size_t inputs, int rows,
                   size_t begin, size_t end, float *y, size_t y_stride);

#endif

/* How F32, F16 and BF16 weights and their fp32 activations lie in memory for the products.
 *
 * A panel is PANEL_OUTPUTS outputs; for each pair of inputs it holds both, for all outputs (an odd
 * last input gets a zero beside it):
 *
 *   F32, F16   element [input][output]
 *   BF16       element [pair][output][input of the pair]: a 32-bit lane holds both, and becomes
 *              either of them as fp32 with one instruction
 *
 * A tile is TILE_ROWS rows: x[input][row]. Each output is one fp32 sum over inputs in order, by fma. */
#ifndef KERNELS_AVX2_FLOAT_PANEL_H
#define KERNELS_AVX2_FLOAT_PANEL_H

#include "kernels/avx2/panel.h"

#define FLOAT_PANEL_LAYOUT "float panel 1" /* of weights; numbered anew when they change */
#define FLOAT_PANELS_MAX   4

/* y[row][panel][output] of one tile's rows and some neighbouring panels. */
typedef void float_tile_fn(const uint8_t *w, const float *t, size_t inputs,
                           float y[TILE_ROWS][FLOAT_PANELS_MAX][PANEL_OUTPUTS]);

/* For a number of rows: how many panels go together, so that enough sums are under way. */
struct float_step {
    float_tile_fn *one, *several;
    int panels; /* of `several` */
};

size_t float_panel_bytes(enum dtype type, size_t inputs);

/* The parts of struct cpu_product that AVX2 and AVX-512 share; steps[rows]. */
size_t float_weight_bytes(enum dtype type, size_t outputs, size_t inputs);
void float_weight_pack(void *dst, const struct matrix *m, size_t begin, size_t end);
size_t float_act_bytes(int rows, size_t inputs);
void float_act_pack(void *dst, const float *x, size_t x_stride, size_t inputs, int rows, int begin, int end);
void float_multiply(const struct float_step steps[TILE_ROWS + 1], const void *w, enum dtype type,
                    const void *act, size_t inputs, int rows, size_t begin, size_t end, float *y,
                    size_t y_stride, const struct cpu_ahead *ahead);

#endif

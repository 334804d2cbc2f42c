/* The product y = W x for every weight type: fp32 activations times the weights' exact values, read
 * from the file's own rows. */
#include "kernels/reference/reference.h"

#include "base/memory.h"

#include <string.h>

void ref_dot_span(const float *a, const float *b, size_t n, float sum[REF_LANES])
{
    size_t k = 0;
    for (; k + REF_LANES <= n; k += REF_LANES)
        for (size_t lane = 0; lane < REF_LANES; lane++) sum[lane] += a[k + lane] * b[k + lane];
    for (size_t lane = 0; k < n; k++, lane++) sum[lane] += a[k] * b[k];
}

float ref_dot_total(const float sum[REF_LANES])
{
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

/* A row of W is decoded once for this many activation rows. */
#define TILE_ROWS 16

static size_t weight_bytes(enum dtype type, size_t outputs, size_t inputs)
{
    (void)type, (void)outputs, (void)inputs;
    return 0;
}

/* Activations stay as they are, rows next to each other. */
static size_t act_bytes(int rows, size_t inputs)
{
    size_t padded = size_round_up((size_t)rows, TILE_ROWS);
    return size_round_up(size_mul(padded, size_mul(inputs, sizeof(float))), MEMORY_ALIGN);
}

static void act_pack(void *dst, const float *x, size_t x_stride, size_t inputs, int rows, int begin, int end)
{
    float *out = dst;
    for (int r = begin; r < end; r++) memcpy(out + (size_t)r * inputs, x + (size_t)r * x_stride, inputs * 4);
    if (end != rows) return;
    size_t padded = size_round_up((size_t)rows, TILE_ROWS);
    memset(out + (size_t)rows * inputs, 0, (padded - (size_t)rows) * inputs * sizeof(float));
}

/* One output for up to TILE_ROWS rows of activations. */
static void multiply_output(const char *w_row, enum dtype type, const float *x, size_t inputs, int rows,
                            float *y, size_t y_stride)
{
    size_t elems = dtype_block_elems(type), bytes = dtype_block_bytes(type);
    float w[REF_SPAN], sum[TILE_ROWS][REF_LANES] = {{0}};

    for (size_t k = 0; k < inputs; k += REF_SPAN) {
        size_t n = inputs - k < REF_SPAN ? inputs - k : REF_SPAN;
        dtype_decode(type, w_row + k / elems * bytes, w, n);
        for (int r = 0; r < rows; r++) ref_dot_span(w, x + (size_t)r * inputs + k, n, sum[r]);
    }
    for (int r = 0; r < rows; r++) y[(size_t)r * y_stride] = ref_dot_total(sum[r]);
}

static void multiply(const void *w, enum dtype type, const void *act, size_t inputs, size_t outputs, int rows,
                     size_t begin, size_t end, float *y, size_t y_stride, const struct cpu_ahead *ahead)
{
    (void)outputs, (void)ahead;
    const float *x = act;
    size_t row_bytes = dtype_row_bytes(type, inputs);

    for (int r = 0; r < rows; r += TILE_ROWS) {
        int tile = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
        for (size_t o = begin; o < end; o++)
            multiply_output((const char *)w + o * row_bytes, type, x + (size_t)r * inputs, inputs, tile,
                            y + (size_t)r * y_stride + (o - begin), y_stride);
    }
}

const struct cpu_product ref_product = {
    .layout = "in place",
    .panel_outputs = 1,
    .tile_rows = TILE_ROWS,
    .weight_bytes = weight_bytes,
    .act_bytes = act_bytes,
    .act_pack = act_pack,
    .multiply = multiply,
};

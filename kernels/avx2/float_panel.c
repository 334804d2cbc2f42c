#include "kernels/avx2/float_panel.h"

#include "base/memory.h"

#include <string.h>

static size_t padded(size_t inputs) { return inputs + inputs % 2; }
size_t float_panel_bytes(enum dtype type, size_t inputs)
{
    return padded(inputs) * PANEL_OUTPUTS * dtype_block_bytes(type);
}

size_t float_weight_bytes(enum dtype type, size_t outputs, size_t inputs)
{
    size_t elements = size_mul(size_round_up(outputs, PANEL_OUTPUTS), size_round_up(inputs, 2));
    return size_mul(elements, dtype_block_bytes(type));
}

static void panel_fill(const struct matrix *m, size_t first, uint8_t *dst)
{
    size_t size = dtype_block_bytes(m->type), pair = m->type == DTYPE_BF16 ? 2 : 1;
    memset(dst, 0, float_panel_bytes(m->type, m->cols));
    for (size_t o = 0; o < PANEL_OUTPUTS && first + o < m->rows; o++) {
        const uint8_t *row = (const uint8_t *)m->data + (first + o) * m->cols * size;
        for (size_t k = 0; k < m->cols; k++) {
            size_t at = k / pair * pair * PANEL_OUTPUTS + o * pair + k % pair;
            memcpy(dst + at * size, row + k * size, size);
        }
    }
}

void float_weight_pack(void *dst, const struct matrix *m, size_t begin, size_t end)
{
    for (size_t o = begin; o < end; o += PANEL_OUTPUTS)
        panel_fill(m, o, (uint8_t *)dst + o / PANEL_OUTPUTS * float_panel_bytes(m->type, m->cols));
}

/* Rounded up so that every tile starts on a cache line. */
static size_t tile_floats(size_t inputs) { return size_round_up(padded(inputs) * TILE_ROWS, 16); }

size_t float_act_bytes(int rows, size_t inputs)
{
    return (size_t)(rows + TILE_ROWS - 1) / TILE_ROWS * tile_floats(inputs) * sizeof(float);
}

void float_act_pack(void *dst, const float *x, size_t x_stride, size_t inputs, int rows, int begin, int end)
{
    for (int r = begin; r < end; r += TILE_ROWS) {
        float *t = (float *)dst + (size_t)(r / TILE_ROWS) * tile_floats(inputs);
        if (rows - r < TILE_ROWS || inputs % 2) memset(t, 0, tile_floats(inputs) * sizeof *t);
        for (int i = 0; i < TILE_ROWS && r + i < rows; i++)
            for (size_t k = 0; k < inputs; k++)
                t[k * TILE_ROWS + (size_t)i] = x[(size_t)(r + i) * x_stride + k];
    }
}

/* One tile (n rows) times neighbouring panels that hold outputs [0, outputs). */
static void tile_times_panels(const struct float_step *step, int n, int panels, const uint8_t *w,
                              const float *t, enum dtype type, size_t inputs, size_t outputs, float *y,
                              size_t y_stride)
{
    float sums[TILE_ROWS][FLOAT_PANELS_MAX][PANEL_OUTPUTS];
    float_tile_fn *fn = panels == step->panels ? step->several : step->one;
    int at_once = panels == step->panels ? panels : 1;
    for (int p = 0; p < panels; p += at_once, w += (size_t)at_once * float_panel_bytes(type, inputs)) {
        size_t first = (size_t)p * PANEL_OUTPUTS, count = (size_t)at_once * PANEL_OUTPUTS;
        if (count > outputs - first) count = outputs - first;
        fn(w, t, inputs, sums);
        for (int r = 0; r < n; r++) memcpy(y + (size_t)r * y_stride + first, sums[r], count * sizeof *y);
    }
}

void float_multiply(const struct float_step steps[TILE_ROWS + 1], const void *w, enum dtype type,
                    const void *act, size_t inputs, int rows, size_t begin, size_t end, float *y,
                    size_t y_stride, const struct cpu_ahead *ahead)
{
    size_t bytes = float_panel_bytes(type, inputs);
    int together = steps[rows < TILE_ROWS ? rows : TILE_ROWS].panels;
    size_t tiles = (size_t)(rows + TILE_ROWS - 1) / TILE_ROWS, bunch = (size_t)together * PANEL_OUTPUTS;
    struct handout handout = handout_of(ahead, (end - begin + bunch - 1) / bunch * tiles);
    for (size_t o = begin, count; o < end; o += count) {
        int panels = end - o > (size_t)(together - 1) * PANEL_OUTPUTS ? together : 1;
        count = (size_t)panels * PANEL_OUTPUTS < end - o ? (size_t)panels * PANEL_OUTPUTS : end - o;
        const uint8_t *panel = (const uint8_t *)w + o / PANEL_OUTPUTS * bytes;
        for (int r = 0; r < rows; r += TILE_ROWS) {
            int n = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
            for (size_t due = handout_due(&handout); due > 0; due--)
                __builtin_prefetch(handout.line[handout.taken++], 0, 2);
            const float *t = (const float *)act + (size_t)(r / TILE_ROWS) * tile_floats(inputs);
            tile_times_panels(&steps[n], n, panels, panel, t, type, inputs, count,
                              y + (size_t)r * y_stride + (o - begin), y_stride);
        }
    }
}

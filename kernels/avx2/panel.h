/* How quantised weights and activations lie in memory for the int8 products.
 *
 * A panel is PANEL_OUTPUTS consecutive outputs. Its inputs go in blocks of PANEL_BLOCK, the run of inputs
 * that shares a scale: one block holds the scales of the 16 outputs, then their quants (8-bit ones signed,
 * all others unsigned), four consecutive inputs of an output in a 32-bit lane. One 64-byte line is such a
 * group of all outputs: two vectors of 8 lanes for AVX2, one of 16 for AVX-512. A panel takes about the
 * file's bytes: Q4_1 20 a block and output, Q8_0 34, Q4_K 18.5.
 *
 *   head   [super]   f16 d[16]; [min] f16 -dmin[16]        once every PANEL_SUPER blocks
 *   block  scales    plain:  f16 d[16]; [min] f16 m[16]
 *                    super:  u8 scale[16], min[16]
 *                    halves: s8 scale of inputs 0..15 [16], of inputs 16..31 [16]
 *          quants    8 bits: line g = 0..7: inputs 4g..4g+3
 *                    else:   line g = 0..3: inputs 4g.. in the low nibbles, 16+4g.. in the high ones
 *                    5 bits: + one line: bit g of a byte is the fifth bit of group g
 *                    6 bits: + two lines: bits 2(g%4) of line g/4 are the top bits of group g
 *
 * Activations are quantised in the same blocks, x = scale * q with |q| <= 127, and packed in
 * tiles of TILE_ROWS rows, so that a lane is broadcast from memory at a constant offset. */
#ifndef KERNELS_AVX2_PANEL_H
#define KERNELS_AVX2_PANEL_H

#include "kernels/cpu/kernels.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

#define PANEL_LAYOUT  "panel 1" /* of weights; numbered anew when they change */
#define PANEL_OUTPUTS 16
#define PANEL_BLOCK   32
#define PANEL_SUPER   8 /* blocks of a K-quant's super-block */
#define TILE_ROWS     4

struct panel_format {
    int bits;    /* 4, 5, 6 or 8 */
    int offset;  /* value = scale * (quant - offset), if not min */
    bool min;    /* value = scale * quant + min */
    bool super;  /* scales are integers times the head's d */
    bool halves; /* a scale for each 16 inputs */
};

/* type, then the fields above */
#define PANEL_FORMATS(X)    \
    X(Q4_0, 4, 8, 0, 0, 0)  \
    X(Q4_1, 4, 0, 1, 0, 0)  \
    X(Q5_0, 5, 16, 0, 0, 0) \
    X(Q5_1, 5, 0, 1, 0, 0)  \
    X(Q8_0, 8, 0, 0, 0, 0)  \
    X(Q4_K, 4, 0, 1, 1, 0)  \
    X(Q5_K, 5, 0, 1, 1, 0)  \
    X(Q6_K, 6, 32, 0, 1, 1)

#define X(type, bits, offset, min, super, halves) \
    static const struct panel_format PANEL_##type = {bits, offset, min, super, halves};
PANEL_FORMATS(X)
#undef X

static inline size_t panel_head_bytes(struct panel_format f) { return f.super ? f.min ? 64 : 32 : 0; }
static inline size_t panel_scale_bytes(struct panel_format f) { return f.min && !f.super ? 64 : 32; }
static inline size_t panel_quant_bytes(struct panel_format f)
{
    return f.bits == 8 ? 512 : 256 + 64 * (size_t)(f.bits - 4);
}
static inline size_t panel_block_bytes(struct panel_format f)
{
    return panel_scale_bytes(f) + panel_quant_bytes(f);
}

/* Blocks between two heads; a format without heads counts every block as one. */
static inline size_t panel_super_blocks(struct panel_format f) { return f.super ? PANEL_SUPER : 1; }

/* Bytes of one panel. */
static inline size_t panel_bytes(struct panel_format f, size_t inputs)
{
    size_t blocks = inputs / PANEL_BLOCK;
    return blocks * panel_block_bytes(f) + blocks / panel_super_blocks(f) * panel_head_bytes(f);
}

/* One block of a tile. */
struct tile_block {
    int32_t q[PANEL_BLOCK / 4][TILE_ROWS]; /* four int8 each */
    int32_t total[TILE_ROWS];              /* of the quants */
    float scale[TILE_ROWS];
    float sum[TILE_ROWS];         /* scale * total */
    float half_sum[2][TILE_ROWS]; /* the same of inputs 0..15 and of 16..31 */
};

static inline size_t tile_bytes(size_t inputs) { return inputs / PANEL_BLOCK * sizeof(struct tile_block); }

/* What is fetched with every block of a panel times a tile: a share of the panel that follows, cache line by
 * cache line, and of the lines that the product was told of. */
struct panel_ahead {
    const uint8_t *panel;
    size_t panel_lines; /* a block */
    const void *const *other, *const *other_end;
    size_t other_lines; /* a block */
};

/* One panel times one tile: y[row][output], stride y_stride. */
typedef void panel_fn(const uint8_t *w, const struct tile_block *t, size_t inputs, float *y, size_t y_stride,
                      const struct panel_ahead *ahead);

INLINE const uint8_t *panel_fetch(const uint8_t *ahead, size_t lines)
{
    for (; lines > 0; lines--, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    return ahead;
}

INLINE void panel_ahead_fetch(struct panel_ahead *a)
{
    a->panel = panel_fetch(a->panel, a->panel_lines);
    for (size_t n = a->other_lines; n > 0 && a->other < a->other_end; n--)
        __builtin_prefetch(*a->other++, 0, 2);
}

/* Hands out the lines that a product was told of to its calls of a tile function. */
struct handout {
    const void *const *line;
    size_t count, taken;
    uint64_t due, share; /* by now, and for each call: lines by 2^16 */
};

static inline struct handout handout_of(const struct cpu_ahead *ahead, size_t calls)
{
    if (!ahead || calls == 0) return (struct handout){0};
    return (struct handout){
        .line = ahead->line, .count = ahead->count, .share = ((uint64_t)ahead->count << 16) / calls + 1};
}

/* How many are due with the next call, beside those that were taken. */
static inline size_t handout_due(struct handout *h)
{
    h->due += h->share;
    size_t due = (size_t)(h->due >> 16);
    if (due > h->count) due = h->count;
    return due > h->taken ? due - h->taken : 0;
}

/* The product by fns[rows of a tile]; the rest is as for `multiply` of struct cpu_product. */
void panel_multiply(panel_fn *const fns[TILE_ROWS + 1], const void *w, enum dtype type, const void *act,
                    size_t inputs, size_t outputs, int rows, size_t begin, size_t end, float *y,
                    size_t y_stride, const struct cpu_ahead *ahead);

/* The parts of struct cpu_product that AVX2 and AVX-512 share. */
size_t panel_weight_bytes(enum dtype type, size_t outputs, size_t inputs);
void panel_weight_pack(void *dst, const struct matrix *m, size_t begin, size_t end);
size_t panel_act_bytes(int rows, size_t inputs);
void panel_act_pack(void *dst, const float *x, size_t x_stride, size_t inputs, int rows, int begin, int end);

#endif

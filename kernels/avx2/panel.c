#include "kernels/avx2/panel.h"

#include "base/memory.h"
#include "kernels/avx2/tile.h"

#include <immintrin.h>
#include <string.h>

static struct panel_format format_of(enum dtype type)
{
    switch (type) {
#define X(name, ...) \
    case DTYPE_##name: return PANEL_##name;
        PANEL_FORMATS(X)
#undef X
    default: return (struct panel_format){0};
    }
}

/* One block of one output, as the file has it. Four quants, a group, are a word: all of a word's bytes are
 * handled at once. */
struct quant_block {
    uint32_t q[PANEL_BLOCK / 4]; /* a byte a quant, unsigned; two's complement if of 8 bits */
    uint16_t d, min;             /* f16: scale and minimum, or the super-block's, the latter negated */
    uint8_t scale[2];            /* of a super-block format: scale and min, or one scale for each half */
};

#define NIBBLES  0x0F0F0F0Fu /* the low ones of a word's bytes */
#define ONE_BITS 0x01010101u
#define TWO_BITS 0x03030303u

static uint16_t load_u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static uint32_t load_u32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void q4_read(const uint8_t *b, bool min, struct quant_block *u)
{
    const uint8_t *q = b + (min ? 4 : 2);
    u->d = load_u16(b);
    if (min) u->min = load_u16(b + 2);
    for (int g = 0; g < 4; g++) {
        u->q[g] = load_u32(q + 4 * g) & NIBBLES;
        u->q[g + 4] = load_u32(q + 4 * g) >> 4 & NIBBLES;
    }
}

INLINE void q5_read(const uint8_t *b, bool min, struct quant_block *u)
{
    const uint8_t *q = b + (min ? 8 : 6);
    uint32_t high = load_u32(q - 4);
    u->d = load_u16(b);
    if (min) u->min = load_u16(b + 2);
    for (int g = 0; g < 8; g++) {
        /* The product has bit k of the four at bit 8 k. */
        uint32_t fifth = (high >> (4 * g) & 0xF) * 0x00204081u & ONE_BITS;
        u->q[g] = (load_u32(q + g % 4 * 4) >> (g / 4 * 4) & NIBBLES) | fifth << 4;
    }
}

INLINE void q8_0_read(const uint8_t *b, struct quant_block *u)
{
    u->d = load_u16(b);
    memcpy(u->q, b + 2, sizeof u->q);
}

/* Sub-block j of a Q4_K or Q5_K super-block; the formulas are those of base/dtype.c's decoder. */
INLINE void k45_read(const uint8_t *b, int bits, int j, struct quant_block *u)
{
    const uint8_t *s = b + 4, *high = b + 16, *q = b + (bits == 5 ? 48 : 16) + j / 2 * 32;
    u->d = load_u16(b);
    u->min = load_u16(b + 2) ^ 0x8000;
    u->scale[0] = j < 4 ? s[j] & 63 : (uint8_t)((s[j + 4] & 0xF) | s[j - 4] >> 6 << 4);
    u->scale[1] = j < 4 ? s[j + 4] & 63 : (uint8_t)(s[j + 4] >> 4 | s[j] >> 6 << 4);
    for (int g = 0; g < 8; g++) {
        u->q[g] = load_u32(q + 4 * g) >> (j % 2 * 4) & NIBBLES;
        if (bits == 5) u->q[g] |= (load_u32(high + 4 * g) >> j & ONE_BITS) << 4;
    }
}

INLINE void q6_k_read(const uint8_t *b, int j, struct quant_block *u)
{
    int half = j / 4, run = j % 4;
    const uint8_t *low = b + half * 64 + run % 2 * 32, *high = b + 128 + half * 32;
    u->d = load_u16(b + 208);
    memcpy(u->scale, b + 192 + 2 * j, 2);
    for (int g = 0; g < 8; g++)
        u->q[g] = (load_u32(low + 4 * g) >> (run / 2 * 4) & NIBBLES) |
                  (load_u32(high + 4 * g) >> (run * 2) & TWO_BITS) << 4;
}

/* Block `block` (of 32) of a row, whose type has blocks of `stride` bytes. */
INLINE void quant_block_read(enum dtype type, size_t stride, const uint8_t *row, size_t block,
                             struct quant_block *u)
{
    const uint8_t *super = row + block / PANEL_SUPER * stride;
    int j = (int)(block % PANEL_SUPER);
    switch (type) {
    case DTYPE_Q4_0: q4_read(row + block * stride, false, u); break;
    case DTYPE_Q4_1: q4_read(row + block * stride, true, u); break;
    case DTYPE_Q5_0: q5_read(row + block * stride, false, u); break;
    case DTYPE_Q5_1: q5_read(row + block * stride, true, u); break;
    case DTYPE_Q8_0: q8_0_read(row + block * stride, u); break;
    case DTYPE_Q4_K: k45_read(super, 4, j, u); break;
    case DTYPE_Q5_K: k45_read(super, 5, j, u); break;
    default: q6_k_read(super, j, u); break;
    }
}

/* Puts the quants of output r where the layout has them. */
INLINE void quants_place(struct panel_format f, const uint32_t *q, int r, uint8_t *dst)
{
    uint32_t top[2] = {0};
    for (int g = 0; g < 8; g++) {
        if (f.bits == 5) top[0] |= (q[g] >> 4 & ONE_BITS) << g;
        if (f.bits == 6) top[g / 4] |= (q[g] >> 4 & TWO_BITS) << (g % 4 * 2);
    }
    for (int l = 0; l < (f.bits == 8 ? 8 : 4); l++) {
        uint32_t line = f.bits == 8 ? q[l] : (q[l] & NIBBLES) | (q[l + 4] & NIBBLES) << 4;
        memcpy(dst + l * 64 + r * 4, &line, 4);
    }
    for (int l = 0; f.bits != 8 && l < f.bits - 4; l++) memcpy(dst + 256 + l * 64 + r * 4, &top[l], 4);
}

INLINE void block_place(struct panel_format f, const struct quant_block *u, int r, uint8_t *head,
                        uint8_t *dst)
{
    uint8_t *f16 = f.super ? head : dst;
    memcpy(f16 + 2 * r, &u->d, 2);
    if (f.min) memcpy(f16 + 32 + 2 * r, &u->min, 2);
    if (f.super) {
        dst[r] = u->scale[0];
        dst[16 + r] = u->scale[1];
    }
    quants_place(f, u->q, r, dst + panel_scale_bytes(f));
}

size_t panel_weight_bytes(enum dtype type, size_t outputs, size_t inputs)
{
    if (inputs % dtype_block_elems(type)) return SIZE_MAX;
    size_t panels = size_round_up(outputs, PANEL_OUTPUTS) / PANEL_OUTPUTS;
    return size_mul(panels, panel_bytes(format_of(type), inputs));
}

/* type and f are constants, so that this is made anew for each of them. */
INLINE void panel_pack(enum dtype type, struct panel_format f, const struct matrix *m, size_t first,
                       uint8_t *dst)
{
    size_t stride = dtype_block_bytes(type), row_bytes = dtype_row_bytes(type, m->cols);
    int rows = m->rows - first < PANEL_OUTPUTS ? (int)(m->rows - first) : PANEL_OUTPUTS;
    if (rows < PANEL_OUTPUTS) memset(dst, 0, panel_bytes(f, m->cols));
    uint8_t *head = dst;
    for (size_t b = 0; b < m->cols / PANEL_BLOCK; b++) {
        if (b % panel_super_blocks(f) == 0) {
            head = dst;
            dst += panel_head_bytes(f);
        }
        const uint8_t *row = (const uint8_t *)m->data + first * row_bytes;
        for (int r = 0; r < rows; r++, row += row_bytes) {
            struct quant_block u;
            quant_block_read(type, stride, row, b, &u);
            block_place(f, &u, r, head, dst);
        }
        dst += panel_block_bytes(f);
    }
}

#define X(type, ...)                                                            \
    static void pack_##type(const struct matrix *m, size_t first, uint8_t *dst) \
    {                                                                           \
        panel_pack(DTYPE_##type, PANEL_##type, m, first, dst);                  \
    }
PANEL_FORMATS(X)
#undef X

void panel_weight_pack(void *dst, const struct matrix *m, size_t begin, size_t end)
{
    static void (*const pack[DTYPE_COUNT])(const struct matrix *, size_t, uint8_t *) = {
#define X(type, ...) [DTYPE_##type] = pack_##type,
        PANEL_FORMATS(X)
#undef X
    };
    size_t bytes = panel_bytes(format_of(m->type), m->cols);
    for (size_t first = begin; first < end; first += PANEL_OUTPUTS)
        pack[m->type](m, first, (uint8_t *)dst + first / PANEL_OUTPUTS * bytes);
}

size_t panel_act_bytes(int rows, size_t inputs)
{
    size_t bytes = (size_t)(rows + TILE_ROWS - 1) / TILE_ROWS * tile_bytes(inputs);
    return size_round_up(bytes, MEMORY_ALIGN);
}

static __m256i sum_lanes(__m256i v) /* in every lane */
{
    v = _mm256_add_epi32(v, _mm256_shuffle_epi32(v, 0x4E));
    v = _mm256_add_epi32(v, _mm256_shuffle_epi32(v, 0xB1));
    return _mm256_add_epi32(v, _mm256_permute2x128_si256(v, v, 1));
}

/* Quantises 32 inputs of row r: fills its scale and sums, and returns its eight lanes of quants. */
static __m256i block_quantise(const float *x, int r, struct tile_block *t)
{
    float largest = tile_max_abs(x);
    bool tiny = largest < TILE_TINY;
    __m256 inverse = _mm256_set1_ps(tiny ? 0 : 127.0f / largest);
    __m256i v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse));
    int halves[2];
    for (int h = 0; h < 2; h++)
        halves[h] = _mm256_cvtsi256_si32(sum_lanes(_mm256_add_epi32(v[2 * h], v[2 * h + 1])));

    float scale = tiny ? 0 : largest / 127.0f;
    t->scale[r] = scale;
    t->total[r] = halves[0] + halves[1];
    t->sum[r] = scale * (float)t->total[r];
    t->half_sum[0][r] = scale * (float)halves[0];
    t->half_sum[1][r] = scale * (float)halves[1];

    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

static void tile_pack(struct tile_block *t, const float *x, size_t x_stride, size_t inputs, int rows)
{
    for (size_t k = 0; k < inputs; k += PANEL_BLOCK, t++) {
        __m256i q[TILE_ROWS];
        if (rows < TILE_ROWS) memset(t, 0, sizeof *t);
        for (int r = 0; r < TILE_ROWS; r++)
            q[r] = r < rows ? block_quantise(x + (size_t)r * x_stride + k, r, t) : _mm256_setzero_si256();
        tile_interleave(q, t->q);
    }
}

void panel_act_pack(void *dst, const float *x, size_t x_stride, size_t inputs, int rows, int begin, int end)
{
    for (int r = begin; r < end; r += TILE_ROWS) {
        struct tile_block *t = (void *)((uint8_t *)dst + (size_t)(r / TILE_ROWS) * tile_bytes(inputs));
        int left = rows - r;
        tile_pack(t, x + (size_t)r * x_stride, x_stride, inputs, left < TILE_ROWS ? left : TILE_ROWS);
    }
}

/* ---- the product's order of work ---- */

static size_t tile_count(int rows) { return (size_t)(rows + TILE_ROWS - 1) / TILE_ROWS; }

/* What is due of the handout, as lines with each of `blocks` blocks. */
static void handout_spread(struct handout *h, size_t blocks, struct panel_ahead *out)
{
    size_t due = handout_due(h), left = h->count - h->taken;
    out->other = h->line + h->taken;
    out->other_end = h->line + h->count;
    out->other_lines = (due + blocks - 1) / blocks;
    h->taken += out->other_lines * blocks < left ? out->other_lines * blocks : left;
}

/* One panel times the tiles of rows [0, rows), which together fetch the panel after it if `more`. A last
 * panel may have fewer outputs than its layout. */
static void panel_times_rows(panel_fn *const fns[], const uint8_t *w, size_t bytes, bool more,
                             const uint8_t *act, size_t inputs, int rows, size_t outputs, float *y,
                             size_t y_stride, struct handout *handout)
{
    size_t blocks = inputs / PANEL_BLOCK, tiles = tile_count(rows);
    size_t lines = more ? (bytes / 64 + tiles * blocks - 1) / (tiles * blocks) : 0;
    struct panel_ahead ahead = {.panel = w + bytes, .panel_lines = lines};
    for (int r = 0; r < rows; r += TILE_ROWS, act += tile_bytes(inputs), ahead.panel += lines * 64 * blocks) {
        int n = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
        float *to = y + (size_t)r * y_stride;
        if (ahead.panel >= w + 2 * bytes) ahead.panel_lines = 0;
        handout_spread(handout, blocks, &ahead);
        if (outputs >= PANEL_OUTPUTS) {
            fns[n](w, (const void *)act, inputs, to, y_stride, &ahead);
        } else {
            float whole[TILE_ROWS][PANEL_OUTPUTS];
            fns[n](w, (const void *)act, inputs, whole[0], PANEL_OUTPUTS, &ahead);
            for (int i = 0; i < n; i++)
                for (size_t o = 0; o < outputs; o++) to[(size_t)i * y_stride + o] = whole[i][o];
        }
    }
}

/* Rows whose tiles stay in L2 while panels pass. */
static int rows_at_once(size_t inputs)
{
    size_t tiles = (256u << 10) / tile_bytes(inputs);
    return (int)(tiles ? tiles : 1) * TILE_ROWS;
}

void panel_multiply(panel_fn *const fns[TILE_ROWS + 1], const void *w, enum dtype type, const void *act,
                    size_t inputs, size_t outputs, int rows, size_t begin, size_t end, float *y,
                    size_t y_stride, const struct cpu_ahead *ahead)
{
    struct panel_format f = format_of(type);
    size_t bytes = panel_bytes(f, inputs);
    int group = rows_at_once(inputs);
    struct handout handout =
        handout_of(ahead, ((end - begin + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS) * tile_count(rows));
    for (int r = 0; r < rows; r += group) {
        int n = rows - r < group ? rows - r : group;
        for (size_t o = begin; o < end; o += PANEL_OUTPUTS) {
            const uint8_t *panel = (const uint8_t *)w + o / PANEL_OUTPUTS * bytes;
            panel_times_rows(fns, panel, bytes, o + PANEL_OUTPUTS < outputs,
                             (const uint8_t *)act + (size_t)(r / TILE_ROWS) * tile_bytes(inputs), inputs, n,
                             end - o, y + (size_t)r * y_stride + (o - begin), y_stride, &handout);
        }
    }
}

#include "base/dtype.h"

#include "base/memory.h"
#include "base/status.h"

#include <endian.h>
#include <string.h>

struct dtype_row {
    const char *name;
    size_t block_elems, block_bytes;
};

/* Numbers that are no type have block_elems 0. */
static const struct dtype_row rows[DTYPE_COUNT] = {
#define X(name, number, elems, bytes) [number] = {#name, elems, bytes},
    DTYPE_TABLE(X)
#undef X
};

bool dtype_known(uint32_t number) { return number < DTYPE_COUNT && rows[number].block_elems; }

static const struct dtype_row *row_of(enum dtype t)
{
    CHECK(dtype_known((uint32_t)t));
    return &rows[t];
}

const char *dtype_name(enum dtype t) { return row_of(t)->name; }
size_t dtype_block_elems(enum dtype t) { return row_of(t)->block_elems; }
size_t dtype_block_bytes(enum dtype t) { return row_of(t)->block_bytes; }

size_t dtype_row_bytes(enum dtype t, size_t n)
{
    const struct dtype_row *row = row_of(t);
    return n % row->block_elems ? SIZE_MAX : size_mul(n / row->block_elems, row->block_bytes);
}

static float f32_of_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static uint32_t bits_of_f32(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 0x1F, fraction = h & 0x3FF;
    if (exponent == 0) { /* zero or subnormal: fraction * 2^-24, exact in fp32 */
        float magnitude = (float)fraction * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    exponent = exponent == 0x1F ? 0xFF : exponent + (127 - 15);
    return f32_of_bits(sign | exponent << 23 | fraction << 13);
}

uint16_t f32_to_f16(float f)
{
    uint32_t u = bits_of_f32(f);
    uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7FFFFFFF, half;
    if (magnitude > 0x7F800000) { /* NaN stays one, quiet */
        half = 0x7E00 | (magnitude >> 13 & 0x3FF);
    } else if (magnitude >= bits_of_f32(65520.0f)) { /* half-way from the largest half to 2^16 */
        half = 0x7C00;
    } else if (magnitude < bits_of_f32(0x1p-14f)) {
        /* Subnormal: around 0.5 fp32 has the spacing 2^-24 of these halves, so the sum rounds. */
        half = bits_of_f32(f32_of_bits(magnitude) + 0.5f) - bits_of_f32(0.5f);
    } else {
        uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
        half = (rounded - ((127 - 15) << 23)) >> 13;
    }
    return (uint16_t)(sign | half);
}

uint16_t f32_to_bf16(float f)
{
    uint32_t u = bits_of_f32(f);
    if ((u & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(u >> 16 | 0x40); /* NaN stays one, quiet */
    return (uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

static uint16_t load_u16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return le16toh(v);
}

static uint32_t load_u32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return le32toh(v);
}

static float load_f16(const uint8_t *p) { return f16_to_f32(load_u16(p)); }

/* Each function below decodes one block. Layouts and formulas are those of the GGML formats:
 * a low nibble belongs to the first half of its run, a high nibble to the second. */

static void decode_f32(const uint8_t *b, float *y) { *y = f32_of_bits(load_u32(b)); }
static void decode_f16(const uint8_t *b, float *y) { *y = load_f16(b); }
static void decode_bf16(const uint8_t *b, float *y) { *y = bf16_to_f32(load_u16(b)); }

/* f16 d; 16 bytes of nibbles: y = (q - 8) d */
static void decode_q4_0(const uint8_t *b, float *y)
{
    float d = load_f16(b);
    const uint8_t *q = b + 2;
    for (int i = 0; i < 16; i++) {
        y[i] = (float)((q[i] & 0xF) - 8) * d;
        y[i + 16] = (float)((q[i] >> 4) - 8) * d;
    }
}

/* f16 d, m; 16 bytes of nibbles: y = q d + m */
static void decode_q4_1(const uint8_t *b, float *y)
{
    float d = load_f16(b), m = load_f16(b + 2);
    const uint8_t *q = b + 4;
    for (int i = 0; i < 16; i++) {
        y[i] = (float)(q[i] & 0xF) * d + m;
        y[i + 16] = (float)(q[i] >> 4) * d + m;
    }
}

/* Five-bit values: nibbles in q, the fifth bit of element i is bit i of high. */
static int five_bits_low(const uint8_t *q, uint32_t high, int i)
{
    return (q[i] & 0xF) | (int)(high >> i & 1) << 4;
}

static int five_bits_high(const uint8_t *q, uint32_t high, int i)
{
    return q[i] >> 4 | (int)(high >> (i + 16) & 1) << 4;
}

/* f16 d; u32 fifth bits; 16 bytes of nibbles: y = (q - 16) d */
static void decode_q5_0(const uint8_t *b, float *y)
{
    float d = load_f16(b);
    uint32_t high = load_u32(b + 2);
    const uint8_t *q = b + 6;
    for (int i = 0; i < 16; i++) {
        y[i] = (float)(five_bits_low(q, high, i) - 16) * d;
        y[i + 16] = (float)(five_bits_high(q, high, i) - 16) * d;
    }
}

/* f16 d, m; u32 fifth bits; 16 bytes of nibbles: y = q d + m */
static void decode_q5_1(const uint8_t *b, float *y)
{
    float d = load_f16(b), m = load_f16(b + 2);
    uint32_t high = load_u32(b + 4);
    const uint8_t *q = b + 8;
    for (int i = 0; i < 16; i++) {
        y[i] = (float)five_bits_low(q, high, i) * d + m;
        y[i + 16] = (float)five_bits_high(q, high, i) * d + m;
    }
}

/* f16 d; 32 int8: y = q d */
static void decode_q8_0(const uint8_t *b, float *y)
{
    float d = load_f16(b);
    for (int i = 0; i < 32; i++) y[i] = (float)(int8_t)b[2 + i] * d;
}

/* Scale and minimum of sub-block j (0..7) of Q4_K and Q5_K: six bits each, packed in 12 bytes. The first
 * four of each have a byte of their own, whose top two bits complete the nibbles of the last four. */
static void k_scale_min(const uint8_t *s, int j, int *scale, int *min)
{
    if (j < 4) {
        *scale = s[j] & 63;
        *min = s[j + 4] & 63;
    } else {
        *scale = (s[j + 4] & 0xF) | s[j - 4] >> 6 << 4;
        *min = s[j + 4] >> 4 | s[j] >> 6 << 4;
    }
}

/* f16 d, dmin; 12 bytes of scales; [Q5_K: 32 bytes of fifth bits;] 128 bytes of nibbles:
 * y = (d scale) q - dmin min, over 8 sub-blocks of 32. Sub-blocks 2i and 2i + 1 share 32 bytes
 * of nibbles, and bit j of byte l is the fifth bit of element l of sub-block j. */
static void decode_k45(const uint8_t *b, const uint8_t *high, const uint8_t *q, float *y)
{
    float d = load_f16(b), dmin = load_f16(b + 2);
    for (int j = 0; j < 8; j++) {
        int scale, min;
        k_scale_min(b + 4, j, &scale, &min);
        float ds = d * (float)scale, m = dmin * (float)min;
        for (int l = 0; l < 32; l++) {
            int v = q[j / 2 * 32 + l] >> (j % 2 * 4) & 0xF;
            if (high) v |= (high[l] >> j & 1) << 4;
            y[j * 32 + l] = ds * (float)v - m;
        }
    }
}

static void decode_q4_k(const uint8_t *b, float *y) { decode_k45(b, NULL, b + 16, y); }
static void decode_q5_k(const uint8_t *b, float *y) { decode_k45(b, b + 16, b + 48, y); }

/* 128 bytes of low nibbles; 64 bytes of high bit pairs; 16 int8 scales; f16 d: y = (d scale) (q - 32).
 * Each half of 128 elements is four runs of 32: runs 0 and 1 take the low nibbles of bytes 0..31 and
 * 32..63, runs 2 and 3 the high ones, and run r the bit pair r of each high byte. */
static void decode_q6_k(const uint8_t *b, float *y)
{
    const int8_t *scales = (const int8_t *)(b + 192);
    float d = load_f16(b + 208);
    for (int i = 0; i < 256; i++) {
        int half = i / 128, run = i % 128 / 32, l = i % 32;
        int low = b[half * 64 + run % 2 * 32 + l] >> (run / 2 * 4) & 0xF;
        int high = b[128 + half * 32 + l] >> (run * 2) & 3;
        y[i] = d * (float)scales[i / 16] * (float)((low | high << 4) - 32);
    }
}

void dtype_decode(enum dtype t, const void *src, float *dst, size_t n)
{
    static void (*const decoders[DTYPE_COUNT])(const uint8_t *, float *) = {
        [DTYPE_F32] = decode_f32,   [DTYPE_F16] = decode_f16,   [DTYPE_BF16] = decode_bf16,
        [DTYPE_Q4_0] = decode_q4_0, [DTYPE_Q4_1] = decode_q4_1, [DTYPE_Q5_0] = decode_q5_0,
        [DTYPE_Q5_1] = decode_q5_1, [DTYPE_Q8_0] = decode_q8_0, [DTYPE_Q4_K] = decode_q4_k,
        [DTYPE_Q5_K] = decode_q5_k, [DTYPE_Q6_K] = decode_q6_k,
    };
    const struct dtype_row *row = row_of(t);
    CHECK(n % row->block_elems == 0);
    const uint8_t *b = src;
    for (size_t i = 0; i < n; i += row->block_elems, b += row->block_bytes) decoders[t](b, dst + i);
}

/* Element types of tensors, with GGUF's numbering and block layouts.
 *
 * Quantised types store `block_elems` consecutive elements of a row in `block_bytes` bytes.
 * A tensor's rows are its outermost dimension; blocks never straddle rows. */
#ifndef BASE_DTYPE_H
#define BASE_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* name, GGUF number, elements in a block, bytes of a block */
#define DTYPE_TABLE(X)                                                                           \
    X(F32, 0, 1, 4)                                                                              \
    X(F16, 1, 1, 2)                                                                              \
    X(Q4_0, 2, 32, 18)                                                                           \
    X(Q4_1, 3, 32, 20)                                                                           \
    X(Q5_0, 6, 32, 22)                                                                           \
    X(Q5_1, 7, 32, 24)                                                                           \
    X(Q8_0, 8, 32, 34)                                                                           \
    X(Q4_K, 12, 256, 144)                                                                        \
    X(Q5_K, 13, 256, 176)                                                                        \
    X(Q6_K, 14, 256, 210)                                                                        \
    X(BF16, 30, 1, 2)

enum dtype {
#define X(name, number, elems, bytes) DTYPE_##name = number,
    DTYPE_TABLE(X)
#undef X
    DTYPE_COUNT = 31 /* one past the largest number, for tables indexed by type */
};

bool dtype_known(uint32_t number);
const char *dtype_name(enum dtype t);       /* "Q4_1" */
size_t dtype_block_elems(enum dtype t);
size_t dtype_block_bytes(enum dtype t);
/* Bytes of a row of n elements; SIZE_MAX if n is not a multiple of the block. */
size_t dtype_row_bytes(enum dtype t, size_t n);

/* Decodes n elements (whole blocks) of src to fp32: the exact values the format defines.
 * This is the one decoder of GGUF blocks in the project. */
void dtype_decode(enum dtype t, const void *src, float *dst, size_t n);

/* Scalar conversions. To half and bfloat16 they round to nearest even. */
float f16_to_f32(uint16_t h);
uint16_t f32_to_f16(float f);
static inline float bf16_to_f32(uint16_t h)
{
    union { uint32_t u; float f; } v = {.u = (uint32_t)h << 16};
    return v.f;
}
uint16_t f32_to_bf16(float f);

#endif

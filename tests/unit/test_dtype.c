#include "base/dtype.h"
#include "base/file.h"
#include "base/gguf.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

static uint32_t bits_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float of_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* Every element of tensor `name` of the fixture, decoded, against `name`.expected: the same bits, as
 * both sides compute in fp32 by the format's own formula. */
static void check_type(const struct gguf *g, enum dtype t)
{
    char name[32];
    const struct gguf_tensor *blocks = gguf_tensor_find(g, dtype_name(t));
    snprintf(name, sizeof name, "%s.expected", dtype_name(t));
    const struct gguf_tensor *expected = gguf_tensor_find(g, name);
    assert_non_null(blocks);
    assert_non_null(expected);
    assert_int_equal(blocks->type, t);
    size_t n = (size_t)expected->dim[0];
    assert_true(n > 16 && dtype_row_bytes(t, n) == blocks->bytes);

    /* at an odd address, as files may have it */
    uint8_t *moved = malloc(blocks->bytes + 1);
    float *decoded = malloc(n * sizeof *decoded);
    assert_true(moved && decoded);
    memcpy(moved + 1, blocks->data, blocks->bytes);
    dtype_decode(t, moved + 1, decoded, n);
    for (size_t i = 0; i < n; i++) {
        uint32_t wanted;
        memcpy(&wanted, (const char *)expected->data + 4 * i, 4);
        if (bits_of(decoded[i]) != wanted)
            fail_msg("%s element %zu: %a, not %a", dtype_name(t), i, (double)decoded[i],
                     (double)of_bits(wanted));
    }
    free(moved);
    free(decoded);
}

static void every_type_decodes_to_the_same_bits_as_numpy(void **state)
{
    (void)state;
    struct test_path path = fixture_path("dtypes/blocks.gguf");
    struct file_map m;
    struct gguf *g;
    struct error err;
    assert_ok(file_map(path.text, &m, &err), err);
    assert_ok(gguf_parse(m.data, m.size, &g, &err), err);
#define X(name, number, elems, bytes) check_type(g, DTYPE_##name);
    DTYPE_TABLE(X)
#undef X
    gguf_free(g);
    file_unmap(&m);
}

static void sizes_come_from_the_table(void **state)
{
    (void)state;
    assert_true(dtype_known(2) && dtype_known(30) && dtype_known(0));
    assert_false(dtype_known(4) || dtype_known(9) || dtype_known(31) || dtype_known(UINT32_MAX));
    assert_string_equal(dtype_name(DTYPE_Q4_1), "Q4_1");
    assert_int_equal(dtype_block_elems(DTYPE_Q6_K), 256);
    assert_int_equal(dtype_block_bytes(DTYPE_Q6_K), 210);
    assert_int_equal(dtype_row_bytes(DTYPE_Q4_1, 576), 576 / 32 * 20);
    assert_true(dtype_row_bytes(DTYPE_Q4_1, 33) == SIZE_MAX);
    assert_true(dtype_row_bytes(DTYPE_F32, SIZE_MAX / 2) == SIZE_MAX);
    assert_int_equal(dtype_row_bytes(DTYPE_Q4_K, 0), 0);
}

/* A half by its definition (IEEE 754 binary16), in double arithmetic. */
static double half_value(uint16_t h)
{
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? ldexp(fraction, -24)
                                       : ldexp(1024 + fraction, exponent - 25);
    return h & 0x8000 ? -magnitude : magnitude;
}

static void all_halves_convert_and_return(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float f = f16_to_f32((uint16_t)h);
        double wanted = half_value((uint16_t)h);
        if (isnan(wanted)) {
            assert_true(isnan(f));
            assert_true(isnan(f16_to_f32(f32_to_f16(f))));
            continue;
        }
        if ((double)f != wanted || !signbit(f) != !signbit(wanted)) fail_msg("half %04x", h);
        if (f32_to_f16(f) != h) fail_msg("half %04x comes back as %04x", h, f32_to_f16(f));
    }
}

/* Around the middle of every two neighbouring halves: below it down, above it up, on it to even. */
static void to_half_rounds_to_nearest_even(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x7C00; h++) {
        float low = f16_to_f32((uint16_t)h);
        float high = h + 1 == 0x7C00 ? 65536.0f : f16_to_f32((uint16_t)(h + 1)); /* beyond it, infinity */
        float middle = (low + high) / 2;                                         /* exact: 12 bits */
        uint32_t even = h & 1 ? h + 1 : h;
        if (f32_to_f16(middle) != even || f32_to_f16(nextafterf(middle, 0)) != h ||
            f32_to_f16(nextafterf(middle, INFINITY)) != h + 1 || f32_to_f16(-middle) != (even | 0x8000))
            fail_msg("above half %04x", h);
    }
    assert_int_equal(f32_to_f16(3e38f), 0x7C00);
    assert_int_equal(f32_to_f16(-INFINITY), 0xFC00);
    assert_int_equal(f32_to_f16(0x1p-25f), 0);
    assert_int_equal(f32_to_f16(0x1p-149f), 0);
}

static void to_bfloat16_rounds_to_nearest_even(void **state)
{
    (void)state;
    for (uint32_t b = 0; b < 0x7F80; b++) {
        uint32_t bits = b << 16;
        uint32_t even = b & 1 ? b + 1 : b;
        if (f32_to_bf16(of_bits(bits)) != b || f32_to_bf16(of_bits(bits | 0x7FFF)) != b ||
            f32_to_bf16(of_bits(bits | 0x8000)) != even || f32_to_bf16(of_bits(bits | 0x8001)) != b + 1 ||
            f32_to_bf16(of_bits(bits | 0x80000000)) != (b | 0x8000))
            fail_msg("around bfloat16 %04x", b);
    }
    assert_int_equal(f32_to_bf16(INFINITY), 0x7F80);
    assert_true(isnan(bf16_to_f32(f32_to_bf16(NAN))));
    assert_true(isnan(bf16_to_f32(f32_to_bf16(of_bits(0x7F800001))))); /* its top bits alone are infinity */
    assert_true(isnan(f16_to_f32(f32_to_f16(of_bits(0x7F800001)))));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_type_decodes_to_the_same_bits_as_numpy),
        cmocka_unit_test(sizes_come_from_the_table),
        cmocka_unit_test(all_halves_convert_and_return),
        cmocka_unit_test(to_half_rounds_to_nearest_even),
        cmocka_unit_test(to_bfloat16_rounds_to_nearest_even),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

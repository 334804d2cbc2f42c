#include "base/reader.h"
#include "tests/support/check.h"

static void reads_little_endian(void **state)
{
    (void)state;
    static const uint8_t bytes[] = {0xFE, 0x34, 0x12, 0x78, 0x56, 0x34, 0x92, 8, 7, 6, 5, 4, 3,   2,
                                    0x81, 0,    0,    0xC0, 0xBF, 0,    0,    0, 0, 0, 0, 4, 0x40};
    struct reader r = reader_of(bytes, sizeof bytes);
    assert_int_equal(reader_u8(&r), 0xFE);
    assert_int_equal(reader_u16(&r), 0x1234);
    assert_true(reader_u32(&r) == 0x92345678);
    assert_true(reader_u64(&r) == 0x8102030405060708);
    assert_true(reader_f32(&r) == -1.5f);
    assert_true(reader_f64(&r) == 2.5);
    assert_int_equal(reader_left(&r), 0);
    assert_false(r.bad);
}

static void a_fault_sticks(void **state)
{
    (void)state;
    static const uint8_t bytes[] = {1, 2, 3, 4, 5};
    struct reader r = reader_of(bytes, sizeof bytes);
    assert_true(reader_u32(&r) == 0x04030201);
    assert_int_equal(reader_left(&r), 1);
    assert_true(reader_u32(&r) == 0); /* one byte is not enough */
    assert_true(r.bad);
    assert_int_equal(reader_left(&r), 0);
    assert_int_equal(reader_u8(&r), 0); /* though a byte would be there */
    assert_null(reader_take(&r, 0));
    assert_true(reader_f32(&r) == 0);
    assert_true(reader_f64(&r) == 0);
}

static void takes_what_is_there_and_no_more(void **state)
{
    (void)state;
    static const uint8_t bytes[] = {1, 2, 3};
    struct reader r = reader_of(bytes, sizeof bytes);
    assert_ptr_equal(reader_take(&r, 0), bytes);
    assert_ptr_equal(reader_take(&r, 2), bytes);
    assert_ptr_equal(reader_take(&r, 1), bytes + 2);
    assert_non_null(reader_take(&r, 0)); /* nothing, at the end */
    assert_false(r.bad);

    const uint64_t too_many[] = {4, (uint64_t)1 << 32, UINT64_MAX, UINT64_MAX - 1};
    for (int i = 0; i < 4; i++) {
        r = reader_of(bytes, sizeof bytes);
        assert_int_equal(reader_u8(&r), 1);
        assert_null(reader_take(&r, too_many[i]));
        assert_true(r.bad);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_little_endian),
        cmocka_unit_test(a_fault_sticks),
        cmocka_unit_test(takes_what_is_there_and_no_more),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

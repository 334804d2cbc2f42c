#include "base/memory.h"
#include "tests/support/check.h"

#include <stdbool.h>

static void sizes_stick_at_the_maximum(void **state)
{
    (void)state;
    assert_true(size_mul(3, 4) == 12);
    assert_true(size_mul(0, SIZE_MAX) == SIZE_MAX); /* sticky, even times zero */
    assert_true(size_mul(SIZE_MAX / 2 + 1, 2) == SIZE_MAX);
    assert_true(size_mul((size_t)1 << 32, (size_t)1 << 32) == SIZE_MAX);
    assert_true(size_add(3, 4) == 7);
    assert_true(size_add(SIZE_MAX - 1, 2) == SIZE_MAX);
    assert_true(size_add(SIZE_MAX, 0) == SIZE_MAX);
    assert_true(size_round_up(0, 64) == 0);
    assert_true(size_round_up(1, 64) == 64);
    assert_true(size_round_up(64, 64) == 64);
    assert_true(size_round_up(SIZE_MAX - 10, 64) == SIZE_MAX);
    assert_true(size_round_up(10, 3) == 12);
}

static void blocks_are_aligned(void **state)
{
    (void)state;
    const size_t sizes[] = {0, 1, 63, 65, 4096, 5 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char *p = memory_alloc(sizes[i]);
        assert_non_null(p);
        assert_true((uintptr_t)p % MEMORY_ALIGN == 0);
        memset(p, 1, sizes[i]);
        memory_free(p);
    }
    memory_free(NULL);
}

static bool all_zero(const unsigned char *p, size_t n)
{
    while (n && !p[n - 1]) n--;
    return n == 0;
}

static void zeroed_blocks_are_zero_after_reuse(void **state)
{
    (void)state;
    /* both sides of the size from which the kernel does the zeroing, at odd ends */
    const size_t sizes[] = {1, 100, ((size_t)2 << 20) - 1, (size_t)2 << 20, ((size_t)3 << 20) + 4097};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (int round = 0; round < 3; round++) {
            unsigned char *p = memory_zalloc(sizes[i], 1);
            assert_non_null(p);
            assert_true(all_zero(p, sizes[i]));
            memset(p, 0xAA, sizes[i]); /* what a careless reuse would show */
            memory_free(p);
        }
    }
}

static void impossible_sizes_fail(void **state)
{
    (void)state;
    assert_null(memory_alloc(SIZE_MAX));
    assert_null(memory_zalloc(SIZE_MAX / 2, 3));
    assert_null(memory_zalloc(SIZE_MAX, 0));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_stick_at_the_maximum),
        cmocka_unit_test(blocks_are_aligned),
        cmocka_unit_test(zeroed_blocks_are_zero_after_reuse),
        cmocka_unit_test(impossible_sizes_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#include "engine/kv.h"

#include "kernels/device.h"
#include "tests/support/check.h"
#include "tests/support/random.h"

#include <stdbool.h>
#include <stdlib.h>

static void test_pages_needed(void **state)
{
    (void)state;
    assert_int_equal(kv_pages_needed(0), 0);
    assert_int_equal(kv_pages_needed(1), 1);
    assert_int_equal(kv_pages_needed(KV_PAGE_TOKENS), 1);
    assert_int_equal(kv_pages_needed(KV_PAGE_TOKENS + 1), 2);
    assert_int_equal(kv_pages_needed(INT32_MAX), INT32_MAX / KV_PAGE_TOKENS + 1);
}

static void test_full_leaves_all_as_it_was(void **state)
{
    (void)state;
    struct kv_pages *kv = kv_pages_new(4);
    struct kv_table a = {0}, b = {0};
    assert_int_equal(kv_reserve(kv, 3 * KV_PAGE_TOKENS, &a), ST_OK);
    assert_int_equal(kv_reserve(kv, KV_PAGE_TOKENS + 1, &b), ST_FULL);
    assert_int_equal(b.count, 0);
    assert_null(b.page);
    assert_int_equal(kv_pages_unused(kv), 1);
    assert_int_equal(kv_reserve(kv, KV_PAGE_TOKENS, &b), ST_OK);
    assert_int_equal(kv_pages_unused(kv), 0);
    kv_release(kv, &a);
    kv_release(kv, &b);
    kv_release(kv, &b); /* an empty one */
    assert_int_equal(kv_pages_unused(kv), 4);
    kv_pages_free(kv);
}

#define PAGES 37
#define TABLES 12

/* Every page is in exactly one table or free, whatever the order of reserving and releasing. */
static void owners_check(const struct kv_pages *kv, const struct kv_table *table)
{
    bool taken[PAGES] = {false};
    int count = 0;
    for (int t = 0; t < TABLES; t++) {
        for (int i = 0; i < table[t].count; i++, count++) {
            int32_t page = table[t].page[i];
            assert_in_range(page, 0, PAGES - 1);
            assert_false(taken[page]);
            taken[page] = true;
        }
    }
    assert_int_equal(kv_pages_unused(kv), PAGES - count);
}

static void test_every_page_has_one_owner(void **state)
{
    (void)state;
    struct test_random r = {7};
    struct kv_pages *kv = kv_pages_new(PAGES);
    struct kv_table table[TABLES] = {{0}};
    for (int round = 0; round < 2000; round++) {
        struct kv_table *t = &table[random_below(&r, TABLES)];
        int tokens = (int)random_below(&r, 10 * KV_PAGE_TOKENS);
        bool fits = kv_pages_needed(tokens) <= kv_pages_unused(kv);
        if (t->count > 0) kv_release(kv, t);
        else assert_int_equal(kv_reserve(kv, tokens, t), fits ? ST_OK : ST_FULL);
        owners_check(kv, table);
    }
    for (int t = 0; t < TABLES; t++) kv_release(kv, &table[t]);
    assert_int_equal(kv_pages_unused(kv), kv_pages_count(kv));
    kv_pages_free(kv);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pages_needed),
        cmocka_unit_test(test_full_leaves_all_as_it_was),
        cmocka_unit_test(test_every_page_has_one_owner),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

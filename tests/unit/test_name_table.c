#include "base/name_table.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"

#include <stdio.h>

#define NAMES 5000

static void finds_all_and_only_what_was_added(void **state)
{
    (void)state;
    static char names[NAMES][16];
    struct name_table t;
    assert_int_equal(name_table_init(&t, NAMES), ST_OK);
    for (int i = 0; i < NAMES; i++) {
        snprintf(names[i], sizeof names[i], "name.%d", i);
        assert_true(name_table_add(&t, names[i], strlen(names[i]), (size_t)i));
    }
    for (int i = 0; i < NAMES; i++) {
        char copy[16];
        int n = snprintf(copy, sizeof copy, "name.%d", i);
        assert_int_equal(name_table_find(&t, copy, (size_t)n), i);
        copy[0] = 'N';
        assert_true(name_table_find(&t, copy, (size_t)n) == NAME_NONE);
    }
    assert_true(name_table_find(&t, "name.1", 5) == NAME_NONE); /* a prefix is another name */
    name_table_release(&t);
    assert_true(name_table_find(&t, "name.1", 6) == NAME_NONE); /* of an empty table */
}

/* Longest first, so that each name is a prefix of all that are there before it: where two meet in
 * one slot, only their lengths tell them apart. */
static void prefixes_are_other_names(void **state)
{
    (void)state;
    static char name[NAMES];
    struct name_table t;
    memset(name, 'a', sizeof name);
    assert_int_equal(name_table_init(&t, NAMES), ST_OK);
    for (size_t n = NAMES; n > 0; n--) assert_true(name_table_add(&t, name, n, n));
    for (size_t n = 1; n <= NAMES; n++) assert_int_equal(name_table_find(&t, name, n), n);
    name_table_release(&t);
}

static void tells_duplicates(void **state)
{
    (void)state;
    struct name_table t;
    assert_int_equal(name_table_init(&t, 3), ST_OK);
    assert_true(name_table_add(&t, "a", 1, 7));
    assert_true(name_table_add(&t, "", 0, 8));
    assert_false(name_table_add(&t, "a", 1, 9));
    assert_int_equal(name_table_find(&t, "a", 1), 7);
    assert_int_equal(name_table_find(&t, "", 0), 8);
    name_table_release(&t);
}

static void impossible_capacities_fail(void **state)
{
    (void)state;
    struct name_table t;
    assert_int_equal(name_table_init(&t, SIZE_MAX / 2), ST_NOMEM);
    assert_int_equal(name_table_init(&t, 0), ST_OK);
    assert_true(name_table_find(&t, "a", 1) == NAME_NONE);
    name_table_release(&t);
    if (!alloc_fail_available()) return;
    alloc_fail_after(0);
    enum status st = name_table_init(&t, 10);
    assert_true(alloc_fail_stop());
    assert_int_equal(st, ST_NOMEM);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(finds_all_and_only_what_was_added),
        cmocka_unit_test(prefixes_are_other_names),
        cmocka_unit_test(tells_duplicates),
        cmocka_unit_test(impossible_capacities_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

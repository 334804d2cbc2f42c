#include "server/set_key.h"

#include "tests/support/check.h"

#include <stdlib.h>

static const unsigned char secret[SET_SECRET_BYTES] = {1, 2, 3};

#define SETS 9

/* Every change of a version, a weight, their order or number is another set. */
static void test_unequal_sets(void **state)
{
    (void)state;
    static const struct set_member a = {{{1, 0}}, 1}, heavier = {{{1, 0}}, 1.0000001f}, other = {{{0, 1}}, 1},
                                   far = {{{1, 1ull << 63}}, 1};
    const struct {
        size_t count;
        struct set_member member[2];
    } set[SETS] = {
        {0},         {1, {a}},        {1, {heavier}},  {1, {other}},      {1, {far}},
        {2, {a, a}}, {2, {a, other}}, {2, {other, a}}, {2, {a, heavier}},
    };
    struct key128 key[SETS];
    for (int i = 0; i < SETS; i++) {
        key[i] = set_key(secret, set[i].member, set[i].count);
        assert_true(key128_equal(key[i], set_key(secret, set[i].member, set[i].count)));
        for (int j = 0; j < i; j++) assert_false(key128_equal(key[i], key[j]));
    }
    assert_true(key128_equal(key[0], (struct key128){{0}})); /* the bare base */
}

static void test_salts(void **state)
{
    (void)state;
    static const char *const salt[][2] = {{"a", NULL}, {"b", NULL}, {"a", ""},
                                          {"a", "s"},  {"a", "t"},  {"as", NULL}};
    struct key128 key[6];
    for (int i = 0; i < 6; i++) {
        key[i] = salt_key(secret, salt[i][0], salt[i][1]);
        for (int j = 0; j < i; j++) assert_false(key128_equal(key[i], key[j]));
    }
    assert_true(key128_equal(key[3], salt_key(secret, "a", "s")));
}

static void test_the_secret_counts(void **state)
{
    (void)state;
    static const unsigned char another[SET_SECRET_BYTES] = {1, 2, 4};
    static const struct set_member a = {{{1, 0}}, 1};
    assert_false(key128_equal(set_key(secret, &a, 1), set_key(another, &a, 1)));
    assert_false(key128_equal(salt_key(secret, "a", "s"), salt_key(another, "a", "s")));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unequal_sets),
        cmocka_unit_test(test_salts),
        cmocka_unit_test(test_the_secret_counts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

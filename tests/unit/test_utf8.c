#include "base/utf8.h"
#include "tests/support/check.h"

/* What the standard calls well-formed, said in another way: a character is well-formed exactly if
 * it is what encoding some scalar value gives. */
static void every_scalar_value_goes_there_and_back(void **state)
{
    (void)state;
    for (uint32_t cp = 0; cp <= 0x10FFFF; cp++) {
        if (cp >= 0xD800 && cp < 0xE000) continue;
        char s[4];
        size_t n = utf8_encode(cp, s);
        uint32_t back;
        if (n != (cp < 0x80      ? 1u
                  : cp < 0x800   ? 2u
                  : cp < 0x10000 ? 3u
                                 : 4u) ||
            utf8_decode(s, n, &back) != n || back != cp || !utf8_valid(s, n))
            fail_msg("U+%04X", cp);
        for (size_t cut = 1; cut < n; cut++)
            if (utf8_valid(s, cut) || utf8_complete_prefix(s, cut) != 0)
                fail_msg("U+%04X cut at %zu", cp, cut);
    }
}

static void all_three_byte_strings_agree_with_encoding(void **state)
{
    (void)state;
    for (uint32_t bytes = 0xE00000; bytes <= 0xEFFFFF; bytes++) { /* with the leads of three */
        const char s[3] = {(char)(bytes >> 16), (char)(bytes >> 8), (char)bytes};
        uint32_t cp = (bytes >> 4 & 0xF000) | (bytes >> 2 & 0xFC0) | (bytes & 0x3F);
        char again[4];
        bool valid = cp >= 0x800 && (cp < 0xD800 || cp >= 0xE000) && utf8_encode(cp, again) == 3 &&
                     !memcmp(again, s, 3);
        if (utf8_valid(s, 3) != valid) fail_msg("%06X", bytes);
    }
}

static void refuses_what_is_ill_formed(void **state)
{
    (void)state;
    static const char *const bad[] = {
        "\x80",
        "\xBF",
        "\xC0\x80",
        "\xC1\xBF",
        "\xC2",
        "\xC2\x41",
        "\xE0\x9F\xBF",
        "\xED\xA0\x80",
        "\xED\xBF\xBF",
        "\xF0\x8F\xBF\xBF",
        "\xF4\x90\x80\x80",
        "\xF5\x80\x80\x80",
        "\xFF",
        "\xE2\x82",
        "ok\xF0\x9F\x98",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (utf8_valid(bad[i], strlen(bad[i]))) fail_msg("case %zu", i);
    assert_true(utf8_valid("", 0));
    assert_true(utf8_valid("a\0b", 3));
    uint32_t cp;
    assert_int_equal(utf8_decode("\xED\xA0\x80", 3, &cp), 1);
    assert_true(cp == UINT32_MAX);
}

static void holds_back_only_what_can_become_a_character(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        size_t complete;
    } cases[] = {
        {"", 0},
        {"abc", 3},
        {"ab\xC3", 2},
        {"ab\xC3\xA9", 4},
        {"a\xE2\x82", 1},
        {"a\xE2", 1},
        {"a\xE2\x82\xAC", 4},
        {"\xF0\x9F\x98", 0},
        {"x\xF0\x9F", 1},
        {"x\xF0", 1},
        {"\xF0\x9F\x98\x80", 4},
        {"a\x80", 2}, /* nobody's continuation */
        {"a\xFF", 2},
        {"a\xC0", 2},
        {"\xE0\x80", 2},
        {"\xED\xA0", 2}, /* can never become valid */
        {"\xF4\x90", 2},
        {"\x80\x80\x80\x80", 4},
        {"\xC3\xA9\xC3", 2},
        {"\xE2\xE2", 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(utf8_complete_prefix(cases[i].text, strlen(cases[i].text)), cases[i].complete);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_scalar_value_goes_there_and_back),
        cmocka_unit_test(all_three_byte_strings_agree_with_encoding),
        cmocka_unit_test(refuses_what_is_ill_formed),
        cmocka_unit_test(holds_back_only_what_can_become_a_character),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

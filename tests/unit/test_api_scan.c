/* What is taken from a body's text before it is parsed, and what is left to the parser. */
#include "tests/support/check.h"

#include "api/scan.h"
#include "base/strbuf.h"

#include <stdio.h>
#include <string.h>

static enum status take_tokens(const char *json, char text[256], struct token_rows *rows)
{
    snprintf(text, 256, "%s", json);
    return scan_take_tokens(text, strlen(text), "prompt", rows);
}

static void token_ids(void **state)
{
    (void)state;
    char text[256];
    struct token_rows t = {0};
    assert_int_equal(
        take_tokens("{\"a\": [[\"]\"], {}], \"prompt\": [1, 2147483647,\n0], \"b\": 1}", text, &t), ST_OK);
    assert_true(!t.nested && t.rows == 1 && t.end[0] == 3 && t.ids[1] == INT32_MAX && t.ids[2] == 0);
    assert_string_equal(text, "{\"a\": [[\"]\"], {}], \"prompt\": 0                 , \"b\": 1}");
    token_rows_release(&t);

    assert_int_equal(take_tokens("{\"prompt\": [[7, 8], [], [9]]}", text, &t), ST_OK);
    assert_true(t.nested && t.rows == 3 && t.end[0] == 2 && t.end[1] == 2 && t.end[2] == 3 && t.ids[2] == 9);
    token_rows_release(&t);

    /* A key is what it means, however it is written. */
    assert_int_equal(take_tokens("{\"pr\\u006fmpt\": [5]}", text, &t), ST_OK);
    assert_true(t.rows == 1 && t.ids[0] == 5);
    token_rows_release(&t);
}

static void left_alone(void **state)
{
    (void)state;
    static const char *const bodies[] = {
        "",
        "[1]",
        "{",
        "{\"prompt\"",
        "{\"prompt\": ",
        "{\"prompt\": []}",
        "{\"prompt\": [1}",
        "{\"prompt\": [1",
        "{\"prompt\": [1,]}",
        "{\"prompt\": [,1]}",
        "{\"prompt\": [01]}",
        "{\"prompt\": [-1]}",
        "{\"prompt\": [1.0]}",
        "{\"prompt\": [2147483648]}",
        "{\"prompt\": [1, [2]]}",
        "{\"prompt\": [[1], 2]}",
        "{\"prompt\": [[1] [2]]}",
        "{\"prompt\": \"[1]\"}",
        "{\"a\": {\"prompt\": [1]}}",
        "{\"a\": \"x\ny\", \"prompt\": [1]}",
        "{\"a\" 1, \"prompt\": [1]}",
        "{\"a\": tru, \"prompt\": [1]}",
        "{\"a\": [1}, \"prompt\": [1]}",
    };
    for (size_t i = 0; i < sizeof bodies / sizeof *bodies; i++) {
        char text[256];
        struct token_rows t = {0};
        if (take_tokens(bodies[i], text, &t) != ST_NOT_FOUND) fail_msg("taken from %s", bodies[i]);
        assert_string_equal(text, bodies[i]);
        assert_null(t.ids);
    }
}

static void deep_nesting_is_left_to_the_parser(void **state)
{
    (void)state;
    static char text[200001];
    static const char end[] = ", \"prompt\": [1]}";
    memset(text, '[', sizeof text - 1);
    memcpy(text, "{\"a\": ", 6);
    memcpy(text + sizeof text - sizeof end, end, sizeof end);
    struct token_rows t = {0};
    assert_int_equal(scan_take_tokens(text, strlen(text), "prompt", &t), ST_NOT_FOUND);
}

static void elements_become_lines(void **state)
{
    (void)state;
    char text[] = "{\"examples\": [ {\"text\": \"a\\nb]\"},\n {\"tokens\":\n[1,\r 2]} ], \"x\": []}";
    struct strbuf lines = {0};
    strbuf_puts(&lines, "before\n");
    assert_int_equal(scan_take_lines(text, strlen(text), "examples", &lines), ST_OK);
    assert_string_equal(lines.data, "before\n{\"text\": \"a\\nb]\"}\n{\"tokens\": [1,  2]}\n");
    assert_int_equal(scan_take_lines(text, strlen(text), "x", &lines), ST_OK); /* no element, no line */
    assert_int_equal(scan_take_lines(text, strlen(text), "examples", &lines),
                     ST_NOT_FOUND); /* a number by now */
    assert_string_equal(lines.data, "before\n{\"text\": \"a\\nb]\"}\n{\"tokens\": [1,  2]}\n");
    strbuf_release(&lines);
}

static void integers(void **state)
{
    (void)state;
    static const struct {
        const char *value;
        enum status status;
        uint64_t integer;
    } cases[] = {
        {"0", ST_OK, 0},
        {"18446744073709551615", ST_OK, UINT64_MAX},
        {"-0", ST_OK, 0},
        {"-9223372036854775808", ST_OK, (uint64_t)1 << 63},
        {" -1 ", ST_OK, UINT64_MAX},
        {"18446744073709551616", ST_INVALID, 0},
        {"null", ST_NOT_FOUND, 0},
        {"-9223372036854775809", ST_INVALID, 0},
        {"\"1\"", ST_INVALID, 0},
        {"1.0", ST_INVALID, 0},
        {"1e3", ST_INVALID, 0},
        {"01", ST_INVALID, 0},
        {"- 1", ST_INVALID, 0},
        {"[1]", ST_INVALID, 0},
        {"true", ST_INVALID, 0},
        {"1 2", ST_INVALID, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[64];
        uint64_t v = 0;
        snprintf(text, sizeof text, "{\"a\": 1, \"seed\": %s}", cases[i].value);
        enum status st = scan_integer(text, strlen(text), "seed", &v);
        if (st != cases[i].status || v != cases[i].integer)
            fail_msg("%s: status %d, %llu", text, st, (unsigned long long)v);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(token_ids),
        cmocka_unit_test(left_alone),
        cmocka_unit_test(deep_nesting_is_left_to_the_parser),
        cmocka_unit_test(elements_become_lines),
        cmocka_unit_test(integers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#include "base/json.h"
#include "base/strbuf.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"
#include "tests/support/random.h"

#include <math.h>
#include <stdlib.h>

/* Parses a literal (NULs inside are its own). */
#define PARSE(text, out, err) json_parse(text, sizeof text - 1, out, err)

static void accepts_all_of_json(void **state)
{
    (void)state;
    static const char *const good[] = {
        "0",
        "-0",
        "1.5e-3",
        "1E+2",
        "true",
        "false",
        "null",
        "\"\"",
        "[]",
        "{}",
        " [ 1 , 2 ] ",
        "\t\r\n1\n",
        "{\"a\":{\"a\":1},\"A\":2}",
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\uD83D\\uDE00\"",
        "\"\xC3\xA9\x7F\"",
        "[{\"a\":1},{\"a\":1}]",
        "123456789012345678901234567890",
        "1e-999",
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        cJSON *json;
        struct error err = {0};
        if (json_parse(good[i], strlen(good[i]), &json, &err)) fail_msg("%s: %s", good[i], err.message);
        cJSON_Delete(json);
    }
    cJSON *json;
    struct error err;
    assert_ok(PARSE("[\"\\u00e9\\ud83d\\ude00\\n\", -12.5e1]", &json, &err), err);
    assert_string_equal(cJSON_GetArrayItem(json, 0)->valuestring, "\xC3\xA9\xF0\x9F\x98\x80\n");
    assert_true(cJSON_GetArrayItem(json, 1)->valuedouble == -125);
    cJSON_Delete(json);
}

static void refuses_all_else_and_says_where(void **state)
{
    (void)state;
#define BAD(text, says)             \
    {                               \
        text, sizeof text - 1, says \
    }
    static const struct {
        const char *text;
        size_t size;
        const char *says;
    } bad[] = {
        BAD("", "line 1 column 1: the text ends too early"),
        BAD("   ", "line 1 column 4"),
        BAD("{", "line 1 column 2: a string is expected"),
        BAD("[1,\n 2,\n x]", "line 3 column 2: a value is expected"),
        BAD("[\"\xC3\xA9\xC3\xA9\", x]", "line 1 column 8"), /* columns are characters */
        BAD("[1,]", "a value is expected"),
        BAD("[1 2]", "',' or ']'"),
        BAD("{\"a\":1,}", "a string is expected"),
        BAD("{\"a\" 1}", "':' is expected"),
        BAD("{\"a\":1 \"b\":2}", "',' or '}'"),
        BAD("{a:1}", "a string is expected"),
        BAD("{} {}", "column 4: there is more after the value"),
        BAD("1\0", "more after the value"),
        BAD("\xEF\xBB\xBF{}", "a value is expected"), /* a byte order mark */
        BAD("tru", "a value is expected"),
        BAD("NaN", "a value is expected"),
        BAD("01", "leading zero"),
        BAD("-01", "leading zero"),
        BAD("+1", "a value is expected"),
        BAD("1.", "a digit is expected"),
        BAD(".5", "a value is expected"),
        BAD("-", "a digit is expected"),
        BAD("1e", "a digit is expected"),
        BAD("0x10", "more after the value"),
        BAD("1e999", "too large"),
        BAD("[-1e400]", "column 2: a number is too large"),
        BAD("1234567890123456789012345678901234567890123456789012345678901234", "more than 63 characters"),
        BAD("\"a", "ends inside a string"),
        BAD("\"a\\", "unknown escape"),
        BAD("\"\\x\"", "unknown escape"),
        BAD("\"\\u12g4\"", "four hexadecimal digits"),
        BAD("\"\\u12", "four hexadecimal digits"),
        BAD("\"\\u0000\"", "NUL in a string"),
        BAD("\"\\ud800\"", "half of a surrogate pair"),
        BAD("\"\\ud800\\u0041\"", "half of a surrogate pair"),
        BAD("\"\\udc00\"", "half of a surrogate pair"),
        BAD("\"a\nb\"", "control character"),
        BAD("\"a\0b\"", "control character"),
        BAD("\"\xFF\"", "column 2: invalid UTF-8"),
        BAD("\"\xED\xA0\x80\"", "invalid UTF-8"),
        BAD("\"\xC0\x80\"", "invalid UTF-8"),
        BAD("{\"a\":1,\"b\":2,\"a\":3}", "column 14: this key appears twice"),
        BAD("{\"x\":[{\"k\":1,\"\\u006b\":2}]}", "column 14: this key appears twice"),
        BAD("'a'", "a value is expected"),
        BAD("// c\n1", "a value is expected"),
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char *exact = malloc(bad[i].size ? bad[i].size : 1); /* no NUL behind it */
        memcpy(exact, bad[i].text, bad[i].size);
        cJSON *json = (cJSON *)exact;
        struct error err = {0};
        enum status st = json_parse(exact, bad[i].size, &json, &err);
        if (st != ST_BAD_FORMAT || !strstr(err.message, bad[i].says))
            fail_msg("'%s': %s, not %s", bad[i].text, err.message, bad[i].says);
        assert_ptr_equal(json, exact);
        free(exact);
    }
}

static void nesting_has_a_limit(void **state)
{
    (void)state;
    char text[2 * JSON_DEPTH_MAX + 2];
    cJSON *json;
    struct error err;
    memset(text, '[', JSON_DEPTH_MAX);
    memset(text + JSON_DEPTH_MAX, ']', JSON_DEPTH_MAX);
    assert_ok(json_parse(text, 2 * JSON_DEPTH_MAX, &json, &err), err);
    cJSON_Delete(json);
    memset(text, '[', JSON_DEPTH_MAX + 1);
    assert_refused(json_parse(text, JSON_DEPTH_MAX + 1, &json, &err), ST_BAD_FORMAT, err, "nested too deep");
}

static void gets_members(void **state)
{
    (void)state;
    cJSON *json;
    struct error err;
    assert_ok(
        PARSE(
            "{\"b\":true,\"n\":1.5,\"i\":9007199254740992,\"big\":1e300,\"s\":\"x\",\"null\":null,\"o\":{}}",
            &json, &err),
        err);
    bool b = false;
    double f = 0;
    int64_t i = 0;
    const char *s = NULL;
    assert_int_equal(json_get_bool(json, "b", &b, &err), ST_OK);
    assert_int_equal(json_get_f64(json, "n", 0, 2, &f, &err), ST_OK);
    assert_int_equal(json_get_i64(json, "i", 0, INT64_MAX, &i, &err), ST_OK);
    assert_int_equal(json_get_string(json, "s", &s, &err), ST_OK);
    assert_true(b && f == 1.5 && i == 9007199254740992);
    assert_string_equal(s, "x");

    assert_refused(json_get_bool(json, "null", &b, &err), ST_NOT_FOUND, err, "'null' is missing");
    assert_refused(json_get_string(json, "B", &s, &err), ST_NOT_FOUND, err,
                   "'B' is missing"); /* case counts */
    assert_null(json_get(json, "null"));
    assert_null(json_get(NULL, "b"));
    assert_non_null(json_get(json, "o"));

    assert_refused(json_get_bool(json, "n", &b, &err), ST_INVALID, err,
                   "'n' must be true or false, not a number");
    assert_refused(json_get_f64(json, "n", 2, 3, &f, &err), ST_INVALID, err,
                   "'n' must be a number from 2 to 3, not 1.5");
    assert_refused(json_get_f64(json, "n", 2, INFINITY, &f, &err), ST_INVALID, err,
                   "a number of at least 2, not 1.5");
    assert_refused(json_get_f64(json, "n", -INFINITY, 1, &f, &err), ST_INVALID, err,
                   "a number of at most 1, not 1.5");
    assert_refused(json_get_f64(json, "s", -INFINITY, INFINITY, &f, &err), ST_INVALID, err,
                   "a number, not a string");
    assert_refused(json_get_i64(json, "n", 0, 9, &i, &err), ST_INVALID, err,
                   "an integer from 0 to 9, not 1.5");
    assert_refused(json_get_i64(json, "big", INT64_MIN, INT64_MAX, &i, &err), ST_INVALID, err,
                   "from -9007199254740992 to 9007199254740992, not 1e+300");
    assert_refused(json_get_i64(json, "i", 0, 9, &i, &err), ST_INVALID, err, "not 9007199254740992");
    assert_refused(json_get_string(json, "o", &s, &err), ST_INVALID, err,
                   "'o' must be a string, not an object");
    assert_true(b && f == 1.5 && i == 9007199254740992);
    assert_string_equal(s, "x");
    cJSON_Delete(json);
}

static void check_written_string(const char *s, size_t n, const char *wanted)
{
    struct strbuf b = {0};
    json_write_string(&b, s, n);
    assert_string_equal(b.data, wanted);
    strbuf_release(&b);
}

static void writes_strings(void **state)
{
    (void)state;
    check_written_string("", 0, "\"\"");
    check_written_string("a\"\\/\b\f\n\r\t\x01\0\x7F", 12, "\"a\\\"\\\\/\\b\\f\\n\\r\\t\\u0001\\u0000\x7F\"");
    check_written_string("\xC3\xA9\xF0\x9F\x98\x80", 6, "\"\xC3\xA9\xF0\x9F\x98\x80\"");
    check_written_string("a\xFF\xC3", 3, "\"a\xEF\xBF\xBD\xEF\xBF\xBD\"");
    check_written_string("\xED\xA0\x80", 3, "\"\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\"");
}

static void check_written_number(double v, const char *wanted)
{
    struct strbuf b = {0};
    json_write_f64(&b, v);
    assert_string_equal(b.data, wanted);
    strbuf_release(&b);
}

static void writes_numbers(void **state)
{
    (void)state;
    check_written_number(0, "0");
    check_written_number(-3, "-3");
    check_written_number(1700000256, "1700000256");
    check_written_number(9007199254740992, "9007199254740992");
    check_written_number(0.1, "0.1");
    check_written_number((double)0.1f, "0.1"); /* the value of a float takes a float's digits */
    check_written_number(-0.693147182464599609375, "-0.6931472");
    check_written_number(1.0 / 3, "0.3333333333333333");
    check_written_number(1e300, "1e+300");
    check_written_number(5e-324, "4.94065645841247e-324");
    check_written_number(NAN, "null");
    check_written_number(-INFINITY, "null");

    struct test_random random = {1};
    for (int i = 0; i < 20000; i++) {
        uint64_t bits = random_u64(&random);
        double d;
        float f;
        memcpy(&d, &bits, sizeof d);
        memcpy(&f, &bits, sizeof f);
        struct strbuf b = {0};
        json_write_f64(&b, d);
        if (isfinite(d)) assert_true(strtod(b.data, NULL) == d);
        strbuf_clear(&b);
        json_write_f64(&b, (double)f);
        if (isfinite(f)) assert_true(strtof(b.data, NULL) == f);
        strbuf_release(&b);
    }
}

static enum status parse_some(void *ctx)
{
    (void)ctx;
    cJSON *json;
    enum status st =
        PARSE("{\"alpha\":[1,2,{\"x\":\"long enough to leave the first buffer behind, and then some\"}],"
              "\"beta\":null,\"gamma\":{\"a\":1,\"b\":2}}",
              &json, NULL);
    if (!st) cJSON_Delete(json);
    return st;
}

static void survives_every_failed_allocation(void **state)
{
    (void)state;
    if (!alloc_fail_available()) skip();
    assert_true(alloc_fail_sweep(parse_some, NULL) > 10);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(accepts_all_of_json),
        cmocka_unit_test(refuses_all_else_and_says_where),
        cmocka_unit_test(nesting_has_a_limit),
        cmocka_unit_test(gets_members),
        cmocka_unit_test(writes_strings),
        cmocka_unit_test(writes_numbers),
        cmocka_unit_test(survives_every_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

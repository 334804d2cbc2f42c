#include "base/json_scan.h"

#include "base/utf8.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* cJSON's own buffer for a number: what is longer it would cut. */
#define NUMBER_CHARS_MAX 63

bool json_scan_fail(struct json_scan *s, const char *problem)
{
    s->problem = problem;
    return false;
}

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

/* The byte at the current position, without stepping over space; '\0' at the end. */
static char here(const struct json_scan *s) { return s->at < s->size ? s->text[s->at] : '\0'; }

char json_scan_peek(struct json_scan *s)
{
    while (here(s) == ' ' || here(s) == '\t' || here(s) == '\n' || here(s) == '\r') s->at++;
    return here(s);
}

bool json_scan_take(struct json_scan *s, char c)
{
    if (json_scan_peek(s) != c || s->at == s->size) return false;
    s->at++;
    return true;
}

bool json_scan_expect(struct json_scan *s, char c, const char *problem)
{
    return json_scan_take(s, c) || json_scan_fail(s, problem);
}

/* The four digits of \uXXXX. */
static bool scan_hex4(struct json_scan *s, uint32_t *out)
{
    uint32_t v = 0;
    for (int i = 0; i < 4; i++, s->at++) {
        char c = here(s);
        uint32_t digit = is_digit(c)            ? (uint32_t)(c - '0')
                         : c >= 'a' && c <= 'f' ? (uint32_t)(c - 'a' + 10)
                         : c >= 'A' && c <= 'F' ? (uint32_t)(c - 'A' + 10)
                                                : 16;
        if (digit == 16) return json_scan_fail(s, "\\u takes four hexadecimal digits");
        v = v << 4 | digit;
    }
    *out = v;
    return true;
}

/* After "\u": one code unit, or two that make a surrogate pair. */
static bool scan_unicode_escape(struct json_scan *s, struct strbuf *out)
{
    uint32_t cp = 0, low = 0;
    if (!scan_hex4(s, &cp)) return false;
    if (cp >= 0xD800 && cp < 0xDC00 && s->size - s->at >= 2 && !memcmp(s->text + s->at, "\\u", 2)) {
        s->at += 2;
        if (!scan_hex4(s, &low)) return false;
        if (low >= 0xDC00 && low < 0xE000) cp = 0x10000 + ((cp - 0xD800) << 10) + (low - 0xDC00);
    }
    if (cp >= 0xD800 && cp < 0xE000) return json_scan_fail(s, "half of a surrogate pair");
    if (cp == 0) return json_scan_fail(s, "NUL in a string");

    char utf8[4];
    strbuf_append(out, utf8, utf8_encode(cp, utf8));
    return true;
}

/* After the backslash. */
static bool scan_escape(struct json_scan *s, struct strbuf *out)
{
    static const char written[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    char c = here(s);
    const char *found = c ? strchr(written, c) : NULL;
    if (!found && c != 'u') return json_scan_fail(s, "unknown escape in a string");
    s->at++;
    if (c == 'u') return scan_unicode_escape(s, out);
    strbuf_putc(out, meant[found - written]);
    return true;
}

/* Steps over the characters of a string up to a quote, a backslash or a fault. */
static bool scan_plain(struct json_scan *s)
{
    while (here(s) != '"' && here(s) != '\\') {
        if (s->at == s->size) return json_scan_fail(s, "the text ends inside a string");
        if ((unsigned char)here(s) < 0x20)
            return json_scan_fail(s, "control character in a string: write it as an escape");
        uint32_t cp;
        size_t n = utf8_decode(s->text + s->at, s->size - s->at, &cp);
        if (cp == UINT32_MAX) return json_scan_fail(s, "invalid UTF-8");
        s->at += n;
    }
    return true;
}

bool json_scan_string(struct json_scan *s, struct strbuf *out)
{
    if (!json_scan_expect(s, '"', "a string is expected here")) return false;
    for (;;) {
        size_t begin = s->at;
        if (!scan_plain(s)) return false;
        strbuf_append(out, s->text + begin, s->at - begin);
        if (s->text[s->at++] == '"') return true;
        if (!scan_escape(s, out)) return false;
    }
}

static bool scan_digits(struct json_scan *s)
{
    if (!is_digit(here(s))) return json_scan_fail(s, "a digit is expected here");
    while (is_digit(here(s))) s->at++;
    return true;
}

/* A number's characters, by the grammar: -? (0 | 1-9 digits) (. digits)? (e sign? digits)? */
static bool scan_number_text(struct json_scan *s)
{
    if (here(s) == '-') s->at++;
    if (here(s) == '0')
        s->at++;
    else if (!scan_digits(s))
        return false;
    if (is_digit(here(s))) return json_scan_fail(s, "a number has a leading zero");
    if (here(s) == '.') {
        s->at++;
        if (!scan_digits(s)) return false;
    }
    if (here(s) == 'e' || here(s) == 'E') {
        s->at++;
        if (here(s) == '+' || here(s) == '-') s->at++;
        if (!scan_digits(s)) return false;
    }
    return true;
}

bool json_scan_number(struct json_scan *s, double *out)
{
    json_scan_peek(s);
    size_t begin = s->at;
    if (!scan_number_text(s)) return false;

    char digits[NUMBER_CHARS_MAX + 1] = {0};
    if (s->at - begin > NUMBER_CHARS_MAX) return json_scan_fail(s, "a number has more than 63 characters");
    memcpy(digits, s->text + begin, s->at - begin);
    double v = strtod(digits, NULL);
    if (isinf(v)) {
        s->at = begin;
        return json_scan_fail(s, "a number is too large");
    }
    *out = v;
    return true;
}

bool json_scan_u64(struct json_scan *s, uint64_t *out)
{
    uint64_t v = 0;
    json_scan_peek(s);
    size_t begin = s->at;
    if (!is_digit(here(s))) return json_scan_fail(s, "an integer of 0 or more is expected here");
    for (; is_digit(here(s)); s->at++)
        if (__builtin_mul_overflow(v, 10, &v) || __builtin_add_overflow(v, (uint64_t)(here(s) - '0'), &v))
            return json_scan_fail(s, "an integer is too large");
    if (s->text[begin] == '0' && s->at - begin > 1) return json_scan_fail(s, "a number has a leading zero");
    *out = v;
    return true;
}

bool json_scan_literal(struct json_scan *s)
{
    static const char *const literals[] = {"true", "false", "null"};
    json_scan_peek(s);
    for (int i = 0; i < 3; i++) {
        size_t n = strlen(literals[i]);
        if (s->size - s->at < n || memcmp(s->text + s->at, literals[i], n)) continue;
        s->at += n;
        return true;
    }
    return json_scan_fail(s, s->at == s->size ? "the text ends too early" : "a value is expected here");
}

enum status json_scan_error(const struct json_scan *s, const char *what, struct error *err)
{
    size_t line = 1, column = 1;
    for (size_t i = 0; i < s->at; i++) {
        if (s->text[i] == '\n') {
            line++;
            column = 1;
        } else if (((unsigned char)s->text[i] & 0xC0) != 0x80) { /* columns count characters */
            column++;
        }
    }
    return error_set(err, ST_BAD_FORMAT, "%s, line %zu column %zu: %s", what, line, column, s->problem);
}

#include "api/scan.h"

#include "base/strbuf.h"

#include <stdlib.h>
#include <string.h>

struct span {
    const char *at, *end;
};

static void skip_space(struct span *s)
{
    while (s->at < s->end && (*s->at == ' ' || *s->at == '\t' || *s->at == '\n' || *s->at == '\r')) s->at++;
}

static bool take_char(struct span *s, char c)
{
    skip_space(s);
    if (s->at >= s->end || *s->at != c) return false;
    s->at++;
    return true;
}

/* Past the string whose opening quote is at s->at. */
static bool skip_string(struct span *s)
{
    for (s->at++; s->at < s->end; s->at++) {
        if (*s->at == '\\')
            s->at++;
        else if (*s->at == '"')
            return s->at++, true;
    }
    return false;
}

/* Past one value of any kind, by counting brackets. */
static bool skip_value(struct span *s)
{
    size_t depth = 0;
    skip_space(s);
    const char *start = s->at;
    while (s->at < s->end) {
        char c = *s->at;
        if (c == '"') {
            if (!skip_string(s)) return false;
            if (!depth) return true;
            continue;
        }
        if (c == '[' || c == '{') depth++;
        if (c == ']' || c == '}') {
            if (!depth) return s->at > start;
            if (!--depth) return s->at++, true;
        }
        if (c == ',' && !depth) return s->at > start;
        s->at++;
    }
    return false;
}

/* Leaves *s before the value of the first top-level member named key. */
static bool find_member(struct span *s, const char *key)
{
    size_t key_size = strlen(key);
    if (!take_char(s, '{')) return false;
    do {
        skip_space(s);
        if (s->at >= s->end || *s->at != '"') return false;
        const char *name = s->at + 1;
        if (!skip_string(s)) return false;
        size_t name_size = (size_t)(s->at - 1 - name);
        if (!take_char(s, ':')) return false;
        skip_space(s);
        if (name_size == key_size && memcmp(name, key, key_size) == 0) return true;
        if (!skip_value(s)) return false;
    } while (take_char(s, ','));
    return false;
}

/* Digits as JSON writes a whole number: none leading with zero but "0" itself. */
static bool take_digits(struct span *s, uint64_t max, uint64_t *out)
{
    const char *start = s->at;
    uint64_t v = 0;
    for (; s->at < s->end && *s->at >= '0' && *s->at <= '9'; s->at++) {
        uint64_t digit = (uint64_t)(*s->at - '0');
        if (v > (max - digit) / 10) return false;
        v = v * 10 + digit;
    }
    size_t n = (size_t)(s->at - start);
    if (n == 0 || (n > 1 && start[0] == '0')) return false;
    *out = v;
    return true;
}

/* The number of elements at most, so that one allocation is enough. */
static size_t count_commas(const char *at, const char *end)
{
    size_t n = 1;
    for (; at < end; at++) n += *at == ',';
    return n;
}

/* One "[1, 2, 3]" onto the end of t->ids. An empty row is legal JSON but no prompt: refused later. */
static bool take_row(struct span *s, int32_t *ids, size_t *count)
{
    if (!take_char(s, '[')) return false;
    if (take_char(s, ']')) return true;
    do {
        uint64_t id;
        skip_space(s);
        if (!take_digits(s, INT32_MAX, &id)) return false;
        ids[(*count)++] = (int32_t)id;
    } while (take_char(s, ','));
    return take_char(s, ']');
}

static bool take_rows(struct span s, struct token_rows *t)
{
    size_t count = 0;
    struct span inner = s;
    if (!take_char(&inner, '[')) return false;
    skip_space(&inner);
    t->nested = inner.at < inner.end && *inner.at == '[';
    if (!t->nested) {
        if (!take_row(&s, t->ids, &count) || count == 0) return false;
        t->end[t->rows++] = count;
    } else {
        do {
            if (!take_row(&inner, t->ids, &count)) return false;
            t->end[t->rows++] = count;
        } while (take_char(&inner, ','));
        if (!take_char(&inner, ']')) return false;
        s = inner;
    }
    skip_space(&s);
    return s.at == s.end;
}

void token_rows_release(struct token_rows *t)
{
    free(t->ids);
    free(t->end);
    *t = (struct token_rows){0};
}

/* A value that was taken becomes a number of the same length. */
static void blank(char *text, struct span value)
{
    memset(text + (value.at - text), ' ', (size_t)(value.end - value.at));
    text[value.at - text] = '0';
}

enum status scan_take_tokens(char *text, size_t size, const char *key, struct token_rows *out)
{
    struct span s = {text, text + size};
    if (!find_member(&s, key) || s.at >= s.end || *s.at != '[') return ST_NOT_FOUND;
    struct span value = s;
    if (!skip_value(&s)) return ST_NOT_FOUND;
    value.end = s.at;

    struct token_rows t = {0};
    enum status st = ST_NOMEM;
    size_t most = count_commas(value.at, value.end);
    t.ids = malloc(most * sizeof *t.ids);
    t.end = malloc(most * sizeof *t.end);
    if (!t.ids || !t.end) goto done;
    st = ST_NOT_FOUND;
    if (!take_rows(value, &t)) goto done;

    blank(text, value);
    *out = t;
    t = (struct token_rows){0}; /* moved to the caller */
    st = ST_OK;
done:
    token_rows_release(&t);
    return st;
}

/* One element onto a line of its own. Between tokens, line breaks mean no more than spaces; inside strings
 * they are against the grammar, and a reader of the line will say so of other characters than these two. */
static void append_line(struct strbuf *out, const char *at, const char *end)
{
    size_t from = out->size;
    while (end > at && (end[-1] == ' ' || end[-1] == '\t' || end[-1] == '\n' || end[-1] == '\r')) end--;
    strbuf_append(out, at, (size_t)(end - at));
    for (size_t i = from; !out->failed && i < out->size; i++)
        if (out->data[i] == '\n' || out->data[i] == '\r') out->data[i] = ' ';
    strbuf_putc(out, '\n');
}

enum status scan_take_lines(char *text, size_t size, const char *key, struct strbuf *out)
{
    struct span s = {text, text + size}, value;
    size_t before = out->size;
    if (!find_member(&s, key)) return ST_NOT_FOUND;
    value = s;
    if (!take_char(&s, '[')) return ST_NOT_FOUND;
    bool whole = take_char(&s, ']');
    while (!whole) {
        skip_space(&s);
        const char *element = s.at;
        if (!skip_value(&s)) break;
        append_line(out, element, s.at);
        whole = take_char(&s, ']');
        if (!whole && !take_char(&s, ',')) break;
    }
    value.end = s.at;
    if (!whole || out->failed) {
        strbuf_truncate(out, before);
        return whole ? ST_NOMEM : ST_NOT_FOUND;
    }
    blank(text, value);
    return ST_OK;
}

enum status scan_integer(const char *text, size_t size, const char *key, uint64_t *out)
{
    struct span s = {text, text + size};
    if (!find_member(&s, key)) return ST_NOT_FOUND;
    if (s.end - s.at >= 4 && memcmp(s.at, "null", 4) == 0) return ST_NOT_FOUND;
    bool negative = s.at < s.end && *s.at == '-';
    if (negative) s.at++;
    uint64_t v;
    if (!take_digits(&s, negative ? (uint64_t)INT64_MAX + 1 : UINT64_MAX, &v)) return ST_INVALID;
    skip_space(&s);
    if (s.at < s.end && *s.at != ',' && *s.at != '}') return ST_INVALID;
    *out = negative ? 0 - v : v;
    return ST_OK;
}

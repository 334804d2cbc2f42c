#include "api/scan.h"

#include "base/json.h"
#include "base/json_scan.h"
#include "base/strbuf.h"

#include <stdlib.h>
#include <string.h>

/* Past one value of any kind; depth: how many arrays and objects are open around it. */
static bool skip_value(struct json_scan *s, struct strbuf *scratch, int depth)
{
    char open = json_scan_peek(s);
    double number;
    strbuf_clear(scratch);
    if (open == '"') return json_scan_string(s, scratch);
    if (open == '-' || (open >= '0' && open <= '9')) return json_scan_number(s, &number);
    if (open != '[' && open != '{') return json_scan_literal(s);

    char close = open == '[' ? ']' : '}';
    json_scan_take(s, open);
    if (depth == JSON_DEPTH_MAX) return false;
    if (json_scan_take(s, close)) return true;
    do {
        strbuf_clear(scratch);
        if (open == '{' && (!json_scan_string(s, scratch) || !json_scan_take(s, ':'))) return false;
        if (!skip_value(s, scratch, depth + 1)) return false;
    } while (json_scan_take(s, ','));
    return json_scan_take(s, close);
}

/* Leaves *s at the value of the first top-level member named key. */
static bool find_member(struct json_scan *s, const char *key, struct strbuf *scratch)
{
    size_t key_size = strlen(key);
    if (!json_scan_take(s, '{')) return false;
    do {
        strbuf_clear(scratch);
        if (!json_scan_string(s, scratch) || !json_scan_take(s, ':') || scratch->failed) return false;
        json_scan_peek(s);
        if (scratch->size == key_size && memcmp(scratch->data, key, key_size) == 0) return true;
        if (!skip_value(s, scratch, 1)) return false;
    } while (json_scan_take(s, ','));
    return false;
}

/* Where in a body the value of a member stands. */
struct span {
    size_t at, end;
};

/* ST_NOT_FOUND where the member is missing or its value is no whole array. ST_NOMEM. */
static enum status find_array(const char *text, size_t size, const char *key, struct span *out)
{
    struct json_scan s = {.text = text, .size = size};
    struct strbuf scratch = {0};
    enum status st = ST_NOT_FOUND;
    if (find_member(&s, key, &scratch) && json_scan_peek(&s) == '[') {
        out->at = s.at;
        if (skip_value(&s, &scratch, 1)) st = ST_OK;
        out->end = s.at;
    }
    if (scratch.failed) st = ST_NOMEM;
    strbuf_release(&scratch);
    return st;
}

/* The number of elements at most, so that one allocation is enough. */
static size_t count_commas(const char *text, struct span value)
{
    size_t n = 1;
    for (size_t i = value.at; i < value.end; i++) n += text[i] == ',';
    return n;
}

/* One "[1, 2, 3]" onto the end of ids. An empty row is legal JSON but no prompt: refused later. */
static bool take_row(struct json_scan *s, int32_t *ids, size_t *count)
{
    if (!json_scan_take(s, '[')) return false;
    if (json_scan_take(s, ']')) return true;
    do {
        uint64_t id;
        if (!json_scan_u64(s, &id) || id > INT32_MAX) return false;
        ids[(*count)++] = (int32_t)id;
    } while (json_scan_take(s, ','));
    return json_scan_take(s, ']');
}

/* The whole of s, which is an array. */
static bool take_rows(struct json_scan *s, struct token_rows *t)
{
    size_t count = 0;
    struct json_scan first = *s;
    json_scan_take(&first, '[');
    t->nested = json_scan_peek(&first) == '[';
    if (t->nested) *s = first;
    do {
        if (!take_row(s, t->ids, &count)) return false;
        t->end[t->rows++] = count;
    } while (t->nested && json_scan_take(s, ','));
    return t->nested ? json_scan_take(s, ']') : count > 0;
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
    memset(text + value.at, ' ', value.end - value.at);
    text[value.at] = '0';
}

enum status scan_take_tokens(char *text, size_t size, const char *key, struct token_rows *out)
{
    struct span value = {0};
    enum status st = find_array(text, size, key, &value);
    if (st) return st;

    struct token_rows t = {0};
    struct json_scan s = {.text = text, .size = value.end, .at = value.at};
    size_t most = count_commas(text, value);
    t.ids = malloc(most * sizeof *t.ids);
    t.end = malloc(most * sizeof *t.end);
    st = !t.ids || !t.end ? ST_NOMEM : take_rows(&s, &t) ? ST_OK : ST_NOT_FOUND;
    if (!st) {
        blank(text, value);
        *out = t;
        t = (struct token_rows){0}; /* moved to the caller */
    }
    token_rows_release(&t);
    return st;
}

/* One element onto a line of its own. Between tokens, line breaks mean no more than spaces; strings have
 * none. */
static void append_line(struct strbuf *out, const char *element, size_t size)
{
    size_t from = out->size;
    strbuf_append(out, element, size);
    for (size_t i = from; !out->failed && i < out->size; i++)
        if (out->data[i] == '\n' || out->data[i] == '\r') out->data[i] = ' ';
    strbuf_putc(out, '\n');
}

enum status scan_take_lines(char *text, size_t size, const char *key, struct strbuf *out)
{
    struct span value = {0};
    enum status st = find_array(text, size, key, &value);
    if (st) return st;

    struct json_scan s = {.text = text, .size = value.end, .at = value.at + 1};
    struct strbuf scratch = {0};
    size_t before = out->size;
    while (!json_scan_take(&s, ']')) {
        json_scan_take(&s, ',');
        json_scan_peek(&s);
        size_t element = s.at;
        if (!skip_value(&s, &scratch, 2)) break; /* no memory: its grammar is known to be right */
        append_line(out, text + element, s.at - element);
    }
    if (scratch.failed || out->failed) {
        strbuf_truncate(out, before);
        st = ST_NOMEM;
    } else {
        blank(text, value);
    }
    strbuf_release(&scratch);
    return st;
}

/* A whole number: digits, and after them the member's end. */
static enum status take_integer(struct json_scan *s, uint64_t *out)
{
    uint64_t v;
    bool negative = json_scan_take(s, '-');
    bool digits =
        s->at < s->size && s->text[s->at] >= '0' && s->text[s->at] <= '9'; /* no space after the sign */
    if (!digits || !json_scan_u64(s, &v)) return ST_INVALID;
    if (negative && v > (uint64_t)INT64_MAX + 1) return ST_INVALID;
    char next = json_scan_peek(s);
    if (next != ',' && next != '}') return ST_INVALID;
    *out = negative ? 0 - v : v;
    return ST_OK;
}

enum status scan_integer(const char *text, size_t size, const char *key, uint64_t *out)
{
    struct json_scan s = {.text = text, .size = size};
    struct strbuf scratch = {0};
    enum status st = find_member(&s, key, &scratch) ? ST_OK : ST_NOT_FOUND;
    if (scratch.failed) st = ST_NOMEM;
    if (!st && json_scan_peek(&s) == 'n') st = ST_NOT_FOUND; /* null, or a fault for the parser to name */
    if (!st) st = take_integer(&s, out);
    strbuf_release(&scratch);
    return st;
}

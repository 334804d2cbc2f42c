#include "base/json.h"

#include "base/json_scan.h"
#include "base/memory.h"
#include "base/name_table.h"
#include "base/strbuf.h"
#include "base/utf8.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXACT_INTEGER_MAX ((int64_t)1 << 53)

/* The check that comes before cJSON: one pass over the text that follows the whole grammar. Keys of
 * all objects that are still open lie on a stack, those of the innermost on top. */
struct checker {
    struct json_scan scan;
    struct strbuf text; /* decoded bytes of the keys, and above them the last string */
    struct key {
        size_t text_at, size;
        size_t at; /* where it stands, for the message */
    } * keys;
    size_t key_count, key_capacity;
    bool nomem;
};

static bool check_value(struct checker *c, int depth);

static bool push_key(struct checker *c)
{
    if (c->key_count == c->key_capacity) {
        size_t capacity = c->key_capacity ? size_mul(c->key_capacity, 2) : 32;
        struct key *keys = reallocarray(c->keys, capacity, sizeof *keys);
        if (!keys) {
            c->nomem = true;
            return false;
        }
        c->keys = keys;
        c->key_capacity = capacity;
    }
    struct key key = {.text_at = c->text.size};
    json_scan_peek(&c->scan);
    key.at = c->scan.at;
    if (!json_scan_string(&c->scan, &c->text)) return false;
    key.size = c->text.size - key.text_at;
    c->keys[c->key_count++] = key;
    return true;
}

/* No two of the keys from `first` on may be equal. */
static bool check_unique(struct checker *c, size_t first)
{
    struct name_table names = {0};
    if (c->key_count - first < 2) return true;
    if (c->text.failed || name_table_init(&names, c->key_count - first)) {
        c->nomem = true;
        return false;
    }
    bool unique = true;
    for (size_t i = first; unique && i < c->key_count; i++) {
        const struct key *key = &c->keys[i];
        unique = name_table_add(&names, c->text.data + key->text_at, key->size, i);
        if (!unique) {
            c->scan.at = key->at;
            json_scan_fail(&c->scan, "this key appears twice in its object");
        }
    }
    name_table_release(&names);
    return unique;
}

static bool check_object(struct checker *c, int depth)
{
    size_t first = c->key_count, text_size = c->text.size;
    if (!json_scan_take(&c->scan, '}')) {
        do {
            if (!push_key(c) || !json_scan_expect(&c->scan, ':', "':' is expected after a key") ||
                !check_value(c, depth))
                return false;
        } while (json_scan_take(&c->scan, ','));
        if (!json_scan_expect(&c->scan, '}', "',' or '}' is expected here")) return false;
    }
    if (!check_unique(c, first)) return false;
    c->key_count = first;
    strbuf_truncate(&c->text, text_size);
    return true;
}

static bool check_array(struct checker *c, int depth)
{
    if (json_scan_take(&c->scan, ']')) return true;
    do {
        if (!check_value(c, depth)) return false;
    } while (json_scan_take(&c->scan, ','));
    return json_scan_expect(&c->scan, ']', "',' or ']' is expected here");
}

/* depth: how many objects and arrays are open around the value. */
static bool check_value(struct checker *c, int depth)
{
    char next = json_scan_peek(&c->scan);
    double number;
    if (next == '{' || next == '[') {
        if (depth == JSON_DEPTH_MAX) return json_scan_fail(&c->scan, "nested too deep");
        json_scan_take(&c->scan, next);
        return next == '{' ? check_object(c, depth + 1) : check_array(c, depth + 1);
    }
    if (next == '"') {
        size_t text_size = c->text.size;
        bool ok = json_scan_string(&c->scan, &c->text);
        strbuf_truncate(&c->text, text_size);
        return ok;
    }
    if (next == '-' || (next >= '0' && next <= '9')) return json_scan_number(&c->scan, &number);
    return json_scan_literal(&c->scan);
}

static enum status check_text(const char *text, size_t size, struct error *err)
{
    struct checker c = {.scan = {.text = text, .size = size}};
    bool ok = check_value(&c, 0);
    if (ok && (json_scan_peek(&c.scan), c.scan.at != size))
        ok = json_scan_fail(&c.scan, "there is more after the value");

    enum status st = ST_OK;
    if (c.nomem || c.text.failed)
        st = error_set(err, ST_NOMEM, "out of memory for %zu bytes of JSON", size);
    else if (!ok)
        st = json_scan_error(&c.scan, "JSON", err);
    strbuf_release(&c.text);
    free(c.keys);
    return st;
}

enum status json_parse(const char *text, size_t size, cJSON **out, struct error *err)
{
    enum status st = check_text(text, size, err);
    if (st) return st;
    cJSON *parsed = cJSON_ParseWithLength(text, size);
    if (!parsed) return error_set(err, ST_NOMEM, "out of memory for %zu bytes of JSON", size);
    *out = parsed;
    return ST_OK;
}

const cJSON *json_get(const cJSON *obj, const char *key)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(obj, key);
    return item && !cJSON_IsNull(item) ? item : NULL;
}

static enum status missing(const char *key, struct error *err)
{
    return error_set(err, ST_NOT_FOUND, "'%s' is missing", key);
}

static const char *kind_of(const cJSON *item)
{
    return cJSON_IsBool(item)     ? "a boolean"
           : cJSON_IsNumber(item) ? "a number"
           : cJSON_IsString(item) ? "a string"
           : cJSON_IsArray(item)  ? "an array"
                                  : "an object";
}

enum status json_get_bool(const cJSON *obj, const char *key, bool *out, struct error *err)
{
    const cJSON *item = json_get(obj, key);
    if (!item) return missing(key, err);
    if (!cJSON_IsBool(item))
        return error_set(err, ST_INVALID, "'%s' must be true or false, not %s", key, kind_of(item));
    *out = cJSON_IsTrue(item);
    return ST_OK;
}

/* "'top_p' must be a number from 0 to 1, not 1.5", with only the bounds there are. */
static enum status not_in_range(const cJSON *item, const char *what, double min, double max,
                                struct error *err)
{
    struct strbuf m = {0};
    strbuf_printf(&m, "'%s' must be %s", item->string, what);
    if (min > -INFINITY) {
        strbuf_puts(&m, max < INFINITY ? " from " : " of at least ");
        json_write_f64(&m, min);
    }
    if (max < INFINITY) {
        strbuf_puts(&m, min > -INFINITY ? " to " : " of at most ");
        json_write_f64(&m, max);
    }
    strbuf_puts(&m, ", not ");
    if (cJSON_IsNumber(item))
        json_write_f64(&m, item->valuedouble);
    else
        strbuf_puts(&m, kind_of(item));
    enum status st = error_set(err, ST_INVALID, "%s", m.failed ? status_text(ST_INVALID) : m.data);
    strbuf_release(&m);
    return st;
}

enum status json_get_f64(const cJSON *obj, const char *key, double min, double max, double *out,
                         struct error *err)
{
    const cJSON *item = json_get(obj, key);
    if (!item) return missing(key, err);
    if (cJSON_IsNumber(item) && item->valuedouble >= min && item->valuedouble <= max) {
        *out = item->valuedouble;
        return ST_OK;
    }
    return not_in_range(item, "a number", min, max, err);
}

enum status json_get_i64(const cJSON *obj, const char *key, int64_t min, int64_t max, int64_t *out,
                         struct error *err)
{
    const cJSON *item = json_get(obj, key);
    if (!item) return missing(key, err);
    double v = item->valuedouble;
    /* Beyond 2^53 a double stands for several integers. */
    if (cJSON_IsNumber(item) && v == floor(v) && fabs(v) <= (double)EXACT_INTEGER_MAX && (int64_t)v >= min &&
        (int64_t)v <= max) {
        *out = (int64_t)v;
        return ST_OK;
    }
    return not_in_range(item, "an integer", (double)(min < -EXACT_INTEGER_MAX ? -EXACT_INTEGER_MAX : min),
                        (double)(max > EXACT_INTEGER_MAX ? EXACT_INTEGER_MAX : max), err);
}

enum status json_get_string(const cJSON *obj, const char *key, const char **out, struct error *err)
{
    const cJSON *item = json_get(obj, key);
    if (!item) return missing(key, err);
    if (!cJSON_IsString(item))
        return error_set(err, ST_INVALID, "'%s' must be a string, not %s", key, kind_of(item));
    *out = item->valuestring;
    return ST_OK;
}

static void write_ascii(struct strbuf *out, char c)
{
    static const char special[] = "\"\\\b\f\n\r\t", letters[] = "\"\\bfnrt";
    const char *found = c ? strchr(special, c) : NULL;
    if (found) {
        strbuf_putc(out, '\\');
        strbuf_putc(out, letters[found - special]);
    } else if ((unsigned char)c < 0x20) {
        strbuf_printf(out, "\\u%04x", (unsigned)c);
    } else {
        strbuf_putc(out, c);
    }
}

void json_write_string(struct strbuf *out, const char *s, size_t n)
{
    strbuf_putc(out, '"');
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        size_t length = utf8_decode(s + i, n - i, &cp);
        if (cp == UINT32_MAX)
            strbuf_puts(out, "\xEF\xBF\xBD"); /* U+FFFD */
        else if (cp < 0x80)
            write_ascii(out, s[i]);
        else
            strbuf_append(out, s + i, length);
        i += length;
    }
    strbuf_putc(out, '"');
}

void json_write_f64(struct strbuf *out, double v)
{
    if (!isfinite(v)) {
        strbuf_puts(out, "null");
        return;
    }
    if (v == floor(v) && fabs(v) <= (double)EXACT_INTEGER_MAX) {
        strbuf_printf(out, "%.0f", v);
        return;
    }
    /* A value that is a float needs only the digits that tell floats apart: 9 always do, as 17
     * do for doubles; %g drops zeros at the end, so three fewer is where to begin. */
    bool is_float = fabs(v) <= 0x1.fffffep127 && (double)(float)v == v;
    char text[32];
    for (int digits = is_float ? 6 : 15; digits <= (is_float ? 9 : 17); digits++) {
        snprintf(text, sizeof text, "%.*g", digits, v);
        if (is_float ? strtof(text, NULL) == (float)v : strtod(text, NULL) == v) break;
    }
    strbuf_puts(out, text);
}

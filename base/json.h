/* Strict JSON over cJSON, for requests and configuration.
 *
 * What cJSON lets through and this refuses: invalid UTF-8, NUL in strings, duplicate keys, numbers
 * that overflow to infinity, trailing bytes, nesting beyond JSON_DEPTH_MAX. Keys are compared
 * case-sensitively. Numbers are doubles: integers are exact up to 2^53, and json_get_i64 refuses
 * larger ones rather than round them. */
#ifndef BASE_JSON_H
#define BASE_JSON_H

#include "base/status.h"

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define JSON_DEPTH_MAX 64

/* On ST_OK the caller owes cJSON_Delete. ST_BAD_FORMAT says line and column. */
NODISCARD enum status json_parse(const char *text, size_t size, cJSON **out, struct error *err);

/* Members of an object. Missing or null: ST_NOT_FOUND, output untouched. Wrong kind or out of
 * range: ST_INVALID, err names the key and what it takes. */
enum status json_get_bool(const cJSON *obj, const char *key, bool *out, struct error *err);
enum status json_get_f64(const cJSON *obj, const char *key, double min, double max, double *out,
                         struct error *err);
enum status json_get_i64(const cJSON *obj, const char *key, int64_t min, int64_t max, int64_t *out,
                         struct error *err);
enum status json_get_string(const cJSON *obj, const char *key, const char **out, struct error *err);
/* NULL where missing or null. */
const cJSON *json_get(const cJSON *obj, const char *key);

/* Appends s as a JSON string with quotes: control characters escaped, invalid UTF-8 bytes
 * replaced by U+FFFD. */
struct strbuf;
void json_write_string(struct strbuf *out, const char *s, size_t n);
/* Appends a number so that it reads back equal, without digits it can do without: as a double, or as a
 * float where v is the value of one. NaN and infinities become null. */
void json_write_f64(struct strbuf *out, double v);

#endif

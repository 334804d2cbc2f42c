/* A strict scanner of JSON text (RFC 8259): grammar, escapes, UTF-8, position of the first fault.
 *
 * json.c checks with it what cJSON would let through, safetensors.c reads headers with it.
 * Every function steps over space first and answers false at a fault, which stays recorded in
 * `problem` with `at` on the offending byte. */
#ifndef BASE_JSON_SCAN_H
#define BASE_JSON_SCAN_H

#include "base/status.h"
#include "base/strbuf.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct json_scan {
    const char *text; /* not owned */
    size_t size, at;
    const char *problem; /* static; NULL while all is well */
};

/* The next byte that is not space, or '\0' at the end. */
char json_scan_peek(struct json_scan *s);
/* Steps over c if it is next. */
bool json_scan_take(struct json_scan *s, char c);
/* The same, and a fault with this problem if it is not. */
bool json_scan_expect(struct json_scan *s, char c, const char *problem);
/* A string, whose decoded bytes are appended to out (no NUL among them). */
bool json_scan_string(struct json_scan *s, struct strbuf *out);
bool json_scan_number(struct json_scan *s, double *out);
/* A number written as digits only. */
bool json_scan_u64(struct json_scan *s, uint64_t *out);
/* true, false or null. */
bool json_scan_literal(struct json_scan *s);
/* Records a fault at the current byte and answers false. */
bool json_scan_fail(struct json_scan *s, const char *problem);

/* ST_BAD_FORMAT: "<what>, line 2 column 7: <problem>". */
enum status json_scan_error(const struct json_scan *s, const char *what, struct error *err);

#endif

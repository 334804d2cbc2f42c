/* Regular expressions over module names, as adapter configurations use them.
 *
 * They come from an upload, so compiling and matching are bounded: PATTERN_BYTES_MAX of text,
 * PATTERN_STEPS_MAX of backtracking. Exceeding either is an error, never "no match". */
#ifndef ADAPTERS_PATTERN_H
#define ADAPTERS_PATTERN_H

#include "base/status.h"

#include <stdbool.h>

#define PATTERN_BYTES_MAX 1024
#define PATTERN_STEPS_MAX 5000

struct pattern;

/* The pattern must match the whole subject (Python's re.fullmatch). ST_REJECTED: not a regular
 * expression, or too large; err quotes it. */
NODISCARD enum status pattern_compile(const char *regex, struct pattern **out, struct error *err);
/* The whole subject, or the part of it after any dot (Python's re.match(rf"(.*\.)?({regex})$")). */
NODISCARD enum status pattern_compile_suffix(const char *regex, struct pattern **out, struct error *err);
void pattern_free(struct pattern *p);

/* ST_REJECTED where matching takes too many steps. */
NODISCARD enum status pattern_match(const struct pattern *p, const char *subject, bool *out,
                                    struct error *err);

#endif

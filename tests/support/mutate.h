/* Damaged copies of good bytes: truncated, flipped, spliced, and with lengths that lie. */
#ifndef TESTS_SUPPORT_MUTATE_H
#define TESTS_SUPPORT_MUTATE_H

#include "tests/support/random.h"

#include <stddef.h>
#include <stdint.h>

/* Good bytes to start from. */
struct mutate_source {
    const char *name;
    const void *data;
    size_t size;
    size_t head;              /* three of four mutations fall into this many first bytes; 0: no preference */
    const char *const *words; /* pieces of text to put in, for textual formats; may be NULL */
    size_t word_count;
    const void *context; /* whatever the reader of the bytes needs to know; not looked at here */
};

/* A malloc'd copy of exactly *size_out bytes (so that a sanitizer sees a read beyond them) with one
 * to four mutations. The same random state gives the same bytes. */
uint8_t *mutate_copy(const struct mutate_source *source, struct test_random *r, size_t *size_out);

/* A malloc'd copy of the first n bytes only. */
uint8_t *mutate_truncate(const struct mutate_source *source, size_t n);

#endif

/* A growing byte buffer with a sticky out-of-memory flag; always NUL-terminated once written to.
 *
 * Append freely, then check `failed` once. */
#ifndef BASE_STRBUF_H
#define BASE_STRBUF_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>

struct strbuf {
    char *data; /* owned; NULL while empty */
    size_t size; /* bytes written, without the terminating NUL */
    size_t capacity;
    bool failed;
};

/* A zeroed strbuf is a valid empty one. */
void strbuf_release(struct strbuf *b); /* frees, and leaves an empty buffer */
void strbuf_clear(struct strbuf *b);   /* size 0, memory kept */
void strbuf_truncate(struct strbuf *b, size_t size); /* to its first `size` bytes */
void strbuf_append(struct strbuf *b, const void *bytes, size_t n);
void strbuf_puts(struct strbuf *b, const char *text);
void strbuf_putc(struct strbuf *b, char c);
void strbuf_printf(struct strbuf *b, const char *fmt, ...) PRINTF_LIKE(2, 3);
/* The bytes as a malloc'd string the caller frees; b becomes empty. NULL if failed. */
char *strbuf_take(struct strbuf *b);

#endif

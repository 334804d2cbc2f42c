#include "base/strbuf.h"

#include "base/memory.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FIRST_CAPACITY 64

void strbuf_release(struct strbuf *b)
{
    free(b->data);
    *b = (struct strbuf){0};
}

void strbuf_clear(struct strbuf *b)
{
    b->size = 0;
    b->failed = false;
    if (b->data) b->data[0] = '\0';
}

void strbuf_truncate(struct strbuf *b, size_t size)
{
    CHECK(size <= b->size);
    b->size = size;
    if (b->data) b->data[size] = '\0';
}

/* Makes room for n more bytes and the terminating NUL. */
static bool strbuf_grow(struct strbuf *b, size_t n)
{
    if (b->failed) return false;
    size_t need = size_add(size_add(b->size, n), 1);
    if (need <= b->capacity) return true;

    size_t capacity = size_mul(b->capacity, 2);
    if (capacity < FIRST_CAPACITY) capacity = FIRST_CAPACITY;
    if (capacity == SIZE_MAX || capacity < need) capacity = need;
    char *data = capacity == SIZE_MAX ? NULL : realloc(b->data, capacity);
    if (!data) {
        b->failed = true;
        return false;
    }
    b->data = data;
    b->capacity = capacity;
    return true;
}

void strbuf_append(struct strbuf *b, const void *bytes, size_t n)
{
    if (!strbuf_grow(b, n)) return;
    if (n) memcpy(b->data + b->size, bytes, n);
    b->size += n;
    b->data[b->size] = '\0';
}

void strbuf_puts(struct strbuf *b, const char *text) { strbuf_append(b, text, strlen(text)); }
void strbuf_putc(struct strbuf *b, char c) { strbuf_append(b, &c, 1); }

void strbuf_printf(struct strbuf *b, const char *fmt, ...)
{
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, fmt, args);
    va_end(args);
    if (n < 0) {
        b->failed = true;
    } else if (strbuf_grow(b, (size_t)n)) {
        vsnprintf(b->data + b->size, (size_t)n + 1, fmt, again);
        b->size += (size_t)n;
    }
    va_end(again);
}

char *strbuf_take(struct strbuf *b)
{
    strbuf_append(b, "", 0); /* an empty buffer becomes an empty string */
    char *text = b->failed ? NULL : b->data;
    if (text) b->data = NULL;
    strbuf_release(b);
    return text;
}

#include "tests/support/gguf_writer.h"

#include <string.h>

static void put_number(struct strbuf *b, uint64_t v, int bytes)
{
    for (int i = 0; i < bytes; i++) strbuf_putc(b, (char)(v >> (8 * i)));
}

static void put_text(struct strbuf *b, const char *s)
{
    put_number(b, strlen(s), 8);
    strbuf_puts(b, s);
}

void gguf_put_raw(struct gguf_writer *w, const char *key, uint32_t type, const void *value, size_t bytes)
{
    put_text(&w->values, key);
    put_number(&w->values, type, 4);
    strbuf_append(&w->values, value, bytes);
    w->value_count++;
}

void gguf_put_u64(struct gguf_writer *w, const char *key, enum gguf_type type, uint64_t v)
{
    static const int bytes[GGUF_TYPE_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    struct strbuf value = {0};
    put_number(&value, v, bytes[type]);
    gguf_put_raw(w, key, type, value.data, value.size);
    strbuf_release(&value);
}

void gguf_put_f32(struct gguf_writer *w, const char *key, float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    gguf_put_u64(w, key, GGUF_F32, bits);
}

void gguf_put_f64(struct gguf_writer *w, const char *key, double v)
{
    uint64_t bits;
    memcpy(&bits, &v, sizeof bits);
    gguf_put_u64(w, key, GGUF_F64, bits);
}

void gguf_put_string(struct gguf_writer *w, const char *key, const char *v)
{
    struct strbuf value = {0};
    put_text(&value, v);
    gguf_put_raw(w, key, GGUF_STRING, value.data, value.size);
    strbuf_release(&value);
}

void gguf_put_array(struct gguf_writer *w, const char *key, enum gguf_type type, uint64_t count,
                    const void *elements, size_t bytes)
{
    struct strbuf value = {0};
    put_number(&value, type, 4);
    put_number(&value, count, 8);
    strbuf_append(&value, elements, bytes);
    gguf_put_raw(w, key, GGUF_ARRAY, value.data, value.size);
    strbuf_release(&value);
}

void gguf_put_strings(struct gguf_writer *w, const char *key, const char *const *v, uint64_t count)
{
    struct strbuf elements = {0};
    for (uint64_t i = 0; i < count; i++) put_text(&elements, v[i]);
    gguf_put_array(w, key, GGUF_STRING, count, elements.data, elements.size);
    strbuf_release(&elements);
}

static void pad(struct strbuf *b, uint64_t alignment)
{
    while (b->size % (alignment ? alignment : 32)) strbuf_putc(b, '\0');
}

void gguf_put_tensor(struct gguf_writer *w, const char *name, uint32_t type, int dim_count,
                     const uint64_t *dim, const void *data, size_t bytes)
{
    pad(&w->data, w->alignment);
    put_text(&w->tensors, name);
    put_number(&w->tensors, (uint64_t)dim_count, 4);
    for (int i = 0; i < dim_count; i++) put_number(&w->tensors, dim[i], 8);
    put_number(&w->tensors, type, 4);
    put_number(&w->tensors, w->data.size, 8);
    strbuf_append(&w->data, data, bytes);
    w->tensor_count++;
}

void gguf_finish(struct gguf_writer *w, struct strbuf *out)
{
    struct strbuf head = {0};
    strbuf_puts(&head, "GGUF");
    put_number(&head, w->version, 4);
    put_number(&head, w->tensor_count, 8);
    put_number(&head, w->value_count, 8);
    strbuf_append(&head, w->values.data, w->values.size);
    strbuf_append(&head, w->tensors.data, w->tensors.size);
    if (w->data.size) pad(&head, w->alignment);
    strbuf_append(out, head.data, head.size);
    strbuf_append(out, w->data.data, w->data.size);
    strbuf_release(&head);
    strbuf_release(&w->values);
    strbuf_release(&w->tensors);
    strbuf_release(&w->data);
}

/* GGUF files made in memory, good or deliberately wrong. */
#ifndef TESTS_SUPPORT_GGUF_WRITER_H
#define TESTS_SUPPORT_GGUF_WRITER_H

#include "base/gguf.h"
#include "base/strbuf.h"

#include <stdint.h>

/* Zeroed and then given a version it is ready for use. Values and tensors may be added in any
 * order; the counts in the header are of those added, unless a test overrides them. */
struct gguf_writer {
    uint32_t version;
    uint64_t alignment; /* of the data; 0: the default, 32 (a key of the file is the caller's to add) */
    struct strbuf values, tensors, data;
    uint64_t value_count, tensor_count;
};

void gguf_put_u64(struct gguf_writer *w, const char *key, enum gguf_type type,
                  uint64_t v); /* any integer type, bool */
void gguf_put_f32(struct gguf_writer *w, const char *key, float v);
void gguf_put_f64(struct gguf_writer *w, const char *key, double v);
void gguf_put_string(struct gguf_writer *w, const char *key, const char *v);
void gguf_put_strings(struct gguf_writer *w, const char *key, const char *const *v, uint64_t count);
/* elements: the array's bytes, packed little-endian. */
void gguf_put_array(struct gguf_writer *w, const char *key, enum gguf_type type, uint64_t count,
                    const void *elements, size_t bytes);
/* Any record: key, type number, and its value's bytes. */
void gguf_put_raw(struct gguf_writer *w, const char *key, uint32_t type, const void *value, size_t bytes);
/* Appends the tensor's data, aligned. type may be a number that is no dtype. */
void gguf_put_tensor(struct gguf_writer *w, const char *name, uint32_t type, int dim_count,
                     const uint64_t *dim, const void *data, size_t bytes);

/* The finished file, appended to out; releases w. */
void gguf_finish(struct gguf_writer *w, struct strbuf *out);

#endif

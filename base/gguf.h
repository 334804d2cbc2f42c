/* The GGUF container, versions 2 and 3: bytes to a table of named values and tensors.
 *
 * Every count, length and offset is checked against the bytes given; nothing is copied that need
 * not be, so the bytes (usually a mapped file) must outlive the table. */
#ifndef BASE_GGUF_H
#define BASE_GGUF_H

#include "base/dtype.h"
#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum gguf_type {
    GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL,
    GGUF_STRING, GGUF_ARRAY, GGUF_U64, GGUF_I64, GGUF_F64, GGUF_TYPE_COUNT
};

struct gguf_string {
    const char *data; /* not NUL-terminated, not owned */
    size_t size;
};

struct gguf_tensor {
    struct gguf_string name;
    enum dtype type;
    int dim_count;      /* 1..4 */
    uint64_t dim[4];    /* dim[0] is the innermost (a row's length); unused ones are 1 */
    const void *data;   /* inside the mapped bytes; may be unaligned for its type */
    size_t bytes;
};

struct gguf;

NODISCARD enum status gguf_parse(const void *data, size_t size, struct gguf **out, struct error *err);
void gguf_free(struct gguf *g);

size_t gguf_tensor_count(const struct gguf *g);
const struct gguf_tensor *gguf_tensor_at(const struct gguf *g, size_t i);
/* NULL if there is none. Constant time on average. */
const struct gguf_tensor *gguf_tensor_find(const struct gguf *g, const char *name);

/* Metadata look-ups: ST_NOT_FOUND where the key is missing; ST_BAD_FORMAT (err names key and type)
 * where it is of another kind. Integers of any width and sign are accepted where the value fits. */
enum status gguf_get_u64(const struct gguf *g, const char *key, uint64_t *out, struct error *err);
enum status gguf_get_f64(const struct gguf *g, const char *key, double *out, struct error *err);
enum status gguf_get_bool(const struct gguf *g, const char *key, bool *out, struct error *err);
enum status gguf_get_string(const struct gguf *g, const char *key, struct gguf_string *out,
                            struct error *err);

/* Arrays of scalars or strings; nested arrays are checked and skipped, not exposed. */
struct gguf_array {
    enum gguf_type type;
    uint64_t count;
    const void *data; /* packed little-endian scalars; for strings use gguf_array_strings */
};
enum status gguf_get_array(const struct gguf *g, const char *key, struct gguf_array *out,
                           struct error *err);
/* All strings of an array, count of them, in a malloc'd table the caller frees. */
enum status gguf_get_strings(const struct gguf *g, const char *key, struct gguf_string **out,
                             size_t *count_out, struct error *err);

#endif

/* The safetensors container: bytes to a table of named tensors.
 *
 * The header is read by a scanner of its own (it is JSON, but may be large and is hostile).
 * Refused: duplicate names, overlapping or out-of-range ranges, holes, sizes that do not equal
 * shape times element size, nesting, more than SAFETENSORS_TENSORS_MAX tensors. */
#ifndef BASE_SAFETENSORS_H
#define BASE_SAFETENSORS_H

#include "base/dtype.h"
#include "base/status.h"

#include <stddef.h>
#include <stdint.h>

#define SAFETENSORS_TENSORS_MAX 65536
#define SAFETENSORS_HEADER_BYTES_MAX (100u << 20)

struct safetensor {
    const char *name;   /* NUL-terminated, owned by the table; no NUL inside */
    enum dtype type;    /* F32, F16 or BF16; a file with any other is ST_UNSUPPORTED */
    int dim_count;      /* 0..4 */
    uint64_t dim[4];    /* dim[0] outermost, as in the file; unused ones are 1 */
    const void *data;   /* inside the given bytes; may be unaligned */
    size_t bytes;
};

struct safetensors;

/* data must outlive the table. */
NODISCARD enum status safetensors_parse(const void *data, size_t size, struct safetensors **out,
                                        struct error *err);
void safetensors_free(struct safetensors *s);
size_t safetensors_count(const struct safetensors *s);
const struct safetensor *safetensors_at(const struct safetensors *s, size_t i); /* file order */
const struct safetensor *safetensors_find(const struct safetensors *s, const char *name);

/* Writing, for exports and tests: a file's bytes from a list of tensors, appended to out. */
struct strbuf;
void safetensors_write(const struct safetensor *tensors, size_t count, struct strbuf *out);

#endif

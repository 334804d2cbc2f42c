/* A bounded little-endian byte reader with a sticky error.
 *
 * Everything read from a file or a socket passes through one. After the first read past the end,
 * `bad` stays true and every read gives zero or NULL: read a whole record, then check once, at the
 * decision that depends on it. */
#ifndef BASE_READER_H
#define BASE_READER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct reader {
    const uint8_t *data; /* not owned */
    size_t size;
    size_t offset; /* of the next byte, from data */
    bool bad;
};

static inline struct reader reader_of(const void *data, size_t size)
{
    return (struct reader){.data = data, .size = size};
}
static inline size_t reader_left(const struct reader *r) { return r->bad ? 0 : r->size - r->offset; }

/* The next n bytes, which stay owned by the source; NULL (and bad) if there are fewer. */
const void *reader_take(struct reader *r, uint64_t n);
uint8_t reader_u8(struct reader *r);
uint16_t reader_u16(struct reader *r);
uint32_t reader_u32(struct reader *r);
uint64_t reader_u64(struct reader *r);
float reader_f32(struct reader *r);
double reader_f64(struct reader *r);

#endif

#include "base/reader.h"

#include <string.h>

const void *reader_take(struct reader *r, uint64_t n)
{
    if (r->bad || n > r->size - r->offset) {
        r->bad = true;
        return NULL;
    }
    const void *taken = r->data + r->offset;
    r->offset += (size_t)n;
    return taken;
}

/* The next `bytes` (at most 8) bytes as a little-endian number. */
static uint64_t take_number(struct reader *r, int bytes)
{
    const uint8_t *p = reader_take(r, (uint64_t)bytes);
    uint64_t v = 0;
    for (int i = 0; p && i < bytes; i++) v |= (uint64_t)p[i] << (8 * i);
    return v;
}

uint8_t reader_u8(struct reader *r) { return (uint8_t)take_number(r, 1); }
uint16_t reader_u16(struct reader *r) { return (uint16_t)take_number(r, 2); }
uint32_t reader_u32(struct reader *r) { return (uint32_t)take_number(r, 4); }
uint64_t reader_u64(struct reader *r) { return take_number(r, 8); }

float reader_f32(struct reader *r)
{
    uint32_t bits = reader_u32(r);
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

double reader_f64(struct reader *r)
{
    uint64_t bits = reader_u64(r);
    double f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

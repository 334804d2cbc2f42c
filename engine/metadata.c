#include "engine/metadata.h"

#include <inttypes.h>

uint64_t metadata_u64(struct metadata *m, const char *key, uint64_t min, uint64_t max,
                      uint64_t fallback)
{
    if (m->status) return min;
    uint64_t v = 0;
    enum status st = gguf_get_u64(m->gguf, key, &v, m->err);
    if (st == ST_NOT_FOUND) {
        if (fallback != METADATA_REQUIRED) return fallback;
        m->status = error_set(m->err, ST_BAD_FORMAT, "metadata '%s' is missing", key);
    } else if (st) {
        m->status = st;
    } else if (v < min || v > max) {
        m->status = error_set(m->err, ST_UNSUPPORTED,
                              "metadata '%s' is %" PRIu64 "; supported: %" PRIu64 " to %" PRIu64,
                              key, v, min, max);
    }
    return m->status ? min : v;
}

double metadata_f64(struct metadata *m, const char *key, double min, double max, double fallback)
{
    if (m->status) return min;
    double v = 0;
    enum status st = gguf_get_f64(m->gguf, key, &v, m->err);
    if (st == ST_NOT_FOUND) return fallback;
    if (st) {
        m->status = st;
    } else if (!(v >= min && v <= max)) {
        m->status = error_set(m->err, ST_UNSUPPORTED, "metadata '%s' is %g; supported: %g to %g",
                              key, v, min, max);
    }
    return m->status ? min : v;
}

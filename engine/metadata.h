/* Metadata of a model file with ranges and defaults, under a sticky status.
 *
 * Read all values, then check `status` once. After a failure every read gives its smallest legal
 * value, so that arithmetic on what was read stays defined. */
#ifndef ENGINE_METADATA_H
#define ENGINE_METADATA_H

#include "base/gguf.h"
#include "base/status.h"

#include <stdint.h>

struct metadata {
    const struct gguf *gguf;
    enum status status;
    struct error *err;
};

#define METADATA_REQUIRED UINT64_MAX

/* fallback: the value where the key is missing, or METADATA_REQUIRED. */
uint64_t metadata_u64(struct metadata *m, const char *key, uint64_t min, uint64_t max,
                      uint64_t fallback);
/* Within [min, max] and finite; fallback where the key is missing. */
double metadata_f64(struct metadata *m, const char *key, double min, double max, double fallback);

#endif

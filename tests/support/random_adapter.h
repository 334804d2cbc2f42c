/* Adapters of random weights, packed for a device without passing through a file. */
#ifndef TESTS_SUPPORT_RANDOM_ADAPTER_H
#define TESTS_SUPPORT_RANDOM_ADAPTER_H

#include "engine/engine.h"
#include "kernels/device.h"

#include <stdint.h>

struct random_adapter_config {
    uint64_t seed;
    unsigned projections; /* bit p: sites on projection p */
    int experts, rank, top_k;
    enum gate_rule rule;
    float scale; /* of every expert; may be infinite or NaN */
};

/* The sites it packs belong to `out`, whose layers and width are set. */
NODISCARD enum status random_adapter_make(struct device *d, const struct model_shape *shape,
                                          const struct random_adapter_config *c,
                                          struct lr_adapter *out);
void random_adapter_release(struct device *d, struct lr_adapter *a);

#endif

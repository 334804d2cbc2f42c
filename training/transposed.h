/* What passes see of transposed weights (pass.h opens and closes them). */
#ifndef TRAINING_TRANSPOSED_H
#define TRAINING_TRANSPOSED_H

#include "engine/model.h"
#include "training/pass.h"

#include <stdatomic.h>

struct transposed_weight {
    struct weight *weight; /* (d_in, d_out) */
    void *data;            /* owned; NULL where the device keeps its own copy */
};

struct transposed {
    const struct model *model;
    struct engine_turn *turn; /* of opening */
    struct transposed_weight *layer; /* [layers * PROJ_COUNT] */
    struct transposed_weight *head;  /* [block_count]: (embed, block_rows), the last may be narrower */
    size_t block_count, block_rows;
    size_t bytes;
    atomic_size_t kept; /* bytes of insides of layers that passes keep */
};

#endif

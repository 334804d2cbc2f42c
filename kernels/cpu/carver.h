/* Cutting one block of memory into the arrays of a scratch. */
#ifndef KERNELS_CPU_CARVER_H
#define KERNELS_CPU_CARVER_H

#include "base/memory.h"

/* Hands out aligned parts of a block in turn. With no block it only adds up, so that one function both
 * measures and lays out. */
struct carver {
    char *block;
    size_t used;
};

static inline void *carve(struct carver *c, size_t count, size_t size)
{
    void *part = c->block ? c->block + c->used : NULL;
    c->used = size_add(c->used, size_round_up(size_mul(count, size), MEMORY_ALIGN));
    return part;
}

#endif

/* The threads that share the work of an op.
 *
 * A job is `total` chunks, handed out one by one to whoever is free; an op of several phases is
 * several jobs. The caller takes part as worker 0 and waits only for chunks that others have begun: a
 * worker that the system has put off its core delays nobody. Between jobs the others spin
 * for a moment, then park. */
#ifndef KERNELS_CPU_POOL_H
#define KERNELS_CPU_POOL_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>

struct pool;

/* Does one chunk. worker is below pool_size: an index for scratch of its own. */
typedef void (*pool_fn)(void *ctx, size_t chunk, int worker);

/* threads >= 1, the caller included. */
NODISCARD enum status pool_open(int threads, struct pool **out);
void pool_close(struct pool *p);
int pool_size(const struct pool *p);

/* Runs all chunks and returns when they are done. One thread at a time. */
void pool_run(struct pool *p, size_t total, pool_fn fn, void *ctx);

/* A chunk size, a multiple of `multiple`, that cuts `count` into a few chunks per thread: enough that
 * a thread which loses its core for a while leaves its share to the others. */
size_t pool_chunk(const struct pool *p, size_t count, size_t multiple);

/* Physical cores this process may run on, at least 1. */
int pool_cores(void);

#endif

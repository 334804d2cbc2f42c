/* The threads that share the work of an op.
 *
 * A job is `total` chunks. Each thread has a share of consecutive ones, claims them one by one, and goes on with those
 * that others have left; an op of several phases is several jobs. The caller takes part as worker 0 and waits only for
 * chunks that others have begun: a worker that the system has put off its core delays nobody. Between jobs the others
 * spin for a moment, then park. */
#ifndef KERNELS_CPU_POOL_H
#define KERNELS_CPU_POOL_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>

struct pool;

/* Does one chunk. worker is below pool_size: an index for scratch of its own. */
typedef void (*pool_fn)(void *ctx, size_t chunk, int worker);

/* threads >= 1, the caller included. With `pin`, and as many threads as this process may use cores, each thread but the
 * caller stays on a core of its own. With fewer nobody knows which cores others leave free. */
NODISCARD enum status pool_open(int threads, bool pin, struct pool **out);
void pool_close(struct pool *p);
int pool_size(const struct pool *p);
/* The calling thread will call pool_run: where the others are pinned, it is too. */
void pool_attach(const struct pool *p);

/* Runs all chunks and returns when they are done. One thread at a time. */
void pool_run(struct pool *p, size_t total, pool_fn fn, void *ctx);

/* A chunk size, a multiple of `multiple`, that cuts `count` into a few chunks per thread: enough that
 * a thread which loses its core for a while leaves its share to the others. */
size_t pool_chunk(const struct pool *p, size_t count, size_t multiple);

#endif

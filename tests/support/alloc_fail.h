/* Makes a chosen allocation fail, and counts those alive, so that every out-of-memory path gets its run.
 *
 * Replaces glibc's malloc family in the programs that use it. Sanitizers that bring a heap of their own
 * exclude it: alloc_fail_available() is false there and the test skips itself. */
#ifndef TESTS_SUPPORT_ALLOC_FAIL_H
#define TESTS_SUPPORT_ALLOC_FAIL_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>

bool alloc_fail_available(void);

/* The allocation after `n` more ones fails, once. */
void alloc_fail_after(long n);
/* Stops that; whether it has failed by now. */
bool alloc_fail_stop(void);
/* Blocks allocated and not freed. */
long alloc_live(void);

/* Calls `attempt` with its 1st, 2nd, ... allocation failing, until it gets by without a failure. Each run
 * must answer ST_NOMEM and keep nothing, the last one ST_OK (and keep nothing either). Returns the number of
 * failures that were tried, or -1 after a message on stderr. */
int alloc_fail_sweep(enum status (*attempt)(void *ctx), void *ctx);
/* The same where a library gets by without some of its allocations (the C library's qsort, PCRE2): ST_OK may
 * be the answer to their failure too. Returns how many failures were answered ST_NOMEM. */
int alloc_fail_sweep_lenient(enum status (*attempt)(void *ctx), void *ctx);

#endif

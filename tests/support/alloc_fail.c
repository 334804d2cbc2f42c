#include "tests/support/alloc_fail.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define OWN_HEAP 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define OWN_HEAP 1
#endif

static atomic_long countdown = -1; /* -1: nothing fails */
static atomic_long live;

#ifndef OWN_HEAP

void *__libc_malloc(size_t n);
void *__libc_calloc(size_t count, size_t n);
void *__libc_realloc(void *p, size_t n);
void *__libc_memalign(size_t alignment, size_t n);
void __libc_free(void *p);

/* Whether the allocation at hand is the one to fail. */
static bool must_fail(void) { return atomic_load(&countdown) >= 0 && atomic_fetch_sub(&countdown, 1) == 0; }

static void *counted(void *p)
{
    if (p) atomic_fetch_add(&live, 1);
    return p;
}

void *malloc(size_t n) { return must_fail() ? NULL : counted(__libc_malloc(n)); }
void *calloc(size_t count, size_t n) { return must_fail() ? NULL : counted(__libc_calloc(count, n)); }

void *realloc(void *p, size_t n)
{
    if (must_fail()) return NULL;
    return p ? __libc_realloc(p, n) : counted(__libc_realloc(NULL, n));
}

int posix_memalign(void **out, size_t alignment, size_t n)
{
    void *p = must_fail() ? NULL : counted(__libc_memalign(alignment, n));
    if (p) *out = p;
    return p ? 0 : ENOMEM;
}

void free(void *p)
{
    if (p) atomic_fetch_sub(&live, 1);
    __libc_free(p);
}

bool alloc_fail_available(void) { return true; }

#else

bool alloc_fail_available(void) { return false; }

#endif

void alloc_fail_after(long n) { atomic_store(&countdown, n); }

/* A failure leaves the countdown at -1. */
bool alloc_fail_stop(void) { return atomic_exchange(&countdown, -1) < 0; }

long alloc_live(void) { return atomic_load(&live); }

/* Returns the number of failures that were answered ST_NOMEM. */
static int sweep(enum status (*attempt)(void *ctx), void *ctx, bool lenient)
{
    int refused = 0;
    for (int n = 0;; n++) {
        long before = alloc_live();
        alloc_fail_after(n);
        enum status st = attempt(ctx);
        bool failed = alloc_fail_stop();
        long kept = alloc_live() - before;
        bool expected = st == (failed ? ST_NOMEM : ST_OK) || (lenient && st == ST_OK);
        if (kept != 0 || !expected) {
            fprintf(stderr, "allocation %d %s: answered '%s', kept %ld blocks\n", n,
                    failed ? "failed" : "was never made", status_text(st), kept);
            return -1;
        }
        if (!failed) return refused;
        refused += st == ST_NOMEM;
    }
}

int alloc_fail_sweep(enum status (*attempt)(void *ctx), void *ctx) { return sweep(attempt, ctx, false); }

int alloc_fail_sweep_lenient(enum status (*attempt)(void *ctx), void *ctx)
{
    return sweep(attempt, ctx, true);
}

#include "kernels/cpu/pool.h"

#include "base/memory.h"
#include "kernels/cpu/cores.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

/* Rounds of a pause instruction (40 to 140 cycles) before parking: about 50 microseconds, longer than
 * the gap between two ops of a step. */
#define SPIN_ROUNDS       2000
#define CHUNKS_PER_THREAD 6
/* A worker offers its core to whoever waits for it, between two chunks, when it has kept it so long: less than the
 * system's slices of time. Else it would lose it in the midst of a chunk, for which all would wait until the core comes
 * back. Beside one busy process on one of two cores that took 45% of the speed instead of 25%. */
#define OFFER_S 1e-3
#define THREADS_MAX       1024

/* A worker's share of a job: consecutive chunks, the same part of equal jobs, so that a thread finds in its caches, and
 * on its memory node, what it had of the last step. Who is through with its own share takes from others'. */
struct share {
    /* Job number in the upper half, chunks not yet taken in the lower; of an older job until somebody looks at it. A
     * successful compare-and-swap claims a chunk of exactly that job, so a late worker cannot touch a finished one,
     * and the job's fields stay put while any claimed chunk is undone. */
    _Alignas(MEMORY_ALIGN) _Atomic uint64_t ticket;
    _Atomic uint64_t done; /* chunks, of all jobs so far */
};

struct worker {
    struct pool *pool;
    int index;
    pthread_t thread;
    double offered; /* when it offered its core */
};

struct pool {
    _Alignas(MEMORY_ALIGN) _Atomic uint64_t job; /* number in the upper half, chunks in the lower */
    pool_fn fn;
    void *ctx;

    _Alignas(MEMORY_ALIGN) pthread_mutex_t lock; /* of parking only */
    pthread_cond_t work, finished;
    atomic_int parked;         /* workers waiting for `work` */
    atomic_bool caller_parked; /* waiting for `finished` */
    atomic_bool closing;

    int threads, started;
    bool pinned;
    struct worker *workers;
    struct share *shares; /* [threads] */
    uint64_t *expected;   /* [threads], the caller's: `done` of each share when the job is done */
};

static void spin_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static uint32_t upper(uint64_t word) { return (uint32_t)(word >> 32); }

static uint32_t lower(uint64_t word) { return (uint32_t)word; }

/* The first chunk of a share; of the one past the last: all chunks. */
static size_t share_begin(const struct pool *p, uint64_t job, int share)
{
    return (size_t)lower(job) * (size_t)share / (size_t)p->threads;
}

/* A share of no chunks is brought up to date like any other: no ticket stays behind until job numbers come round. */
static bool claim(struct pool *p, uint64_t job, int share, size_t *chunk_out)
{
    size_t end = share_begin(p, job, share + 1);
    uint32_t all = (uint32_t)(end - share_begin(p, job, share));
    uint64_t ticket = atomic_load(&p->shares[share].ticket);
    for (;;) {
        int32_t age = (int32_t)(upper(job) - upper(ticket));
        if (age < 0 || (age == 0 && lower(ticket) == 0)) return false;
        uint32_t left = age > 0 ? all : lower(ticket);
        uint64_t next = (uint64_t)upper(job) << 32 | (left > 0 ? left - 1 : 0);
        if (!atomic_compare_exchange_weak(&p->shares[share].ticket, &ticket, next)) continue;
        *chunk_out = end - left;
        return left > 0;
    }
}

static double now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void offer_core(struct worker *w)
{
    if (now_seconds() - w->offered < OFFER_S) return;
    sched_yield();
    w->offered = now_seconds();
}

/* While the caller is parked its job is not over, so the share's ticket is that job's. */
static void chunk_done(struct pool *p, int share)
{
    atomic_fetch_add(&p->shares[share].done, 1);
    if (!atomic_load(&p->caller_parked) || lower(atomic_load(&p->shares[share].ticket)) > 0) return;
    pthread_mutex_lock(&p->lock);
    pthread_cond_signal(&p->finished);
    pthread_mutex_unlock(&p->lock);
}

/* Does one chunk after another, if any is left: of its own share, then of its neighbours'. */
static void work_on(struct pool *p, uint64_t job, int worker)
{
    for (int i = 0; i < p->threads; i++) {
        int share = (worker + i) % p->threads;
        size_t chunk;
        while (claim(p, job, share, &chunk)) {
            p->fn(p->ctx, chunk, worker);
            chunk_done(p, share);
            if (worker > 0) offer_core(&p->workers[worker]);
        }
        if (worker > 0 && atomic_load(&p->job) != job) return;
    }
}

static bool work_waits(struct pool *p, uint64_t last)
{
    return atomic_load(&p->job) != last || atomic_load(&p->closing);
}

static void wait_for_work(struct pool *p, uint64_t last)
{
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        if (work_waits(p, last)) return;
        spin_pause();
    }
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->parked, 1); /* before looking again: pool_run looks at it after the job */
    while (!work_waits(p, last)) pthread_cond_wait(&p->work, &p->lock);
    atomic_fetch_sub(&p->parked, 1);
    pthread_mutex_unlock(&p->lock);
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    if (w->pool->pinned) cores_pin(w->index);
    uint64_t job = 0;
    while (!atomic_load(&w->pool->closing)) {
        wait_for_work(w->pool, job);
        job = atomic_load(&w->pool->job);
        work_on(w->pool, job, w->index);
    }
    return NULL;
}

static bool all_done(const struct pool *p)
{
    for (int i = 0; i < p->threads; i++)
        if (atomic_load(&p->shares[i].done) != p->expected[i]) return false;
    return true;
}

/* Parking the caller matters where a chunk's owner lost its core: the system moves it to this one. */
static void wait_until_done(struct pool *p)
{
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        if (all_done(p)) return;
        spin_pause();
    }
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->caller_parked, true);
    while (!all_done(p)) pthread_cond_wait(&p->finished, &p->lock);
    atomic_store(&p->caller_parked, false);
    pthread_mutex_unlock(&p->lock);
}

void pool_run(struct pool *p, size_t total, pool_fn fn, void *ctx)
{
    if (total <= 1 || p->threads == 1) {
        for (size_t i = 0; i < total; i++) fn(ctx, i, 0);
        return;
    }
    CHECK(total <= UINT32_MAX);

    uint64_t job = (uint64_t)(upper(atomic_load(&p->job)) + 1) << 32 | total;
    p->fn = fn;
    p->ctx = ctx;
    for (int i = 0; i < p->threads; i++)
        p->expected[i] += share_begin(p, job, i + 1) - share_begin(p, job, i);
    atomic_store(&p->job, job);

    if (atomic_load(&p->parked) > 0) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->work);
        pthread_mutex_unlock(&p->lock);
    }
    work_on(p, job, 0);
    wait_until_done(p);
}

size_t pool_chunk(const struct pool *p, size_t count, size_t multiple)
{
    size_t units = (count + multiple - 1) / multiple;
    size_t wanted = (size_t)p->threads * CHUNKS_PER_THREAD;
    size_t per_chunk = units / wanted;
    return (per_chunk ? per_chunk : 1) * multiple;
}

void pool_attach(const struct pool *p)
{
    if (p->pinned) cores_pin(0);
}

int pool_size(const struct pool *p) { return p->threads; }

enum status pool_open(int threads, bool pin, struct pool **out)
{
    CHECK(threads >= 1);
    if (threads > THREADS_MAX) return ST_INVALID;
    struct pool *p = memory_zalloc(1, sizeof *p);
    if (!p) return ST_NOMEM;
    p->threads = threads;
    p->pinned = pin && threads == cores_count();
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->work, NULL);
    pthread_cond_init(&p->finished, NULL);
    p->workers = memory_zalloc((size_t)threads, sizeof *p->workers);
    p->shares = memory_zalloc((size_t)threads, sizeof *p->shares);
    p->expected = memory_zalloc((size_t)threads, sizeof *p->expected);

    enum status st = ST_NOMEM;
    if (!p->workers || !p->shares || !p->expected) goto done;
    for (int i = 1; i < threads; i++) {
        struct worker *w = &p->workers[i];
        *w = (struct worker){.pool = p, .index = i};
        if (pthread_create(&w->thread, NULL, worker_main, w) != 0) goto done;
        p->started = i;
    }
    *out = p;
    p = NULL;
    st = ST_OK;
done:
    pool_close(p);
    return st;
}

void pool_close(struct pool *p)
{
    if (!p) return;
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->closing, true);
    pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->lock);
    for (int i = 1; i <= p->started; i++) pthread_join(p->workers[i].thread, NULL);
    pthread_cond_destroy(&p->work);
    pthread_cond_destroy(&p->finished);
    pthread_mutex_destroy(&p->lock);
    memory_free(p->workers);
    memory_free(p->shares);
    memory_free(p->expected);
    memory_free(p);
}

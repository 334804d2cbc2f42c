#include "kernels/cpu/pool.h"

#include "base/memory.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
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

struct worker {
    struct pool *pool;
    int index;
    pthread_t thread;
    double offered; /* when it offered its core */
};

struct pool {
    /* Job number in the upper half, chunks not yet taken in the lower. A successful
     * compare-and-swap claims a chunk of exactly that job, so a late worker cannot touch a
     * finished one, and the job's fields below stay put while any claimed chunk is undone. */
    _Alignas(MEMORY_ALIGN) _Atomic uint64_t ticket;
    _Alignas(MEMORY_ALIGN) _Atomic size_t done; /* chunks of the current job */

    _Alignas(MEMORY_ALIGN) pool_fn fn;
    void *ctx;
    size_t total;

    pthread_mutex_t lock; /* of parking only */
    pthread_cond_t work, finished;
    atomic_int parked;         /* workers waiting for `work` */
    atomic_bool caller_parked; /* waiting for `finished` */
    atomic_bool closing;

    int threads, started;
    struct worker *workers;
};

static void spin_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static size_t chunks_left(uint64_t ticket) { return (size_t)(ticket & UINT32_MAX); }

static bool claim(struct pool *p, size_t *chunk_out)
{
    uint64_t ticket = atomic_load(&p->ticket);
    while (chunks_left(ticket) > 0) {
        if (atomic_compare_exchange_weak(&p->ticket, &ticket, ticket - 1)) {
            *chunk_out = p->total - chunks_left(ticket);
            return true;
        }
    }
    return false;
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

/* Does one chunk after another, if any is left. */
static void work_on(struct pool *p, int worker)
{
    size_t chunk;
    while (claim(p, &chunk)) {
        size_t total = p->total; /* before `done` tells the caller that the job's fields are free */
        p->fn(p->ctx, chunk, worker);
        if (atomic_fetch_add(&p->done, 1) + 1 == total && atomic_load(&p->caller_parked)) {
            pthread_mutex_lock(&p->lock);
            pthread_cond_signal(&p->finished);
            pthread_mutex_unlock(&p->lock);
        }
        if (worker > 0) offer_core(&p->workers[worker]);
    }
}

static bool work_waits(struct pool *p)
{
    return chunks_left(atomic_load(&p->ticket)) > 0 || atomic_load(&p->closing);
}

static void wait_for_work(struct pool *p)
{
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        if (work_waits(p)) return;
        spin_pause();
    }
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->parked, 1); /* before looking again: pool_run looks at it after the ticket */
    while (!work_waits(p)) pthread_cond_wait(&p->work, &p->lock);
    atomic_fetch_sub(&p->parked, 1);
    pthread_mutex_unlock(&p->lock);
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    while (!atomic_load(&w->pool->closing)) {
        work_on(w->pool, w->index);
        wait_for_work(w->pool);
    }
    return NULL;
}

/* Parking the caller matters where a chunk's owner lost its core: the system moves it to this one. */
static void wait_until_done(struct pool *p, size_t total)
{
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        if (atomic_load(&p->done) == total) return;
        spin_pause();
    }
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->caller_parked, true);
    while (atomic_load(&p->done) != total) pthread_cond_wait(&p->finished, &p->lock);
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

    p->fn = fn;
    p->ctx = ctx;
    p->total = total;
    atomic_store(&p->done, 0);
    uint64_t job = (atomic_load(&p->ticket) >> 32) + 1;
    atomic_store(&p->ticket, job << 32 | total);

    if (atomic_load(&p->parked) > 0) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->work);
        pthread_mutex_unlock(&p->lock);
    }
    work_on(p, 0);
    wait_until_done(p, total);
}

size_t pool_chunk(const struct pool *p, size_t count, size_t multiple)
{
    size_t units = (count + multiple - 1) / multiple;
    size_t wanted = (size_t)p->threads * CHUNKS_PER_THREAD;
    size_t per_chunk = units / wanted;
    return (per_chunk ? per_chunk : 1) * multiple;
}

int pool_size(const struct pool *p) { return p->threads; }

enum status pool_open(int threads, struct pool **out)
{
    CHECK(threads >= 1);
    if (threads > THREADS_MAX) return ST_INVALID;
    struct pool *p = memory_zalloc(1, sizeof *p);
    if (!p) return ST_NOMEM;
    p->threads = threads;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->work, NULL);
    pthread_cond_init(&p->finished, NULL);
    p->workers = memory_zalloc((size_t)threads, sizeof *p->workers);

    enum status st = ST_NOMEM;
    if (!p->workers) goto done;
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
    memory_free(p);
}

/* The first of the hardware threads that share cpu's core; cpu itself where the system does not say. */
static int core_leader(int cpu)
{
    char path[96];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    FILE *f = fopen(path, "r");
    int leader;
    if (!f || fscanf(f, "%d", &leader) != 1) leader = cpu;
    if (f) fclose(f);
    return leader;
}

int pool_cores(void)
{
    cpu_set_t allowed, leaders;
    CPU_ZERO(&leaders);
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        int leader = core_leader(cpu);
        if (leader >= 0 && leader < CPU_SETSIZE) CPU_SET(leader, &leaders);
    }
    int cores = CPU_COUNT(&leaders);
    return cores > 0 ? cores : 1;
}

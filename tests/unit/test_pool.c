/* The thread pool: every chunk exactly once, in any number of threads, however the jobs follow. */
#include "kernels/cpu/pool.h"

#include "kernels/cpu/cores.h"

#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define CHUNKS_MAX 1000

struct job {
    int threads;
    atomic_int count[CHUNKS_MAX];
    atomic_bool bad_worker;
};

static void count_chunk(void *ctx, size_t chunk, int worker)
{
    struct job *job = ctx;
    if (worker < 0 || worker >= job->threads) atomic_store(&job->bad_worker, true);
    atomic_fetch_add(&job->count[chunk], 1);
}

static void run_and_check(struct pool *p, struct job *job, size_t total)
{
    memset(job->count, 0, sizeof job->count);
    pool_run(p, total, count_chunk, job);
    for (size_t i = 0; i < CHUNKS_MAX; i++) assert_int_equal(atomic_load(&job->count[i]), i < total);
    assert_false(atomic_load(&job->bad_worker));
}

static void every_chunk_runs_once(void **state)
{
    (void)state;
    static const size_t totals[] = {0, 1, 2, 3, 7, 64, CHUNKS_MAX};
    for (int threads = 1; threads <= 5; threads++) {
        struct pool *p;
        static struct job job;
        job.threads = threads;
        assert_int_equal(pool_open(threads, threads % 2 == 0, &p), ST_OK);
        assert_int_equal(pool_size(p), threads);
        for (int round = 0; round < 50; round++)
            for (size_t i = 0; i < sizeof totals / sizeof *totals; i++) run_and_check(p, &job, totals[i]);
        pool_close(p);
    }
}

/* Plain memory written by one job and read by the next: what a phase makes, all threads of the next see. */
struct relay {
    size_t n;
    uint64_t *from, *to;
};

static void add_neighbours(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    struct relay *r = ctx;
    r->to[chunk] = r->from[chunk] + 2 * r->from[(chunk + 1) % r->n] + 1;
}

static void jobs_see_what_the_last_one_wrote(void **state)
{
    (void)state;
    struct pool *p;
    assert_int_equal(pool_open(3, false, &p), ST_OK);
    uint64_t ring[2][16] = {{0}}, expected = 0;
    for (int step = 0; step < 3000; step++) {
        struct relay r = {16, ring[step % 2], ring[(step + 1) % 2]};
        pool_run(p, 16, add_neighbours, &r);
        if (step % 1000 == 999) usleep(20000); /* long enough for the others to park */
        expected = 3 * expected + 1;
    }
    for (size_t i = 0; i < 16; i++) assert_int_equal(ring[0][i], expected);
    pool_close(p);
}

static void sleep_in_chunk(void *ctx, size_t chunk, int worker)
{
    if (worker != 0) usleep(20000); /* the caller runs out of work, and parks */
    count_chunk(ctx, chunk, worker);
}

static void a_slow_chunk_is_waited_for(void **state)
{
    (void)state;
    struct pool *p;
    static struct job job;
    job.threads = 3;
    assert_int_equal(pool_open(3, false, &p), ST_OK);
    for (int i = 0; i < 5; i++) {
        memset(job.count, 0, sizeof job.count);
        pool_run(p, 40, sleep_in_chunk, &job);
        for (size_t c = 0; c < 40; c++) assert_int_equal(atomic_load(&job.count[c]), 1);
    }
    pool_close(p);
}

/* Whoever is through with its share takes the rest of a slow one's, and writes where its owner would have: the sums of
 * inputs that change from job to job are right whoever made them. */
#define STOLEN_CHUNKS 64

struct stolen {
    uint64_t input;
    uint64_t sum[STOLEN_CHUNKS];
    int by[STOLEN_CHUNKS];
    int slow; /* this worker is */
};

static void sum_slowly(void *ctx, size_t chunk, int worker)
{
    struct stolen *s = ctx;
    if (worker == s->slow) usleep(500);
    for (uint64_t i = 0; i < 100; i++) s->sum[chunk] += s->input * i + chunk;
    s->by[chunk] = worker;
}

static void shares_of_slow_threads_are_taken_over(void **state)
{
    (void)state;
    struct pool *p;
    assert_int_equal(pool_open(3, false, &p), ST_OK);
    int taken = 0;
    for (int job = 0; job < 60; job++) {
        struct stolen s = {.input = (uint64_t)job * 7919, .slow = job % 3};
        size_t total = (size_t)(job % STOLEN_CHUNKS) + 1;
        pool_run(p, total, sum_slowly, &s);
        for (size_t c = 0; c < STOLEN_CHUNKS; c++) {
            assert_int_equal(s.sum[c], c < total ? s.input * 4950 + 100 * c : 0);
            taken += c < total && s.by[c] != (int)(c * 3 / total);
        }
    }
    assert_true(taken > 0);
    pool_close(p);
}

static void read_affinity(void *ctx, size_t chunk, int worker)
{
    (void)chunk;
    cpu_set_t mine;
    if (sched_getaffinity(0, sizeof mine, &mine) == 0) ((cpu_set_t *)ctx)[worker] = mine;
    usleep(2000); /* all take part */
}

/* Pinned threads share no core; others go wherever the process may. A thread that came too late for any chunk is not
 * seen. */
static void check_affinity(int threads, bool pin, const cpu_set_t *allowed)
{
    struct pool *p;
    cpu_set_t *seen = calloc((size_t)threads, sizeof *seen), taken, both;
    assert_non_null(seen);
    assert_int_equal(pool_open(threads, pin, &p), ST_OK);
    pool_run(p, (size_t)threads * 4, read_affinity, seen);
    CPU_ZERO(&taken);
    for (int i = 1; i < threads; i++) {
        if (CPU_COUNT(&seen[i]) == 0) continue;
        if (!pin || threads != cores_count()) {
            assert_true(CPU_EQUAL(&seen[i], allowed));
            continue;
        }
        CPU_AND(&both, &taken, &seen[i]);
        assert_int_equal(CPU_COUNT(&both), 0);
        CPU_OR(&taken, &taken, &seen[i]);
        assert_true(CPU_COUNT(&taken) < CPU_COUNT(allowed)); /* one is left to the caller */
    }
    pool_close(p);
    free(seen);
}

static void threads_are_pinned_where_each_has_a_core(void **state)
{
    (void)state;
    cpu_set_t allowed;
    assert_int_equal(sched_getaffinity(0, sizeof allowed, &allowed), 0);
    for (int threads = cores_count() > 1 ? cores_count() - 1 : 1; threads <= cores_count() + 1; threads++)
        for (int pin = 0; pin < 2; pin++) check_affinity(threads, pin, &allowed);
    assert_true(cores_nodes() >= 1);
}

/* At least `wanted` of a few per thread, so less than twice that many. */
static void chunks_are_multiples_and_few(void **state)
{
    (void)state;
    struct pool *p;
    assert_int_equal(pool_open(2, true, &p), ST_OK);
    for (size_t count = 1; count < 5000; count += 37)
        for (size_t multiple = 1; multiple <= 64; multiple *= 4) {
            size_t chunk = pool_chunk(p, count, multiple);
            assert_int_equal(chunk % multiple, 0);
            assert_true(chunk > 0);
            assert_true((count + chunk - 1) / chunk <= 24);
        }
    pool_close(p);
}

static void absurd_thread_counts_are_refused(void **state)
{
    (void)state;
    struct pool *p = NULL;
    assert_int_equal(pool_open(1000000, true, &p), ST_INVALID);
    assert_null(p);
    pool_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_chunk_runs_once),
        cmocka_unit_test(jobs_see_what_the_last_one_wrote),
        cmocka_unit_test(a_slow_chunk_is_waited_for),
        cmocka_unit_test(shares_of_slow_threads_are_taken_over),
        cmocka_unit_test(threads_are_pinned_where_each_has_a_core),
        cmocka_unit_test(chunks_are_multiples_and_few),
        cmocka_unit_test(absurd_thread_counts_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

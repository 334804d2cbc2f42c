/* The thread pool: every chunk exactly once, in any number of threads, however the jobs follow. */
#include "kernels/cpu/pool.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
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
        assert_int_equal(pool_open(threads, &p), ST_OK);
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
    assert_int_equal(pool_open(3, &p), ST_OK);
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
    assert_int_equal(pool_open(3, &p), ST_OK);
    for (int i = 0; i < 5; i++) {
        memset(job.count, 0, sizeof job.count);
        pool_run(p, 40, sleep_in_chunk, &job);
        for (size_t c = 0; c < 40; c++) assert_int_equal(atomic_load(&job.count[c]), 1);
    }
    pool_close(p);
}

/* At least `wanted` of a few per thread, so less than twice that many. */
static void chunks_are_multiples_and_few(void **state)
{
    (void)state;
    struct pool *p;
    assert_int_equal(pool_open(2, &p), ST_OK);
    for (size_t count = 1; count < 5000; count += 37)
        for (size_t multiple = 1; multiple <= 64; multiple *= 4) {
            size_t chunk = pool_chunk(p, count, multiple);
            assert_int_equal(chunk % multiple, 0);
            assert_true(chunk > 0);
            assert_true((count + chunk - 1) / chunk <= 24);
        }
    pool_close(p);
    assert_true(pool_cores() >= 1);
}

static void absurd_thread_counts_are_refused(void **state)
{
    (void)state;
    struct pool *p = NULL;
    assert_int_equal(pool_open(1000000, &p), ST_INVALID);
    assert_null(p);
    pool_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_chunk_runs_once),
        cmocka_unit_test(jobs_see_what_the_last_one_wrote),
        cmocka_unit_test(a_slow_chunk_is_waited_for),
        cmocka_unit_test(chunks_are_multiples_and_few),
        cmocka_unit_test(absurd_thread_counts_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

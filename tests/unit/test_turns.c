/* The engine lends its device between steps: serving goes on, texts stay the same, nobody works beside another. */
#include "engine/engine.h"

#include "tests/support/answer.h"
#include "tests/support/check.h"
#include "tests/support/rig.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

static const int32_t prompt[] = {1, 300, 17, 401, 88, 259, 260, 511};

static struct engine_request request_of(int max_tokens)
{
    struct engine_request r = {.prompt = prompt, .prompt_count = 8, .sampling = sampling_greedy(max_tokens)};
    r.sampling.ignore_eos = true;
    return r;
}

struct borrower {
    struct engine *engine;
    pthread_t thread;
    atomic_bool stop;
    atomic_int turns;      /* begun */
    atomic_int *inside;    /* how many have the device: one at most */
    atomic_bool *crowded;  /* more did */
};

/* What a borrower does between two looks at the engine: an op's worth of time. */
static void work(const struct borrower *b)
{
    if (atomic_fetch_add(b->inside, 1) > 0) atomic_store(b->crowded, true);
    struct timespec t = {.tv_nsec = 200000};
    nanosleep(&t, NULL);
    atomic_fetch_sub(b->inside, 1);
}

/* One turn for its whole life, given back whenever the engine wants it. */
static void *borrow(void *arg)
{
    struct borrower *b = arg;
    struct engine_turn *turn;
    assert_int_equal(engine_turn_open(b->engine, &turn), ST_OK);
    assert_int_equal(engine_turn_begin(turn), ST_OK);
    while (!atomic_load(&b->stop)) {
        work(b);
        atomic_fetch_add(&b->turns, 1);
        assert_int_equal(engine_turn_continue(turn), ST_OK);
    }
    engine_turn_end(turn);
    engine_turn_close(turn);
    return NULL;
}

static void borrowers_start(struct borrower *b, int count, struct engine *e, atomic_int *inside,
                            atomic_bool *crowded)
{
    for (int i = 0; i < count; i++) {
        b[i] = (struct borrower){.engine = e, .inside = inside, .crowded = crowded};
        assert_int_equal(pthread_create(&b[i].thread, NULL, borrow, &b[i]), 0);
    }
    for (int i = 0; i < count; i++) /* all get turns, also with nothing to serve */
        while (atomic_load(&b[i].turns) < 3) work(&(struct borrower){.inside = &(atomic_int){0}});
}

static void borrowers_stop(struct borrower *b, int count)
{
    for (int i = 0; i < count; i++) atomic_store(&b[i].stop, true);
    for (int i = 0; i < count; i++) pthread_join(b[i].thread, NULL);
}

static void test_serving_goes_on(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){.turn_seconds = 0.001});
    struct engine_request r = request_of(30);
    struct answer *alone = answer_of(rig.engine, &r);

    atomic_int inside = 0;
    atomic_bool crowded = false;
    struct borrower borrower[2];
    borrowers_start(borrower, 2, rig.engine, &inside, &crowded);
    int before[2] = {atomic_load(&borrower[0].turns), atomic_load(&borrower[1].turns)};
    for (int i = 0; i < 3; i++) { /* would wait for ever if the device did not come back */
        struct answer *beside = answer_of(rig.engine, &r);
        assert_true(answer_equal(alone, beside));
        answer_free(beside);
    }
    for (int i = 0; i < 2; i++) assert_true(atomic_load(&borrower[i].turns) > before[i]);
    borrowers_stop(borrower, 2);
    assert_false(atomic_load(&crowded));
    answer_free(alone);
    rig_close(&rig);
}

/* Cancelling is seen within an op too. */
static void test_cancel_is_seen(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){.turn_seconds = 60});
    atomic_int inside = 0;
    atomic_bool crowded = false;
    struct borrower borrower;
    borrowers_start(&borrower, 1, rig.engine, &inside, &crowded);
    struct engine_request r = request_of(200);
    struct answer *a = answer_new(rig.engine);
    assert_int_equal(answer_ask(a, &r, NULL), ST_OK);
    answer_wait_admitted(a);
    engine_cancel(rig.engine, a->id);
    answer_wait(a);
    assert_int_equal(a->finish, FINISH_CANCELLED);
    borrowers_stop(&borrower, 1);
    answer_free(a);
    rig_close(&rig);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_serving_goes_on),
        cmocka_unit_test(test_cancel_is_seen),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

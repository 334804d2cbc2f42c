/* What a pass computes does not depend on how: on memory, threads, tiles of rows, or serving meanwhile. */
#include "tests/support/answer.h"
#include "tests/support/check.h"
#include "tests/support/train_case.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

static struct train_case cases[TRAIN_CASES_MAX];
static int case_count;

static int group_setup(void **state)
{
    (void)state;
    case_count = train_cases_read("cases", cases);
    return 0;
}

static struct pass *pass_of(const struct train_rig *r, size_t keep_bytes)
{
    struct pass *p;
    assert_int_equal(pass_open(r->rig.engine, r->transposed, r->params, TRAIN_ROWS_MAX, TRAIN_ROWS_MAX, keep_bytes,
                               &p),
                     ST_OK);
    return p;
}

/* One backward pass with so much memory for layers' insides; malloc'd gradients. */
static float *gradients(const struct train_case *c, struct train_rig *r, size_t keep_bytes)
{
    struct pass *pass = pass_of(r, keep_bytes);
    struct pass_result got;
    struct pass_batch batch = pass_batch_of(&c->batch[0]);
    assert_int_equal(pass_backward(pass, &batch, &c->loss, NULL, &got), ST_OK);
    pass_close(pass);
    float *grad = train_rig_read(r, r->params->grad);
    float *zero = calloc(r->params->count, sizeof *zero);
    train_rig_write(r, r->params->grad, zero);
    free(zero);
    return grad;
}

static void test_memory_and_threads(void **state)
{
    (void)state;
    for (int i = 0; i < case_count; i++) {
        struct train_rig one = train_rig_open(&cases[i], CPU_LEVEL_BEST, 1);
        struct train_rig three = train_rig_open(&cases[i], CPU_LEVEL_BEST, 3);
        size_t bytes = one.params->count * sizeof(float);
        float *first = gradients(&cases[i], &one, 0);
        /* The rig's own pass has taken TRAIN_KEEP_BYTES or less. */
        static const size_t keep[] = {0, 2 * TRAIN_KEEP_BYTES, (size_t)1 << 30};
        for (size_t k = 0; k < sizeof keep / sizeof *keep; k++) {
            float *again = gradients(&cases[i], &one, keep[k]), *threads = gradients(&cases[i], &three, keep[k]);
            assert_memory_equal(first, again, bytes);
            assert_memory_equal(first, threads, bytes);
            free(again);
            free(threads);
        }
        free(first);
        train_rig_close(&three);
        train_rig_close(&one);
    }
}

/* Passes share what may be kept: the first takes it, and leaves it to the next when it closes. */
static void test_shared_memory(void **state)
{
    (void)state;
    struct train_rig r = train_rig_open(&cases[0], CPU_LEVEL_BEST, 1);
    pass_close(r.pass);
    struct pass *none = pass_of(&r, 0), *first = pass_of(&r, TRAIN_KEEP_BYTES), *second = pass_of(&r, TRAIN_KEEP_BYTES);
    size_t least = pass_bytes(none), most = pass_bytes(first);
    assert_true(most > least && most - least <= TRAIN_KEEP_BYTES);
    assert_true(pass_bytes(second) < most && most - least + (pass_bytes(second) - least) <= TRAIN_KEEP_BYTES);
    pass_close(second);
    pass_close(first);
    r.pass = pass_of(&r, TRAIN_KEEP_BYTES);
    assert_int_equal(pass_bytes(r.pass), most);
    pass_close(none);
    train_rig_close(&r);
}

/* --- beside serving --- */

struct stream {
    struct engine *engine;
    pthread_t thread;
    atomic_bool stop;
    int count; /* answers that were equal to the first */
};

static void *stream_run(void *arg)
{
    struct stream *s = arg;
    static const int32_t prompt[] = {1, 300, 17, 401, 88};
    struct engine_request r = {.prompt = prompt, .prompt_count = 5, .sampling = sampling_greedy(12)};
    r.sampling.ignore_eos = true;
    struct answer *first = answer_of(s->engine, &r);
    do {
        struct answer *a = answer_of(s->engine, &r);
        assert_true(answer_equal(first, a));
        answer_free(a);
        s->count++;
    } while (!atomic_load(&s->stop));
    answer_free(first);
    return NULL;
}

static void test_beside_serving(void **state)
{
    (void)state;
    const struct train_case *c = &cases[0];
    struct train_rig r = train_rig_open(c, CPU_LEVEL_BEST, 2);
    float *quiet = gradients(c, &r, 0);
    struct stream s = {.engine = r.rig.engine};
    assert_int_equal(pthread_create(&s.thread, NULL, stream_run, &s), 0);
    for (int i = 0; i < 3; i++) {
        float *busy = gradients(c, &r, 0);
        assert_memory_equal(quiet, busy, r.params->count * sizeof *quiet);
        free(busy);
    }
    atomic_store(&s.stop, true);
    pthread_join(s.thread, NULL);
    assert_true(s.count > 0);
    free(quiet);
    train_rig_close(&r);
}

static void test_cancelled(void **state)
{
    (void)state;
    struct train_rig r = train_rig_open(&cases[0], CPU_LEVEL_BEST, 1);
    struct pass_batch batch = pass_batch_of(&cases[0].batch[0]);
    struct pass_result got;
    atomic_bool cancel = true;
    assert_int_equal(pass_backward(r.pass, &batch, NULL, &cancel, &got), ST_CANCELLED);
    cancel = false;
    assert_int_equal(pass_backward(r.pass, &batch, NULL, &cancel, &got), ST_OK); /* the device was given back */
    train_rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_memory_and_threads),
        cmocka_unit_test(test_shared_memory),
        cmocka_unit_test(test_beside_serving),
        cmocka_unit_test(test_cancelled),
    };
    return cmocka_run_group_tests(tests, group_setup, NULL);
}

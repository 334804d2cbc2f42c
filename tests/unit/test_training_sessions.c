/* Step-wise training: sessions. */
#include "tests/support/check.h"
#include "tests/support/train_service.h"
#include "tests/support/train_set.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

static void signal_done(struct session_call *c) { atomic_store((atomic_bool *)c->ctx, true); }

static enum status call(struct train_service *s, enum session_action action, const struct train_settings *settings,
                        const struct strbuf *examples, struct session_call *c)
{
    atomic_bool done = false;
    *c = (struct session_call){.action = action,
                               .tenant = TENANT,
                               .adapter = "a",
                               .settings = *settings,
                               .done = signal_done,
                               .ctx = &done};
    if (examples) {
        c->examples = examples->data;
        c->examples_size = examples->size;
    }
    session_start(s->jobs, c);
    while (!atomic_load(&done)) train_service_pause(1);
    return c->result.status;
}

/* Some steps; the loss before the last one. */
static double loop(struct train_service *s, const struct train_settings *settings, const struct strbuf *examples,
                   int steps)
{
    struct session_call c;
    double loss = 0;
    for (int i = 0; i < steps; i++) {
        assert_ok(call(s, SESSION_FORWARD_BACKWARD, settings, examples, &c), c.result.error);
        loss = c.result.objective;
        session_call_release(&c);
        assert_ok(call(s, SESSION_OPTIM_STEP, settings, NULL, &c), c.result.error);
        assert_true(c.result.grad_norm > 0);
    }
    return loss;
}

static void a_session_trains_and_publishes(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct session_call c;
    struct error err = {0};
    struct train_settings settings = train_set_settings();
    train_service_start(&s);
    train_set_text(&examples);
    assert_int_equal(call(&s, SESSION_OPTIM_STEP, &settings, NULL, &c), ST_CONFLICT);
    assert_ok(call(&s, SESSION_FORWARD_BACKWARD, &settings, &examples, &c), c.result.error);
    assert_true(c.result.opened && c.result.optim_steps == 0 && c.result.version_before[0]);
    assert_int_equal(c.result.sequence_count, TRAIN_SET_EXAMPLES);
    assert_int_equal(c.result.sequences[0].count, 5);
    assert_true(c.result.sequences[3].logprob[4] < 0 && c.result.sequences[3].logprob[0] == 0);
    double first = c.result.objective, mean = 0;
    for (int i = 0; i < TRAIN_SET_EXAMPLES; i++)
        for (int k = 2; k < 5; k++)
            mean -= (double)c.result.sequences[i].logprob[k] / (3 * TRAIN_SET_EXAMPLES);
    assert_float_equal(first, mean, 1e-6); /* over batches, it is still the mean over all */
    session_call_release(&c);
    assert_ok(call(&s, SESSION_OPTIM_STEP, &settings, NULL, &c), c.result.error);
    assert_int_equal(call(&s, SESSION_OPTIM_STEP, &settings, NULL, &c),
                     ST_CONFLICT); /* the gradients are used up */
    assert_true(loop(&s, &settings, &examples, 6) < 0.9 * first);
    train_service_versions(&s, 1);
    assert_ok(call(&s, SESSION_PUBLISH, &settings, NULL, &c), c.result.error);
    assert_int_equal(c.result.optim_steps, 7);
    train_service_versions(&s, 2);
    assert_ok(session_drop(s.jobs, TENANT, "a", &err), err);
    assert_int_equal(session_drop(s.jobs, TENANT, "a", &err), ST_NOT_FOUND);
    assert_int_equal(call(&s, SESSION_PUBLISH, &settings, NULL, &c), ST_CONFLICT);
    strbuf_release(&examples);
    train_service_stop(&s);
}

static void a_session_survives_on_disk(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct session_call c;
    struct train_settings settings = train_set_settings();
    char version[2][ADAPTER_VERSION_HEX + 1];
    train_set_text(&examples);
    for (int round = 0; round < 2; round++) {
        train_service_start(&s);
        (void)loop(&s, &settings, &examples, 3);
        if (round) {
            train_service_close(&s);
            train_service_open(&s, (struct jobs_config){.session_seconds = 0.001});
            train_service_pause(1500); /* it leaves memory, and comes back */
        }
        (void)loop(&s, &settings, &examples, 2);
        assert_ok(call(&s, SESSION_PUBLISH, &settings, NULL, &c), c.result.error);
        memcpy(version[round], c.result.put.version, sizeof version[round]);
        train_service_stop(&s);
    }
    assert_string_equal(version[0], version[1]);
    strbuf_release(&examples);
}

static void a_session_learns_preferences(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf pairs = {0};
    struct session_call c;
    struct train_settings settings = train_set_settings();
    settings.loss = LOSS_DPO;
    train_service_start(&s);
    train_set_pairs(&pairs);
    (void)loop(&s, &settings, &pairs, 5);
    assert_ok(call(&s, SESSION_FORWARD, &settings, &pairs, &c), c.result.error);
    assert_true(c.result.margin > 0.01 && c.result.objective < log(2) && c.result.accuracy > 0.8);
    assert_int_equal(c.result.sequence_count, 2 * TRAIN_SET_EXAMPLES);
    session_call_release(&c);
    strbuf_release(&pairs);
    train_service_stop(&s);
}

static void a_session_tells_its_mistakes(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct session_call c;
    struct train_settings settings = train_set_settings();
    train_service_start(&s);
    strbuf_puts(&examples, "{\"tokens\": [1, 2]}\n{\"tokens\": [1]}\n");
    assert_refused(call(&s, SESSION_FORWARD_BACKWARD, &settings, &examples, &c), ST_INVALID, c.result.error,
                   "examples, line 2: a sequence needs");
    session_call_release(&c);
    settings.loss = LOSS_PPO;
    assert_refused(call(&s, SESSION_FORWARD_BACKWARD, &settings, &examples, &c), ST_INVALID, c.result.error,
                   "examples, line 1: 'logprobs'");
    session_call_release(&c);
    strbuf_release(&examples);
    train_service_stop(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_session_trains_and_publishes),
        cmocka_unit_test(a_session_survives_on_disk),
        cmocka_unit_test(a_session_learns_preferences),
        cmocka_unit_test(a_session_tells_its_mistakes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Each allocation of the engine failing in turn: ST_NOMEM, and nothing left behind. */
#include "engine/engine.h"

#include "engine/sequence.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/answer.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"

static const int32_t prompt[] = {1, 300, 17, 401};

struct stage {
    struct test_path path;
    struct device *device;
    struct engine *engine;
};

static enum status open_attempt(void *ctx)
{
    struct stage *s = ctx;
    struct engine_config config = {.model_path = s->path.text, .device = s->device,
                                   .kv_bytes = 1 << 20, .max_batch = 2, .prefill_chunk = 4};
    struct engine *e;
    enum status st = engine_open(&config, &e, NULL);
    if (!st) engine_close(e);
    return st;
}

static void test_opening(void **state)
{
    struct stage s = {.path = fixture_path("models/mha_untied.gguf")};
    struct cpu_device_config device = {.level = CPU_LEVEL_BEST, .threads = 1};
    (void)state;
    if (!alloc_fail_available()) skip();
    assert_int_equal(cpu_device_open(&device, &s.device, NULL), ST_OK);
    assert_int_equal(open_attempt(&s), ST_OK); /* what is made once and kept is made here */
    /* Not alloc_fail_sweep: PCRE2 gets by without memory for its compiled code. */
    int tried = 0, refused = 0;
    for (bool failed = true; failed;) {
        long before = alloc_live();
        alloc_fail_after(tried++);
        enum status st = open_attempt(&s);
        failed = alloc_fail_stop();
        assert_int_equal(alloc_live(), before);
        assert_true(st == ST_OK || (st == ST_NOMEM && failed));
        refused += st != ST_OK;
    }
    assert_true(refused > 50);
    s.device->ops->close(s.device);
}

static void ignore_event(void *ctx, const struct engine_event *event)
{
    (void)ctx;
    (void)event;
}

/* A request with all that needs memory, and its first token. */
static enum status sequence_attempt(void *ctx)
{
    const struct stage *s = ctx;
    const int32_t end = 2;
    const char *const stop[] = {"abc", "de"};
    const struct logit_bias bias = {300, 1};
    struct sequence_rules rules = {.tokenizer = engine_tokenizer(s->engine),
                                   .shape = engine_shape(s->engine), .lr_width = 1,
                                   .end_tokens = &end, .end_count = 1};
    struct engine_request r = {.prompt = prompt, .prompt_count = 4,
                               .sampling = sampling_greedy(3), .on_event = ignore_event};
    r.sampling.stop = stop;
    r.sampling.stop_count = 2;
    r.sampling.bias = &bias;
    r.sampling.bias_count = 1;
    r.sampling.repetition_penalty = 1.1f;
    r.sampling.prompt_logprobs = 0;

    struct sequence *q;
    struct sampler_scratch *scratch = sampler_scratch_new(rules.shape->vocab);
    if (!scratch) return ST_NOMEM;
    enum status st = sequence_new(&rules, &r, &q, NULL);
    if (!st) {
        float logits[512] = {[300] = 5};
        struct verdict v;
        for (int i = 0; i < 4; i++) {
            sequence_judge(q, scratch, i, logits, &v);
            sequence_take(q, i, &v);
        }
        if (q->ended) st = q->error.status;
        sequence_free(q);
    }
    sampler_scratch_free(scratch);
    return st;
}

static enum status scheduler_attempt(void *ctx)
{
    static const int32_t zeros[40];
    (void)ctx;
    struct scheduler_config c = {2, 2, 4, 10, true};
    struct scheduler *s = scheduler_new(&c);
    if (!s) return ST_NOMEM;
    struct sched_seq q = {.prompt = zeros, .prompt_count = 40, .tokens_max = 50};
    enum status st = scheduler_add(s, &q);
    if (!st && !scheduler_admit(s)) st = ST_NOMEM; /* it waits, and is asked again */
    scheduler_remove(s, &q);
    scheduler_free(s);
    return st;
}

static void test_requests(void **state)
{
    struct stage s = {.path = fixture_path("models/gqa_tied.gguf")};
    struct cpu_device_config device = {.level = CPU_REFERENCE, .threads = 1};
    (void)state;
    if (!alloc_fail_available()) skip();
    assert_int_equal(cpu_device_open(&device, &s.device, NULL), ST_OK);
    struct engine_config config = {.model_path = s.path.text, .device = s.device};
    assert_int_equal(engine_open(&config, &s.engine, NULL), ST_OK);
    assert_true(alloc_fail_sweep(sequence_attempt, &s) > 10);
    assert_true(alloc_fail_sweep(scheduler_attempt, NULL) >= 5);
    engine_close(s.engine);
    s.device->ops->close(s.device);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_opening),
        cmocka_unit_test(test_requests),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

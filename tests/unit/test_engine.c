/* The engine as its users see it: requests in, events out, on small random models. */
#include "engine/engine.h"

#include "tests/support/answer.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"
#include "tests/support/random.h"
#include "tests/support/random_adapter.h"
#include "tests/support/rig.h"
#include "tests/support/teacher.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int32_t some_prompt[] = {1, 300, 17, 401, 88, 259, 260, 511, 3, 42, 377, 90};
#define SOME_PROMPT_COUNT 12

static struct engine_request request_of(int max_tokens)
{
    struct engine_request r = {.prompt = some_prompt, .prompt_count = SOME_PROMPT_COUNT,
                               .sampling = sampling_greedy(max_tokens)};
    r.sampling.ignore_eos = true;
    return r;
}

/* --- numbers, against the forward pass alone --- */

static double log_softmax(const float *l, size_t n, int32_t token)
{
    double max = (double)l[0], sum = 0;
    for (size_t i = 1; i < n; i++) max = fmax(max, (double)l[i]);
    for (size_t i = 0; i < n; i++) sum += exp((double)l[i] - max);
    return (double)l[token] - max - log(sum);
}

static int32_t argmax(const float *l, size_t n)
{
    size_t best = 0;
    for (size_t i = 1; i < n; i++)
        if (l[i] > l[best]) best = i;
    return (int32_t)best;
}

/* Greedy tokens are the teacher's likeliest, and scores of prompt and output its log-softmax. */
static void test_greedy_and_scores(void **state)
{
    (void)state;
    enum { OUTPUT = 40, ALL = SOME_PROMPT_COUNT + OUTPUT };
    struct rig rig = rig_open((struct engine_config){.prefill_chunk = 5});
    struct engine_request r = request_of(OUTPUT);
    r.sampling.logprobs = 3;
    r.sampling.prompt_logprobs = 0;
    struct answer *a = answer_of(rig.engine, &r);
    assert_int_equal(a->finish, FINISH_LENGTH);
    assert_int_equal(a->token_count, OUTPUT);
    assert_int_equal(a->output_tokens, OUTPUT);
    assert_int_equal(a->prompt_tokens, SOME_PROMPT_COUNT);
    assert_true(a->prompt_scored);
    assert_int_equal(a->prompt_logprob_count, SOME_PROMPT_COUNT - 1);
    rig_close(&rig);

    int32_t tokens[ALL];
    memcpy(tokens, some_prompt, sizeof some_prompt);
    memcpy(tokens + SOME_PROMPT_COUNT, a->token, OUTPUT * sizeof *tokens);
    struct teacher t;
    struct device *d = rig_device(CPU_LEVEL_BEST, 1);
    assert_int_equal(teacher_open(rig.path.text, d, ALL, DTYPE_F32, &t, NULL), ST_OK);
    size_t vocab = t.model->shape.vocab;
    float *logits = malloc(ALL * vocab * sizeof *logits);
    assert_int_equal(teacher_run(&t, tokens, ALL, ALL, NULL, 0, logits), ST_OK);
    for (int i = 0; i + 1 < ALL; i++) {
        const float *row = logits + (size_t)i * vocab;
        bool output = i + 1 >= SOME_PROMPT_COUNT;
        const struct token_logprob *lp =
            output ? &a->logprob[i + 1 - SOME_PROMPT_COUNT] : &a->prompt_logprob[i];
        assert_int_equal(lp->token, tokens[i + 1]);
        if (output) assert_int_equal(tokens[i + 1], argmax(row, vocab));
        /* the same logits bit for bit; log-softmax in fp32 and in double */
        assert_true(fabs((double)lp->logprob - log_softmax(row, vocab, tokens[i + 1])) < 3e-6);
        assert_int_equal(lp->top_count, output ? 3 : 0);
        if (output) assert_int_equal(lp->top[0].token, tokens[i + 1]);
    }
    free(logits);
    teacher_close(&t);
    d->ops->close(d);
    answer_free(a);
}

/* --- batch invariance --- */

#define CROWD 17
#define ADAPTERS 8

static void adapters_make(struct rig *rig, struct lr_adapter *adapter)
{
    static const enum gate_rule rule[] = {GATE_TOPK, GATE_NONE, GATE_DENSE, GATE_TOPK_RAW};
    for (int i = 0; i < ADAPTERS; i++) {
        enum gate_rule g = rule[i % 4];
        struct random_adapter_config c = {
            .seed = 50 + (uint64_t)i, .projections = i % 3 == 0 ? 0x7f : 0x55u >> (i % 2),
            .experts = g == GATE_NONE ? 1 : 4 + i % 3, .rank = 2 + i, .top_k = 2,
            .rule = g, .scale = 0.5f};
        assert_int_equal(random_adapter_make(rig->device, engine_shape(rig->engine), &c,
                                             &adapter[i]), ST_OK);
    }
}

/* A crowd of requests that differ in prompt, sampling and adapters. */
struct crowd {
    int32_t prompt[CROWD][64];
    struct lr_member members[CROWD][2];
    struct engine_request request[CROWD];
};

static void crowd_make(struct crowd *c, const struct lr_adapter *adapter)
{
    struct test_random r = {99};
    for (int i = 0; i < CROWD; i++) {
        size_t n = 1 + random_below(&r, 60);
        for (size_t k = 0; k < n; k++) c->prompt[i][k] = (int32_t)random_below(&r, 512);
        struct engine_request *q = &c->request[i];
        *q = request_of(3 + (int)random_below(&r, 10));
        q->prompt = c->prompt[i];
        q->prompt_count = n;
        q->sampling.logprobs = 2;
        q->sampling.prompt_logprobs = i % 4 == 1 ? 1 : -1;
        q->sampling.temperature = i % 2 ? 0.9f : 0;
        q->sampling.top_p = i % 3 ? 1 : 0.9f;
        q->sampling.seed = (uint64_t)i;
        q->sampling.repetition_penalty = i % 5 ? 1 : 1.3f;
        q->priority = i % 2;
        if (i % 4 == 0) continue; /* the bare base */
        c->members[i][0] = (struct lr_member){&adapter[i % ADAPTERS], 1};
        c->members[i][1] = (struct lr_member){&adapter[(i + 3) % ADAPTERS], i % 6 ? 0 : -0.5f};
        q->members = c->members[i];
        q->member_count = 2;
        q->set_key.word[0] = (uint64_t)(i % ADAPTERS) + (i % 6 ? 1 : 101);
    }
}

static void crowd_run(struct engine *e, struct crowd *c, bool alone, struct answer **out)
{
    for (int i = 0; i < CROWD; i++) {
        if (alone) {
            out[i] = answer_of(e, &c->request[i]);
            continue;
        }
        out[i] = answer_new(e);
        assert_int_equal(answer_ask(out[i], &c->request[i], NULL), ST_OK);
    }
    for (int i = 0; i < CROWD; i++) answer_wait(out[i]);
}

static void invariance_check(enum cpu_level level, const char *model)
{
    static const struct { int chunk, threads, max_batch; bool alone; } way[] = {
        {128, 1, 1, true}, {128, 2, 64, false}, {16, 2, 5, false}, {3, 1, 64, false},
        {1, 2, 64, false}, {16, 2, 1, true},
    };
    struct answer *want[CROWD];
    for (size_t w = 0; w < sizeof way / sizeof *way; w++) {
        struct engine_config config = {.prefill_chunk = way[w].chunk, .max_batch = way[w].max_batch};
        struct rig rig = rig_open_at(model, level, way[w].threads, config);
        struct lr_adapter adapter[ADAPTERS];
        struct answer *got[CROWD];
        struct crowd *c = calloc(1, sizeof *c);
        adapters_make(&rig, adapter);
        crowd_make(c, adapter);
        crowd_run(rig.engine, c, way[w].alone, got);
        for (int i = 0; i < CROWD; i++) {
            if (w == 0) want[i] = got[i];
            else if (!answer_equal(got[i], want[i]))
                fail_msg("%s, %s: request %d differs (chunk %d, %d threads)", model,
                         rig.device->name, i, way[w].chunk, way[w].threads);
            if (w > 0) answer_free(got[i]);
        }
        engine_close(rig.engine);
        for (int i = 0; i < ADAPTERS; i++) random_adapter_release(rig.device, &adapter[i]);
        rig.device->ops->close(rig.device);
        free(c);
    }
    for (int i = 0; i < CROWD; i++) answer_free(want[i]);
}

static void test_batch_invariance(void **state)
{
    (void)state;
    for (int level = CPU_REFERENCE; level < CPU_LEVEL_COUNT; level++)
        if (cpu_level_usable((enum cpu_level)level))
            invariance_check((enum cpu_level)level, "models/gqa_tied.gguf");
    invariance_check(cpu_level_supported(), "models/mha_untied.gguf");
}

/* Two sets that share a key by mistake still get their own adapters. */
static void test_equal_keys_of_unequal_sets(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){.no_prefix_cache = true});
    struct lr_adapter adapter[ADAPTERS];
    struct lr_member member[2] = {{&adapter[0], 1}, {&adapter[1], 1}};
    struct engine_request r[2] = {request_of(40), request_of(40)};
    struct answer *want[2], *got[2];
    adapters_make(&rig, adapter);
    for (int i = 0; i < 2; i++) {
        r[i].members = &member[i];
        r[i].member_count = 1;
        r[i].set_key.word[0] = 7;
        want[i] = answer_of(rig.engine, &r[i]);
    }
    for (int i = 0; i < 2; i++) {
        got[i] = answer_new(rig.engine);
        assert_int_equal(answer_ask(got[i], &r[i], NULL), ST_OK);
    }
    assert_false(answer_equal(want[0], want[1]));
    for (int i = 0; i < 2; i++) {
        answer_wait(got[i]);
        assert_true(answer_equal(got[i], want[i]));
        answer_free(got[i]);
        answer_free(want[i]);
    }
    engine_close(rig.engine);
    for (int i = 0; i < ADAPTERS; i++) random_adapter_release(rig.device, &adapter[i]);
    rig.device->ops->close(rig.device);
}

static void test_adapters_change_the_answer(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){0});
    struct lr_adapter adapter[ADAPTERS];
    adapters_make(&rig, adapter);
    struct engine_request r = request_of(20);
    struct answer *base = answer_of(rig.engine, &r);
    struct lr_member member = {&adapter[0], 1};
    r.members = &member;
    r.member_count = 1;
    r.set_key.word[0] = 7;
    struct answer *adapted = answer_of(rig.engine, &r);
    member.weight = 0; /* exactly the base */
    struct answer *zero = answer_of(rig.engine, &r);
    assert_false(answer_equal(base, adapted));
    assert_true(answer_equal(base, zero));
    answer_free(base);
    answer_free(adapted);
    answer_free(zero);
    engine_close(rig.engine);
    for (int i = 0; i < ADAPTERS; i++) random_adapter_release(rig.device, &adapter[i]);
    rig.device->ops->close(rig.device);
}

/* --- one request's trouble is its own --- */

static void test_overflow_ends_its_sequence_only(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){0});
    struct lr_adapter broken;
    struct random_adapter_config c = {.projections = 1u << PROJ_DOWN, .experts = 1, .rank = 2,
                                      .top_k = 1, .rule = GATE_NONE, .scale = INFINITY};
    assert_int_equal(random_adapter_make(rig.device, engine_shape(rig.engine), &c, &broken), ST_OK);
    struct engine_request good = request_of(30), bad = good;
    struct lr_member member = {&broken, 1};
    bad.members = &member;
    bad.member_count = 1;
    bad.set_key.word[0] = 1;
    struct answer *want = answer_of(rig.engine, &good);
    struct answer *got = answer_new(rig.engine), *failed = answer_new(rig.engine);
    assert_int_equal(answer_ask(got, &good, NULL), ST_OK);
    assert_int_equal(answer_ask(failed, &bad, NULL), ST_OK);
    answer_wait(got);
    answer_wait(failed);
    assert_true(answer_equal(got, want));
    assert_int_equal(failed->finish, FINISH_ERROR);
    assert_int_equal(failed->error.status, ST_REJECTED);
    assert_non_null(strstr(failed->error.message, "not finite"));
    assert_int_equal(failed->token_count, 0);
    answer_free(want);
    answer_free(got);
    answer_free(failed);
    engine_close(rig.engine);
    random_adapter_release(rig.device, &broken);
    rig.device->ops->close(rig.device);
}

static void refused(struct engine *e, struct engine_request *r, enum status st, const char *word)
{
    struct answer *a = answer_new(e);
    struct error err = {0};
    assert_int_equal(answer_ask(a, r, &err), st);
    assert_int_equal(err.status, st);
    if (!strstr(err.message, word)) fail_msg("'%s' does not say '%s'", err.message, word);
    assert_false(a->done);
    answer_free(a);
}

static void test_bad_requests(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){.lr_width = 100});
    struct engine_request r = request_of(4);
    static const int32_t outside[] = {1, 512}, negative[] = {-1};
    static int32_t lengthy[512];
#define REFUSED(change, word)                    \
    do {                                         \
        r = request_of(4);                       \
        change;                                  \
        refused(rig.engine, &r, ST_INVALID, word); \
    } while (0)
    REFUSED(r.prompt_count = 0, "empty");
    REFUSED((r.prompt = outside, r.prompt_count = 2), "512");
    REFUSED((r.prompt = negative, r.prompt_count = 1), "-1");
    REFUSED((r.prompt = lengthy, r.prompt_count = 512), "context");
    REFUSED(r.sampling.temperature = -1, "temperature");
    REFUSED(r.sampling.temperature = NAN, "temperature");
    REFUSED(r.sampling.top_p = 1.5f, "top_p");
    REFUSED(r.sampling.min_p = -0.5f, "min_p");
    REFUSED(r.sampling.repetition_penalty = 0, "repetition_penalty");
    REFUSED(r.sampling.frequency_penalty = INFINITY, "frequency_penalty");
    REFUSED(r.sampling.max_tokens = -1, "max_tokens");
    REFUSED(r.sampling.logprobs = ENGINE_LOGPROBS_MAX + 1, "logprobs");
    const char *const stop[] = {"ok", ""}, *const broken[] = {"\xFF"};
    REFUSED((r.sampling.stop = stop, r.sampling.stop_count = 2), "stop string 1");
    REFUSED((r.sampling.stop = broken, r.sampling.stop_count = 1), "UTF-8");
    REFUSED((r.sampling.stop_token_ids = outside, r.sampling.stop_token_count = 2), "stop_token_ids");
    const struct logit_bias bias[] = {{600, 1}}, infinite[] = {{6, INFINITY}};
    REFUSED((r.sampling.bias = bias, r.sampling.bias_count = 1), "logit_bias");
    REFUSED((r.sampling.bias = infinite, r.sampling.bias_count = 1), "logit_bias");
    struct lr_adapter wide = {.width = 101, .layers = 2}, other = {.width = 1, .layers = 3};
    struct lr_member members[ENGINE_SET_MAX + 1] = {{&wide, 1}};
    REFUSED((r.members = members, r.member_count = ENGINE_SET_MAX + 1), "at most");
    r = request_of(4);
    r.members = members;
    r.member_count = 1;
    refused(rig.engine, &r, ST_REJECTED, "101");
    members[0].adapter = &other;
    refused(rig.engine, &r, ST_REJECTED, "layers");

    r = request_of(4); /* and it still works */
    answer_free(answer_of(rig.engine, &r));
    rig_close(&rig);
}

/* --- capacity --- */

static void test_context_is_filled_to_the_end(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){.context_length = 40});
    struct engine_request r = request_of(1000);
    struct answer *a = answer_of(rig.engine, &r);
    assert_int_equal(a->finish, FINISH_LENGTH);
    assert_int_equal(a->output_tokens, 40 - SOME_PROMPT_COUNT);
    answer_free(a);
    rig_close(&rig);
}

/* Room for two pages, that is 32 positions: the context shrinks, and requests run one by one. */
static void test_small_cache(void **state)
{
    (void)state;
    size_t page = kv_page_bytes(DTYPE_F32, 2, 2, 16);
    struct rig rig = rig_open((struct engine_config){.kv_bytes = 2 * page + 1});
    assert_int_equal(engine_shape(rig.engine)->context_length, 32);
    struct engine_request r = request_of(10);
    struct answer *want = answer_of(rig.engine, &r), *got[6];
    for (int i = 0; i < 6; i++) {
        got[i] = answer_new(rig.engine);
        assert_int_equal(answer_ask(got[i], &r, NULL), ST_OK);
    }
    for (int i = 0; i < 6; i++) {
        answer_wait(got[i]);
        assert_true(answer_equal(got[i], want));
        answer_free(got[i]);
    }
    answer_free(want);
    rig_close(&rig);
}

static void test_full_queue(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){.max_batch = 1, .max_queue = 2});
    struct engine_request r = request_of(450);
    struct answer *a[3];
    for (int i = 0; i < 3; i++) {
        a[i] = answer_new(rig.engine);
        assert_int_equal(answer_ask(a[i], &r, NULL), ST_OK);
        if (i == 0) answer_wait_admitted(a[0]);
    }
    refused(rig.engine, &r, ST_FULL, "waiting");
    engine_cancel(rig.engine, a[1]->id); /* a waiting one */
    answer_wait(a[1]);
    assert_int_equal(a[1]->finish, FINISH_CANCELLED);
    assert_false(a[1]->admitted);
    engine_cancel(rig.engine, a[0]->id);
    engine_cancel(rig.engine, a[2]->id);
    for (int i = 0; i < 3; i++) {
        answer_wait(a[i]);
        answer_free(a[i]);
    }
    rig_close(&rig);
}

static void pages_free_check(struct engine *e)
{
    struct engine_stats s;
    do engine_stats(e, &s); /* shown when the step that freed them is over */
    while (s.running > 0 || s.kv_pages_used > 0);
    assert_int_equal(s.waiting, 0);
}

static void test_cancel(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){0});
    struct engine_request r = request_of(400);
    struct answer *a = answer_new(rig.engine);
    a->cancel_after = 3;
    assert_int_equal(answer_ask(a, &r, NULL), ST_OK);
    answer_wait(a);
    assert_int_equal(a->finish, FINISH_CANCELLED);
    assert_int_equal(a->token_count, 3); /* within the step */
    engine_cancel(rig.engine, a->id);    /* finished: ignored */
    engine_cancel(rig.engine, 12345);
    pages_free_check(rig.engine);
    answer_free(a);
    rig_close(&rig);
}

static void test_close_ends_everything(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){.max_batch = 2});
    struct engine_request r = request_of(400);
    struct answer *a[6];
    for (int i = 0; i < 6; i++) {
        a[i] = answer_new(rig.engine);
        assert_int_equal(answer_ask(a[i], &r, NULL), ST_OK);
    }
    answer_wait_admitted(a[0]);
    rig_close(&rig);
    for (int i = 0; i < 6; i++) {
        assert_true(a[i]->done);
        assert_int_equal(a[i]->finish, FINISH_CANCELLED);
        answer_free(a[i]);
    }
}

/* --- what ends a text --- */

static void test_stop_string(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){0});
    struct engine_request r = request_of(60);
    struct answer *whole = answer_of(rig.engine, &r);
    /* Two characters from the middle of what it says; the first place they stand at. */
    size_t at = 0;
    while (at < whole->text.size / 2 || (whole->text.data[at] & 0x80) ||
           (whole->text.data[at + 1] & 0x80)) at++;
    char word[3] = {whole->text.data[at], whole->text.data[at + 1], 0};
    at = (size_t)(strstr(whole->text.data, word) - whole->text.data);
    const char *const stop[] = {"never said by chance", word};
    r.sampling.stop = stop;
    r.sampling.stop_count = 2;
    for (int include = 0; include < 2; include++) {
        r.sampling.include_stop = include;
        struct answer *a = answer_of(rig.engine, &r);
        assert_int_equal(a->finish, FINISH_STOP);
        assert_string_equal(a->stop_string, word);
        assert_int_equal(a->stop_token, -1);
        assert_int_equal(a->text.size, at + (include ? 2 : 0));
        assert_memory_equal(a->text.data, whole->text.data, a->text.size);
        answer_free(a);
    }
    answer_free(whole);
    rig_close(&rig);
}

static void test_stop_tokens_and_min_tokens(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){0});
    struct engine_request r = request_of(30);
    struct answer *whole = answer_of(rig.engine, &r);
    int32_t stop = whole->token[7];
    int first = 0;
    while (whole->token[first] != stop) first++;
    r.sampling.stop_token_ids = &stop;
    r.sampling.stop_token_count = 1;
    struct answer *a = answer_of(rig.engine, &r);
    assert_int_equal(a->finish, FINISH_STOP);
    assert_int_equal(a->stop_token, stop);
    assert_int_equal(a->token_count, first);
    assert_int_equal(a->output_tokens, first + 1);
    answer_free(a);

    r.sampling.min_tokens = 20;
    a = answer_of(rig.engine, &r);
    assert_true(a->token_count >= 20);
    for (int i = 0; i < 20; i++) assert_int_not_equal(a->token[i], stop);
    answer_free(a);

    /* The model's own end, made likely. */
    const struct logit_bias end = {tokenizer_eos(engine_tokenizer(rig.engine)), 1000};
    r = request_of(30);
    r.sampling.bias = &end;
    r.sampling.bias_count = 1;
    a = answer_of(rig.engine, &r);
    assert_int_equal(a->finish, FINISH_LENGTH); /* ignore_eos */
    assert_int_equal(a->token[29], end.token);
    answer_free(a);
    r.sampling.ignore_eos = false;
    r.sampling.min_tokens = 2;
    a = answer_of(rig.engine, &r);
    assert_int_equal(a->finish, FINISH_STOP);
    assert_int_equal(a->stop_token, end.token);
    assert_int_equal(a->token_count, 2);
    answer_free(a);
    answer_free(whole);
    rig_close(&rig);
}

static void test_no_output_wanted(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){.prefill_chunk = 4});
    struct engine_request r = request_of(0);
    r.sampling.prompt_logprobs = 2;
    struct answer *a = answer_of(rig.engine, &r);
    assert_int_equal(a->finish, FINISH_LENGTH);
    assert_int_equal(a->output_tokens, 0);
    assert_int_equal(a->prompt_logprob_count, SOME_PROMPT_COUNT - 1);
    answer_free(a);
    r.prompt_count = 1;
    a = answer_of(rig.engine, &r);
    assert_true(a->prompt_scored);
    assert_int_equal(a->prompt_logprob_count, 0);
    answer_free(a);
    rig_close(&rig);
}

static void test_seeds(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){0});
    struct engine_request r = request_of(30);
    r.sampling.temperature = 1;
    r.sampling.seed = 1;
    struct answer *a = answer_of(rig.engine, &r), *b = answer_of(rig.engine, &r);
    r.sampling.seed = 2;
    struct answer *c = answer_of(rig.engine, &r);
    assert_true(answer_equal(a, b));
    assert_false(answer_equal(a, c));
    answer_free(a);
    answer_free(b);
    answer_free(c);
    rig_close(&rig);
}

/* --- trouble with the device --- */

static enum status sync_fails(struct device *d)
{
    (void)d;
    return ST_DEVICE;
}

static void test_device_failure_ends_everything(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){.max_batch = 2});
    const struct device_ops *ops = rig.device->ops;
    struct device_ops failing = *ops;
    failing.sync = sync_fails;
    rig.device->ops = &failing; /* the engine thread sleeps; submitting publishes this */
    struct engine_request r = request_of(5);
    struct answer *a = answer_of(rig.engine, &r);
    assert_int_equal(a->finish, FINISH_ERROR);
    assert_int_equal(a->error.status, ST_DEVICE);
    answer_free(a);
    refused(rig.engine, &r, ST_DEVICE, "failed");
    rig_close(&rig);
}

/* --- many threads --- */

struct client {
    struct engine *engine;
    uint64_t seed;
    pthread_t thread;
};

static void *client_main(void *arg)
{
    struct client *c = arg;
    struct test_random r = {c->seed};
    for (int i = 0; i < 12; i++) {
        struct engine_request q = request_of(1 + (int)random_below(&r, 20));
        struct answer *a = answer_new(c->engine);
        a->cancel_after = (int)random_below(&r, 30);
        CHECK(answer_ask(a, &q, NULL) == ST_OK);
        if (random_below(&r, 4) == 0) engine_cancel(c->engine, a->id);
        struct engine_stats s;
        engine_stats(c->engine, &s);
        answer_wait(a);
        answer_free(a);
    }
    return NULL;
}

static void test_many_threads(void **state)
{
    (void)state;
    struct rig rig = rig_open((struct engine_config){.max_batch = 3});
    struct client client[4];
    for (int i = 0; i < 4; i++) {
        client[i] = (struct client){.engine = rig.engine, .seed = (uint64_t)i};
        assert_int_equal(pthread_create(&client[i].thread, NULL, client_main, &client[i]), 0);
    }
    for (int i = 0; i < 4; i++) pthread_join(client[i].thread, NULL);
    pages_free_check(rig.engine);
    rig_close(&rig);
}

/* --- the real model --- */

static void test_real_model(void **state)
{
    (void)state;
    if (!test_model_present()) skip();
    struct rig rig = {.device = rig_device(CPU_LEVEL_BEST, 2), .path = test_model_path()};
    struct engine_config config = {.model_path = rig.path.text, .device = rig.device,
                                   .kv_bytes = 64 << 20};
    assert_int_equal(engine_open(&config, &rig.engine, NULL), ST_OK);
    struct token_list prompt = {0};
    const char text[] = "The capital of France is";
    assert_int_equal(tokenizer_encode(engine_tokenizer(rig.engine), text, sizeof text - 1, 0, &prompt),
                     ST_OK);
    struct engine_request r = {.prompt = prompt.ids, .prompt_count = prompt.count,
                               .sampling = sampling_greedy(8)};
    struct answer *a = answer_of(rig.engine, &r);
    assert_memory_equal(a->text.data, " Paris", 6);
    answer_free(a);
    token_list_release(&prompt);
    rig_close(&rig);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy_and_scores),
        cmocka_unit_test(test_batch_invariance),
        cmocka_unit_test(test_equal_keys_of_unequal_sets),
        cmocka_unit_test(test_adapters_change_the_answer),
        cmocka_unit_test(test_overflow_ends_its_sequence_only),
        cmocka_unit_test(test_bad_requests),
        cmocka_unit_test(test_context_is_filled_to_the_end),
        cmocka_unit_test(test_small_cache),
        cmocka_unit_test(test_full_queue),
        cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_close_ends_everything),
        cmocka_unit_test(test_stop_string),
        cmocka_unit_test(test_stop_tokens_and_min_tokens),
        cmocka_unit_test(test_no_output_wanted),
        cmocka_unit_test(test_seeds),
        cmocka_unit_test(test_device_failure_ends_everything),
        cmocka_unit_test(test_many_threads),
        cmocka_unit_test(test_real_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* The engine with and without its prefix cache: the same bits, with less to compute. */
#include "engine/engine.h"

#include "tests/support/answer.h"
#include "tests/support/check.h"
#include "tests/support/random.h"
#include "tests/support/random_adapter.h"
#include "tests/support/rig.h"

#include <stdlib.h>
#include <string.h>

#define VOCAB      512
#define PROMPT_MAX 128

static struct engine_request request_of(const int32_t *prompt, size_t count, int max_tokens)
{
    struct engine_request r = {
        .prompt = prompt, .prompt_count = count, .sampling = sampling_greedy(max_tokens)};
    r.sampling.ignore_eos = true;
    r.sampling.logprobs = 2;
    return r;
}

static void prompt_make(uint64_t seed, int32_t prompt[PROMPT_MAX])
{
    struct test_random r = {seed};
    for (int i = 0; i < PROMPT_MAX; i++) prompt[i] = (int32_t)random_below(&r, VOCAB);
}

static void answered_alike(const struct answer *got, const struct answer *want)
{
    assert_int_equal(got->finish, want->finish);
    assert_true(answer_equal(got, want));
}

/* --- what is found --- */

static void test_the_last_token_is_computed(void **state)
{
    (void)state;
    static const struct {
        int count, cached;
    } want[] = {{15, 0}, {16, 0}, {17, 16}, {32, 16}, {33, 32}, {100, 96}};
    int32_t prompt[PROMPT_MAX];
    prompt_make(1, prompt);
    struct rig rig = rig_open((struct engine_config){0});
    struct engine_request r = request_of(prompt, PROMPT_MAX, 1);
    answer_free(answer_of(rig.engine, &r));
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        r = request_of(prompt, (size_t)want[i].count, 1);
        struct answer *a = answer_of(rig.engine, &r);
        assert_int_equal(a->cached_tokens, want[i].cached);
        assert_int_equal(a->prompt_tokens, want[i].count);
        answer_free(a);
    }
    struct engine_stats s;
    engine_stats(rig.engine, &s);
    assert_int_equal(s.prefix_queries, PROMPT_MAX + 15 + 16 + 17 + 32 + 33 + 100);
    assert_int_equal(s.prefix_hits, 0 + 16 + 16 + 32 + 96);
    assert_int_equal(s.prompt_tokens, s.prefix_queries - s.prefix_hits);
    rig_close(&rig);
}

/* The next turn of a chat finds the answer to the one before. */
static void test_output_is_cached_too(void **state)
{
    (void)state;
    int32_t prompt[PROMPT_MAX];
    prompt_make(2, prompt);
    struct rig rig = rig_open((struct engine_config){0});
    struct engine_request r = request_of(prompt, 21, 60);
    struct answer *first = answer_of(rig.engine, &r);
    memcpy(prompt + 21, first->token, 60 * sizeof *prompt);
    r = request_of(prompt, 90, 20);
    struct answer *second = answer_of(rig.engine, &r);
    assert_int_equal(second->cached_tokens, 80); /* 21 + 59 are in the cache */
    rig_close(&rig);

    rig = rig_open((struct engine_config){.no_prefix_cache = true});
    struct answer *want = answer_of(rig.engine, &r);
    assert_int_equal(want->cached_tokens, 0);
    answered_alike(second, want);
    rig_close(&rig);
    answer_free(first);
    answer_free(second);
    answer_free(want);
}

/* Prompts that come at once and begin equally are computed once. */
static void test_a_crowd_computes_once(void **state)
{
    (void)state;
    enum { CROWD = 8, SHARED = 96, COUNT = 100 };
    int32_t prompt[CROWD][PROMPT_MAX];
    struct rig rig = rig_open((struct engine_config){.prefill_chunk = 40});
    struct engine_request r[CROWD];
    struct answer *a[CROWD];
    for (int i = 0; i < CROWD; i++) {
        prompt_make(3, prompt[i]);
        prompt[i][SHARED] = i;
        r[i] = request_of(prompt[i], COUNT, 3);
        a[i] = answer_new(rig.engine);
    }
    for (int i = 0; i < CROWD; i++) assert_int_equal(answer_ask(a[i], &r[i], NULL), ST_OK);
    for (int i = 0; i < CROWD; i++) {
        answer_wait(a[i]);
        answer_free(a[i]);
    }
    struct engine_stats s;
    engine_stats(rig.engine, &s);
    assert_int_equal(s.prompt_tokens, SHARED + CROWD * (COUNT - SHARED));
    rig_close(&rig);
}

/* What scores its whole prompt computes it, and others find that. */
static void test_scored_prompts(void **state)
{
    (void)state;
    int32_t prompt[PROMPT_MAX];
    prompt_make(4, prompt);
    struct rig rig = rig_open((struct engine_config){0});
    struct engine_request plain = request_of(prompt, 70, 5), scored = plain;
    scored.sampling.prompt_logprobs = 1;
    struct answer *first = answer_of(rig.engine, &scored), *found = answer_of(rig.engine, &plain),
                  *again = answer_of(rig.engine, &scored);
    assert_int_equal(found->cached_tokens, 64);
    assert_int_equal(again->cached_tokens, 0);
    assert_int_equal(again->prompt_logprob_count, 69);
    answered_alike(again, first);
    answer_free(first);
    answer_free(found);
    answer_free(again);
    rig_close(&rig);
}

/* --- who finds it --- */

#define ADAPTERS 3

static void adapters_make(struct rig *rig, struct lr_adapter *adapter)
{
    for (int i = 0; i < ADAPTERS; i++) {
        struct random_adapter_config c = {.seed = 80 + (uint64_t)i,
                                          .projections = 0x7f,
                                          .experts = 3,
                                          .rank = 4,
                                          .top_k = 2,
                                          .rule = GATE_TOPK,
                                          .scale = 0.5f};
        assert_int_equal(random_adapter_make(rig->device, engine_shape(rig->engine), &c, &adapter[i]), ST_OK);
    }
}

static void rig_close_with(struct rig *rig, struct lr_adapter *adapter)
{
    engine_close(rig->engine);
    for (int i = 0; i < ADAPTERS; i++) random_adapter_release(rig->device, &adapter[i]);
    rig->device->ops->close(rig->device);
}

static void test_sets_and_salts_share_nothing(void **state)
{
    (void)state;
    int32_t prompt[PROMPT_MAX];
    prompt_make(5, prompt);
    struct rig rig = rig_open((struct engine_config){0});
    struct lr_adapter adapter[ADAPTERS];
    adapters_make(&rig, adapter);
    struct lr_member member[] = {{&adapter[0], 1}, {&adapter[1], 1}, {&adapter[1], 0.5f}};
    struct engine_request r[5];
    for (int i = 0; i < 5; i++) r[i] = request_of(prompt, 50, 10);
    for (int i = 0; i < 3; i++) {
        r[i + 1].members = &member[i];
        r[i + 1].member_count = 1;
        r[i + 1].set_key.word[1] = (uint64_t)i + 1;
    }
    r[4].cache_salt.word[0] = 1;
    for (int round = 0; round < 2; round++)
        for (int i = 0; i < 5; i++) {
            struct answer *a = answer_of(rig.engine, &r[i]);
            assert_int_equal(a->cached_tokens, round ? 48 : 0);
            answer_free(a);
        }
    rig_close_with(&rig, adapter);
}

/* --- any mixture --- */

#define REQUESTS  120
#define IN_FLIGHT 10

/* Prompts that share beginnings of any length, over several sets; some are given up half-way. */
struct mixture {
    int32_t prompt[REQUESTS][PROMPT_MAX];
    struct lr_member member[REQUESTS];
    struct engine_request request[REQUESTS];
    int cancel_after[REQUESTS];
};

static void mixture_make(struct mixture *m, const struct lr_adapter *adapter)
{
    struct test_random r = {6};
    for (int i = 0; i < REQUESTS; i++) {
        prompt_make(1000 + random_below(&r, 3), m->prompt[i]);
        size_t count = 1 + random_below(&r, 100), shared = random_below(&r, 100);
        for (size_t k = shared; k < count; k++) m->prompt[i][k] = (int32_t)random_below(&r, VOCAB);
        struct engine_request *q = &m->request[i];
        *q = request_of(m->prompt[i], count, 1 + (int)random_below(&r, 40));
        q->sampling.temperature = i % 3 ? 0.8f : 0;
        q->sampling.seed = (uint64_t)i;
        q->sampling.prompt_logprobs = i % 10 == 9 ? 0 : -1;
        q->cache_salt.word[0] = i % 17 == 0;
        m->cancel_after[i] = random_below(&r, 6) == 0 ? 1 + (int)random_below(&r, 20) : 0;
        int set = (int)random_below(&r, ADAPTERS + 1);
        if (set == ADAPTERS) continue;
        m->member[i] = (struct lr_member){&adapter[set], 1};
        q->members = &m->member[i];
        q->member_count = 1;
        q->set_key.word[0] = (uint64_t)set + 1;
    }
}

/* IN_FLIGHT at a time; where they are cancelled, answers end early. */
static void mixture_run(struct mixture *m, struct engine_config config, bool cancel, struct answer **out,
                        struct engine_stats *stats)
{
    struct rig rig = rig_open(config);
    struct lr_adapter adapter[ADAPTERS];
    adapters_make(&rig, adapter);
    mixture_make(m, adapter);
    for (int i = 0; i < REQUESTS + IN_FLIGHT; i++) {
        if (i >= IN_FLIGHT) answer_wait(out[i - IN_FLIGHT]);
        if (i >= REQUESTS) continue;
        out[i] = answer_new(rig.engine);
        if (cancel) out[i]->cancel_after = m->cancel_after[i];
        assert_int_equal(answer_ask(out[i], &m->request[i], NULL), ST_OK);
        /* Some are cancelled while they read their prompt, or wait. */
        if (cancel && i % 13 == 5) engine_cancel(rig.engine, out[i]->id);
    }
    do engine_stats(rig.engine, stats);
    while (stats->running > 0 || stats->kv_pages_used > 0);
    rig_close_with(&rig, adapter);
}

/* A cancelled answer is a beginning of the whole one. */
static void mixture_check(struct answer *got, const struct answer *want)
{
    if (got->finish != FINISH_CANCELLED) {
        answered_alike(got, want);
        return;
    }
    assert_true(got->token_count <= want->token_count);
    assert_memory_equal(got->token, want->token, (size_t)got->token_count * sizeof *got->token);
}

static void test_the_same_bits(void **state)
{
    (void)state;
    size_t page = kv_page_bytes(DTYPE_F32, 2, 2, 16);
    const struct {
        struct engine_config config;
        bool cancel;
    } way[] = {
        {{.no_prefix_cache = true}, false},
        {{.prefill_chunk = 128}, false},
        {{.prefill_chunk = 24, .max_batch = 4}, true},
        {{.prefill_chunk = 7, .kv_bytes = 12 * page}, false}, /* evicts all the time */
        {{.prefill_chunk = 40, .kv_bytes = 25 * page}, true},
    };
    struct mixture *m = calloc(1, sizeof *m);
    struct answer *want[REQUESTS], *got[REQUESTS];
    struct engine_stats s;
    for (size_t w = 0; w < sizeof way / sizeof *way; w++) {
        mixture_run(m, way[w].config, way[w].cancel, w ? got : want, &s);
        if (w == 0)
            assert_int_equal(s.prefix_queries, 0);
        else
            assert_true(s.prefix_hits > 100); /* even where pages are given out all the time */
        for (int i = 0; i < REQUESTS && w > 0; i++) {
            mixture_check(got[i], want[i]);
            answer_free(got[i]);
        }
    }
    for (int i = 0; i < REQUESTS; i++) answer_free(want[i]);
    free(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_last_token_is_computed),   cmocka_unit_test(test_output_is_cached_too),
        cmocka_unit_test(test_a_crowd_computes_once),        cmocka_unit_test(test_scored_prompts),
        cmocka_unit_test(test_sets_and_salts_share_nothing), cmocka_unit_test(test_the_same_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#include "engine/sampler.h"

#include "tests/support/check.h"
#include "tests/support/random.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define VOCAB 300

static struct sampling sampling_default(void)
{
    return (struct sampling){.temperature = 1, .top_p = 1, .repetition_penalty = 1,
                             .max_tokens = 1 << 20, .logprobs = -1, .prompt_logprobs = -1};
}

static void logits_random(float *l, uint64_t seed)
{
    struct test_random r = {seed};
    for (int i = 0; i < VOCAB; i++) l[i] = random_f32(&r, -6, 6);
}

static int32_t choose(struct sampler *s, struct sampler_scratch *scratch, const float *l, int index)
{
    int32_t token = -1;
    struct error err = {0};
    assert_int_equal(sampler_choose(s, scratch, l, index, &token, NULL, &err), ST_OK);
    return token;
}

static struct sampler *make(const struct sampling *r)
{
    struct sampler *s = sampler_new(r, VOCAB, NULL, 0, NULL, 0);
    assert_non_null(s);
    return s;
}

static void test_greedy_takes_the_first_of_the_largest(void **state)
{
    struct sampler_scratch *scratch = *state;
    struct sampling r = sampling_default();
    r.temperature = 0;
    struct sampler *s = make(&r);
    float l[VOCAB];
    logits_random(l, 1);
    l[299] = l[40] = l[41] = 7;
    assert_int_equal(choose(s, scratch, l, 0), 40);
    l[299] = 7.5f;
    assert_int_equal(choose(s, scratch, l, 1), 299);
    sampler_free(s);
}

/* --- what may be drawn, against the definition written plainly --- */

static int by_likelihood(const void *a, const void *b)
{
    const double *x = a, *y = b; /* {logit, token} */
    if (x[0] != y[0]) return x[0] < y[0] ? 1 : -1;
    return x[1] < y[1] ? -1 : 1;
}

/* Probability of each token after min_p, top_k and top_p, in double precision. */
static void expected_distribution(const struct sampling *r, const float *l, double *p)
{
    double sorted[VOCAB][2], w[VOCAB], total = 0, sum = 0;
    for (int i = 0; i < VOCAB; i++) {
        sorted[i][0] = (double)l[i];
        sorted[i][1] = i;
        p[i] = 0;
    }
    qsort(sorted, VOCAB, sizeof sorted[0], by_likelihood);
    int n = r->top_k > 0 && r->top_k < VOCAB ? r->top_k : VOCAB;
    for (int i = 0; i < n; i++) {
        w[i] = exp((sorted[i][0] - sorted[0][0]) / (double)r->temperature);
        if (w[i] < (double)r->min_p) n = i;
        else total += w[i];
    }
    int kept = 0;
    while (kept < n && (kept == 0 || sum < (double)r->top_p * total)) sum += w[kept++];
    for (int i = 0; i < kept; i++) p[(int)sorted[i][1]] = w[i] / sum;
}

#define DRAWS 20000

/* Chi-squared of DRAWS draws against the expected distribution, tokens expected fewer than 5 times
 * taken together. Tokens that must not appear must not. */
static void distribution_check(struct sampler_scratch *scratch, const struct sampling *r,
                               const float *l)
{
    double p[VOCAB], chi = 0, rest_expected = 0, rest_seen = 0;
    static int seen[VOCAB];
    memset(seen, 0, sizeof seen);
    expected_distribution(r, l, p);
    struct sampler *s = make(r);
    for (int i = 0; i < DRAWS; i++) seen[choose(s, scratch, l, i)]++;
    sampler_free(s);
    int cells = 0;
    for (int i = 0; i < VOCAB; i++) {
        double expected = p[i] * DRAWS;
        if (p[i] == 0) assert_int_equal(seen[i], 0);
        if (expected < 5) {
            rest_expected += expected;
            rest_seen += seen[i];
            continue;
        }
        chi += (seen[i] - expected) * (seen[i] - expected) / expected;
        cells++;
    }
    if (rest_expected >= 5) {
        chi += (rest_seen - rest_expected) * (rest_seen - rest_expected) / rest_expected;
        cells++;
    }
    /* Mean cells - 1, variance twice that: five standard deviations. The seed is fixed, so this
     * either always passes or never. */
    double freedom = cells > 1 ? cells - 1 : 1;
    assert_true(chi < freedom + 5 * sqrt(2 * freedom) + 1);
}

static void test_distributions(void **state)
{
    struct sampler_scratch *scratch = *state;
    const struct { float temperature, top_p, min_p; int top_k; } rule[] = {
        {1, 1, 0, 0},        {0.7f, 1, 0, 0},      {3, 1, 0, 0},          {1, 0.9f, 0, 0},
        {1, 0.3f, 0, 0},     {1, 0, 0, 0},         {1, 1, 0.05f, 0},      {1, 1, 1, 0},
        {1, 1, 0, 1},        {1, 1, 0, 17},        {1.5f, 0.8f, 0.02f, 30}, {1, 0.95f, 0.1f, 0},
        {2, 0.999f, 0, 0},   {1, 1, 0, VOCAB},     {0.01f, 0.9f, 0, 0},   {50, 0.5f, 0, 299},
    };
    for (size_t i = 0; i < sizeof rule / sizeof *rule; i++) {
        struct sampling r = sampling_default();
        r.temperature = rule[i].temperature;
        r.top_p = rule[i].top_p;
        r.min_p = rule[i].min_p;
        r.top_k = rule[i].top_k;
        r.seed = 11 + i;
        float l[VOCAB];
        logits_random(l, 100 + i);
        distribution_check(scratch, &r, l);
    }
}

/* Equal logits at the edge of a cut: the lower ids stay. */
static void test_cuts_keep_lower_ids(void **state)
{
    struct sampler_scratch *scratch = *state;
    float l[VOCAB];
    for (int i = 0; i < VOCAB; i++) l[i] = 1;
    struct sampling r = sampling_default();
    r.top_k = 10;
    struct sampler *s = make(&r);
    for (int i = 0; i < 500; i++) assert_in_range(choose(s, scratch, l, i), 0, 9);
    sampler_free(s);
    r.top_k = 0;
    r.top_p = 9.5f / VOCAB;
    s = make(&r);
    for (int i = 0; i < 500; i++) assert_in_range(choose(s, scratch, l, i), 0, 9);
    sampler_free(s);
}

static void test_seed_and_index_decide(void **state)
{
    struct sampler_scratch *scratch = *state;
    float l[VOCAB], other[VOCAB];
    logits_random(l, 5);
    logits_random(other, 6);
    struct sampling r = sampling_default();
    r.seed = 42;
    struct sampler *a = make(&r), *b = make(&r);
    r.seed = 43;
    struct sampler *c = make(&r);
    int differ = 0, repeat = 0;
    for (int i = 0; i < 200; i++) {
        int32_t token = choose(a, scratch, l, i);
        choose(c, scratch, other, i); /* another sequence in between */
        assert_int_equal(choose(b, scratch, l, i), token);
        differ += choose(c, scratch, l, i) != token;
        repeat += choose(b, scratch, l, i + 1) == token;
    }
    assert_true(differ > 100 && repeat < 100);
    sampler_free(a);
    sampler_free(b);
    sampler_free(c);
}

/* --- penalties, bias, min_tokens --- */

static void test_penalties(void **state)
{
    struct sampler_scratch *scratch = *state;
    const int32_t prompt[] = {3, 3, 4};
    struct sampling r = sampling_default();
    r.temperature = 0;
    r.repetition_penalty = 2;
    r.frequency_penalty = 0.5f;
    r.presence_penalty = 0.25f;
    struct sampler *s = sampler_new(&r, VOCAB, prompt, 3, NULL, 0);
    float l[VOCAB];
    for (int i = 0; i < VOCAB; i++) l[i] = -100;
    l[3] = 5;     /* of the prompt: 2.5 by repetition only */
    l[4] = -0.1f; /* of the prompt: -0.2 */
    l[5] = 3;     /* 3, then once generated 3/2 - 0.5 - 0.25 = 0.75, then 3/2 - 1 - 0.25 = 0.25 */
    l[6] = -0.05f;
    assert_int_equal(choose(s, scratch, l, 0), 5);
    assert_int_equal(choose(s, scratch, l, 1), 3); /* now 5/2 - 0.75 = 1.75 */
    assert_int_equal(choose(s, scratch, l, 2), 3); /* 5/2 - 1.25 = 1.25 */
    assert_int_equal(choose(s, scratch, l, 3), 3); /* 5/2 - 1.75 = 0.75 */
    assert_int_equal(choose(s, scratch, l, 4), 3); /* as likely as 5, and the lower id; now 0.25 */
    assert_int_equal(choose(s, scratch, l, 5), 5); /* 3/2 - 1.25 = 0.25 */
    assert_int_equal(choose(s, scratch, l, 6), 3); /* a tie again; now -0.25 */
    assert_int_equal(choose(s, scratch, l, 7), 5); /* now -0.25 */
    assert_int_equal(choose(s, scratch, l, 8), 6);
    sampler_free(s);
}

static void test_bias(void **state)
{
    struct sampler_scratch *scratch = *state;
    const struct logit_bias bias[] = {{7, 100}, {8, -100}};
    struct sampling r = sampling_default();
    r.bias = bias;
    r.bias_count = 2;
    struct sampler *s = make(&r);
    float l[VOCAB];
    logits_random(l, 9);
    for (int i = 0; i < 50; i++) assert_int_equal(choose(s, scratch, l, i), 7);
    sampler_free(s);
}

static void test_min_tokens_bans_the_end(void **state)
{
    struct sampler_scratch *scratch = *state;
    const int32_t ending[] = {2, 250};
    struct sampling r = sampling_default();
    r.min_tokens = 3;
    r.temperature = 0;
    struct sampler *s = sampler_new(&r, VOCAB, NULL, 0, ending, 2);
    float l[VOCAB];
    logits_random(l, 9);
    l[2] = 50;
    l[250] = 40;
    l[9] = 30;
    for (int i = 0; i < 3; i++) assert_int_equal(choose(s, scratch, l, i), 9);
    assert_int_equal(choose(s, scratch, l, 3), 2);
    sampler_free(s);

    /* Banned tokens have no chance either where everything else has hardly one. */
    r.temperature = 1000;
    s = sampler_new(&r, VOCAB, NULL, 0, ending, 2);
    for (int i = 0; i < 3; i++) {
        int32_t token = choose(s, scratch, l, i);
        assert_true(token != 2 && token != 250);
    }
    sampler_free(s);
}

/* --- log-probabilities --- */

static void test_logprobs(void **state)
{
    struct sampler_scratch *scratch = *state;
    float l[VOCAB];
    logits_random(l, 3);
    l[100] = l[200] = l[201] = 6.5f; /* ties: 100 before 200 before 201 */
    double sum = 0;
    for (int i = 0; i < VOCAB; i++) sum += exp((double)l[i]);
    for (int32_t token = 0; token < VOCAB; token++) {
        struct token_logprob lp;
        assert_int_equal(logprob_compute(scratch, l, token, 20, &lp, NULL), ST_OK);
        /* exp to 1e-7 relative, and the result rounded to fp32: 5e-7 of up to 14 */
        assert_true(fabs((double)lp.logprob - ((double)l[token] - log(sum))) < 2e-6);
        int rank = 0;
        for (int i = 0; i < VOCAB; i++) rank += l[i] > l[token] || (l[i] == l[token] && i < token);
        assert_int_equal(lp.rank, rank);
        assert_int_equal(lp.top_count, 20);
        assert_int_equal(lp.top[0].token, 100);
        assert_int_equal(lp.top[1].token, 200);
        assert_int_equal(lp.top[2].token, 201);
        for (int i = 1; i < 20; i++) assert_true(lp.top[i].logprob <= lp.top[i - 1].logprob);
        if (rank < 20) {
            assert_int_equal(lp.top[rank].token, token);
            assert_true(lp.top[rank].logprob == lp.logprob);
        }
    }
}

/* They are of the raw logits, whatever penalties and bias did to the choice. */
static void test_logprobs_are_raw(void **state)
{
    struct sampler_scratch *scratch = *state;
    const struct logit_bias bias[] = {{7, 100}};
    struct sampling r = sampling_default();
    r.bias = bias;
    r.bias_count = 1;
    r.logprobs = 2;
    struct sampler *s = make(&r);
    float l[VOCAB];
    logits_random(l, 9);
    struct token_logprob got, want;
    int32_t token;
    assert_int_equal(sampler_choose(s, scratch, l, 0, &token, &got, NULL), ST_OK);
    assert_int_equal(token, 7);
    assert_int_equal(logprob_compute(scratch, l, 7, 2, &want, NULL), ST_OK);
    assert_true(got.logprob == want.logprob);
    assert_int_equal(got.rank, want.rank);
    assert_int_equal(got.top_count, 2);
    assert_int_equal(got.top[0].token, want.top[0].token);
    sampler_free(s);
}

static void test_bad_logits_are_refused(void **state)
{
    struct sampler_scratch *scratch = *state;
    const float bad[] = {NAN, INFINITY};
    const int place[] = {0, 17, VOCAB - 1};
    struct sampling r = sampling_default();
    for (int i = 0; i < 6; i++) {
        r.temperature = i % 2 ? 1 : 0;
        struct sampler *s = make(&r);
        float l[VOCAB];
        logits_random(l, 9);
        l[place[i % 3]] = bad[i / 3];
        int32_t token = -5;
        struct token_logprob lp;
        struct error err = {0};
        assert_int_equal(sampler_choose(s, scratch, l, 0, &token, NULL, &err), ST_REJECTED);
        assert_int_equal(token, -5);
        assert_true(strlen(err.message) > 0);
        assert_int_equal(logprob_compute(scratch, l, 1, 0, &lp, &err), ST_REJECTED);
        sampler_free(s);
    }
    float none[VOCAB];
    for (int i = 0; i < VOCAB; i++) none[i] = -INFINITY;
    struct sampler *s = make(&r);
    int32_t token;
    assert_int_equal(sampler_choose(s, scratch, none, 0, &token, NULL, NULL), ST_REJECTED);
    none[5] = -3; /* the rest is impossible, not wrong */
    assert_int_equal(choose(s, scratch, none, 0), 5);
    sampler_free(s);
}

static int setup(void **state)
{
    *state = sampler_scratch_new(VOCAB);
    return *state ? 0 : -1;
}

static int teardown(void **state)
{
    sampler_scratch_free(*state);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy_takes_the_first_of_the_largest),
        cmocka_unit_test(test_distributions),
        cmocka_unit_test(test_cuts_keep_lower_ids),
        cmocka_unit_test(test_seed_and_index_decide),
        cmocka_unit_test(test_penalties),
        cmocka_unit_test(test_bias),
        cmocka_unit_test(test_min_tokens_bans_the_end),
        cmocka_unit_test(test_logprobs),
        cmocka_unit_test(test_logprobs_are_raw),
        cmocka_unit_test(test_bad_logits_are_refused),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}

/* Gate rules: which experts, and with which weight. */
#include "kernels/cpu/route.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

static struct lr_site site(int experts, enum gate_rule rule, int k, float temperature)
{
    return (struct lr_site){
        .experts = experts, .rank = 1, .rule = rule, .top_k = k, .temperature = temperature};
}

static struct lr_site threshold_site(int experts, enum gate_rule rule, float threshold, float bias)
{
    struct lr_site s = site(experts, rule, 0, 1);
    s.threshold = threshold;
    s.threshold_bias = bias;
    return s;
}

static struct lr_site top_p_site(int experts, float top_p)
{
    struct lr_site s = site(experts, GATE_TOP_P, 0, 1);
    s.top_p = top_p;
    return s;
}

/* fp32 exponentials and sums of a few terms: some units in the last place of 1 */
#define TOLERANCE 1e-6f

static void expect(struct lr_site s, const float *logits, int count, const int32_t *chosen, const float *gate)
{
    int32_t got_chosen[LR_EXPERTS_MAX];
    float got_gate[LR_EXPERTS_MAX];
    assert_int_equal(route_gates(&s, logits, got_chosen, got_gate), count);
    assert_true(count <= lr_chosen_max(s.rule, s.experts, s.top_k));
    for (int i = 0; i < count; i++) {
        assert_int_equal(got_chosen[i], chosen[i]);
        if (isnan(gate[i]))
            assert_true(isnan(got_gate[i]));
        else
            assert_true(fabsf(got_gate[i] - gate[i]) <= TOLERANCE);
    }
}

static void plain_lora_has_gate_one(void **state)
{
    (void)state;
    expect(site(1, GATE_NONE, 0, 0), NULL, 1, (int32_t[]){0}, (float[]){1});
    expect(site(3, GATE_NONE, 0, 0), NULL, 3, (int32_t[]){0, 1, 2}, (float[]){1, 1, 1});
}

/* ln of 1, 2, 4, 1: shares 1/8, 2/8, 4/8, 1/8 */
static const float octaves[4] = {0, 0.69314718f, 1.3862944f, 0};

static void dense_is_softmax(void **state)
{
    (void)state;
    expect(site(4, GATE_DENSE, 0, 1), octaves, 4, (int32_t[]){0, 1, 2, 3},
           (float[]){.125f, .25f, .5f, .125f});
    /* temperature 1/2 squares the shares: 1, 4, 16, 1 of 22 */
    expect(site(4, GATE_DENSE, 0, .5f), octaves, 4, (int32_t[]){0, 1, 2, 3},
           (float[]){1 / 22.0f, 4 / 22.0f, 16 / 22.0f, 1 / 22.0f});
}

static void topk_renormalises(void **state)
{
    (void)state;
    expect(site(4, GATE_TOPK, 2, 1), octaves, 2, (int32_t[]){1, 2}, (float[]){1 / 3.0f, 2 / 3.0f});
    expect(site(4, GATE_TOPK, 1, 1), octaves, 1, (int32_t[]){2}, (float[]){1});
    expect(site(4, GATE_TOPK, 4, 1), octaves, 4, (int32_t[]){0, 1, 2, 3}, (float[]){.125f, .25f, .5f, .125f});
}

static void topk_raw_does_not(void **state)
{
    (void)state;
    expect(site(4, GATE_TOPK_RAW, 2, 1), octaves, 2, (int32_t[]){1, 2}, (float[]){.25f, .5f});
    expect(site(4, GATE_TOPK_RAW, 3, 1), octaves, 3, (int32_t[]){0, 1, 2}, (float[]){.125f, .25f, .5f});
}

static void top_p_takes_the_fewest_that_pass(void **state)
{
    (void)state;
    expect(top_p_site(4, 0), octaves, 1, (int32_t[]){2}, (float[]){.5f});
    expect(top_p_site(4, .4f), octaves, 1, (int32_t[]){2}, (float[]){.5f});
    expect(top_p_site(4, .6f), octaves, 2, (int32_t[]){1, 2}, (float[]){.25f, .5f});
    /* the tie between 0 and 3 goes to 0 */
    expect(top_p_site(4, .8f), octaves, 3, (int32_t[]){0, 1, 2}, (float[]){.125f, .25f, .5f});
    expect(top_p_site(4, .9f), octaves, 4, (int32_t[]){0, 1, 2, 3}, (float[]){.125f, .25f, .5f, .125f});
    /* no sum is above 1, so all are taken */
    expect(top_p_site(4, 1), octaves, 4, (int32_t[]){0, 1, 2, 3}, (float[]){.125f, .25f, .5f, .125f});
    expect(top_p_site(1, .5f), octaves, 1, (int32_t[]){0}, (float[]){1});

    /* a sum that only meets top_p is not above it: two equal halves */
    static const float halves[2] = {7, 7};
    expect(top_p_site(2, .5f), halves, 2, (int32_t[]){0, 1}, (float[]){.5f, .5f});
    expect(top_p_site(2, .49f), halves, 1, (int32_t[]){0}, (float[]){.5f});

    /* the temperature divides what the softmax gives */
    struct lr_site warm = top_p_site(4, .3f);
    warm.temperature = 2;
    expect(warm, octaves, 2, (int32_t[]){1, 2}, (float[]){.125f, .25f});
}

static void a_threshold_may_choose_any_number(void **state)
{
    (void)state;
    enum gate_rule rule = GATE_THRESHOLD;
    expect(threshold_site(4, rule, 0, 0), octaves, 4, (int32_t[]){0, 1, 2, 3},
           (float[]){.125f, .25f, .5f, .125f});
    expect(threshold_site(4, rule, .2f, 0), octaves, 2, (int32_t[]){1, 2}, (float[]){1 / 3.0f, 2 / 3.0f});
    expect(threshold_site(4, rule, .3f, 0), octaves, 1, (int32_t[]){2}, (float[]){1});
    expect(threshold_site(4, rule, .6f, 0), octaves, 0, NULL, NULL);
    expect(threshold_site(1, rule, 1, 0), octaves, 1, (int32_t[]){0}, (float[]){1}); /* p = tau is enough */
    expect(threshold_site(4, rule, INFINITY, 0), octaves, 0, NULL, NULL);
}

static void an_adaptive_threshold_is_taken_off(void **state)
{
    (void)state;
    /* the last logit is the threshold's: sigmoid(0) = 1/2, so tau = .2: .05 and .3 are left */
    static const float even[5] = {0, 0.69314718f, 1.3862944f, 0, 0};
    enum gate_rule rule = GATE_ADA_THRESHOLD;
    expect(threshold_site(4, rule, .4f, 0), even, 2, (int32_t[]){1, 2}, (float[]){1 / 7.0f, 6 / 7.0f});
    /* sigmoid(ln 3) = 3/4, by the bias or by the input */
    static const float three[5] = {0, 0.69314718f, 1.3862944f, 0, 1.0986123f};
    expect(threshold_site(4, rule, .4f, 1.0986123f), even, 1, (int32_t[]){2}, (float[]){1});
    expect(threshold_site(4, rule, .4f, 0), three, 1, (int32_t[]){2}, (float[]){1});
    expect(threshold_site(4, rule, 0, 0), even, 4, (int32_t[]){0, 1, 2, 3},
           (float[]){.125f, .25f, .5f, .125f});
    expect(threshold_site(4, rule, 1.5f, 0), even, 0, NULL, NULL);
    /* an expert right at tau has a gate of 0: p = 1/2 = tau for both */
    static const float halves[3] = {3, 3, 0};
    expect(threshold_site(2, rule, 1, 0), halves, 0, NULL, NULL);
    static const float huge[3] = {1, 1, 3e38f}, tiny[3] = {1, 1, -3e38f};
    expect(threshold_site(2, rule, 1, 0), huge, 0, NULL, NULL);
    expect(threshold_site(2, rule, 1, 0), tiny, 2, (int32_t[]){0, 1}, (float[]){.5f, .5f});
}

static void ties_go_to_the_lower_index(void **state)
{
    (void)state;
    static const float equal[5] = {2, 2, 2, 2, 2}, later[5] = {1, 3, 3, 3, 1}, zeros[2] = {-0.0f, 0.0f};
    expect(site(5, GATE_TOPK, 2, 1), equal, 2, (int32_t[]){0, 1}, (float[]){.5f, .5f});
    expect(site(5, GATE_TOPK, 2, 1), later, 2, (int32_t[]){1, 2}, (float[]){.5f, .5f});
    expect(site(2, GATE_TOPK, 1, 1), zeros, 1, (int32_t[]){0}, (float[]){1});
}

static void nan_is_chosen_last(void **state)
{
    (void)state;
    static const float some[4] = {NAN, 1, NAN, 1}, most[3] = {NAN, NAN, 5};
    expect(site(4, GATE_TOPK, 2, 1), some, 2, (int32_t[]){1, 3}, (float[]){.5f, .5f});
    expect(site(3, GATE_TOPK, 2, 1), most, 2, (int32_t[]){0, 2}, (float[]){NAN, NAN});
    /* a share of a sum that is not a number is none: it shows in the row, whatever the rule */
    static const float nan[4] = {NAN, NAN, NAN, NAN};
    static const int32_t three[] = {0, 1, 2};
    expect(site(3, GATE_DENSE, 0, 1), most, 3, three, nan);
    expect(top_p_site(3, .5f), most, 3, three, nan);
    expect(threshold_site(3, GATE_THRESHOLD, .9f, 0), most, 3, three, nan);
    expect(threshold_site(3, GATE_ADA_THRESHOLD, .9f, 0), (float[]){1, NAN, 1, 0}, 3, three, nan);
    expect(threshold_site(3, GATE_ADA_THRESHOLD, .9f, 0), (float[]){1, 1, 1, NAN}, 3, three, nan);
}

static void huge_logits_do_not_overflow(void **state)
{
    (void)state;
    static const float huge[3] = {3e38f, -3e38f, 2.9e38f};
    expect(site(3, GATE_TOPK, 2, 1), huge, 2, (int32_t[]){0, 2}, (float[]){1, 0});
    expect(site(3, GATE_DENSE, 0, 1), huge, 3, (int32_t[]){0, 1, 2}, (float[]){1, 0, 0});
    expect(top_p_site(3, .99f), huge, 1, (int32_t[]){0}, (float[]){1});
    expect(threshold_site(3, GATE_THRESHOLD, .5f, 0), huge, 1, (int32_t[]){0}, (float[]){1});
}

static void the_most_experts(void **state)
{
    (void)state;
    float logits[LR_EXPERTS_MAX];
    int32_t chosen[LR_EXPERTS_MAX];
    float gate[LR_EXPERTS_MAX], total = 0;
    for (int i = 0; i < LR_EXPERTS_MAX; i++) logits[i] = (float)(i * 37 % LR_EXPERTS_MAX) / 64;
    struct lr_site s = site(LR_EXPERTS_MAX, GATE_TOPK, 8, 1);
    assert_int_equal(route_gates(&s, logits, chosen, gate), 8);
    for (int i = 0; i < 8; i++) {
        assert_true(logits[chosen[i]] >= (float)(LR_EXPERTS_MAX - 8) / 64);
        assert_true(i == 0 || chosen[i] > chosen[i - 1]);
        total += gate[i];
    }
    assert_true(fabsf(total - 1) <= TOLERANCE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain_lora_has_gate_one),
        cmocka_unit_test(dense_is_softmax),
        cmocka_unit_test(topk_renormalises),
        cmocka_unit_test(topk_raw_does_not),
        cmocka_unit_test(top_p_takes_the_fewest_that_pass),
        cmocka_unit_test(a_threshold_may_choose_any_number),
        cmocka_unit_test(an_adaptive_threshold_is_taken_off),
        cmocka_unit_test(ties_go_to_the_lower_index),
        cmocka_unit_test(nan_is_chosen_last),
        cmocka_unit_test(huge_logits_do_not_overflow),
        cmocka_unit_test(the_most_experts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

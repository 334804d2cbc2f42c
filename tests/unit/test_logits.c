/* The whole forward pass, bare and with adapters, against other implementations: Hugging Face
 * transformers, PEFT, and an independent MoELoRA in PyTorch, all in fp32, on the models of
 * tests/fixtures. */
#include "tests/support/cases.h"
#include "tests/support/check.h"

#include <math.h>
#include <stdlib.h>

static const char *const models[] = {"gqa_tied", "gqa_scaled", "mha_tied", "mha_untied"};
#define MODEL_COUNT (sizeof models / sizeof *models)

/* Largest absolute error of a logit. Both sides compute in fp32 with sums in another order; with
 * logits of a standard deviation of about 3 that comes to a few 1e-5 over two or three layers. */
#define TOLERANCE 1e-4f
/* Keys and values rounded to half precision, 2^-11 relative: a few times that of logits up to 12,
 * and more where a softmax is steep. */
#define TOLERANCE_F16_KV 3e-2f

static struct device *device_at(enum cpu_level level, int threads)
{
    struct cpu_device_config config = {.level = level, .threads = threads};
    struct device *d;
    struct error err;
    if (cpu_device_open(&config, &d, &err)) fail_msg("%s", err.message);
    return d;
}

static size_t logit_count(const struct case_book *b, const struct logit_case *c)
{
    return (size_t)c->count * b->teacher.model->shape.vocab;
}

/* NaN counts as infinite. */
static float worst_error(const float *a, const float *b, size_t n)
{
    float worst = 0;
    for (size_t i = 0; i < n; i++) {
        float e = fabsf(a[i] - b[i]);
        if (!(e <= worst)) worst = isnan(e) ? INFINITY : e;
    }
    return worst;
}

/* (count, vocab), the caller's. */
static float *run_alone(struct case_book *b, const struct logit_case *c)
{
    float *logits = malloc(logit_count(b, c) * sizeof *logits);
    assert_non_null(logits);
    assert_int_equal(
        teacher_run(&b->teacher, c->tokens, c->count, CASE_TOKENS_MAX, c->members, c->member_count, logits),
        ST_OK);
    return logits;
}

static float case_error(struct case_book *b, const struct logit_case *c)
{
    float *logits = run_alone(b, c);
    float worst = worst_error(logits, c->expected, logit_count(b, c));
    free(logits);
    return worst;
}

static void check_cases(enum cpu_level level, enum dtype kv_type, float tolerance, double gap_min)
{
    struct device *d = device_at(level, 2);
    float largest = 0;
    for (size_t m = 0; m < MODEL_COUNT; m++) {
        struct case_book b;
        case_book_open(&b, models[m], d, kv_type);
        for (int i = 0; i < b.case_count; i++) {
            if (b.cases[i].router_gap > 0 && b.cases[i].router_gap < gap_min) continue;
            float worst = case_error(&b, &b.cases[i]);
            if (!(worst <= tolerance))
                fail_msg("%s, %s: a logit is off by %g, more than %g", d->name, b.cases[i].name,
                         (double)worst, (double)tolerance);
            if (worst > largest) largest = worst;
        }
        case_book_close(&b);
    }
    print_message("%s, %s cache: largest error %.2g\n", d->name, dtype_name(kv_type), (double)largest);
    d->ops->close(d);
}

static void test_every_level(void **state)
{
    (void)state;
    for (int level = CPU_REFERENCE; level < CPU_LEVEL_COUNT; level++)
        if (cpu_level_usable((enum cpu_level)level))
            check_cases((enum cpu_level)level, DTYPE_F32, TOLERANCE, 0);
}

/* The rounding of the cache reaches the routers too: only cases whose decisions are clearer than that. */
static void test_half_precision_cache(void **state)
{
    (void)state;
    for (int level = CPU_REFERENCE; level < CPU_LEVEL_COUNT; level++)
        if (cpu_level_usable((enum cpu_level)level))
            check_cases((enum cpu_level)level, DTYPE_F16, TOLERANCE_F16_KV, 1e-3);
}

/* Choosing another expert at any one site and token would move some logit by flip_effect or more:
 * where that is well over the error, all routing was the oracle's. */
static void test_routing_is_decided(void **state)
{
    (void)state;
    struct device *d = device_at(CPU_REFERENCE, 1);
    int routed = 0;
    for (size_t m = 0; m < MODEL_COUNT; m++) {
        struct case_book b;
        case_book_open(&b, models[m], d, DTYPE_F32);
        for (int i = 0; i < b.case_count; i++) {
            if (b.cases[i].flip_effect == 0) continue;
            assert_true(b.cases[i].flip_effect > 10 * TOLERANCE);
            assert_true(case_error(&b, &b.cases[i]) < b.cases[i].flip_effect / 10);
            routed++;
        }
        case_book_close(&b);
    }
    assert_true(routed >= 8);
    d->ops->close(d);
}

/* A comparison is worth something only if leaving the adapter out would fail it. */
static void test_adapters_matter(void **state)
{
    (void)state;
    struct device *d = device_at(CPU_LEVEL_BEST, 1);
    for (size_t m = 0; m < MODEL_COUNT; m++) {
        struct case_book b;
        case_book_open(&b, models[m], d, DTYPE_F32);
        for (int i = 0; i < b.case_count; i++) {
            struct logit_case bare = b.cases[i];
            if (bare.member_count == 0) continue;
            bare.member_count = 0;
            assert_true(case_error(&b, &bare) > 0.5f);
        }
        case_book_close(&b);
    }
    d->ops->close(d);
}

struct mixture {
    struct case_book *book;
    float *alone[CASES_MAX]; /* by case, (count, vocab) */
    int compared;
};

static void compare_with_alone(void *ctx, int lesson, int position, const float *logits)
{
    struct mixture *m = ctx;
    size_t vocab = m->book->teacher.model->shape.vocab;
    if (memcmp(logits, m->alone[lesson] + (size_t)position * vocab, vocab * sizeof *logits))
        fail_msg("%s: position %d differs between alone and in a batch", m->book->cases[lesson].name,
                 position);
    m->compared++;
}

/* All cases of a model in one batch, bare ones, single adapters and sets side by side, in chunks
 * of several sizes: bit for bit what each gets alone. */
static void check_mixture(enum cpu_level level, int threads, const char *model)
{
    struct device *d = device_at(level, threads);
    struct case_book b;
    case_book_open(&b, model, d, DTYPE_F16);
    struct mixture m = {.book = &b};
    struct lesson lessons[CASES_MAX];
    int tokens = 0;
    for (int i = 0; i < b.case_count; i++) {
        const struct logit_case *c = &b.cases[i];
        m.alone[i] = run_alone(&b, c);
        lessons[i] = (struct lesson){
            .tokens = c->tokens, .count = c->count, .members = c->members, .member_count = c->member_count};
        tokens += c->count;
    }
    static const int chunks[] = {1, 3, 16, CASE_TOKENS_MAX};
    for (size_t k = 0; k < sizeof chunks / sizeof *chunks; k++) {
        m.compared = 0;
        assert_int_equal(
            teacher_run_all(&b.teacher, lessons, b.case_count, chunks[k], compare_with_alone, &m), ST_OK);
        assert_int_equal(m.compared, tokens);
    }
    for (int i = 0; i < b.case_count; i++) free(m.alone[i]);
    case_book_close(&b);
    d->ops->close(d);
}

static void test_mixed_batch(void **state)
{
    (void)state;
    for (int level = CPU_REFERENCE; level < CPU_LEVEL_COUNT; level++)
        if (cpu_level_usable((enum cpu_level)level))
            for (size_t m = 0; m < MODEL_COUNT; m++)
                check_mixture((enum cpu_level)level, 1 + (int)m % 3, models[m]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_level),        cmocka_unit_test(test_half_precision_cache),
        cmocka_unit_test(test_routing_is_decided), cmocka_unit_test(test_adapters_matter),
        cmocka_unit_test(test_mixed_batch),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

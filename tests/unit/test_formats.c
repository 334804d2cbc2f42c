/* Adapters of every format that is read, against independent forwards of each in fp32 (tests/fixtures/
 * make_formats.py), and what is refused of each. */
#include "tests/support/adapter_maker.h"
#include "tests/support/cases.h"
#include "tests/support/check.h"

#include <math.h>
#include <stdlib.h>

static const char *const models[] = {"gqa_tied", "gqa_scaled", "mha_tied", "mha_untied"};
#define MODEL_COUNT (sizeof models / sizeof *models)

/* Largest absolute error of a logit, as in test_logits. */
#define TOLERANCE 1e-4f

static struct device *device_at(enum cpu_level level)
{
    struct cpu_device_config config = {.level = level, .threads = 1};
    struct device *d;
    struct error err;
    if (cpu_device_open(&config, &d, &err)) fail_msg("%s", err.message);
    return d;
}

static float case_error(struct case_book *b, const struct logit_case *c, int member_count)
{
    size_t n = (size_t)c->count * b->teacher.model->shape.vocab;
    float *logits = malloc(n * sizeof *logits), worst = 0;
    assert_non_null(logits);
    assert_int_equal(
        teacher_run(&b->teacher, c->tokens, c->count, CASE_TOKENS_MAX, c->members, member_count, logits),
        ST_OK);
    for (size_t i = 0; i < n; i++) {
        float e = fabsf(logits[i] - c->expected[i]);
        if (!(e <= worst)) worst = isnan(e) ? INFINITY : e;
    }
    free(logits);
    return worst;
}

static void check_level(enum cpu_level level)
{
    struct device *d = device_at(level);
    for (size_t m = 0; m < MODEL_COUNT; m++) {
        struct case_book b;
        case_book_open_formats(&b, models[m], d, DTYPE_F32);
        for (int i = 0; i < b.case_count; i++) {
            struct logit_case *c = &b.cases[i];
            float worst = case_error(&b, c, c->member_count);
            if (!(worst <= TOLERANCE))
                fail_msg("%s, %s: a logit is off by %g, more than %g", d->name, c->name, (double)worst,
                         (double)TOLERANCE);
            /* Leaving the adapter out must not pass. */
            assert_true(case_error(&b, c, 0) > 0.1f);
        }
        case_book_close(&b);
    }
    d->ops->close(d);
}

static void every_format_at_every_level(void **state)
{
    (void)state;
    for (int level = CPU_REFERENCE; level <= (int)cpu_level_supported(); level++)
        check_level((enum cpu_level)level);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_format_at_every_level),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

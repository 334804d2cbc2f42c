/* Gradients of every kind of parameter against central differences of a loss in double precision. */
#include "tests/support/check.h"
#include "tests/support/random.h"
#include "tests/support/train_case.h"
#include "tests/support/train_oracle.h"

#include <math.h>
#include <stdlib.h>

/* The step, by the size of a parameter's neighbours (about 0.1): the differences' own error is of its square.
 */
#define STEP 1e-5
/* By the largest element of the tensor's gradient: the pass is fp32 (test_training_torch.c). */
#define TOLERANCE 1e-4
/* Parameters compared of each tensor: the one with the largest gradient, and another at random. */
#define SAMPLES 2

struct trial {
    const struct train_case *c;
    struct train_rig rig;
    struct oracle *oracle;
    struct pass_batch batch;
    const struct pass_loss *loss;
    double *value;
    float *grad;
    struct test_random random;
    double worst;
    int compared;
};

static size_t largest_of(const float *x, size_t n)
{
    size_t best = 0;
    for (size_t i = 1; i < n; i++)
        if (fabsf(x[i]) > fabsf(x[best])) best = i;
    return best;
}

static double difference(struct trial *t, size_t i)
{
    double was = t->value[i];
    t->value[i] = was + STEP;
    double up = oracle_loss(t->oracle, t->value, &t->batch, t->loss);
    t->value[i] = was - STEP;
    double down = oracle_loss(t->oracle, t->value, &t->batch, t->loss);
    t->value[i] = was;
    return (up - down) / (2 * STEP);
}

static void check_tensor(struct trial *t, const struct train_site *s, const char *part, size_t offset,
                         size_t count)
{
    size_t largest = largest_of(t->grad + offset, count);
    double size = fabs((double)t->grad[offset + largest]);
    for (int k = 0; k < SAMPLES; k++) {
        size_t i = offset + (k == 0 ? largest : (size_t)random_below(&t->random, count));
        double wanted = difference(t, i), error = fabs((double)t->grad[i] - wanted) / size;
        if (!(error <= TOLERANCE))
            fail_msg("%s: %s of %s of layer %d, element %zu: the gradient is %g, the difference %g",
                     t->c->name, part, projection_name(s->projection), s->layer, i - offset,
                     (double)t->grad[i], wanted);
        t->worst = fmax(t->worst, error);
        t->compared++;
    }
}

static void check_site(struct trial *t, const struct train_site *s)
{
    size_t stacked = (size_t)s->experts * (size_t)s->rank;
    check_tensor(t, s, "A", s->a, stacked * s->d_in);
    check_tensor(t, s, "B", s->bt, stacked * s->d_out);
    if (s->rule != GATE_NONE) check_tensor(t, s, "the router", s->router, (size_t)s->experts * s->d_in);
}

static void trial_open(struct trial *t, const struct train_case *c)
{
    *t = (struct trial){.c = c,
                        .rig = train_rig_open(c, CPU_LEVEL_BEST, 2),
                        .batch = pass_batch_of(&c->batch[0]),
                        .loss = c->auxiliary ? &c->loss : NULL,
                        .random = {c->loss.seed}};
    struct params *p = t->rig.params;
    t->oracle = oracle_open(t->rig.rig.path.text, p);
    float *value = train_rig_read(&t->rig, p->value);
    t->value = malloc(p->count * sizeof *t->value);
    assert_non_null(t->value);
    for (size_t i = 0; i < p->count; i++) t->value[i] = (double)value[i];
    free(value);
}

static void trial_close(struct trial *t)
{
    free(t->value);
    free(t->grad);
    oracle_close(t->oracle);
    train_rig_close(&t->rig);
}

static void check_case(const struct train_case *c)
{
    struct trial t;
    trial_open(&t, c);
    struct pass_result got;
    assert_int_equal(pass_backward(t.rig.pass, &t.batch, t.loss, NULL, &got), ST_OK);
    t.grad = train_rig_read(&t.rig, t.rig.params->grad);

    double total = c->ce[0] + c->loss.balance * c->balance[0] + c->loss.contrast * c->contrast[0];
    double loss = oracle_loss(t.oracle, t.value, &t.batch, t.loss);
    if (!(fabs(loss - total) < 1e-5))
        fail_msg("%s: the oracle's loss is %.9g, PyTorch's %.9g", c->name, loss, total);
    for (int i = 0; i < t.rig.params->site_count; i++) check_site(&t, &t.rig.params->site[i]);
    print_message("%s: %d parameters within %.2g\n", c->name, t.compared, t.worst);
    trial_close(&t);
}

static void test_differences(void **state)
{
    (void)state;
    static struct train_case cases[TRAIN_CASES_MAX];
    int count = train_cases_read("cases", cases);
    for (int i = 0; i < count; i++) check_case(&cases[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_differences)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

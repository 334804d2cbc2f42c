/* Losses, gradients and loss curves of training against PyTorch's autograd on the same small models, in fp32.
 */
#include "tests/support/check.h"
#include "tests/support/train_case.h"

#include <math.h>
#include <stdlib.h>

/* Of a tensor's gradient: the norm of the error by the norm of what is expected, and the largest error of an
 * element by the largest element. PyTorch in fp32 and in fp64 differ by up to 5e-6 of either on these cases
 * (make_training.py); sums in another order, over twice as many layers of rounding in the recomputed forward
 * pass, stay within ten times that. */
#define GRADIENT_TOLERANCE 5e-5
/* Relative, of each part of the loss and of a log-probability: fp32 sums over two or three layers. */
#define LOSS_TOLERANCE 2e-5
/* Absolute, of a loss on a curve: 50 steps of AdamW in fp32 and in fp64 differ by up to 1e-4. */
#define CURVE_TOLERANCE 1e-3

static bool near(double a, double b, double tolerance) { return fabs(a - b) <= tolerance * fmax(1, fabs(b)); }

static void check_near(const struct train_case *c, const char *what, double got, double wanted,
                       double tolerance)
{
    if (!near(got, wanted, tolerance))
        fail_msg("%s: %s is %.9g, PyTorch has %.9g", c->name, what, got, wanted);
}

/* --- gradients --- */

struct distance {
    double norm, element; /* see GRADIENT_TOLERANCE */
};

static struct distance distance_of(const float *got, const float *wanted, size_t n)
{
    double error = 0, size = 0, error_max = 0, size_max = 0;
    for (size_t i = 0; i < n; i++) {
        double e = fabs((double)got[i] - (double)wanted[i]), w = fabs((double)wanted[i]);
        if (isnan(e)) e = INFINITY;
        error += e * e;
        size += w * w;
        error_max = fmax(error_max, e);
        size_max = fmax(size_max, w);
    }
    assert_true(size > 0);
    return (struct distance){sqrt(error / size), error_max / size_max};
}

static const float *expected_gradient(const struct safetensors *f, const struct train_site *s,
                                      const char *part, size_t count)
{
    struct test_path name = test_path("%d.%s.%s", s->layer, projection_name(s->projection), part);
    const struct safetensor *t = safetensors_find(f, name.text);
    if (!t) fail_msg("the fixture has no %s", name.text);
    assert_int_equal(t->type, DTYPE_F32);
    assert_int_equal(t->bytes, count * sizeof(float));
    return t->data;
}

/* The worst of a case's tensors; how many there were, in *count. */
static struct distance worst_gradient(const struct train_rig *r, const struct safetensors *f,
                                      const float *grad, int *count)
{
    struct distance worst = {0};
    *count = 0;
    for (int i = 0; i < r->params->site_count; i++) {
        const struct train_site *s = &r->params->site[i];
        size_t stacked = (size_t)s->experts * (size_t)s->rank;
        const struct {
            const char *name;
            size_t offset, count;
        } part[] = {
            {"a", s->a, stacked * s->d_in},
            {"bt", s->bt, stacked * s->d_out},
            {"router", s->router, (size_t)s->experts * s->d_in},
        };
        for (int k = 0; k < (s->rule == GATE_NONE ? 2 : 3); k++) {
            const float *wanted = expected_gradient(f, s, part[k].name, part[k].count);
            struct distance d = distance_of(grad + part[k].offset, wanted, part[k].count);
            worst.norm = fmax(worst.norm, d.norm);
            worst.element = fmax(worst.element, d.element);
            (*count)++;
        }
    }
    return worst;
}

static void check_losses(const struct train_case *c, int step, const struct pass_result *got,
                         double tolerance)
{
    check_near(c, "the cross-entropy", got->ce, c->ce[step], tolerance);
    if (!c->auxiliary) return;
    check_near(c, "the balance loss", got->balance, c->balance[step], tolerance);
    check_near(c, "the contrastive loss", got->contrast, c->contrast[step], tolerance);
}

static void check_logprobs(const struct train_case *c, const struct safetensors *f,
                           const struct pass_result *got)
{
    const struct case_batch *b = &c->batch[0];
    const struct safetensor *t = safetensors_find(f, "logprob");
    assert_non_null(t);
    assert_int_equal(t->bytes, (size_t)b->rows * sizeof(float));
    const float *wanted = t->data;
    for (int i = 0; i < b->rows; i++)
        check_near(c, "a log-probability", (double)got->logprob[i], b->weight[i] != 0 ? (double)wanted[i] : 0,
                   LOSS_TOLERANCE);
}

static void check_counts(const struct train_rig *r, const struct train_case *c, const struct pass_result *got)
{
    for (int i = 0; i < r->params->routed_count; i++) {
        const struct train_site *s = got->routing[i].site;
        double chosen = 0;
        for (int e = 0; e < s->experts; e++) chosen += (double)got->routing[i].chosen[e];
        assert_true(chosen == (double)c->batch[0].rows * (s->rule == GATE_DENSE ? s->experts : s->top_k));
    }
}

static struct distance check_case(const struct train_case *c, enum cpu_level level, int threads)
{
    struct train_rig r = train_rig_open(c, level, threads);
    struct test_path part = test_path("training/%s.safetensors", c->name);
    size_t size;
    void *bytes = fixture_read(part.text, &size);
    struct safetensors *f;
    struct error err;
    assert_ok(safetensors_parse(bytes, size, &f, &err), err);

    struct pass_batch batch = pass_batch_of(&c->batch[0]);
    struct pass_result got;
    const struct pass_loss *loss = c->auxiliary ? &c->loss : NULL;
    assert_int_equal(pass_backward(r.pass, &batch, loss, NULL, &got), ST_OK);
    check_losses(c, 0, &got, LOSS_TOLERANCE);
    if (c->auxiliary) check_near(c, "the similarity", got.similarity, c->similarity, LOSS_TOLERANCE);
    if (c->auxiliary) check_near(c, "the cohesion", got.cohesion, c->cohesion, LOSS_TOLERANCE);
    check_logprobs(c, f, &got);
    check_counts(&r, c, &got);
    float *grad = train_rig_read(&r, r.params->grad);
    int count;
    struct distance worst = worst_gradient(&r, f, grad, &count);
    if (!(worst.norm <= GRADIENT_TOLERANCE && worst.element <= GRADIENT_TOLERANCE))
        fail_msg("%s, %s: of %d gradients one is off by %g of its norm, %g of its largest element", c->name,
                 r.rig.device->name, count, worst.norm, worst.element);
    free(grad);
    safetensors_free(f);
    free(bytes);
    train_rig_close(&r);
    return worst;
}

static void test_gradients(void **state)
{
    (void)state;
    static struct train_case cases[TRAIN_CASES_MAX];
    int count = train_cases_read("cases", cases);
    for (int level = CPU_REFERENCE; level < CPU_LEVEL_COUNT; level++) {
        if (!cpu_level_usable((enum cpu_level)level)) continue;
        struct distance worst = {0};
        for (int i = 0; i < count; i++) {
            struct distance d = check_case(&cases[i], (enum cpu_level)level, 1 + i % 3);
            worst.norm = fmax(worst.norm, d.norm);
            worst.element = fmax(worst.element, d.element);
        }
        print_message("level %d: gradients within %.2g of their norm, elements within %.2g of the largest\n",
                      level, worst.norm, worst.element);
    }
}

static const struct train_case *case_named(const struct train_case *cases, int count, const char *name)
{
    for (int i = 0; i < count; i++)
        if (!strcmp(cases[i].name, name)) return &cases[i];
    fail_msg("the fixtures have no case '%s'", name);
    return NULL;
}

/* Gradients add up; without the auxiliary losses, or with another sample, they are others: the comparison
 * above would notice. A forward pass gives the same losses and leaves the gradients alone. */
static void test_gradients_add_up(void **state)
{
    (void)state;
    static struct train_case cases[TRAIN_CASES_MAX];
    int count = train_cases_read("cases", cases);
    const struct train_case *c = case_named(cases, count, "topk");
    struct train_rig r = train_rig_open(c, CPU_LEVEL_BEST, 2);
    size_t n = r.params->count;
    struct pass_batch batch = pass_batch_of(&c->batch[0]);
    struct pass_result got;
    assert_int_equal(pass_backward(r.pass, &batch, &c->loss, NULL, &got), ST_OK);
    float *once = train_rig_read(&r, r.params->grad);

    assert_int_equal(pass_forward(r.pass, &batch, &c->loss, NULL, &got), ST_OK);
    check_losses(c, 0, &got, LOSS_TOLERANCE);
    float *after = train_rig_read(&r, r.params->grad);
    assert_memory_equal(once, after, n * sizeof *once);
    free(after);

    assert_int_equal(pass_backward(r.pass, &batch, &c->loss, NULL, &got), ST_OK);
    float *twice = train_rig_read(&r, r.params->grad);
    for (size_t i = 0; i < n; i++) twice[i] /= 2;
    assert_true(distance_of(twice, once, n).norm < 1e-6);
    free(twice);

    struct pass_loss others[] = {c->loss, c->loss, c->loss};
    others[0].balance = 0;
    others[1].contrast = 0;
    others[2].seed++;
    float *zero = calloc(n, sizeof *zero);
    assert_non_null(zero);
    for (int i = 0; i < 3; i++) {
        train_rig_write(&r, r.params->grad, zero);
        assert_int_equal(pass_backward(r.pass, &batch, &others[i], NULL, &got), ST_OK);
        float *other = train_rig_read(&r, r.params->grad);
        assert_true(distance_of(other, once, n).norm > 10 * GRADIENT_TOLERANCE);
        free(other);
    }
    free(zero);
    free(once);
    train_rig_close(&r);
}

/* --- curves --- */

static double norm_of(const struct train_rig *r, float *sum)
{
    struct device *d = r->rig.device;
    float squares;
    d->grad->sum_squares(d, r->params->grad, r->params->count, sum);
    d->ops->read(d, &squares, sum, sizeof squares);
    return sqrt((double)squares);
}

/* One step of AdamW with clipping and warm-up, as make_training.py has it. */
static void update(const struct train_rig *r, const struct train_case *c, int step, double norm)
{
    struct params *p = r->params;
    double warm = (step + 1.0) / c->warmup;
    struct adamw_args args = {.n = p->count,
                              .value = p->value,
                              .grad = p->grad,
                              .m = p->m,
                              .v = p->v,
                              .rate = (float)(c->rate * fmin(1, warm)),
                              .beta1 = 0.9f,
                              .beta2 = 0.95f,
                              .eps = 1e-8f,
                              .correction1 = (float)(1 - pow(0.9, step + 1)),
                              .correction2 = (float)(1 - pow(0.95, step + 1)),
                              .grad_scale = (float)fmin(1, c->clip / norm)};
    r->rig.device->grad->adamw(r->rig.device, &args);
}

static void check_curve(const struct train_case *c, enum cpu_level level)
{
    struct train_rig r = train_rig_open(c, level, 2);
    float *sum = r.rig.device->ops->alloc(r.rig.device, sizeof *sum);
    assert_non_null(sum);
    for (int step = 0; step < c->step_count; step++) {
        struct pass_batch batch = pass_batch_of(&c->batch[step % c->batch_count]);
        struct pass_loss loss = c->loss;
        loss.seed = (uint64_t)step;
        struct pass_result got;
        assert_int_equal(pass_backward(r.pass, &batch, c->auxiliary ? &loss : NULL, NULL, &got), ST_OK);
        check_losses(c, step, &got, CURVE_TOLERANCE);
        double norm = norm_of(&r, sum);
        check_near(c, "the gradient's norm", norm, c->norm[step], CURVE_TOLERANCE);
        update(&r, c, step, norm);
    }
    r.rig.device->ops->free(r.rig.device, sum);
    train_rig_close(&r);
}

static void test_curves(void **state)
{
    (void)state;
    static struct train_case curves[TRAIN_CASES_MAX];
    int count = train_cases_read("curves", curves);
    for (int i = 0; i < count; i++) {
        const struct train_case *c = &curves[i];
        assert_int_equal(c->step_count, 50);
        assert_true(c->ce[c->step_count - 1] < c->ce[0] / 2);
        check_curve(c, CPU_REFERENCE);
        check_curve(c, CPU_LEVEL_BEST);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_gradients_add_up),
        cmocka_unit_test(test_curves),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

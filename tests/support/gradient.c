#include "tests/support/gradient.h"

#include "tests/support/check.h"
#include "tests/support/sites.h"

#include <math.h>
#include <stdlib.h>

struct twin twin_make(struct test_random *r, size_t n, double scale)
{
    struct twin t = {n, malloc((n + 1) * sizeof(float)), malloc((n + 1) * sizeof(double))};
    assert_non_null(t.f);
    assert_non_null(t.d);
    for (size_t i = 0; i < n; i++) t.d[i] = t.f[i] = (float)scale * random_f32(r, -1, 1);
    return t;
}

void twin_free(struct twin *t)
{
    free(t->f);
    free(t->d);
}

struct device *grad_device_open(enum cpu_level level, int threads)
{
    struct cpu_device_config config = {.level = level, .threads = threads};
    struct device *d;
    assert_int_equal(cpu_device_open(&config, &d, NULL), ST_OK);
    assert_non_null(d->grad);
    struct grad_limits limits = {.rows = GRAD_TEST_ROWS,
                                 .cols = 4096,
                                 .seq_rows = GRAD_TEST_SEQ_ROWS,
                                 .heads = 6,
                                 .head_dim = 24,
                                 .experts_rank = 64};
    assert_int_equal(d->grad->reserve(d, &limits), ST_OK);
    return d;
}

double finite_difference(double (*loss)(void *ctx), void *ctx, double *x)
{
    double saved = *x, h = 1e-5 * (1 + fabs(saved));
    *x = saved + h;
    double above = loss(ctx);
    *x = saved - h;
    double below = loss(ctx);
    *x = saved;
    return (above - below) / (2 * h);
}

void check_gradient(const char *what, struct test_random *r, double (*loss)(void *ctx), void *ctx,
                    const struct twin *x, const float *got, size_t samples, double tolerance)
{
    double largest = 0, worst = 0;
    size_t worst_at = 0;
    if (samples > x->n) samples = x->n;
    for (size_t i = 0; i < x->n; i++) largest = fmax(largest, fabs((double)got[i]));
    for (size_t i = 0; i < samples; i++) {
        size_t at = samples == x->n ? i : (size_t)random_below(r, x->n);
        double want = finite_difference(loss, ctx, &x->d[at]), error = fabs(got[at] - want);
        largest = fmax(largest, fabs(want));
        if (!(error <= worst)) {
            worst = error;
            worst_at = at;
        }
        if (isnan(error)) break;
    }
    if (!(worst <= tolerance * largest))
        fail_msg("%s[%zu] is %g, off by %g, of at most %g (%g of the largest)", what, worst_at,
                 (double)got[worst_at], worst, tolerance * largest, tolerance);
}

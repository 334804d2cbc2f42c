/* For tests of training's ops: a device that can train, random inputs that double precision shares, and
 * finite differences. */
#ifndef TESTS_SUPPORT_GRADIENT_H
#define TESTS_SUPPORT_GRADIENT_H

#include "kernels/grad.h"
#include "tests/support/random.h"

/* n numbers in both precisions, of the same value. */
struct twin {
    size_t n;
    float *f;
    double *d;
};
/* in [-scale, scale) */
struct twin twin_make(struct test_random *r, size_t n, double scale);
void twin_free(struct twin *t);

/* Opened and reserved for what the tests use; the caller closes it. */
struct device *grad_device_open(enum cpu_level level, int threads);
#define GRAD_TEST_ROWS     400
#define GRAD_TEST_SEQ_ROWS 130

/* (f(x + h) - f(x - h)) / 2h of the loss as *x changes, all in double: right to about 1e-9 of the loss's
 * scale. */
double finite_difference(double (*loss)(void *ctx), void *ctx, double *x);

/* The gradient `got` of *all* of x against finite differences at `samples` of its elements (or at each, where
 * there are fewer). The bound is `tolerance` times the largest gradient seen: an element's own error in fp32
 * comes from sums of terms of that size, whatever is left of them. */
void check_gradient(const char *what, struct test_random *r, double (*loss)(void *ctx), void *ctx,
                    const struct twin *x, const float *got, size_t samples, double tolerance);

#endif

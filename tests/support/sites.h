/* Random weights and adapters for tests of the device's ops, with everything needed to compute what
 * they mean in double precision. */
#ifndef TESTS_SUPPORT_SITES_H
#define TESTS_SUPPORT_SITES_H

#include "kernels/device.h"
#include "tests/support/random.h"

/* A weight and its exact values. */
struct test_weight {
    struct weight *packed;
    struct matrix file; /* its data is owned */
    float *values;      /* (rows, cols) */
};
void test_weight_make(struct device *d, struct test_random *r, enum dtype type, size_t rows, size_t cols,
                      struct test_weight *out);
void test_weight_release(struct device *d, struct test_weight *w);

/* What kind of site to make. */
struct test_site_shape {
    int experts, rank, top_k;
    enum gate_rule rule;
    float temperature;
    enum dtype type, router_type;
    bool ties; /* all experts but the first have the same router row */
};

struct test_site {
    size_t d_in, d_out;
    struct test_site_shape shape;
    float *router, *a, *b,
        *scale; /* exact values: (experts, d_in), (experts, rank, d_in), (experts, d_out, rank) */
};

/* An adapter of one layer, with sites at the projections whose d_out is not 0. */
struct test_adapter {
    struct lr_adapter lr;
    const struct lr_site *packed[PROJ_COUNT];
    struct test_site site[PROJ_COUNT];
};
void test_adapter_make(struct device *d, struct test_random *r, const struct test_site_shape *shape,
                       size_t d_in, const size_t d_out[PROJ_COUNT], struct test_adapter *out);
void test_adapter_release(struct device *d, struct test_adapter *a);

/* Adds weight * delta(x) of a site to y (d_out), and to bound (d_out) how far fp32 arithmetic in any
 * order may be from it. Written from the formulas of kernels/lowrank.h, in double precision. */
void test_site_add_delta(const struct test_site *s, double weight, const float *x, double *y, double *bound);

/* n values in [-1, 1). */
void test_fill(struct test_random *r, float *x, size_t n);

#endif

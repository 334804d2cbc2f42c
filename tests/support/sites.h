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
    bool shared_a, gain, bias;
    float top_p, threshold, threshold_bias;
};

/* Its exact values. rank 0: a router alone. */
struct test_site {
    size_t d_in, d_out;
    struct test_site_shape shape;
    float *router, *threshold_row; /* (experts, d_in), (d_in) */
    float *a, *b, *scale;          /* (experts, rank, d_in), (experts, d_out, rank), (experts) */
    float *gain, *bias;            /* (d_out), or NULL */
};
void test_site_make(struct device *d, struct test_random *r, const struct test_site_shape *shape, size_t d_in,
                    size_t d_out, struct test_site *out, const struct lr_site **packed);
void test_site_release(struct device *d, struct test_site *s, const struct lr_site *packed);

/* An adapter of one layer, with sites at the projections whose d_out is not 0. */
struct test_adapter {
    struct lr_adapter lr;
    const struct lr_site *packed[PROJ_COUNT];
    struct test_site site[PROJ_COUNT];
};
void test_adapter_make(struct device *d, struct test_random *r, const struct test_site_shape *shape,
                       size_t d_in, const size_t d_out[PROJ_COUNT], struct test_adapter *out);
void test_adapter_release(struct device *d, struct test_adapter *a);

/* The oracle, written from the formulas of kernels/lowrank.h in double precision. */

/* Gates of all experts, 0 where not chosen, and how far fp32 may be from them: INFINITY where rounding
 * may choose other experts. */
void test_site_gates(const struct test_site *s, const float *x, double *gate, double *error);
/* Adds factor * scale * B (A x) of one expert to y (d_out). */
void test_site_add_expert(const struct test_site *s, int expert, double factor, const double *x, double *y);
/* Adds weight * delta(x) of a site to y (d_out), and to bound (d_out) how far fp32 arithmetic in any
 * order may be from it. base is W x, with its own bound. */
void test_site_add_delta(const struct test_site *s, double weight, const float *x, const double *base,
                         const double *base_bound, double *y, double *bound);

/* n values in [-1, 1). */
void test_fill(struct test_random *r, float *x, size_t n);

#endif

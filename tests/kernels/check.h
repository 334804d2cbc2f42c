/* The harness of checkkernels: guarded buffers, random numbers, comparisons, and the score.
 *
 * Buffers end at a page that cannot be touched and are filled with 0xff, which reads as NaN in every
 * float type: a kernel that reads past an input's edge crashes or spreads NaN, one that writes
 * past an output's edge crashes or leaves a mark. */
#ifndef TESTS_KERNELS_CHECK_H
#define TESTS_KERNELS_CHECK_H

#include "kernels/cpu/kernels.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A table under test, and the one it must agree with. */
struct check {
    const struct cpu_kernels *table, *reference;
    const char *name; /* of the table: the emulated one shares its kernels' name with the real one */
};

/* One case: sets what a failure, or a crash, is reported as. */
void check_begin(const struct check *c, const char *fmt, ...) PRINTF_LIKE(2, 3);
/* Counts the case as failed, once; prints the reason. */
void check_fail(const char *fmt, ...) PRINTF_LIKE(1, 2);
/* Ends the case and counts it; buffers are freed. */
void check_end(void);
int check_passed_count(void);
int check_failed_count(void);

/* Valid until check_end. The end is flush with the guard page, as far as the alignment allows. */
void *check_buffer(size_t bytes, size_t align);
static inline float *check_floats(size_t n) { return check_buffer(n * sizeof(float), sizeof(float)); }
/* A copy of a buffer, guarded as well. */
void *check_copy(const void *p, size_t bytes, size_t align);

void check_seed(uint64_t seed);
size_t check_below(size_t n);
float check_uniform(float low, float high);
float check_normal(void);
void check_fill_normal(float *x, size_t n, float scale);
/* n elements of type around `scale`, quantised types by random blocks with sane scales. */
void check_fill_type(enum dtype type, void *dst, size_t n, float scale);

/* |got - want| <= tol[i] for each i; NaN agrees with NaN only. Says which element is worst. */
void check_near(const char *what, const float *got, const float *want, const float *tol, size_t n);
void check_equal(const char *what, const void *got, const void *want, size_t bytes);
/* Bytes nobody wrote. */
void check_untouched(const char *what, const void *p, size_t bytes);

/* Half the distance of 1 to the next float: the relative error of one rounding. */
#define CHECK_EPS (1.0f / 16777216)

void check_products(const struct check *c);
void check_elementwise(const struct check *c);
void check_attention(const struct check *c);
void check_lowrank(const struct check *c);

/* Speed of every kernel of the table on one thread. */
void bench_table(const struct check *c);

#endif

/* Seeded random numbers for tests: the same seed gives the same numbers on every machine.
 *
 * The generator is SplitMix64 (Steele, Lea, Flood 2014), good enough to choose test inputs. */
#ifndef TESTS_SUPPORT_RANDOM_H
#define TESTS_SUPPORT_RANDOM_H

#include <stddef.h>
#include <stdint.h>

struct test_random {
    uint64_t state; /* set it to the seed */
};

uint64_t random_u64(struct test_random *r);
/* 0 .. n - 1; n > 0. */
uint64_t random_below(struct test_random *r, uint64_t n);
/* Uniform in [min, max). */
float random_f32(struct test_random *r, float min, float max);
void random_bytes(struct test_random *r, void *dst, size_t n);

#endif

/* Random numbers of training: the same seed gives the same ones everywhere. SplitMix64 (Steele, Lea, Flood 2014). */
#ifndef TRAINING_RANDOM_H
#define TRAINING_RANDOM_H

#include <math.h>
#include <stdint.h>

/* A hash of x: nearby values give unrelated ones. */
static inline uint64_t random_hash(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* The generator: state begins as a hash of the seed. */
static inline uint64_t random_next(uint64_t *state)
{
    uint64_t x = *state;
    *state += 0x9e3779b97f4a7c15u;
    return random_hash(x);
}

/* In (0, 1). */
static inline double random_unit(uint64_t *state) { return ((double)(random_next(state) >> 11) + 0.5) * 0x1p-53; }

/* Of deviation 1 (Box and Muller 1958). */
static inline double random_normal(uint64_t *state)
{
    double radius = sqrt(-2 * log(random_unit(state)));
    return radius * cos(6.283185307179586 * random_unit(state));
}

#endif

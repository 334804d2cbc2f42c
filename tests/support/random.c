#include "tests/support/random.h"

uint64_t random_u64(struct test_random *r)
{
    uint64_t z = r->state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

uint64_t random_below(struct test_random *r, uint64_t n) { return random_u64(r) % n; }

float random_f32(struct test_random *r, float min, float max)
{
    float unit = (float)(random_u64(r) >> 40) * 0x1p-24f;
    return min + unit * (max - min);
}

void random_bytes(struct test_random *r, void *dst, size_t n)
{
    for (size_t i = 0; i < n; i++) ((uint8_t *)dst)[i] = (uint8_t)random_u64(r);
}

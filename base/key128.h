/* Identities of 128 bits: digests that are compared, and sorted by, but mean nothing else. All zero
 * is the key of what has no identity of its own. */
#ifndef BASE_KEY128_H
#define BASE_KEY128_H

#include <stdbool.h>
#include <stdint.h>

struct key128 {
    uint64_t word[2];
};

static inline int key128_compare(struct key128 a, struct key128 b)
{
    for (int i = 0; i < 2; i++)
        if (a.word[i] != b.word[i]) return a.word[i] < b.word[i] ? -1 : 1;
    return 0;
}

static inline bool key128_equal(struct key128 a, struct key128 b) { return key128_compare(a, b) == 0; }

#endif

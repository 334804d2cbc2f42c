/* Sizes that cannot overflow, and memory aligned for vector loads.
 *
 * Sizes from files and requests are hostile: multiply and add them only through size_mul and
 * size_add, whose sticky result SIZE_MAX makes every allocation below fail. */
#ifndef BASE_MEMORY_H
#define BASE_MEMORY_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/* SIZE_MAX when the true result does not fit, or an operand already is SIZE_MAX. */
static inline size_t size_mul(size_t a, size_t b)
{
    size_t r;
    return a == SIZE_MAX || b == SIZE_MAX || __builtin_mul_overflow(a, b, &r) ? SIZE_MAX : r;
}

static inline size_t size_add(size_t a, size_t b)
{
    size_t r;
    return a == SIZE_MAX || b == SIZE_MAX || __builtin_add_overflow(a, b, &r) ? SIZE_MAX : r;
}

static inline size_t size_round_up(size_t n, size_t multiple)
{
    size_t padded = size_add(n, multiple - 1);
    return padded == SIZE_MAX ? SIZE_MAX : padded - padded % multiple;
}

#define MEMORY_ALIGN 64 /* a cache line, and the widest vector */

/* NULL on failure or when bytes is SIZE_MAX. Contents are undefined; 64-byte aligned.
 * Large blocks ask for huge pages. Freed with memory_free. */
void *memory_alloc(size_t bytes);
/* As memory_alloc for count elements of size bytes, zeroed. */
void *memory_zalloc(size_t count, size_t size);
void memory_free(void *p);

#endif

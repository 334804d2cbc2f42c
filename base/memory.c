#include "base/memory.h"

#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* From this size on huge pages pay, and zeroing is left to the kernel. */
#define LARGE_BYTES ((size_t)2 << 20)

/* The whole pages inside a block. */
static void *inner_pages(void *p, size_t bytes, size_t *inner_bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t skip = size_round_up((uintptr_t)p, page) - (uintptr_t)p;
    *inner_bytes = (bytes - skip) / page * page;
    return (char *)p + skip;
}

void *memory_alloc(size_t bytes)
{
    void *p = NULL;
    if (bytes == SIZE_MAX || posix_memalign(&p, MEMORY_ALIGN, bytes ? bytes : 1)) return NULL;
    if (bytes >= LARGE_BYTES) {
        size_t inner_bytes;
        void *inner = inner_pages(p, bytes, &inner_bytes);
        (void)madvise(inner, inner_bytes, MADV_HUGEPAGE); /* only advice: kernels may lack it */
    }
    return p;
}

/* Linux gives zeroed pages for dropped anonymous ones, at their first use: a large cache costs no
 * memory before it is filled. Where pages cannot be dropped (locked memory), false. */
static bool drop_pages(void *p, size_t bytes)
{
    size_t inner_bytes;
    char *inner = inner_pages(p, bytes, &inner_bytes);
    if (madvise(inner, inner_bytes, MADV_DONTNEED)) return false;

    char *end = (char *)p + bytes, *inner_end = inner + inner_bytes;
    memset(p, 0, (size_t)(inner - (char *)p));
    memset(inner_end, 0, (size_t)(end - inner_end));
    return true;
}

void *memory_zalloc(size_t count, size_t size)
{
    size_t bytes = size_mul(count, size);
    void *p = memory_alloc(bytes);
    if (p && !(bytes >= LARGE_BYTES && drop_pages(p, bytes))) memset(p, 0, bytes);
    return p;
}

void memory_free(void *p) { free(p); }

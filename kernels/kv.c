#include "kernels/device.h"

#include "base/memory.h"

static size_t half_page_bytes(enum dtype type, int layers, int kv_heads, int head_dim)
{
    size_t tokens = size_mul(size_mul((size_t)layers, (size_t)kv_heads), KV_PAGE_TOKENS);
    return size_mul(tokens, size_mul((size_t)head_dim, dtype_block_bytes(type)));
}

size_t kv_cache_bytes(enum dtype type, int layers, int kv_heads, int head_dim, int pages)
{
    return size_mul(half_page_bytes(type, layers, kv_heads, head_dim), (size_t)pages);
}

size_t kv_page_bytes(enum dtype type, int layers, int kv_heads, int head_dim)
{
    return size_mul(half_page_bytes(type, layers, kv_heads, head_dim), 2);
}

#include "engine/kv.h"

#include "kernels/device.h"

#include <stdbool.h>
#include <stdlib.h>

struct kv_pages {
    int count, unused;
    int32_t *free_page; /* [count]: a stack, of which `unused` are filled */
    bool *taken;        /* [count]: catches a page returned twice, or never given out */
};

struct kv_pages *kv_pages_new(int count)
{
    CHECK(count >= 0);
    struct kv_pages *kv = calloc(1, sizeof *kv);
    if (!kv) return NULL;
    kv->count = kv->unused = count;
    kv->free_page = calloc((size_t)count + 1, sizeof *kv->free_page);
    kv->taken = calloc((size_t)count + 1, sizeof *kv->taken);
    if (!kv->free_page || !kv->taken) {
        free(kv->free_page);
        free(kv->taken);
        free(kv);
        return NULL;
    }
    /* Low pages are on top: a lightly used cache stays in few of the machine's pages. */
    for (int i = 0; i < count; i++) kv->free_page[i] = count - 1 - i;
    return kv;
}

void kv_pages_free(struct kv_pages *kv)
{
    if (!kv) return;
    CHECK(kv->unused == kv->count);
    free(kv->free_page);
    free(kv->taken);
    free(kv);
}

int kv_pages_count(const struct kv_pages *kv) { return kv->count; }
int kv_pages_unused(const struct kv_pages *kv) { return kv->unused; }

int kv_pages_needed(int tokens)
{
    CHECK(tokens >= 0);
    return tokens / KV_PAGE_TOKENS + (tokens % KV_PAGE_TOKENS != 0);
}

enum status kv_reserve(struct kv_pages *kv, int tokens, struct kv_table *out)
{
    CHECK(out->count == 0);
    int count = kv_pages_needed(tokens);
    if (count == 0) return ST_OK;
    if (count > kv->unused) return ST_FULL;
    int32_t *page = malloc((size_t)count * sizeof *page);
    if (!page) return ST_NOMEM;
    for (int i = 0; i < count; i++) {
        page[i] = kv->free_page[--kv->unused];
        CHECK(!kv->taken[page[i]]);
        kv->taken[page[i]] = true;
    }
    *out = (struct kv_table){.page = page, .count = count};
    return ST_OK;
}

void kv_release(struct kv_pages *kv, struct kv_table *table)
{
    for (int i = table->count - 1; i >= 0; i--) {
        int32_t page = table->page[i];
        CHECK(page >= 0 && page < kv->count && kv->taken[page]);
        kv->taken[page] = false;
        kv->free_page[kv->unused++] = page;
    }
    free(table->page);
    *table = (struct kv_table){0};
}

/* Pages of the KV cache: which are free, and which belong to whom.
 *
 * Pure bookkeeping over page numbers; the memory is forward.c's. A sequence gets all pages it can
 * ever need at once, when it is admitted, so that a running one never fails for lack of memory.
 * A page is free or in exactly one table. Not thread-safe. */
#ifndef ENGINE_KV_H
#define ENGINE_KV_H

#include "base/status.h"

#include <stdint.h>

struct kv_pages;

/* Pages of one sequence: position p lives in page[p / KV_PAGE_TOKENS]. */
struct kv_table {
    int32_t *page; /* [count], owned by the table */
    int count;
};

/* NULL when there is no memory. */
struct kv_pages *kv_pages_new(int count);
/* All tables must have been released. */
void kv_pages_free(struct kv_pages *kv);

int kv_pages_count(const struct kv_pages *kv);
int kv_pages_unused(const struct kv_pages *kv);
/* Pages for that many positions. */
int kv_pages_needed(int tokens);

/* Gives out, an empty table, pages for `tokens` positions. ST_FULL: not enough are free; ST_NOMEM. */
NODISCARD enum status kv_reserve(struct kv_pages *kv, int tokens, struct kv_table *out);
/* Takes a table's pages back and empties it; an empty one is fine. */
void kv_release(struct kv_pages *kv, struct kv_table *table);

#endif

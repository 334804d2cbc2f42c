/* Pages of the KV cache: which are free, which belong to whom, and which hold what others may share.
 *
 * Pure bookkeeping over page numbers; the memory is forward.c's. Not thread-safe.
 *
 *  1. A sequence gets all pages it can ever need at once, when it is admitted, so that a running one never
 *     fails for lack of memory.
 *  2. A page is in as many tables as it has references. One without any is free, whether or not it
 *     still holds something: it may be given out, those that hold nothing first, then the least recently
 * used.
 *  3. A page is published when it is full. From then on it is not written, whoever has it. Pages that were
 *     not filled to their end are never found by anybody.
 *  4. The published pages of a table are its first ones, and no two published pages hold the same: where
 *     a sequence has computed what another has published meanwhile, it takes over the other's page, whose
 * bits are the same. So who has a page has its ancestors too, and of free pages a child is always given out
 * before its parent.
 *  5. A page that is being computed may be claimed, so that others who need the same wait for it. */
#ifndef ENGINE_KV_H
#define ENGINE_KV_H

#include "base/status.h"
#include "engine/prefix.h"

#include <stdbool.h>
#include <stdint.h>

struct kv_pages;

/* What a sequence is about to read, as far as its pages can be those of others. */
struct kv_prompt {
    struct prefix_space space;
    const int32_t *token; /* [count] */
    int count;            /* 0: nothing is taken from others */
};

/* Pages of one sequence: position p lives in page[p / KV_PAGE_TOKENS]. */
struct kv_table {
    int32_t *page; /* [count], owned by the table */
    int count;
    int published; /* of them, the first ones */
};

/* share: whether pages are published at all. NULL when there is no memory. */
struct kv_pages *kv_pages_new(int count, bool share);
/* All tables must have been released. */
void kv_pages_free(struct kv_pages *kv);

int kv_pages_count(const struct kv_pages *kv);
/* Pages without an owner, those that still hold something included. */
int kv_pages_unused(const struct kv_pages *kv);
/* Pages for that many positions. */
int kv_pages_needed(int tokens);

/* Gives out, an empty table, pages for `tokens` positions. The first of them, out->published, hold the
 * beginning of the prompt already. ST_FULL: not enough are free; ST_NOMEM. */
NODISCARD enum status kv_reserve(struct kv_pages *kv, const struct kv_prompt *prompt, int tokens,
                                 struct kv_table *out);
/* Takes a table's pages back and empties it; an empty one is fine. */
void kv_release(struct kv_pages *kv, struct kv_table *table);

enum kv_turn {
    KV_COMPUTE, /* the page is the table's to compute */
    KV_ADOPTED, /* it holds what it should: one more is published */
    KV_WAIT     /* another sequence is computing it */
};
/* For the page after the published ones, whether or not the table's owner has begun to compute it. */
enum kv_turn kv_claim(struct kv_pages *kv, const struct kv_prompt *prompt, struct kv_table *table);
/* The page after the published ones is full, with these tokens. Nothing where pages are not shared. */
void kv_publish(struct kv_pages *kv, struct prefix_space space, const int32_t token[static KV_PAGE_TOKENS],
                struct kv_table *table);

#endif

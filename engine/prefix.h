/* Which KV page holds which tokens, so that a prompt finds the pages of its beginning.
 *
 * A forest: a page's parent is the page of the tokens before it, and the roots are told apart by the
 * space they are in. What a page holds is thus known exactly, by its tokens and its ancestors, and
 * finding compares it: a hash only says where to look, so that no collision, chosen or not, can give one
 * request the pages of another. Nothing is allocated after prefix_new. Not thread-safe. */
#ifndef ENGINE_PREFIX_H
#define ENGINE_PREFIX_H

#include "base/key128.h"
#include "kernels/device.h"

#include <stdint.h>

struct prefix;

/* Sequences share pages within one space only. */
struct prefix_space {
    struct key128 set;  /* adapters, their versions and weights: they shape every key and value */
    struct key128 salt; /* who wants to share with whom */
};

#define PREFIX_NONE (-1)

/* What a page holds. */
struct prefix_key {
    struct prefix_space space;
    int32_t parent;       /* the page of the KV_PAGE_TOKENS tokens before; PREFIX_NONE: the first page */
    const int32_t *token; /* [KV_PAGE_TOKENS] */
};

/* For pages 0 .. pages - 1. NULL when there is no memory. */
struct prefix *prefix_new(int pages);
void prefix_free(struct prefix *p);

/* The page that holds that, or PREFIX_NONE. */
int32_t prefix_find(const struct prefix *p, const struct prefix_key *key);
/* The page, which is not in the forest, comes to hold that, which no page holds yet. */
void prefix_add(struct prefix *p, int32_t page, const struct prefix_key *key);
/* The page, which is in the forest and has no children, leaves it. */
void prefix_remove(struct prefix *p, int32_t page);

#endif

#include "engine/prefix.h"

#include <sodium.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

/* A page as it is found; no padding, since it is hashed as bytes. */
struct content {
    struct prefix_space space;
    int32_t token[KV_PAGE_TOKENS];
    int64_t parent;
};
_Static_assert(sizeof(struct content) == sizeof(struct prefix_space) + KV_PAGE_TOKENS * 4 + 8,
               "hashed without padding");

struct node {
    struct content content;
    int32_t next; /* in its bucket, or PREFIX_NONE */
    int children;
    bool used;
};

struct prefix {
    struct node *node; /* [pages], by page */
    int32_t *bucket;   /* [mask + 1]: the first of a chain, or PREFIX_NONE */
    uint64_t mask;
    unsigned char secret[crypto_shorthash_KEYBYTES]; /* nobody can aim at one bucket */
};

struct prefix *prefix_new(int pages)
{
    CHECK(pages >= 0);
    struct prefix *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    size_t buckets = 1;
    while (buckets < (size_t)pages) buckets *= 2;
    p->mask = buckets - 1;
    p->node = calloc((size_t)pages + 1, sizeof *p->node);
    p->bucket = malloc(buckets * sizeof *p->bucket);
    if (!p->node || !p->bucket || getentropy(p->secret, sizeof p->secret)) {
        prefix_free(p);
        return NULL;
    }
    for (size_t i = 0; i < buckets; i++) p->bucket[i] = PREFIX_NONE;
    return p;
}

void prefix_free(struct prefix *p)
{
    if (!p) return;
    free(p->node);
    free(p->bucket);
    free(p);
}

static struct content content_of(const struct prefix_key *key)
{
    struct content c = {.space = key->space, .parent = key->parent};
    memcpy(c.token, key->token, sizeof c.token);
    return c;
}

static int32_t *bucket_of(const struct prefix *p, const struct content *c)
{
    uint64_t hash;
    _Static_assert(sizeof hash == crypto_shorthash_BYTES, "SipHash's result");
    crypto_shorthash((unsigned char *)&hash, (const unsigned char *)c, sizeof *c, p->secret);
    return &p->bucket[hash & p->mask];
}

int32_t prefix_find(const struct prefix *p, const struct prefix_key *key)
{
    struct content c = content_of(key);
    int32_t page = *bucket_of(p, &c);
    while (page != PREFIX_NONE && memcmp(&p->node[page].content, &c, sizeof c) != 0)
        page = p->node[page].next;
    return page;
}

void prefix_add(struct prefix *p, int32_t page, const struct prefix_key *key)
{
    struct node *n = &p->node[page];
    CHECK(!n->used && prefix_find(p, key) == PREFIX_NONE);
    CHECK(key->parent == PREFIX_NONE || p->node[key->parent].used);
    n->content = content_of(key);
    int32_t *bucket = bucket_of(p, &n->content);
    n->next = *bucket;
    *bucket = page;
    n->children = 0;
    n->used = true;
    if (key->parent != PREFIX_NONE) p->node[key->parent].children++;
}

void prefix_remove(struct prefix *p, int32_t page)
{
    struct node *n = &p->node[page];
    CHECK(n->used && n->children == 0); /* or a child would pass for the next owner's */
    int32_t *at = bucket_of(p, &n->content);
    while (*at != page) at = &p->node[*at].next;
    *at = n->next;
    n->used = false;
    if (n->content.parent != PREFIX_NONE) p->node[n->content.parent].children--;
}

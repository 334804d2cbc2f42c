#include "engine/kv.h"

#include <stdlib.h>

enum page_state {
    PAGE_PRIVATE,  /* nobody finds it */
    PAGE_CLAIMED,  /* found, but not full yet */
    PAGE_PUBLISHED /* full */
};

struct page {
    enum page_state state;
    int references;     /* tables it is in; 0: free */
    int32_t prev, next; /* of free pages */
};

struct kv_pages {
    int count, unused;
    struct page *page;     /* [count + 1]; the last one heads the ring of free pages, */
    int32_t head;          /* in the order in which they are given out */
    struct prefix *prefix; /* claimed and published pages; NULL: nothing is shared */
};

/* --- free pages -------------------------------------------------------------------------------- */

static void free_insert_after(struct kv_pages *kv, int32_t after, int32_t page)
{
    struct page *p = kv->page;
    p[page].prev = after;
    p[page].next = p[after].next;
    p[p[page].next].prev = page;
    p[after].next = page;
    kv->unused++;
}

static void free_remove(struct kv_pages *kv, int32_t page)
{
    struct page *p = kv->page;
    p[p[page].prev].next = p[page].next;
    p[p[page].next].prev = p[page].prev;
    kv->unused--;
}

struct kv_pages *kv_pages_new(int count, bool share)
{
    CHECK(count >= 0);
    struct kv_pages *kv = calloc(1, sizeof *kv);
    if (!kv) return NULL;
    kv->count = count;
    kv->head = count;
    kv->page = calloc((size_t)count + 1, sizeof *kv->page);
    if (share) kv->prefix = prefix_new(count);
    if (!kv->page || (share && !kv->prefix)) {
        prefix_free(kv->prefix);
        free(kv->page);
        free(kv);
        return NULL;
    }
    /* Low pages come first: a lightly used cache stays in few of the machine's pages. */
    kv->page[count].prev = kv->page[count].next = count;
    for (int i = count - 1; i >= 0; i--) free_insert_after(kv, kv->head, i);
    return kv;
}

void kv_pages_free(struct kv_pages *kv)
{
    if (!kv) return;
    CHECK(kv->unused == kv->count);
    prefix_free(kv->prefix);
    free(kv->page);
    free(kv);
}

int kv_pages_count(const struct kv_pages *kv) { return kv->count; }
int kv_pages_unused(const struct kv_pages *kv) { return kv->unused; }

int kv_pages_needed(int tokens)
{
    CHECK(tokens >= 0);
    return tokens / KV_PAGE_TOKENS + (tokens % KV_PAGE_TOKENS != 0);
}

/* --- references -------------------------------------------------------------------------------- */

static void page_forget(struct kv_pages *kv, int32_t page)
{
    prefix_remove(kv->prefix, page);
    kv->page[page].state = PAGE_PRIVATE;
}

/* One more reference to a page that holds something. */
static void page_share(struct kv_pages *kv, int32_t page)
{
    if (kv->page[page].references++ == 0) free_remove(kv, page);
}

/* The next free page, with nothing in it. */
static int32_t page_take(struct kv_pages *kv)
{
    int32_t page = kv->page[kv->head].next;
    CHECK(page != kv->head && kv->page[page].references == 0);
    free_remove(kv, page);
    if (kv->page[page].state == PAGE_PUBLISHED) page_forget(kv, page);
    kv->page[page].references = 1;
    return page;
}

static void page_drop(struct kv_pages *kv, int32_t page)
{
    CHECK(page >= 0 && page < kv->count && kv->page[page].references > 0);
    if (--kv->page[page].references > 0) return;
    if (kv->page[page].state == PAGE_CLAIMED) page_forget(kv, page);
    bool keep = kv->page[page].state == PAGE_PUBLISHED;
    free_insert_after(kv, keep ? kv->page[kv->head].prev : kv->head, page);
}

/* --- tables ------------------------------------------------------------------------------------ */

static struct prefix_key key_of(struct prefix_space space, const int32_t *page, int index,
                                const int32_t *token)
{
    return (struct prefix_key){
        .space = space, .token = token, .parent = index > 0 ? page[index - 1] : PREFIX_NONE};
}

/* The prompt's beginning, as far as it is published, into page. */
static int pages_find(const struct kv_pages *kv, const struct kv_prompt *prompt, int32_t *page)
{
    int n = 0, most = kv->prefix ? prompt->count / KV_PAGE_TOKENS : 0;
    for (; n < most; n++) {
        struct prefix_key key = key_of(prompt->space, page, n, prompt->token + n * KV_PAGE_TOKENS);
        int32_t found = prefix_find(kv->prefix, &key);
        if (found == PREFIX_NONE || kv->page[found].state != PAGE_PUBLISHED) break;
        page[n] = found;
    }
    return n;
}

enum status kv_reserve(struct kv_pages *kv, const struct kv_prompt *prompt, int tokens, struct kv_table *out)
{
    CHECK(out->count == 0 && prompt->count <= tokens);
    int count = kv_pages_needed(tokens);
    if (count == 0) return ST_OK;
    int32_t *page = malloc((size_t)count * sizeof *page);
    if (!page) return ST_NOMEM;
    int shared = pages_find(kv, prompt, page), unused = kv->unused;
    for (int i = 0; i < shared; i++) unused -= kv->page[page[i]].references == 0;
    if (count - shared > unused) {
        free(page);
        return ST_FULL;
    }
    for (int i = 0; i < shared; i++) page_share(kv, page[i]);
    for (int i = shared; i < count; i++) page[i] = page_take(kv);
    *out = (struct kv_table){.page = page, .count = count, .published = shared};
    return ST_OK;
}

void kv_release(struct kv_pages *kv, struct kv_table *table)
{
    /* The last first, which makes children older than their parents. */
    for (int i = table->count - 1; i >= 0; i--) page_drop(kv, table->page[i]);
    free(table->page);
    *table = (struct kv_table){0};
}

/* --- sharing ----------------------------------------------------------------------------------- */

/* The published page takes the place of the table's next one. */
static void page_adopt(struct kv_pages *kv, struct kv_table *table, int32_t page)
{
    int32_t *own = &table->page[table->published++];
    if (*own == page) return;
    page_share(kv, page);
    page_drop(kv, *own);
    *own = page;
}

enum kv_turn kv_claim(struct kv_pages *kv, const struct kv_prompt *prompt, struct kv_table *table)
{
    int index = table->published;
    if (!kv->prefix || (index + 1) * KV_PAGE_TOKENS > prompt->count) return KV_COMPUTE;
    int32_t own = table->page[index];
    struct prefix_key key = key_of(prompt->space, table->page, index, prompt->token + index * KV_PAGE_TOKENS);
    int32_t found = prefix_find(kv->prefix, &key);
    if (found == PREFIX_NONE) {
        prefix_add(kv->prefix, own, &key);
        kv->page[own].state = PAGE_CLAIMED;
        return KV_COMPUTE;
    }
    if (kv->page[found].state == PAGE_CLAIMED) return found == own ? KV_COMPUTE : KV_WAIT;
    page_adopt(kv, table, found);
    return KV_ADOPTED;
}

void kv_publish(struct kv_pages *kv, struct prefix_space space, const int32_t token[static KV_PAGE_TOKENS],
                struct kv_table *table)
{
    CHECK(table->published < table->count);
    if (!kv->prefix) return;
    int32_t own = table->page[table->published];
    struct prefix_key key = key_of(space, table->page, table->published, token);
    int32_t found = prefix_find(kv->prefix, &key);
    /* Whoever claimed it and is still computing will find this one. */
    if (found != PREFIX_NONE && found != own && kv->page[found].state == PAGE_CLAIMED) {
        page_forget(kv, found);
        found = PREFIX_NONE;
    }
    if (found == PREFIX_NONE) {
        prefix_add(kv->prefix, own, &key);
        found = own;
    }
    kv->page[found].state = PAGE_PUBLISHED;
    page_adopt(kv, table, found);
}

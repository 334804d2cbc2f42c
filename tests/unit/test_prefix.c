#include "engine/prefix.h"

#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"
#include "tests/support/random.h"

#include <stdlib.h>
#include <string.h>

struct page_text {
    int32_t token[KV_PAGE_TOKENS];
};

static struct page_text text_of(int32_t first)
{
    struct page_text t;
    for (int i = 0; i < KV_PAGE_TOKENS; i++) t.token[i] = first + i;
    return t;
}

static void test_everything_counts(void **state)
{
    (void)state;
    struct prefix *p = prefix_new(8);
    struct page_text a = text_of(100), changed;
    struct prefix_key root = {.parent = PREFIX_NONE, .token = a.token}, key = root;
    assert_int_equal(prefix_find(p, &root), PREFIX_NONE);
    prefix_add(p, 3, &root);
    assert_int_equal(prefix_find(p, &root), 3);

    key.parent = 3; /* the same tokens, later */
    assert_int_equal(prefix_find(p, &key), PREFIX_NONE);
    prefix_add(p, 5, &key);
    assert_int_equal(prefix_find(p, &key), 5);
    assert_int_equal(prefix_find(p, &root), 3);
    for (int i = 0; i < KV_PAGE_TOKENS; i++) {
        changed = a;
        changed.token[i]++;
        key = (struct prefix_key){.parent = PREFIX_NONE, .token = changed.token};
        assert_int_equal(prefix_find(p, &key), PREFIX_NONE);
    }
    for (int i = 0; i < 4; i++) {
        key = root;
        (i < 2 ? &key.space.set : &key.space.salt)->word[i % 2] = 1;
        assert_int_equal(prefix_find(p, &key), PREFIX_NONE);
    }
    prefix_remove(p, 5);
    prefix_remove(p, 3);
    assert_int_equal(prefix_find(p, &root), PREFIX_NONE);
    prefix_free(p);
}

#define PAGES 61

/* What the pages hold, as a list that is searched from end to end. */
struct mirror {
    bool used[PAGES];
    struct prefix_key key[PAGES];
    struct page_text text[PAGES];
    int children[PAGES];
};

static int32_t mirror_find(const struct mirror *m, const struct prefix_key *key)
{
    for (int i = 0; i < PAGES; i++)
        if (m->used[i] && m->key[i].parent == key->parent &&
            key128_equal(m->key[i].space.set, key->space.set) &&
            key128_equal(m->key[i].space.salt, key->space.salt) &&
            memcmp(m->text[i].token, key->token, sizeof m->text[i].token) == 0)
            return i;
    return PREFIX_NONE;
}

static void mirror_add(struct mirror *m, int32_t page, const struct prefix_key *key)
{
    m->used[page] = true;
    m->key[page] = *key;
    memcpy(m->text[page].token, key->token, sizeof m->text[page].token);
    m->children[page] = 0;
    if (key->parent != PREFIX_NONE) m->children[key->parent]++;
}

static void mirror_remove(struct mirror *m, int32_t page)
{
    m->used[page] = false;
    if (m->key[page].parent != PREFIX_NONE) m->children[m->key[page].parent]--;
}

/* A few spaces and texts only, so that much is found. */
static void test_like_a_list(void **state)
{
    (void)state;
    struct test_random r = {11};
    struct prefix *p = prefix_new(PAGES);
    struct mirror *m = calloc(1, sizeof *m);
    int found = 0, removed = 0;
    for (int round = 0; round < 20000; round++) {
        int32_t page = (int32_t)random_below(&r, PAGES);
        if (m->used[page]) {
            if (m->children[page] > 0) continue;
            prefix_remove(p, page);
            mirror_remove(m, page);
            removed++;
            continue;
        }
        struct page_text t = text_of((int32_t)random_below(&r, 4));
        struct prefix_key key = {.token = t.token, .parent = (int32_t)random_below(&r, PAGES)};
        if (!m->used[key.parent]) key.parent = PREFIX_NONE;
        key.space.set.word[0] = random_below(&r, 3);
        key.space.salt.word[1] = random_below(&r, 2);
        int32_t want = mirror_find(m, &key);
        assert_int_equal(prefix_find(p, &key), want);
        found += want != PREFIX_NONE;
        if (want != PREFIX_NONE) continue;
        prefix_add(p, page, &key);
        mirror_add(m, page, &key);
    }
    assert_true(found > 1000 && removed > 1000);
    prefix_free(p);
    free(m);
}

static enum status attempt(void *ctx)
{
    (void)ctx;
    struct prefix *p = prefix_new(5);
    prefix_free(p);
    return p ? ST_OK : ST_NOMEM;
}

static void test_no_memory(void **state)
{
    (void)state;
    if (!alloc_fail_available()) skip();
    assert_int_equal(alloc_fail_sweep(attempt, NULL), 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_everything_counts),
        cmocka_unit_test(test_like_a_list),
        cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#include "engine/kv.h"

#include "tests/support/check.h"
#include "tests/support/random.h"

#include <stdbool.h>
#include <stdlib.h>

static const struct kv_prompt no_prompt;

static void test_pages_needed(void **state)
{
    (void)state;
    assert_int_equal(kv_pages_needed(0), 0);
    assert_int_equal(kv_pages_needed(1), 1);
    assert_int_equal(kv_pages_needed(KV_PAGE_TOKENS), 1);
    assert_int_equal(kv_pages_needed(KV_PAGE_TOKENS + 1), 2);
    assert_int_equal(kv_pages_needed(INT32_MAX), INT32_MAX / KV_PAGE_TOKENS + 1);
}

static void test_full_leaves_all_as_it_was(void **state)
{
    (void)state;
    struct kv_pages *kv = kv_pages_new(4, false);
    struct kv_table a = {0}, b = {0};
    assert_int_equal(kv_reserve(kv, &no_prompt, 3 * KV_PAGE_TOKENS, &a), ST_OK);
    assert_int_equal(kv_reserve(kv, &no_prompt, KV_PAGE_TOKENS + 1, &b), ST_FULL);
    assert_int_equal(b.count, 0);
    assert_null(b.page);
    assert_int_equal(kv_pages_unused(kv), 1);
    assert_int_equal(kv_reserve(kv, &no_prompt, KV_PAGE_TOKENS, &b), ST_OK);
    assert_int_equal(kv_pages_unused(kv), 0);
    kv_release(kv, &a);
    kv_release(kv, &b);
    kv_release(kv, &b); /* an empty one */
    assert_int_equal(kv_pages_unused(kv), 4);
    kv_pages_free(kv);
}

/* --- streams of tokens that share their beginnings --- */

#define STREAM_PAGES  6
#define STREAM_TOKENS (STREAM_PAGES * KV_PAGE_TOKENS)

/* Bit i of `bits` chooses page i: streams whose low bits are equal begin equally. */
struct stream {
    unsigned bits;
    struct prefix_space space;
    int32_t token[STREAM_TOKENS];
};

static struct stream stream_of(unsigned bits, unsigned space)
{
    struct stream s = {.bits = bits, .space = {.set = {{space % 2}}, .salt = {{0, space / 2}}}};
    for (int i = 0; i < STREAM_TOKENS; i++) {
        unsigned variant = bits >> (i / KV_PAGE_TOKENS) & 1;
        s.token[i] = variant && i % KV_PAGE_TOKENS == KV_PAGE_TOKENS - 1 ? 7 : 1;
    }
    return s;
}

/* Names what page i of a stream holds, all that came before included; never 0. */
static unsigned content_of(const struct stream *s, int page)
{
    unsigned space = (unsigned)(s->space.set.word[0] + 2 * s->space.salt.word[1]);
    return 1 + ((space * STREAM_PAGES + (unsigned)page) << STREAM_PAGES | (s->bits & ((2u << page) - 1)));
}

static struct kv_prompt prompt_of(const struct stream *s, int count)
{
    return (struct kv_prompt){.space = s->space, .token = s->token, .count = count};
}

static void publish(struct kv_pages *kv, const struct stream *s, struct kv_table *t)
{
    kv_publish(kv, s->space, s->token + t->published * KV_PAGE_TOKENS, t);
}

static void reserve_published(struct kv_pages *kv, const struct stream *s, int pages, struct kv_table *t)
{
    struct kv_prompt prompt = prompt_of(s, pages * KV_PAGE_TOKENS);
    assert_int_equal(kv_reserve(kv, &prompt, pages * KV_PAGE_TOKENS, t), ST_OK);
    while (t->published < pages) publish(kv, s, t);
}

/* Of that many pages of the stream, those found in the cache. */
static int found_of(struct kv_pages *kv, const struct stream *s, int pages)
{
    struct kv_prompt prompt = prompt_of(s, pages * KV_PAGE_TOKENS);
    struct kv_table t = {0};
    assert_int_equal(kv_reserve(kv, &prompt, pages * KV_PAGE_TOKENS, &t), ST_OK);
    int count = t.published;
    kv_release(kv, &t);
    return count;
}

static void test_least_recently_used_goes_first(void **state)
{
    (void)state;
    struct kv_pages *kv = kv_pages_new(10, true);
    struct stream a = stream_of(1, 0), b = stream_of(2, 0);
    struct kv_table ta = {0}, tb = {0}, more = {0};
    reserve_published(kv, &a, 4, &ta);
    reserve_published(kv, &b, 4, &tb);
    kv_release(kv, &ta);
    kv_release(kv, &tb);
    assert_int_equal(kv_pages_unused(kv), 10);
    /* 2 pages that hold nothing, then the last two of `a`. */
    assert_int_equal(kv_reserve(kv, &no_prompt, 4 * KV_PAGE_TOKENS, &more), ST_OK);
    assert_int_equal(kv_pages_unused(kv), 6);
    assert_int_equal(found_of(kv, &b, 4), 4);
    assert_int_equal(found_of(kv, &a, 2), 2);
    assert_int_equal(found_of(kv, &a, 3), 2); /* the last of b makes room */
    assert_int_equal(found_of(kv, &b, 4), 3);
    kv_release(kv, &more);
    kv_pages_free(kv);
}

/* Pages in use are shared at no cost, but cannot make room. */
static void test_shared_pages_count_once(void **state)
{
    (void)state;
    struct kv_pages *kv = kv_pages_new(5, true);
    struct stream a = stream_of(0, 0);
    struct kv_prompt whole = prompt_of(&a, 4 * KV_PAGE_TOKENS);
    struct kv_table t[3] = {{0}};
    reserve_published(kv, &a, 4, &t[0]);
    assert_int_equal(kv_reserve(kv, &whole, 5 * KV_PAGE_TOKENS, &t[1]), ST_OK);
    assert_int_equal(t[1].published, 4);
    assert_int_equal(kv_pages_unused(kv), 0);
    assert_int_equal(kv_reserve(kv, &whole, 4 * KV_PAGE_TOKENS, &t[2]), ST_OK); /* all of it */
    kv_release(kv, &t[2]);
    assert_int_equal(kv_reserve(kv, &whole, 5 * KV_PAGE_TOKENS, &t[2]), ST_FULL);
    assert_int_equal(kv_reserve(kv, &no_prompt, KV_PAGE_TOKENS, &t[2]), ST_FULL);
    kv_release(kv, &t[1]);
    kv_release(kv, &t[0]);
    assert_int_equal(kv_pages_unused(kv), 5);
    /* What it shares is not what it takes: 4 cached and idle, 1 other, 6 wanted. */
    assert_int_equal(kv_reserve(kv, &whole, 6 * KV_PAGE_TOKENS, &t[0]), ST_FULL);
    assert_int_equal(kv_reserve(kv, &whole, 5 * KV_PAGE_TOKENS, &t[0]), ST_OK);
    kv_release(kv, &t[0]);
    kv_pages_free(kv);
}

static void test_claims(void **state)
{
    (void)state;
    struct kv_pages *kv = kv_pages_new(20, true);
    struct stream a = stream_of(0, 0);
    struct kv_prompt prompt = prompt_of(&a, 2 * KV_PAGE_TOKENS);
    struct kv_table t[3] = {{0}};
    for (int i = 0; i < 3; i++) assert_int_equal(kv_reserve(kv, &prompt, 50, &t[i]), ST_OK);
    assert_int_equal(kv_claim(kv, &prompt, &t[0]), KV_COMPUTE);
    assert_int_equal(kv_claim(kv, &prompt, &t[0]), KV_COMPUTE);
    assert_int_equal(kv_claim(kv, &prompt, &t[1]), KV_WAIT);
    kv_release(kv, &t[0]); /* its work is void */
    assert_int_equal(kv_claim(kv, &prompt, &t[1]), KV_COMPUTE);
    assert_int_equal(kv_claim(kv, &prompt, &t[2]), KV_WAIT);
    publish(kv, &a, &t[2]); /* who did not wait may be first */
    assert_int_equal(kv_claim(kv, &prompt, &t[1]), KV_ADOPTED);
    assert_int_equal(t[1].page[0], t[2].page[0]);
    assert_int_equal(kv_claim(kv, &prompt, &t[1]), KV_COMPUTE);
    publish(kv, &a, &t[1]);
    assert_int_equal(kv_claim(kv, &prompt, &t[2]), KV_ADOPTED);
    assert_int_equal(kv_claim(kv, &prompt, &t[2]), KV_COMPUTE); /* beyond the prompt */
    assert_int_equal(kv_claim(kv, &prompt, &t[1]), KV_COMPUTE);
    kv_release(kv, &t[1]);
    kv_release(kv, &t[2]);
    assert_int_equal(kv_pages_unused(kv), 20);
    kv_pages_free(kv);
}

/* --- any order of calls --- */

#define PAGES  37
#define TABLES 12

/* A table with what its owner knows. */
struct owner {
    struct stream stream;
    struct kv_table table;
    int prompt; /* tokens */
};

struct world {
    struct kv_pages *kv;
    struct owner owner[TABLES];
    unsigned written[PAGES]; /* content_of what was written there; 0: part of a page */
    bool published[PAGES];   /* and may be found */
    int adopted, waited, shared, full;
};

static bool is_published(const struct world *w, unsigned content)
{
    for (int i = 0; i < PAGES; i++)
        if (w->published[i] && w->written[i] == content) return true;
    return false;
}

/* References are as counted, private pages have one owner, and published ones hold what they should. */
static void world_check(const struct world *w)
{
    int references[PAGES] = {0}, owned = 0;
    for (int t = 0; t < TABLES; t++) {
        const struct owner *o = &w->owner[t];
        for (int i = 0; i < o->table.count; i++) {
            int32_t page = o->table.page[i];
            assert_in_range(page, 0, PAGES - 1);
            owned += references[page]++ == 0;
            if (i < o->table.published) assert_int_equal(w->written[page], content_of(&o->stream, i));
        }
    }
    for (int t = 0; t < TABLES; t++) {
        const struct owner *o = &w->owner[t];
        for (int i = o->table.published; i < o->table.count; i++)
            assert_int_equal(references[o->table.page[i]], 1);
    }
    assert_int_equal(kv_pages_unused(w->kv), PAGES - owned);
}

static void world_reserve(struct world *w, struct owner *o, struct test_random *r)
{
    int before = kv_pages_unused(w->kv);
    int tokens = 1 + (int)random_below(r, STREAM_TOKENS);
    /* Often what another one reads, so that they meet. */
    if (random_below(r, 3) > 0)
        o->stream = w->owner[random_below(r, TABLES)].stream;
    else
        o->stream = stream_of((unsigned)random_below(r, 1 << STREAM_PAGES), (unsigned)random_below(r, 4));
    o->prompt = random_below(r, 5) == 0 ? 0 : (int)random_below(r, (uint64_t)tokens + 1);
    struct kv_prompt prompt = prompt_of(&o->stream, o->prompt);
    enum status st = kv_reserve(w->kv, &prompt, tokens, &o->table);
    if (st) {
        assert_int_equal(st, ST_FULL);
        assert_true(kv_pages_needed(tokens) > before);
        w->full++;
        return;
    }
    int count = o->table.published;
    assert_int_equal(o->table.count, kv_pages_needed(tokens));
    assert_true(count * KV_PAGE_TOKENS <= o->prompt);
    if ((count + 1) * KV_PAGE_TOKENS <= o->prompt)
        assert_false(is_published(w, content_of(&o->stream, count)));
    for (int i = count; i < o->table.count; i++) {
        w->written[o->table.page[i]] = 0;
        w->published[o->table.page[i]] = false;
    }
    w->shared += count;
}

/* The next page of a table, or a part of it. */
static void world_work(struct world *w, struct owner *o, struct test_random *r)
{
    struct kv_prompt prompt = prompt_of(&o->stream, o->prompt);
    int index = o->table.published;
    if (index == o->table.count) {
        kv_release(w->kv, &o->table);
        return;
    }
    unsigned content = content_of(&o->stream, index);
    enum kv_turn turn = kv_claim(w->kv, &prompt, &o->table);
    bool may_share = (index + 1) * KV_PAGE_TOKENS <= o->prompt;
    assert_int_equal(turn == KV_ADOPTED, may_share && is_published(w, content));
    assert_int_equal(o->table.published, index + (turn == KV_ADOPTED));
    w->adopted += turn == KV_ADOPTED;
    w->waited += turn == KV_WAIT;
    if (turn != KV_COMPUTE) return;
    if (random_below(r, 3)) return; /* its rows come in several steps */
    int32_t page = o->table.page[index];
    assert_false(w->published[page]);
    w->written[page] = content;
    publish(w->kv, &o->stream, &o->table);
    w->published[o->table.page[index]] = true;
}

static void test_any_order(void **state)
{
    (void)state;
    struct test_random r = {7};
    struct world *w = calloc(1, sizeof *w);
    w->kv = kv_pages_new(PAGES, true);
    for (int t = 0; t < TABLES; t++) w->owner[t].stream = stream_of(0, 0);
    for (int round = 0; round < 60000; round++) {
        struct owner *o = &w->owner[random_below(&r, TABLES)];
        if (o->table.count == 0)
            world_reserve(w, o, &r);
        else if (random_below(&r, 12) == 0)
            kv_release(w->kv, &o->table);
        else
            world_work(w, o, &r);
        world_check(w);
    }
    assert_true(w->adopted > 100 && w->waited > 100 && w->shared > 100 && w->full > 100);
    for (int t = 0; t < TABLES; t++) kv_release(w->kv, &w->owner[t].table);
    assert_int_equal(kv_pages_unused(w->kv), kv_pages_count(w->kv));
    kv_pages_free(w->kv);
    free(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pages_needed),
        cmocka_unit_test(test_full_leaves_all_as_it_was),
        cmocka_unit_test(test_least_recently_used_goes_first),
        cmocka_unit_test(test_shared_pages_count_once),
        cmocka_unit_test(test_claims),
        cmocka_unit_test(test_any_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#include "engine/scheduler.h"

#include "kernels/device.h"
#include "tests/support/check.h"
#include "tests/support/random.h"

#include <stdlib.h>

static struct scheduler *scheduler_make(int running_max, int waiting_max, int prefill_rows, int pages)
{
    struct scheduler_config c = {running_max, waiting_max, prefill_rows, pages, false};
    struct scheduler *s = scheduler_new(&c);
    assert_non_null(s);
    return s;
}

static struct sched_seq seq_of(int prompt_count, int output_max)
{
    return (struct sched_seq){.prompt_count = prompt_count,
                              .tokens_max = prompt_count + output_max};
}

static void add(struct scheduler *s, struct sched_seq *q)
{
    assert_int_equal(scheduler_add(s, q), ST_OK);
}

/* Rows of q in the step, 0 where it has none. */
static int rows_of(const struct step_entry *e, int n, const struct sched_seq *q)
{
    for (int i = 0; i < n; i++)
        if (e[i].seq == q) return e[i].rows;
    return 0;
}

static void test_order_of_admission(void **state)
{
    (void)state;
    struct scheduler *s = scheduler_make(8, 8, 16, 100);
    struct sched_seq q[5];
    const int priority[5] = {1, 0, 1, -3, 0}, expect[5] = {3, 1, 4, 0, 2};
    for (int i = 0; i < 5; i++) {
        q[i] = seq_of(1, 1);
        q[i].priority = priority[i];
        add(s, &q[i]);
    }
    for (int i = 0; i < 5; i++) assert_ptr_equal(scheduler_admit(s), &q[expect[i]]);
    assert_null(scheduler_admit(s));
    for (int i = 0; i < 5; i++) scheduler_remove(s, &q[i]);
    scheduler_free(s);
}

/* The first that does not fit holds back smaller ones behind it, or it would starve. */
static void test_admission_by_capacity(void **state)
{
    (void)state;
    struct scheduler *s = scheduler_make(8, 3, 16, 4);
    struct sched_seq a = seq_of(3 * KV_PAGE_TOKENS, 0), b = seq_of(1, 2 * KV_PAGE_TOKENS - 1),
                     c = seq_of(1, 0), d = seq_of(1, 0);
    add(s, &a);
    add(s, &b);
    add(s, &c);
    assert_int_equal(scheduler_add(s, &d), ST_FULL);
    assert_ptr_equal(scheduler_admit(s), &a);
    assert_int_equal(a.table.count, 3);
    assert_null(scheduler_admit(s));
    assert_int_equal(scheduler_pages_unused(s), 1);

    scheduler_remove(s, &a);
    assert_int_equal(scheduler_pages_unused(s), 4);
    assert_ptr_equal(scheduler_admit(s), &b);
    assert_ptr_equal(scheduler_admit(s), &c);
    scheduler_remove(s, &b);
    scheduler_remove(s, &c);
    scheduler_free(s);
}

static void test_batch_limit(void **state)
{
    (void)state;
    struct scheduler *s = scheduler_make(2, 8, 16, 100);
    struct sched_seq q[3];
    for (int i = 0; i < 3; i++) {
        q[i] = seq_of(1, 1);
        add(s, &q[i]);
    }
    assert_ptr_equal(scheduler_admit(s), &q[0]);
    assert_ptr_equal(scheduler_admit(s), &q[1]);
    assert_null(scheduler_admit(s));
    scheduler_remove(s, &q[2]); /* a waiting one */
    scheduler_remove(s, &q[0]);
    assert_null(scheduler_admit(s));
    scheduler_remove(s, &q[1]);
    scheduler_free(s);
}

/* A short prompt that arrives behind a very long one is read at once, and a running sequence gets
 * its row in every step. */
static void test_long_prompt_blocks_nobody(void **state)
{
    (void)state;
    struct scheduler *s = scheduler_make(4, 4, 16, 1000);
    struct sched_seq decoding = seq_of(1, 100), slow = seq_of(1000, 1), quick = seq_of(6, 1);
    const struct step_entry *e;
    add(s, &decoding);
    scheduler_admit(s);
    assert_int_equal(scheduler_compose(s, &e), 1);

    add(s, &slow);
    scheduler_admit(s);
    int n = scheduler_compose(s, &e);
    assert_int_equal(rows_of(e, n, &decoding), 1);
    assert_int_equal(rows_of(e, n, &slow), 16);

    add(s, &quick);
    scheduler_admit(s);
    n = scheduler_compose(s, &e);
    assert_int_equal(rows_of(e, n, &decoding), 1);
    assert_int_equal(rows_of(e, n, &quick), 6);
    assert_int_equal(rows_of(e, n, &slow), 10); /* what the short one leaves */
    assert_int_equal(quick.done, 6);
    n = scheduler_compose(s, &e);
    assert_int_equal(rows_of(e, n, &quick), 1);
    assert_int_equal(rows_of(e, n, &slow), 16);
    scheduler_remove(s, &decoding);
    scheduler_remove(s, &slow);
    scheduler_remove(s, &quick);
    scheduler_free(s);
}

static void test_prompts_take_turns(void **state)
{
    (void)state;
    struct scheduler *s = scheduler_make(7, 7, 3, 1000);
    struct sched_seq q[7];
    for (int i = 0; i < 7; i++) {
        q[i] = seq_of(60, 1);
        add(s, &q[i]);
        scheduler_admit(s);
    }
    const struct step_entry *e;
    for (int step = 0; step < 7; step++) assert_int_equal(scheduler_compose(s, &e), 3);
    for (int i = 0; i < 7; i++) {
        assert_int_equal(q[i].done, 3);
        scheduler_remove(s, &q[i]);
    }
    scheduler_free(s);
}

/* --- shared pages --- */

static struct scheduler *sharing_make(int running_max, int prefill_rows, int pages)
{
    struct scheduler_config c = {running_max, 100, prefill_rows, pages, true};
    struct scheduler *s = scheduler_new(&c);
    assert_non_null(s);
    return s;
}

/* What the step's rows filled is published. Tokens after the prompt count up from its length. */
static void publish(struct scheduler *s, struct sched_seq *q)
{
    int32_t token[KV_PAGE_TOKENS];
    int first;
    while ((first = scheduler_page_full(s, q)) >= 0) {
        for (int i = 0; i < KV_PAGE_TOKENS; i++)
            token[i] = first + i < q->prompt_count ? q->prompt[first + i] : first + i;
        scheduler_publish(s, q, token);
    }
}

static void test_equal_prompts_are_read_once(void **state)
{
    (void)state;
    int32_t prompt[100] = {0};
    struct scheduler *s = sharing_make(4, 50, 100);
    struct sched_seq a = seq_of(100, 1), b = a, c = a;
    const struct step_entry *e;
    a.prompt = b.prompt = c.prompt = prompt;
    c.reads_all = true;
    add(s, &a);
    add(s, &b);
    while (scheduler_admit(s)) {}
    int n = scheduler_compose(s, &e);
    assert_int_equal(rows_of(e, n, &a), 50);
    assert_int_equal(rows_of(e, n, &b), 0);
    publish(s, &a);

    /* The first goes away in the middle of a page: what it had published is used. */
    scheduler_remove(s, &a);
    n = scheduler_compose(s, &e);
    assert_int_equal(b.cached, 48);
    assert_int_equal(rows_of(e, n, &b), 50);
    publish(s, &b);
    n = scheduler_compose(s, &e);
    assert_int_equal(rows_of(e, n, &b), 2);
    publish(s, &b);

    add(s, &a);
    add(s, &c);
    while (scheduler_admit(s)) {}
    assert_int_equal(a.done, 96); /* the last page holds the last token, which is read */
    assert_int_equal(a.cached, 96);
    assert_int_equal(c.done, 0);
    n = scheduler_compose(s, &e);
    assert_int_equal(rows_of(e, n, &a), 4);
    assert_int_equal(rows_of(e, n, &c), 46);
    publish(s, &a);
    publish(s, &c);
    scheduler_remove(s, &a);
    scheduler_remove(s, &b);
    scheduler_remove(s, &c);
    assert_int_equal(scheduler_pages_unused(s), 100);
    scheduler_free(s);
}

#define READERS 200

/* Prompts of a few kinds come and go; each that stays is read to its end, and no step is empty. */
static void test_readers_of_the_same(void **state)
{
    (void)state;
    static int32_t prompt[3][120];
    struct test_random r = {5};
    struct scheduler *s = sharing_make(7, 19, 40);
    struct sched_seq *q = calloc(READERS, sizeof *q);
    uint64_t rows = 0, wanted = 0, cached = 0;
    for (int i = 0; i < 3; i++)
        for (int k = 40; k < 120; k++) prompt[i][k] = i; /* the first 40 are equal */
    for (int added = 0; added < READERS || scheduler_running(s) > 0;) {
        while (added < READERS && scheduler_waiting(s) < 5) {
            q[added] = seq_of(1 + (int)random_below(&r, 120), (int)random_below(&r, 30));
            q[added].prompt = prompt[random_below(&r, 3)];
            q[added].space.salt.word[0] = random_below(&r, 4) == 0;
            q[added].reads_all = random_below(&r, 8) == 0;
            add(s, &q[added++]);
        }
        while (scheduler_admit(s)) {}
        const struct step_entry *e;
        int n = scheduler_compose(s, &e);
        assert_true(n > 0);
        for (int i = 0; i < n; i++) {
            struct sched_seq *seq = e[i].seq;
            assert_int_equal(e[i].first + e[i].rows, seq->done);
            publish(s, seq);
            if (e[i].first < seq->prompt_count) rows += (uint64_t)e[i].rows;
            bool leaves = random_below(&r, 40) == 0;
            if (!leaves && seq->done < seq->tokens_max) continue;
            wanted += (uint64_t)(seq->done < seq->prompt_count ? seq->done : seq->prompt_count);
            cached += (uint64_t)seq->cached;
            assert_true(!seq->reads_all || seq->cached == 0);
            scheduler_remove(s, seq);
        }
    }
    assert_int_equal(rows + cached, wanted);
    assert_true(cached > wanted / 4);
    assert_int_equal(scheduler_pages_unused(s), 40);
    scheduler_free(s);
    free(q);
}

#define POOL 40
#define RUNNING_MAX 6
#define PREFILL_ROWS 11
#define PAGES 30

struct world {
    struct scheduler *s;
    struct sched_seq q[POOL];
    bool known[POOL];
    int expected_done[POOL];
};

static void step_check(struct world *w, const struct step_entry *e, int n)
{
    int prompt_rows = 0, hungry = 0, entries = 0;
    for (int i = 0; i < n; i++) {
        const struct sched_seq *q = e[i].seq;
        size_t index = (size_t)(q - w->q);
        assert_true(w->known[index] && q->running);
        assert_int_equal(e[i].first, w->expected_done[index]);
        assert_true(e[i].rows >= 1);
        w->expected_done[index] += e[i].rows;
        assert_int_equal(q->done, w->expected_done[index]);
        assert_true(q->done <= q->table.count * KV_PAGE_TOKENS);
        if (e[i].first >= q->prompt_count) {
            assert_int_equal(e[i].rows, 1);
        } else {
            assert_true(q->done <= q->prompt_count);
            prompt_rows += e[i].rows;
        }
        if (i > 0) assert_true(key128_compare(e[i - 1].seq->space.set, q->space.set) <= 0);
    }
    for (int i = 0; i < POOL; i++) {
        if (!w->known[i] || !w->q[i].running) continue;
        bool decodes = w->q[i].done > w->q[i].prompt_count;
        entries += decodes;
        if (decodes) assert_int_equal(rows_of(e, n, &w->q[i]), 1);
        hungry += w->q[i].done < w->q[i].prompt_count;
    }
    assert_true(prompt_rows <= PREFILL_ROWS);
    assert_true(prompt_rows == PREFILL_ROWS || hungry == 0); /* no row is wasted */
    assert_true(entries <= RUNNING_MAX);
}

static void remove_at(struct world *w, int i)
{
    scheduler_remove(w->s, &w->q[i]);
    w->known[i] = false;
}

static void random_call(struct world *w, struct test_random *r)
{
    int i = (int)random_below(r, POOL);
    if (!w->known[i]) {
        w->q[i] = seq_of(1 + (int)random_below(r, 60), (int)random_below(r, 40));
        w->q[i].priority = (int)random_below(r, 3);
        w->q[i].space.set.word[0] = random_below(r, 3);
        w->expected_done[i] = 0;
        w->known[i] = scheduler_add(w->s, &w->q[i]) == ST_OK;
    } else if (random_below(r, 30) == 0) {
        remove_at(w, i);
    }
}

/* Drives one scheduler through `steps` random steps; a digest of all it decided. */
static uint64_t world_run(uint64_t seed, int steps)
{
    struct test_random r = {seed};
    struct world *w = calloc(1, sizeof *w);
    uint64_t digest = 0;
    w->s = scheduler_make(RUNNING_MAX, 12, PREFILL_ROWS, PAGES);
    for (int step = 0; step < steps; step++) {
        random_call(w, &r);
        while (scheduler_admit(w->s)) {}
        assert_true(scheduler_running(w->s) <= RUNNING_MAX);
        const struct step_entry *e;
        int n = scheduler_compose(w->s, &e);
        step_check(w, e, n);
        for (int i = 0; i < n; i++)
            digest = digest * 1000003 + (uint64_t)(e[i].seq - w->q) * 64 + (uint64_t)e[i].rows;
        for (int i = 0; i < POOL; i++)
            if (w->known[i] && w->q[i].running && w->q[i].done == w->q[i].tokens_max)
                remove_at(w, i);
    }
    for (int i = 0; i < POOL; i++)
        if (w->known[i]) remove_at(w, i);
    assert_int_equal(scheduler_pages_unused(w->s), PAGES);
    scheduler_free(w->s);
    free(w);
    return digest;
}

static void test_random_worlds(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 20; seed++)
        assert_true(world_run(seed, 500) == world_run(seed, 500));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order_of_admission),
        cmocka_unit_test(test_admission_by_capacity),
        cmocka_unit_test(test_batch_limit),
        cmocka_unit_test(test_long_prompt_blocks_nobody),
        cmocka_unit_test(test_prompts_take_turns),
        cmocka_unit_test(test_equal_prompts_are_read_once),
        cmocka_unit_test(test_readers_of_the_same),
        cmocka_unit_test(test_random_worlds),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

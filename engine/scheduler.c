#include "engine/scheduler.h"

#include <stdlib.h>

struct list {
    struct sched_seq *first, *last;
    int count;
};

struct scheduler {
    struct scheduler_config config;
    struct kv_pages *kv;
    struct list waiting; /* by (priority, arrival) */
    struct list running; /* by (set's key, admission): steps are walks of this list */
    uint64_t next_order;
    uint64_t steps;
    struct step_entry *entry; /* [running_max] */
};

/* --- lists ------------------------------------------------------------------------------------- */

/* after NULL: at the front. */
static void list_insert_after(struct list *l, struct sched_seq *after, struct sched_seq *seq)
{
    seq->prev = after;
    seq->next = after ? after->next : l->first;
    if (seq->prev) seq->prev->next = seq;
    else l->first = seq;
    if (seq->next) seq->next->prev = seq;
    else l->last = seq;
    l->count++;
}

static void list_remove(struct list *l, struct sched_seq *seq)
{
    if (seq->prev) seq->prev->next = seq->next;
    else l->first = seq->next;
    if (seq->next) seq->next->prev = seq->prev;
    else l->last = seq->prev;
    seq->prev = seq->next = NULL;
    l->count--;
}

/* --- lifetime ---------------------------------------------------------------------------------- */

struct scheduler *scheduler_new(const struct scheduler_config *config)
{
    CHECK(config->running_max > 0 && config->prefill_rows > 0);
    struct scheduler *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->config = *config;
    s->kv = kv_pages_new(config->pages, config->share_pages);
    s->entry = calloc((size_t)config->running_max, sizeof *s->entry);
    if (!s->kv || !s->entry) {
        scheduler_free(s);
        return NULL;
    }
    return s;
}

void scheduler_free(struct scheduler *s)
{
    if (!s) return;
    CHECK(s->waiting.count == 0 && s->running.count == 0);
    kv_pages_free(s->kv);
    free(s->entry);
    free(s);
}

/* --- sequences --------------------------------------------------------------------------------- */

enum status scheduler_add(struct scheduler *s, struct sched_seq *seq)
{
    CHECK(seq->prompt_count >= 1 && seq->tokens_max >= seq->prompt_count);
    CHECK(kv_pages_needed(seq->tokens_max) <= kv_pages_count(s->kv));
    if (s->waiting.count >= s->config.waiting_max) return ST_FULL;
    seq->done = seq->cached = 0;
    seq->table = (struct kv_table){0};
    seq->running = false;
    seq->order = s->next_order++;
    struct sched_seq *after = s->waiting.last;
    while (after && after->priority > seq->priority) after = after->prev;
    list_insert_after(&s->waiting, after, seq);
    return ST_OK;
}

/* What of the prompt may be taken from the cache. */
static struct kv_prompt shareable(const struct scheduler *s, const struct sched_seq *seq)
{
    bool any = s->config.share_pages && !seq->reads_all;
    return (struct kv_prompt){.space = seq->space, .token = seq->prompt,
                              .count = any ? seq->prompt_count - 1 : 0};
}

struct sched_seq *scheduler_admit(struct scheduler *s)
{
    struct sched_seq *seq = s->waiting.first;
    if (!seq || s->running.count >= s->config.running_max) return NULL;
    struct kv_prompt prompt = shareable(s, seq);
    if (kv_reserve(s->kv, &prompt, seq->tokens_max, &seq->table) != ST_OK) return NULL;
    seq->done = seq->cached = seq->table.published * KV_PAGE_TOKENS;
    list_remove(&s->waiting, seq);
    seq->running = true;
    seq->order = s->next_order++;
    struct sched_seq *after = s->running.last;
    while (after && key128_compare(after->space.set, seq->space.set) > 0) after = after->prev;
    list_insert_after(&s->running, after, seq);
    return seq;
}

void scheduler_remove(struct scheduler *s, struct sched_seq *seq)
{
    list_remove(seq->running ? &s->running : &s->waiting, seq);
    kv_release(s->kv, &seq->table);
    seq->running = false;
}

/* --- steps ------------------------------------------------------------------------------------- */

static int prompt_left(const struct sched_seq *seq)
{
    return seq->done < seq->prompt_count ? seq->prompt_count - seq->done : 0;
}

/* Rows that an entry of a prompt could still use. */
static int entry_hunger(const struct step_entry *e)
{
    int left = prompt_left(e->seq);
    return left > 0 ? left - e->rows : 0;
}

/* Shares `rows` among the prompts of n entries: equally, round after round, until they are used up or
 * no prompt wants more. A remainder smaller than the number of prompts goes, one row each, to
 * those that come first from an entry that moves on with every step. */
static void prefill_share(struct scheduler *s, int n, int rows)
{
    while (rows > 0) {
        int hungry = 0;
        for (int i = 0; i < n; i++) hungry += entry_hunger(&s->entry[i]) > 0;
        if (hungry == 0) return;
        int share = rows / hungry > 0 ? rows / hungry : 1;
        int start = (int)(s->steps % (uint64_t)n);
        for (int i = 0; i < n && rows > 0; i++) {
            struct step_entry *e = &s->entry[(start + i) % n];
            int give = entry_hunger(e) < share ? entry_hunger(e) : share;
            e->rows += give;
            rows -= give;
        }
    }
}

/* Takes over what became cached since the last step. Whether what comes next is somebody else's work. */
static bool prompt_waits(struct scheduler *s, struct sched_seq *seq)
{
    struct kv_prompt prompt = shareable(s, seq);
    enum kv_turn turn;
    while ((turn = kv_claim(s->kv, &prompt, &seq->table)) == KV_ADOPTED) {
        int done = seq->table.published * KV_PAGE_TOKENS;
        seq->cached += done - seq->done;
        seq->done = done;
    }
    return turn == KV_WAIT;
}

int scheduler_compose(struct scheduler *s, const struct step_entry **entries_out)
{
    int n = 0;
    for (struct sched_seq *seq = s->running.first; seq; seq = seq->next) {
        if (prompt_left(seq) > 0 && prompt_waits(s, seq)) continue;
        s->entry[n++] = (struct step_entry){.seq = seq, .first = seq->done,
                                            .rows = prompt_left(seq) > 0 ? 0 : 1};
    }
    prefill_share(s, n, s->config.prefill_rows);
    s->steps++;

    int used = 0;
    for (int i = 0; i < n; i++) {
        struct step_entry e = s->entry[i];
        if (e.rows == 0) continue;
        e.seq->done += e.rows;
        CHECK(e.seq->done <= e.seq->tokens_max);
        s->entry[used++] = e;
    }
    *entries_out = s->entry;
    return used;
}

int scheduler_page_full(const struct scheduler *s, const struct sched_seq *seq)
{
    int first = seq->table.published * KV_PAGE_TOKENS;
    return s->config.share_pages && seq->done - first >= KV_PAGE_TOKENS ? first : -1;
}

void scheduler_publish(struct scheduler *s, struct sched_seq *seq,
                       const int32_t token[static KV_PAGE_TOKENS])
{
    CHECK(scheduler_page_full(s, seq) >= 0);
    kv_publish(s->kv, seq->space, token, &seq->table);
}

int scheduler_running(const struct scheduler *s) { return s->running.count; }
int scheduler_waiting(const struct scheduler *s) { return s->waiting.count; }
int scheduler_pages_unused(const struct scheduler *s) { return kv_pages_unused(s->kv); }

struct sched_seq *scheduler_first(const struct scheduler *s, bool running)
{
    return running ? s->running.first : s->waiting.first;
}

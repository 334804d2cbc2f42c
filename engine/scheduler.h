/* Who runs in the next step, and with how many rows.
 *
 * Pure logic over what it is told of sequences; it touches no device and sends no events.
 *
 *  1. Waiting sequences are admitted in order of (priority, arrival) while there is room for a
 *     running one and free pages for everything it can ever need. The first that does not fit
 *     makes the others wait: nobody starves.
 *  2. Every running sequence that has read its prompt gets one row in every step.
 *  3. The other rows of a step, at most prefill_rows, go to prompts, in equal shares; what one cannot
 *     use goes to the others. Where there are more prompts than rows they take turns.
 *  4. Entries of a step are sorted by (set's key, admission), so that rows of one adapter set are
 *     neighbours and the bare base (key 0) comes first.
 *  5. A prompt does not compute a page that is in the cache, or that another running prompt is computing:
 *     it waits for that one, so that what many share is computed once even where they come together. Its
 *     last token is always computed, since what comes next is chosen from its logits.
 *  6. Deterministic: the same calls give the same steps. */
#ifndef ENGINE_SCHEDULER_H
#define ENGINE_SCHEDULER_H

#include "base/status.h"
#include "engine/kv.h"

#include <stdbool.h>
#include <stdint.h>

struct scheduler;

/* What the scheduler knows of a sequence; embedded in the owner's struct, which stays put until
 * scheduler_remove. The first group is set by the owner before scheduler_add. */
struct sched_seq {
    int priority;              /* lower first */
    struct prefix_space space; /* its adapter set, and who may share its pages */
    const int32_t *prompt;     /* [prompt_count]; stays valid until it is removed */
    int prompt_count;          /* >= 1 */
    int tokens_max;            /* positions it may need in the cache, >= prompt_count */
    bool reads_all;            /* wants all rows of its prompt computed, cached or not */

    /* The scheduler's. */
    int done;              /* positions in the cache, those of the step being run included */
    int cached;            /* of the prompt, positions that were computed for others */
    struct kv_table table; /* reserved while running */
    bool running;
    uint64_t order;        /* of arrival, then of admission */
    struct sched_seq *prev, *next;
};

struct scheduler_config {
    int running_max, waiting_max;
    int prefill_rows; /* of prompts in one step */
    int pages;        /* of the KV cache */
    bool share_pages; /* between sequences of one space; otherwise prompts are not looked at */
};

/* One sequence's part of a step: rows at positions first .. first + rows - 1. */
struct step_entry {
    struct sched_seq *seq;
    int first, rows;
};

/* NULL when there is no memory. */
struct scheduler *scheduler_new(const struct scheduler_config *config);
/* All sequences must have been removed. */
void scheduler_free(struct scheduler *s);

/* ST_FULL: waiting_max already wait. */
NODISCARD enum status scheduler_add(struct scheduler *s, struct sched_seq *seq);
/* Moves the first waiting sequence to the running ones and returns it; NULL when there is none or
 * it has no room yet. */
struct sched_seq *scheduler_admit(struct scheduler *s);
/* Forgets a waiting or running sequence and frees its pages. Not between compose and the end of
 * the step's forward pass. */
void scheduler_remove(struct scheduler *s, struct sched_seq *seq);

/* Composes the next step and counts its rows as done. Returns the number of entries; the array is
 * the scheduler's, valid until the next call. */
int scheduler_compose(struct scheduler *s, const struct step_entry **entries_out);

/* After a step was run: the first position of a page that is full but not published yet, to be
 * followed by scheduler_publish with the tokens there; -1 when there is none. */
int scheduler_page_full(const struct scheduler *s, const struct sched_seq *seq);
void scheduler_publish(struct scheduler *s, struct sched_seq *seq,
                       const int32_t token[static KV_PAGE_TOKENS]);

int scheduler_running(const struct scheduler *s);
int scheduler_waiting(const struct scheduler *s);
/* Pages of no sequence, cached ones included. */
int scheduler_pages_unused(const struct scheduler *s);
/* The first running (or waiting) sequence in order of admission (or turn), then its next. */
struct sched_seq *scheduler_first(const struct scheduler *s, bool running);

#endif

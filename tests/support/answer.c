#include "tests/support/answer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct sampling sampling_greedy(int max_tokens)
{
    return (struct sampling){.top_p = 1, .repetition_penalty = 1, .max_tokens = max_tokens,
                             .skip_special = true, .logprobs = -1, .prompt_logprobs = -1};
}

struct answer *answer_new(struct engine *e)
{
    struct answer *a = calloc(1, sizeof *a);
    CHECK(a);
    a->engine = e;
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->changed, NULL);
    return a;
}

void answer_free(struct answer *a)
{
    if (!a) return;
    strbuf_release(&a->text);
    pthread_cond_destroy(&a->changed);
    pthread_mutex_destroy(&a->lock);
    free(a);
}

static void take_token(struct answer *a, const struct engine_event *event)
{
    CHECK(a->admitted && a->token_count < ANSWER_TOKENS_MAX);
    a->scored = event->logprob != NULL;
    if (event->logprob) a->logprob[a->token_count] = *event->logprob;
    a->token[a->token_count++] = event->token;
    strbuf_append(&a->text, event->text, event->text_size);
}

static void take_done(struct answer *a, const struct engine_event *event)
{
    a->done = true;
    a->finish = event->finish;
    a->stop_token = event->stop_token;
    if (event->stop_string)
        snprintf(a->stop_string, sizeof a->stop_string, "%s", event->stop_string);
    CHECK((event->error != NULL) == (event->finish == FINISH_ERROR));
    if (event->error) a->error = *event->error;
    a->prompt_tokens = event->prompt_tokens;
    a->cached_tokens = event->cached_tokens;
    a->output_tokens = event->output_tokens;
    strbuf_append(&a->text, event->text, event->text_size);
    strbuf_append(&a->text, "", 0); /* so that there is a string even where there is no text */
}

static void on_event(void *ctx, const struct engine_event *event)
{
    struct answer *a = ctx;
    pthread_mutex_lock(&a->lock);
    CHECK(!a->done);
    bool cancel = false;
    switch (event->kind) {
    case EVENT_ADMITTED:
        CHECK(!a->admitted);
        a->admitted = true;
        break;
    case EVENT_PROMPT:
        CHECK(a->admitted && !a->prompt_scored && a->token_count == 0);
        CHECK(event->prompt_logprob_count <= ANSWER_TOKENS_MAX);
        a->prompt_scored = true;
        a->prompt_logprob_count = event->prompt_logprob_count;
        memcpy(a->prompt_logprob, event->prompt_logprobs,
               event->prompt_logprob_count * sizeof *event->prompt_logprobs);
        break;
    case EVENT_TOKEN:
        take_token(a, event);
        cancel = a->token_count == a->cancel_after;
        break;
    case EVENT_DONE:
        take_done(a, event);
        break;
    }
    uint64_t id = a->id;
    pthread_cond_broadcast(&a->changed);
    pthread_mutex_unlock(&a->lock);
    if (cancel) engine_cancel(a->engine, id);
}

enum status answer_ask(struct answer *a, struct engine_request *r, struct error *err)
{
    r->on_event = on_event;
    r->ctx = a;
    /* Under the lock, so that the first event finds the id. */
    pthread_mutex_lock(&a->lock);
    enum status st = engine_submit(a->engine, r, &a->id, err);
    pthread_mutex_unlock(&a->lock);
    return st;
}

void answer_wait_admitted(struct answer *a)
{
    pthread_mutex_lock(&a->lock);
    while (!a->admitted && !a->done) pthread_cond_wait(&a->changed, &a->lock);
    pthread_mutex_unlock(&a->lock);
}

void answer_wait(struct answer *a)
{
    pthread_mutex_lock(&a->lock);
    while (!a->done) pthread_cond_wait(&a->changed, &a->lock);
    pthread_mutex_unlock(&a->lock);
}

struct answer *answer_of(struct engine *e, struct engine_request *r)
{
    struct answer *a = answer_new(e);
    struct error err = {0};
    enum status st = answer_ask(a, r, &err);
    if (st) fprintf(stderr, "refused: %s\n", err.message);
    CHECK(st == ST_OK);
    answer_wait(a);
    return a;
}

static bool logprob_equal(const struct token_logprob *a, const struct token_logprob *b)
{
    if (a->token != b->token || a->logprob != b->logprob || a->rank != b->rank ||
        a->top_count != b->top_count)
        return false;
    for (int i = 0; i < a->top_count; i++)
        if (a->top[i].token != b->top[i].token || a->top[i].logprob != b->top[i].logprob)
            return false;
    return true;
}

bool answer_equal(const struct answer *a, const struct answer *b)
{
    if (a->token_count != b->token_count || a->finish != b->finish || a->scored != b->scored ||
        a->stop_token != b->stop_token || a->text.size != b->text.size ||
        a->prompt_logprob_count != b->prompt_logprob_count)
        return false;
    for (size_t i = 0; i < a->prompt_logprob_count; i++)
        if (!logprob_equal(&a->prompt_logprob[i], &b->prompt_logprob[i])) return false;
    for (int i = 0; i < a->token_count; i++)
        if (a->token[i] != b->token[i] ||
            (a->scored && !logprob_equal(&a->logprob[i], &b->logprob[i])))
            return false;
    return memcmp(a->text.data, b->text.data, a->text.size) == 0;
}

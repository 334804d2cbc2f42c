/* /v1/completions and /v1/chat/completions: the life of a job. */
#include "server/job.h"

#include "server/handlers.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Prompts up to this size are tokenised in the loop's thread: a few hundred microseconds. */
#define INLINE_TEXT_BYTES ((size_t)16 << 10)

static void job_link(struct job *j)
{
    j->next = j->service->jobs;
    if (j->next) j->next->previous = j;
    j->service->jobs = j;
}

static void job_unlink(struct job *j)
{
    if (j->next) j->next->previous = j->previous;
    if (j->previous)
        j->previous->next = j->next;
    else
        j->service->jobs = j->next;
}

static void sequence_release(struct sequence *q)
{
    strbuf_release(&q->text);
    strbuf_release(&q->tail);
    token_list_release(&q->tokens);
    logprob_list_release(&q->logprobs);
    logprob_list_release(&q->prompt_logprobs);
    job_events_close(q);
}

void job_free(struct job *j)
{
    struct service *s = j->service;
    CHECK(!j->working && j->live == 0);
    job_unlink(j);
    for (size_t i = 0; i < j->request.adapter_count; i++) lease_release(j->leases[i]);
    for (size_t i = 0; j->sequences && i < j->sequence_count; i++) sequence_release(&j->sequences[i]);
    for (size_t i = 0; j->prompts && i < j->prompt_count; i++) {
        token_list_release(&j->prompts[i].tokens);
        strbuf_release(&j->prompts[i].echo);
    }
    free(j->sequences);
    free(j->prompts);
    strbuf_release(&j->versions);
    strbuf_release(&j->out);
    completion_request_release(&j->request);
    free(j);
    service_settle(s);
}

static void cancel_live(struct job *j)
{
    for (size_t i = 0; i < j->sequence_count; i++)
        if (j->sequences && j->sequences[i].id && !j->sequences[i].done)
            engine_cancel(j->service->engine, j->sequences[i].id);
}

void job_fail(struct job *j, const struct api_error *err)
{
    struct exchange *x = j->x;
    if (!j->error.http) j->error = *err;
    j->x = NULL;
    cancel_live(j);
    if (x && j->streaming) {
        strbuf_clear(&j->out);
        sse_write_error(&j->out, &j->error);
        sse_write_done(&j->out);
        exchange_write(x, &j->out);
        exchange_end(x);
    } else if (x) {
        exchange_reply_error(x, &j->error);
    }
}

/* The client went away. */
static void on_close(void *ctx)
{
    struct job *j = ctx;
    j->x = NULL;
    cancel_live(j);
    if (!j->working && j->live == 0) job_free(j);
}

void job_cancel_all(struct service *s, const struct api_error *err)
{
    for (struct job *j = s->jobs; j; j = j->next)
        if (j->working)
            j->error = *err; /* its worker's result is dropped */
        else
            job_fail(j, err);
}

void job_ping_all(struct service *s)
{
    struct strbuf ping = {0};
    for (struct job *j = s->jobs; j; j = j->next) {
        sse_write_ping(&ping);
        bool quiet = j->streaming && j->x && !j->wrote;
        if (quiet && !exchange_write(j->x, &ping)) cancel_live(j);
        strbuf_clear(&ping);
        j->wrote = false;
    }
    strbuf_release(&ping);
}

static void job_prepared(struct task *t)
{
    struct job *j = (struct job *)((char *)t - offsetof(struct job, task));
    struct error cause = {0};
    j->working = false;
    if (j->x && !j->error.http) {
        enum status st = job_submit(j, &cause);
        if (st) api_error_from(&j->error, st, &cause, NULL);
    }
    if (j->error.http) job_fail(j, &j->error);
    if (j->live == 0) job_free(j);
}

static void job_work(struct task *t) { job_prepare((struct job *)((char *)t - offsetof(struct job, task))); }

static size_t text_bytes(const struct completion_request *r)
{
    size_t n = 0;
    for (size_t i = 0; i < r->text_count; i++) n += strlen(r->texts[i]);
    for (size_t i = 0; i < r->message_count; i++) n += strlen(r->messages[i].content);
    if (r->echo) n += r->tokens.rows ? r->tokens.end[r->tokens.rows - 1] : 0;
    return n;
}

static struct job *job_new(struct exchange *x, const struct completion_request *r)
{
    struct job *j = calloc(1, sizeof *j);
    if (!j) return NULL;
    j->service = service_of(x);
    j->x = x;
    j->request = *r;
    j->created = (int64_t)time(NULL);
    j->arrived = uv_hrtime();
    snprintf(j->id, sizeof j->id, "%s-%s", r->chat ? "chatcmpl" : "cmpl", exchange_id(x));
    job_link(j);
    exchange_hold(x, j, on_close);
    return j;
}

static void complete(struct exchange *x, bool chat)
{
    struct completion_request r;
    struct api_error err = {0};
    size_t size;
    char *body = exchange_body(x, &size);
    if (!completion_request_parse(body, size, chat, service_of(x)->config->model_name, &r, &err)) {
        exchange_reply_error(x, &err);
        return;
    }
    struct job *j = job_new(x, &r);
    if (!j) {
        completion_request_release(&r);
        api_error_from(&err, ST_NOMEM, NULL, NULL);
        exchange_reply_error(x, &err);
        return;
    }
    if (!job_name_adapters(j)) {
        job_fail(j, &j->error);
        job_free(j);
        return;
    }
    j->working = true;
    if (job_try_leases(j) && text_bytes(&j->request) <= INLINE_TEXT_BYTES) {
        job_prepare(j);
        job_prepared(&j->task);
    } else {
        task_start(j->service, &j->task, job_work, job_prepared);
    }
}

void completions_post(struct exchange *x) { complete(x, false); }
void chat_post(struct exchange *x) { complete(x, true); }

/* The engine's events, copied on its thread and applied on the loop's. */
#include "server/job.h"

#include <stdlib.h>
#include <string.h>

/* One event. Log-probabilities and text follow in the same allocation. */
struct event_mail {
    struct mail mail;
    struct sequence *sequence;
    enum engine_event_kind kind;
    int32_t token;
    size_t logprob_count, text_size;
    struct token_logprob logprobs[]; /* [logprob_count], then text_size bytes */
};

static char *mail_text(struct event_mail *m) { return (char *)(m->logprobs + m->logprob_count); }

static struct event_mail *mail_new(struct sequence *q, enum engine_event_kind kind, size_t logprob_count,
                                   size_t text_size)
{
    struct event_mail *m = malloc(sizeof *m + logprob_count * sizeof *m->logprobs + text_size);
    if (m)
        *m = (struct event_mail){
            .sequence = q, .kind = kind, .logprob_count = logprob_count, .text_size = text_size};
    return m;
}

bool job_events_open(struct sequence *q)
{
    q->last = mail_new(q, EVENT_DONE, 0, 0);
    return q->last != NULL;
}

void job_events_close(struct sequence *q) { free(q->last); }

/* ------------------------------------------------------------------ on the loop's thread */

static void add_logprob(struct logprob_list *l, const struct token_logprob *p, int top_most)
{
    int count = p->top_count < top_most ? p->top_count : top_most;
    struct logprob_alternative *top = logprob_list_push(l, p->token, p->logprob, p->rank, count);
    for (int i = 0; top && i < count; i++)
        top[i] = (struct logprob_alternative){p->top[i].token, p->top[i].logprob};
}

static double seconds_since_arrival(const struct job *j) { return (double)(uv_hrtime() - j->arrived) / 1e9; }

static void apply_token(struct sequence *q, struct event_mail *m)
{
    const struct completion_request *r = &q->job->request;
    if (!q->job->spoke) latency_add(&q->job->service->metrics.first_token, seconds_since_arrival(q->job));
    q->job->spoke = true;
    strbuf_append(&q->text, mail_text(m), m->text_size);
    if (token_list_push(&q->tokens, m->token)) q->failed = true;
    if (m->logprob_count) {
        q->logprob_sum += m->logprobs[0].logprob;
        q->logprob_count++;
        if (r->logprobs >= 0) add_logprob(&q->logprobs, &m->logprobs[0], r->logprobs);
    }
    q->failed |= q->text.failed || q->logprobs.failed;
}

static void apply_prompt(struct sequence *q, const struct event_mail *m)
{
    const struct completion_request *r = &q->job->request;
    for (size_t i = 0; i < m->logprob_count; i++) {
        if (r->echo && r->logprobs >= 0) add_logprob(&q->logprobs, &m->logprobs[i], r->logprobs);
        if (r->prompt_logprobs >= 0) add_logprob(&q->prompt_logprobs, &m->logprobs[i], r->prompt_logprobs);
    }
    q->failed |= q->logprobs.failed || q->prompt_logprobs.failed;
}

/* What ends the whole job, or nothing. */
static void check_failure(struct sequence *q)
{
    struct api_error err = {0};
    if (q->finish == FINISH_ERROR)
        api_error_from(&err, q->error.status, &q->error, NULL);
    else if (q->finish == FINISH_CANCELLED)
        api_error_from(&err, ST_CANCELLED, NULL, NULL);
    else if (q->failed)
        api_error_from(&err, ST_NOMEM, NULL, NULL);
    if (err.http && q->job->x) job_fail(q->job, &err);
}

static void apply_done(struct sequence *q)
{
    struct job *j = q->job;
    q->done = true;
    j->live--;
    j->service->metrics.finished[q->finish]++;
    if (!j->live) latency_add(&j->service->metrics.whole, seconds_since_arrival(j));
    if (q->tail.size) strbuf_append(&q->text, q->tail.data, q->tail.size);
    q->failed |= q->lost || q->text.failed;
    check_failure(q);
    if (j->streaming && j->x) answer_flush(q);
    if (j->live) return;
    if (j->x) answer_finish(j);
    job_free(j);
}

static void deliver(struct mail *mail)
{
    struct event_mail *m = (struct event_mail *)mail;
    struct sequence *q = m->sequence;
    struct job *j = q->job;
    if (m->kind == EVENT_DONE) {
        apply_done(q); /* its message is the sequence's own */
        return;
    }
    j->admitted = true;
    if (m->kind == EVENT_TOKEN) apply_token(q, m);
    if (m->kind == EVENT_PROMPT) apply_prompt(q, m);
    if (j->x && j->request.stream) {
        answer_start(j);
        if (m->kind != EVENT_ADMITTED) answer_flush(q);
    }
    free(m);
}

/* ------------------------------------------------------------------ on the engine's thread */

static void copy_done(struct sequence *q, const struct engine_event *e)
{
    q->finish = e->finish;
    if (e->error) q->error = *e->error;
    q->prompt_tokens = e->prompt_tokens;
    q->cached_tokens = e->cached_tokens;
    q->output_tokens = e->output_tokens;
    if (e->text_size) strbuf_append(&q->tail, e->text, e->text_size);
    q->lost |= q->tail.failed;
}

static struct event_mail *copy_event(struct sequence *q, const struct engine_event *e)
{
    const struct token_logprob *logprobs = e->kind == EVENT_PROMPT ? e->prompt_logprobs : e->logprob;
    size_t count = e->kind == EVENT_PROMPT ? e->prompt_logprob_count : e->logprob != NULL;
    if (e->kind != EVENT_PROMPT && e->kind != EVENT_TOKEN) count = 0;
    size_t text = e->kind == EVENT_TOKEN ? e->text_size : 0;
    struct event_mail *m = mail_new(q, e->kind, count, text);
    if (!m) return NULL;
    m->mail.deliver = deliver;
    m->token = e->token;
    if (count) memcpy(m->logprobs, logprobs, count * sizeof *logprobs);
    if (text) memcpy(mail_text(m), e->text, text);
    return m;
}

void job_on_event(void *ctx, const struct engine_event *event)
{
    struct sequence *q = ctx;
    struct mailbox *box = &q->job->service->mailbox;
    if (event->kind != EVENT_DONE) {
        struct event_mail *m = copy_event(q, event);
        if (m)
            mailbox_post(box, &m->mail);
        else
            q->lost = true;
        return;
    }
    copy_done(q, event);
    q->last->mail.deliver = deliver;
    mailbox_post(box, &q->last->mail);
}

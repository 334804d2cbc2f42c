/* POST /v1/adapters/{name}/train: submits a job; then answers at once, when it has ended, or step by step.
 *
 * The job does not depend on who asked for it: a client that hangs up, or a server that drains, ends the
 * answer and nothing else. News of the job comes on a thread of the jobs', as mail to the loop, which lets a
 * worker ask for what is new and write it. */
#include "server/handlers.h"
#include "server/training.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define EVENTS_AT_ONCE 64

struct follow {
    struct task task;
    struct service *service;
    struct follow *next, *previous; /* service->follows */
    struct exchange *x;             /* NULL once answered or gone */
    struct train_body body;
    struct train_settings settings;
    char adapter[160], id[TRAIN_ID_MAX];

    struct train_watch *watch;
    struct mail news;
    atomic_bool posted;       /* news is in the mailbox */
    bool wait, stream;        /* how it is answered */
    bool working, again;      /* a worker has it; there is news that it may have missed */
    bool streaming, quiet;    /* headers are sent; nothing was written since the last ping */
    struct api_error stopped; /* http != 0: ended while a worker had it */

    /* Written by workers. */
    int64_t last_event;
    bool more, ended; /* there are more events already; there are no more */
    struct strbuf out;
    struct api_error error;
};

static struct follow *follow_of(struct task *t)
{
    return (struct follow *)((char *)t - offsetof(struct follow, task));
}

/* ------------------------------------------------------------------ on a worker */

/* On a thread of the jobs'. */
static void on_news(void *ctx)
{
    struct follow *f = ctx;
    if (!atomic_exchange(&f->posted, true)) mailbox_post(&f->service->mailbox, &f->news);
}

static void work_submit(struct task *t)
{
    struct follow *f = follow_of(t);
    const struct train_body *b = &f->body;
    struct train_request r = {.adapter = f->adapter,
                              .version = b->version,
                              .expected_version = b->expected_version,
                              .settings = f->settings,
                              .examples = b->has_examples ? b->examples.data : NULL,
                              .examples_size = b->examples.size,
                              .file_id = b->training_file,
                              .validation_file_id = b->validation_file,
                              .idempotency_key = b->idempotency_key};
    struct error cause = {0};
    bool existing;
    if (!training_submit(f->service, &r, f->id, &existing, &f->error)) return;
    if (f->wait || f->stream) {
        enum status st = jobs_watch(f->service->training, TENANT, f->id, on_news, f, &f->watch, &cause);
        if (st) training_failed(&f->error, st, &cause, "id");
    }
    if (!f->error.http && !f->wait) training_write_job(f->service, f->id, &f->out, &f->error);
}

/* data: {"type": "step", ..} with what the event says, and who is chosen how often. */
static void write_event(struct follow *f, const struct train_event *e, bool newest)
{
    struct train_routing routing;
    bool step = !strcmp(e->kind, "metrics");
    strbuf_printf(&f->out, "data: {\"type\": \"%s\", \"level\": \"%s\", \"created_at\": %lld, \"message\": ",
                  step ? "step" : e->kind, e->level, (long long)e->created);
    json_write_string(&f->out, e->message, strlen(e->message));
    if (e->data && e->data[0] == '{' && e->data[1] != '}') {
        strbuf_puts(&f->out, ", ");
        strbuf_append(&f->out, e->data + 1, strlen(e->data) - 2);
    }
    if (step && newest && !jobs_routing(f->service->training, TENANT, f->id, &routing, NULL)) {
        strbuf_puts(&f->out, ", \"expert_load\": ");
        train_load_write(&f->out, &routing);
        train_routing_release(&routing);
    }
    strbuf_puts(&f->out, "}\n\n");
}

static void take_events(struct follow *f)
{
    struct train_event *events;
    size_t count;
    struct error cause = {0};
    enum status st = jobs_events(f->service->training, TENANT, f->id, f->last_event, EVENTS_AT_ONCE, &events,
                                 &count, &f->ended, &cause);
    if (st) {
        training_failed(&f->error, st, &cause, "id");
        return;
    }
    for (size_t i = 0; i < count; i++) {
        if (f->stream) write_event(f, &events[i], i + 1 == count);
        f->last_event = events[i].number;
        train_event_release(&events[i]);
    }
    free(events);
    f->more = count == EVENTS_AT_ONCE;
}

static void work_events(struct task *t)
{
    struct follow *f = follow_of(t);
    take_events(f);
    if (f->error.http || !f->ended) return;
    if (f->stream) strbuf_puts(&f->out, "data: {\"type\": \"done\", \"job\": ");
    training_write_job(f->service, f->id, &f->out, &f->error);
    if (f->stream) strbuf_puts(&f->out, "}\n\n");
}

/* ------------------------------------------------------------------ on the loop */

static void follow_link(struct follow *f)
{
    f->next = f->service->follows;
    if (f->next) f->next->previous = f;
    f->service->follows = f;
}

static void follow_free(struct follow *f)
{
    struct service *s = f->service;
    if (f->next) f->next->previous = f->previous;
    if (f->previous)
        f->previous->next = f->next;
    else
        s->follows = f->next;
    train_body_release(&f->body);
    strbuf_release(&f->out);
    free(f);
    service_settle(s);
}

/* It is answered, or its client gone. Freed once neither a worker nor the mailbox has it. */
static void follow_close(struct follow *f)
{
    f->x = NULL;
    if (f->working) return;
    jobs_unwatch(f->watch);
    f->watch = NULL;
    if (!atomic_load(&f->posted)) follow_free(f);
}

static void on_close(void *ctx) { follow_close(ctx); }

/* NULL: there is none. */
static const struct api_error *failure(const struct follow *f)
{
    return f->stopped.http ? &f->stopped : f->error.http ? &f->error : NULL;
}

static void answer_error(struct follow *f, const struct api_error *err)
{
    struct exchange *x = f->x;
    if (x && f->streaming) {
        struct strbuf out = {0};
        sse_write_error(&out, err);
        sse_write_done(&out);
        exchange_write(x, &out);
        strbuf_release(&out);
        exchange_end(x);
    } else if (x) {
        exchange_reply_error(x, err);
    }
    follow_close(f);
}

static void answer_end(struct follow *f)
{
    struct exchange *x = f->x;
    if (f->streaming) {
        sse_write_done(&f->out);
        exchange_write(x, &f->out);
        exchange_end(x);
    } else {
        exchange_reply(x, f->wait ? 200 : 202, "application/json", &f->out);
    }
    follow_close(f);
}

static void start(struct follow *f, void (*work)(struct task *), void (*done)(struct task *))
{
    f->working = true;
    f->again = false;
    task_start(f->service, &f->task, work, done);
}

static void caught_up(struct task *t)
{
    struct follow *f = follow_of(t);
    f->working = false;
    if (!f->x || failure(f)) {
        answer_error(f, failure(f));
        return;
    }
    if (f->ended) {
        answer_end(f);
        return;
    }
    f->quiet &= f->out.size == 0;
    if (f->streaming && !exchange_write(f->x, &f->out)) {
        exchange_end(f->x); /* too slow a reader */
        follow_close(f);
    } else if (f->again || f->more) {
        start(f, work_events, caught_up);
    }
}

static void deliver(struct mail *m)
{
    struct follow *f = (struct follow *)((char *)m - offsetof(struct follow, news));
    atomic_store(&f->posted, false);
    if (f->working)
        f->again = true;
    else if (!f->x)
        follow_close(f);
    else
        start(f, work_events, caught_up);
}

/* The first event of a stream is the job. */
static void begin_stream(struct follow *f)
{
    struct strbuf first = {0};
    strbuf_puts(&first, "data: {\"type\": \"job\", \"job\": ");
    strbuf_append(&first, f->out.data, f->out.size);
    strbuf_puts(&first, "}\n\n");
    strbuf_clear(&f->out);
    f->streaming = true;
    exchange_stream(f->x, "text/event-stream");
    exchange_write(f->x, &first);
    strbuf_release(&first);
}

static void submitted(struct task *t)
{
    struct follow *f = follow_of(t);
    f->working = false;
    train_body_release(&f->body); /* it may be large, and the job long */
    if (!f->x || failure(f)) {
        answer_error(f, failure(f));
        return;
    }
    exchange_add_header(f->x, "x-training-job", f->id);
    if (!f->wait && !f->stream) {
        answer_end(f);
        return;
    }
    if (f->stream) begin_stream(f);
    start(f, work_events, caught_up);
}

/* ------------------------------------------------------------------ all of them */

void follow_end_all(struct service *s, const struct api_error *err)
{
    struct follow *next;
    for (struct follow *f = s->follows; f; f = next) {
        next = f->next;
        if (f->working)
            f->stopped = *err;
        else if (f->x)
            answer_error(f, err);
    }
}

void follow_ping_all(struct service *s)
{
    struct strbuf ping = {0};
    for (struct follow *f = s->follows; f; f = f->next) {
        sse_write_ping(&ping);
        if (f->streaming && f->x && f->quiet) exchange_write(f->x, &ping);
        strbuf_clear(&ping);
        f->quiet = true;
    }
    strbuf_release(&ping);
}

void adapter_train(struct exchange *x)
{
    struct api_error err = {0};
    size_t size;
    if (!training_ready(x)) return;
    char *body = exchange_body(x, &size);
    struct follow *f = calloc(1, sizeof *f);
    if (!f) api_error_from(&err, ST_NOMEM, NULL, NULL);
    if (!f || !train_body_parse(TRAIN_BODY_JOB, body, size, training_is_setting, &f->body, &err) ||
        !training_settings(f->body.body, &f->settings, &err)) {
        if (f) train_body_release(&f->body);
        free(f);
        exchange_reply_error(x, &err);
        return;
    }
    f->service = service_of(x);
    f->x = x;
    f->wait = f->body.wait;
    f->stream = f->body.stream;
    f->news.deliver = deliver;
    snprintf(f->adapter, sizeof f->adapter, "%s", exchange_param(x));
    follow_link(f);
    exchange_hold(x, f, on_close);
    start(f, work_submit, submitted);
}

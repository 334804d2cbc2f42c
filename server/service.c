#include "server/service.h"

#include "server/handlers.h"

#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define WORKER_NICENESS 12 /* above that of the process */

/* ------------------------------------------------------------------ mailbox */

static void mailbox_deliver(uv_async_t *async)
{
    struct mailbox *m = async->data;
    uv_mutex_lock(&m->lock);
    struct mail *mail = m->first;
    m->first = NULL;
    m->last = &m->first;
    uv_mutex_unlock(&m->lock);
    while (mail) {
        struct mail *next = mail->next; /* deliver may free it */
        mail->deliver(mail);
        mail = next;
    }
}

enum status mailbox_open(struct mailbox *m, uv_loop_t *loop)
{
    if (uv_async_init(loop, &m->async, mailbox_deliver)) return ST_IO;
    if (uv_mutex_init(&m->lock)) return ST_NOMEM;
    m->async.data = m;
    m->first = NULL;
    m->last = &m->first;
    return ST_OK;
}

void mailbox_close(struct mailbox *m)
{
    mailbox_deliver(&m->async);
    uv_close((uv_handle_t *)&m->async, NULL);
    uv_mutex_destroy(&m->lock);
}

void mailbox_post(struct mailbox *m, struct mail *mail)
{
    mail->next = NULL;
    uv_mutex_lock(&m->lock);
    *m->last = mail;
    m->last = &mail->next;
    uv_mutex_unlock(&m->lock);
    uv_async_send(&m->async);
}

/* ------------------------------------------------------------------ tasks and calls */

/* Workers take what the engine leaves: a step waits for the slowest of its threads, so an upload that shares a core with
 * one of them as an equal slows every stream. The weight bounds what a flood of uploads can take (about 7% of each core
 * that the engine keeps busy), and they still come through: two a second of each of 16 adapters beside 32 streams.
 * At 19 it was one, and under SCHED_IDLE half of one; at 10 the gaps between tokens grew by half. */
static void worker_yield_to_engine(void)
{
    static _Thread_local bool done;
    if (done) return;
    done = true;
    /* On Linux a thread has a niceness of its own. A refusal costs speed only. */
    id_t self = (id_t)gettid();
    (void)setpriority(PRIO_PROCESS, self, getpriority(PRIO_PROCESS, self) + WORKER_NICENESS);
}

static void task_work(uv_work_t *request)
{
    struct task *t = request->data;
    if (t->yields) worker_yield_to_engine();
    t->work(t);
}

static void task_done(uv_work_t *request, int status)
{
    (void)status;
    struct task *t = request->data;
    struct service *s = t->service;
    s->task_count--;
    t->done(t);
    service_settle(s);
}

void task_start(struct service *s, struct task *t, void (*work)(struct task *), void (*done)(struct task *))
{
    t->service = s;
    t->work = work;
    t->done = done;
    t->request.data = t;
    t->yields = s->state != SERVICE_LOADING; /* threads that loading starts inherit its niceness */
    s->task_count++;
    /* Fails only for a missing function. */
    CHECK(uv_queue_work(s->loop, &t->request, task_work, task_done) == 0);
}

static void call_work(struct task *t)
{
    struct call *c = (struct call *)t;
    c->work(c);
}

void exchange_add_etag(struct exchange *x, const char *version)
{
    char etag[ADAPTER_VERSION_HEX + 3];
    snprintf(etag, sizeof etag, "\"%s\"", version);
    exchange_add_header(x, "ETag", etag);
}

static void call_done(struct task *t)
{
    struct call *c = (struct call *)t;
    if (c->x && c->error.http) {
        exchange_reply_error(c->x, &c->error);
    } else if (c->x) {
        if (c->version[0]) exchange_add_etag(c->x, c->version);
        exchange_reply(c->x, c->status, c->type, &c->body);
    }
    if (c->release) c->release(c);
    strbuf_release(&c->body);
    free(c);
}

static void call_forget(void *ctx) { ((struct call *)ctx)->x = NULL; }

void call_start(struct exchange *x, struct call *c)
{
    c->x = x;
    c->service = service_of(x);
    c->status = 200;
    c->type = "application/json";
    exchange_hold(x, c, call_forget);
    task_start(c->service, &c->task, call_work, call_done);
}

/* ------------------------------------------------------------------ the service */

struct service *service_of(const struct exchange *x) { return exchange_ctx(x); }

void service_settle(struct service *s)
{
    if (s->state == SERVICE_DRAINING && s->http && !s->jobs && !s->follows && !s->session_requests &&
        !s->task_count && !http_exchange_count(s->http))
        s->on_settled(s);
}

/* Compares digests, so that time tells nothing of the key, its length included. */
static bool key_matches(const char *key, const char *given)
{
    unsigned char a[32], b[32];
    crypto_generichash(a, sizeof a, (const unsigned char *)key, strlen(key), NULL, 0);
    crypto_generichash(b, sizeof b, (const unsigned char *)given, strlen(given), NULL, 0);
    return sodium_memcmp(a, b, sizeof a) == 0;
}

static bool authorised(const struct service *s, const struct exchange *x)
{
    const char *key = s->config->api_key;
    const char *given = exchange_header(x, "Authorization");
    if (!key) return true;
    return given && !strncasecmp(given, "Bearer ", 7) && key_matches(key, given + 7);
}

bool service_admit(struct exchange *x, struct api_error *err)
{
    const struct service *s = service_of(x);
    if (exchange_route(x)->open) return true;
    if (!authorised(s, x))
        api_error_set(err, 401, "invalid_api_key", NULL,
                      "send the server's key as 'Authorization: Bearer KEY'");
    else if (s->state == SERVICE_LOADING)
        api_error_set(err, 503, "loading", NULL, "the model is still loading");
    else if (s->state == SERVICE_DRAINING)
        api_error_set(err, 503, "shutting_down", NULL, "the server is shutting down");
    return !err->http;
}

static void reply_state(struct exchange *x, bool ok, const char *status)
{
    struct strbuf body = {0};
    strbuf_printf(&body, "{\"status\": \"%s\"}", status);
    exchange_reply(x, ok ? 200 : 503, "application/json", &body);
}

/* Alive: up to and including the drain. */
void health_get(struct exchange *x)
{
    bool loading = service_of(x)->state == SERVICE_LOADING;
    reply_state(x, !loading, loading ? "loading" : "ok");
}

/* Takes new requests. */
void ready_get(struct exchange *x)
{
    static const char *const names[] = {"loading", "ready", "draining"};
    enum service_state state = service_of(x)->state;
    reply_state(x, state == SERVICE_READY, names[state]);
}

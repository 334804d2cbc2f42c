/* Training step by step: POST /v1/adapters/{name}/forward_backward, /optim_step, /publish; DELETE
 * .../session.
 *
 * A call that a client gave up is done all the same: gradients that came to be half would be worse. */
#include "server/handlers.h"
#include "server/training.h"

#include <stdlib.h>
#include <string.h>

struct session_request {
    struct mail mail;
    struct service *service;
    struct session_request *next, *previous; /* service->session_requests */
    struct exchange *x;                      /* NULL: gone */
    struct train_body body;
    char adapter[160];
    struct session_call call;
};

static void request_free(struct session_request *r)
{
    struct service *s = r->service;
    if (r->next) r->next->previous = r->previous;
    if (r->previous)
        r->previous->next = r->next;
    else
        s->session_requests = r->next;
    session_call_release(&r->call);
    train_body_release(&r->body);
    free(r);
    service_settle(s);
}

static void answer(struct session_request *r)
{
    const struct session_result *result = &r->call.result;
    struct exchange *x = r->x;
    struct api_error err = {0};
    struct strbuf body = {0};
    if (result->status) {
        training_failed(&err, result->status, &result->error, "name");
        if (result->status == ST_INVALID && r->body.has_examples) strcpy(err.param, "examples");
        exchange_reply_error(x, &err);
        return;
    }
    session_result_write(&body, r->call.action, result);
    if (r->call.action == SESSION_PUBLISH) exchange_add_etag(x, result->put.version);
    exchange_reply(x, 200, "application/json", &body);
}

static void deliver(struct mail *m)
{
    struct session_request *r = (struct session_request *)m;
    if (r->x) answer(r);
    request_free(r);
}

/* On a thread of the jobs'. */
static void on_done(struct session_call *c)
{
    struct session_request *r = c->ctx;
    r->mail.deliver = deliver;
    mailbox_post(&r->service->mailbox, &r->mail);
}

static void on_close(void *ctx) { ((struct session_request *)ctx)->x = NULL; }

void session_cancel_all(struct service *s)
{
    for (struct session_request *r = s->session_requests; r; r = r->next)
        session_cancel(s->training, &r->call);
}

static void request_start(struct exchange *x, struct session_request *r, enum session_action action)
{
    r->service = service_of(x);
    r->x = x;
    snprintf(r->adapter, sizeof r->adapter, "%s", exchange_param(x));
    r->call.action = action;
    r->call.tenant = TENANT;
    r->call.adapter = r->adapter;
    r->call.examples = r->body.has_examples ? r->body.examples.data : NULL;
    r->call.examples_size = r->body.examples.size;
    r->call.expected_version = r->body.expected_version;
    r->call.done = on_done;
    r->call.ctx = r;
    r->next = r->service->session_requests;
    if (r->next) r->next->previous = r;
    r->service->session_requests = r;
    exchange_hold(x, r, on_close);
    session_start(r->service->training, &r->call);
}

/* ------------------------------------------------------------------ which settings a call takes */

static bool is_one_of(const char *name, const char *const *names)
{
    for (; *names; names++)
        if (!strcmp(name, *names)) return true;
    return false;
}

static bool is_forward_setting(const char *name)
{
    static const char *const names[] = {
        "loss",     "reduction", "balance",   "contrast", "contrast_temperature", "contrast_pairs",
        "dpo_beta", "clip_low",  "clip_high", "seed",     "batch_tokens",         NULL};
    return is_one_of(name, names);
}

static bool is_optim_setting(const char *name)
{
    static const char *const names[] = {"learning_rate", "beta1", "beta2", "eps",
                                        "weight_decay",  "clip",  NULL};
    return is_one_of(name, names);
}

static bool is_no_setting(const char *name)
{
    (void)name;
    return false;
}

/* ------------------------------------------------------------------ a job's result */

struct job_publish {
    struct call call;
    struct train_body body;
    char adapter[160];
};

static void publish_release(struct call *c) { train_body_release(&((struct job_publish *)c)->body); }

static void work_publish(struct call *c)
{
    struct job_publish *p = (struct job_publish *)c;
    struct train_job job;
    struct put_result result;
    struct error cause = {0};
    enum status st = jobs_get(c->service->training, TENANT, p->body.job, &job, &cause);
    if (!st) {
        bool same = !strcmp(job.adapter, p->adapter);
        train_job_release(&job);
        if (!same)
            st = error_set(&cause, ST_NOT_FOUND, "'%.40s' is not a job of adapter '%.128s'", p->body.job,
                           p->adapter);
    }
    if (!st)
        st = jobs_publish(c->service->training, TENANT, p->body.job, p->body.expected_version, &result,
                          &cause);
    if (st) {
        training_failed(&c->error, st, &cause, "job");
        return;
    }
    memcpy(c->version, result.version, sizeof c->version);
    training_write_job(c->service, p->body.job, &c->body, &c->error);
}

static void publish_job(struct exchange *x, struct train_body *body)
{
    struct api_error err;
    struct job_publish *p = calloc(1, sizeof *p);
    if (!p) {
        train_body_release(body);
        api_error_from(&err, ST_NOMEM, NULL, NULL);
        exchange_reply_error(x, &err);
        return;
    }
    p->body = *body;
    snprintf(p->adapter, sizeof p->adapter, "%s", exchange_param(x));
    p->call.work = work_publish;
    p->call.release = publish_release;
    call_start(x, &p->call);
}

/* ------------------------------------------------------------------ handlers */

static void handle(struct exchange *x, enum train_body_kind kind, enum session_action action,
                   bool (*is_setting)(const char *))
{
    struct api_error err = {0};
    size_t size;
    if (!training_ready(x)) return;
    char *body = exchange_body(x, &size);
    struct session_request *r = calloc(1, sizeof *r);
    if (!r) api_error_from(&err, ST_NOMEM, NULL, NULL);
    if (!r || !train_body_parse(kind, body, size, is_setting, &r->body, &err) ||
        !training_settings(r->body.body, &r->call.settings, &err)) {
        if (r) train_body_release(&r->body);
        free(r);
        exchange_reply_error(x, &err);
    } else if (r->body.job) {
        publish_job(x, &r->body);
        free(r);
    } else {
        request_start(x, r, r->body.forward_only ? SESSION_FORWARD : action);
    }
}

void adapter_forward_backward(struct exchange *x)
{
    handle(x, TRAIN_BODY_FORWARD, SESSION_FORWARD_BACKWARD, is_forward_setting);
}

void adapter_optim_step(struct exchange *x)
{
    handle(x, TRAIN_BODY_OPTIM, SESSION_OPTIM_STEP, is_optim_setting);
}
void adapter_publish(struct exchange *x) { handle(x, TRAIN_BODY_PUBLISH, SESSION_PUBLISH, is_no_setting); }

static void work_drop(struct call *c)
{
    const char *name = training_lookup_of(c)->id;
    struct error cause = {0};
    enum status st = session_drop(c->service->training, TENANT, name, &cause);
    if (st)
        training_failed(&c->error, st, &cause, "name");
    else
        strbuf_printf(&c->body, "{\"name\": \"%s\", \"object\": \"training.session\", \"deleted\": true}",
                      name);
}

void adapter_session_delete(struct exchange *x) { training_lookup_start(x, work_drop); }

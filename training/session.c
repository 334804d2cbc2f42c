/* Step-wise training: adapters whose owners write the loop. One thread does all calls; tenants take turns. */
#include "training/session_int.h"

#include "base/file.h"
#include "base/log.h"
#include "training/publish.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SAVE_SECONDS 60 /* between checkpoints of a session that is used */
#define REST_SECONDS 5  /* without a call, until a session gives the memory of passes back */

/* --- actions --- */

static enum status do_step(struct jobs *j, struct session *s, struct session_call *c, struct error *err)
{
    struct error why = {0};
    if (!s->gradients)
        return error_set(err, ST_CONFLICT, "there are no gradients: forward_backward comes first");
    c->result.learning_rate = c->settings.learning_rate;
    enum status st =
        learner_update(s->learner, &c->settings, c->settings.learning_rate, &c->result.grad_norm);
    s->gradients = false;
    if (st == ST_REJECTED)
        return error_set(err, st, "the gradient is not finite: nothing was changed, and it is dropped");
    if (st) return error_set(err, st, "%s", status_text(st));
    s->changed = true;
    pthread_mutex_lock(&j->lock);
    j->stats.steps++;
    pthread_mutex_unlock(&j->lock);
    if (train_clock() - s->saved >= SAVE_SECONDS && session_save(j, s, &why))
        log_warn("step-wise training of '%s': no checkpoint: %s", s->adapter, why.message);
    return ST_OK;
}

static enum status do_publish(struct jobs *j, struct session *s, struct session_call *c, struct error *err)
{
    struct adapter_bundle *bundle = NULL;
    struct train_path result = session_path(j, s, "result");
    remove_all(result.text);
    enum status st = file_make_folders(result.text, err);
    if (!st) st = learner_bundle(s->learner, &j->config.base, &bundle, err);
    if (!st) st = bundle_write(bundle, &j->config.base, result.text, err);
    adapter_bundle_free(bundle);
    if (!st)
        st = jobs_put(j, s->tenant, s->adapter, s->number, result.text, c->expected_version, &c->result.put,
                      err);
    remove_all(result.text);
    return st;
}

static enum status act(struct jobs *j, struct session *s, struct session_call *c, struct error *err)
{
    bool passes = c->action == SESSION_FORWARD || c->action == SESSION_FORWARD_BACKWARD;
    enum status st = session_ensure(j, s, passes, &c->result.opened, err);
    if (st) return st;
    memcpy(c->result.version_before, s->version_before, sizeof s->version_before);
    if (passes) st = session_pass(j, s, c, err);
    if (c->action == SESSION_OPTIM_STEP) st = do_step(j, s, c, err);
    if (c->action == SESSION_PUBLISH) st = do_publish(j, s, c, err);
    if (s->learner) c->result.optim_steps = s->learner->optim_steps;
    return st;
}

/* --- the table of sessions, under the jobs' lock --- */

static struct session *find(const struct sessions *t, const char *tenant, const char *adapter)
{
    struct session *s = t->first;
    while (s && !(strcmp(s->tenant, tenant) == 0 && strcmp(s->adapter, adapter) == 0)) s = s->next;
    return s;
}

/* The session of that name, marked busy; NULL when out of memory. */
static struct session *claim(struct sessions *t, const char *tenant, const char *adapter)
{
    struct session *s = find(t, tenant, adapter);
    if (!s && (s = calloc(1, sizeof *s))) {
        snprintf(s->tenant, sizeof s->tenant, "%s", tenant);
        snprintf(s->adapter, sizeof s->adapter, "%s", adapter);
        s->next = t->first;
        t->first = s;
    }
    if (s) s->busy = true;
    return s;
}

/* No longer busy; what is not in memory needs no place in the table. */
static void unclaim(struct sessions *t, struct session *s)
{
    s->busy = false;
    if (s->learner) return;
    struct session **at = &t->first;
    while (*at != s) at = &(*at)->next;
    *at = s->next;
    free(s);
}

static int loaded(const struct sessions *t)
{
    int n = 0;
    for (const struct session *s = t->first; s; s = s->next) n += s->learner != NULL;
    return n;
}

/* The least recently used one that must leave memory: there are too many, or it was idle for long. */
static struct session *to_leave(const struct sessions *t, double now)
{
    const struct jobs_config *c = &t->jobs->config;
    struct session *oldest = NULL;
    for (struct session *s = t->first; s; s = s->next)
        if (!s->busy && s->learner && (!oldest || s->used < oldest->used)) oldest = s;
    if (!oldest) return NULL;
    return loaded(t) > c->session_max || now - oldest->used >= c->session_seconds ? oldest : NULL;
}

/* --- the thread --- */

/* Takes out of the queue the oldest call of the tenant that was served longest ago, of a session that is
 * free. */
static struct session_call *take(struct sessions *t)
{
    struct session_call **best = NULL;
    for (struct session_call **at = &t->calls; *at; at = &(*at)->next) {
        const struct session *s = find(t, (*at)->tenant, (*at)->adapter);
        if (s && s->busy) continue;
        if (!best || served_stamp(t->jobs, (*at)->tenant) < served_stamp(t->jobs, (*best)->tenant)) best = at;
    }
    if (!best) return NULL;
    struct session_call *c = *best;
    *best = c->next;
    if (!c->next) t->last = best;
    c->next = NULL;
    served_begin(t->jobs, c->tenant);
    return c;
}

static void finish(struct session_call *c, enum status st, const struct error *err)
{
    c->result.status = st;
    c->result.error = *err;
    if (st && !err->message[0]) error_set(&c->result.error, st, "%s", status_text(st));
    c->done(c);
}

/* Called with the lock, which it gives up meanwhile. */
static void run_call(struct sessions *t, struct session_call *c)
{
    struct jobs *j = t->jobs;
    struct error err = {0};
    bool closing = j->closing;
    struct session *s = closing ? NULL : claim(t, c->tenant, c->adapter);
    t->current = c;
    pthread_mutex_unlock(&j->lock);
    enum status st = closing ? ST_DRAINING : !s ? ST_NOMEM : ST_OK;
    if (!st && atomic_load(&c->cancelled)) st = ST_CANCELLED;
    if (!st) st = act(j, s, c, &err);
    pthread_mutex_lock(&j->lock);
    if (st == ST_CANCELLED && j->closing) st = error_set(&err, ST_DRAINING, "%s", status_text(ST_DRAINING));
    if (s) {
        s->used = train_clock();
        unclaim(t, s);
    }
    t->current = NULL;
    pthread_mutex_unlock(&j->lock);
    finish(c, st, &err);
    pthread_mutex_lock(&j->lock);
}

/* The same with a session that leaves memory. */
static void leave(struct sessions *t, struct session *s)
{
    struct jobs *j = t->jobs;
    struct error err = {0};
    s->busy = true;
    pthread_mutex_unlock(&j->lock);
    if (session_save(j, s, &err))
        log_warn("step-wise training of '%s': no checkpoint, what was learned since the last one is lost: %s",
                 s->adapter, err.message);
    session_unload(j, s);
    pthread_mutex_lock(&j->lock);
    unclaim(t, s);
}

/* One that was idle for a moment: the memory of its passes is worth more elsewhere. */
static struct session *to_rest(const struct sessions *t, double now)
{
    struct session *s = t->first;
    while (s && (s->busy || !s->learner || !s->learner->pass || now - s->used < REST_SECONDS)) s = s->next;
    return s;
}

static void rest(struct sessions *t, struct session *s)
{
    struct jobs *j = t->jobs;
    s->busy = true;
    pthread_mutex_unlock(&j->lock);
    learner_rest(s->learner);
    session_count_bytes(j, s, learner_bytes(s->learner));
    pthread_mutex_lock(&j->lock);
    s->busy = false;
}

static void wait_a_while(struct sessions *t)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 1; /* idle sessions are looked for */
    pthread_cond_timedwait(&t->wake, &t->jobs->lock, &until);
}

static void *sessions_thread(void *ctx)
{
    struct sessions *t = ctx;
    struct jobs *j = t->jobs;
    pthread_mutex_lock(&j->lock);
    while (!j->closing || t->calls) {
        struct session_call *c = take(t);
        struct session *old = c ? NULL : to_leave(t, train_clock());
        struct session *idle = c || old ? NULL : to_rest(t, train_clock());
        if (c)
            run_call(t, c);
        else if (old)
            leave(t, old);
        else if (idle)
            rest(t, idle);
        else
            wait_a_while(t);
    }
    while (t->first) leave(t, t->first);
    pthread_mutex_unlock(&j->lock);
    return NULL;
}

/* --- from outside --- */

enum status sessions_open(struct jobs *j, struct error *err)
{
    struct sessions *t = calloc(1, sizeof *t);
    if (!t) return jobs_no_memory(err);
    t->jobs = j;
    t->last = &t->calls;
    pthread_cond_init(&t->wake, NULL);
    j->sessions = t;
    if (pthread_create(&t->thread, NULL, sessions_thread, t)) return jobs_no_memory(err);
    t->started = true;
    return ST_OK;
}

void sessions_close(struct jobs *j)
{
    struct sessions *t = j->sessions;
    if (!t) return;
    pthread_mutex_lock(&j->lock); /* closing is set already */
    if (t->current) atomic_store(&t->current->cancelled, true);
    pthread_cond_signal(&t->wake);
    pthread_mutex_unlock(&j->lock);
    if (t->started) pthread_join(t->thread, NULL);
    pthread_cond_destroy(&t->wake);
    free(t);
    j->sessions = NULL;
}

int sessions_count(struct jobs *j)
{
    pthread_mutex_lock(&j->lock);
    int n = loaded(j->sessions);
    pthread_mutex_unlock(&j->lock);
    return n;
}

void session_start(struct jobs *j, struct session_call *c)
{
    struct sessions *t = j->sessions;
    c->next = NULL;
    c->result = (struct session_result){0};
    atomic_store(&c->cancelled, false);
    pthread_mutex_lock(&j->lock);
    *t->last = c;
    t->last = &c->next;
    pthread_cond_signal(&t->wake);
    pthread_mutex_unlock(&j->lock);
}

void session_cancel(struct jobs *j, struct session_call *c)
{
    (void)j;
    atomic_store(&c->cancelled, true); /* a call that waits finds it when its turn comes */
}

void session_call_release(struct session_call *c)
{
    for (size_t i = 0; i < c->result.sequence_count; i++) free(c->result.sequences[i].logprob);
    free(c->result.sequences);
    c->result.sequences = NULL;
    c->result.sequence_count = 0;
}

static bool is_called(const struct sessions *t, const char *tenant, const char *adapter)
{
    for (const struct session_call *c = t->calls; c; c = c->next)
        if (strcmp(c->tenant, tenant) == 0 && strcmp(c->adapter, adapter) == 0) return true;
    return false;
}

enum status session_drop(struct jobs *j, const char *tenant, const char *adapter, struct error *err)
{
    struct sessions *t = j->sessions;
    struct session row = {0};
    pthread_mutex_lock(&j->lock);
    const struct session *there = find(t, tenant, adapter);
    bool busy = is_called(t, tenant, adapter) || (there && there->busy);
    struct session *s = busy ? NULL : claim(t, tenant, adapter);
    pthread_mutex_unlock(&j->lock);
    if (busy) return error_set(err, ST_BUSY, "a call on '%.128s' waits or runs", adapter);
    if (!s) return jobs_no_memory(err);
    enum status st =
        db_run(j->db, err, session_row_read, &row,
               "SELECT id, adapter_number, version_before FROM session WHERE tenant = ?1 AND adapter = ?2",
               "tt", tenant, adapter);
    if (!st && !row.id[0])
        st = error_set(err, ST_NOT_FOUND, "'%.128s' is not being trained step by step", adapter);
    if (!st) {
        memcpy(s->id, row.id, sizeof s->id);
        session_forget(j, s, err);
    }
    pthread_mutex_lock(&j->lock);
    unclaim(t, s);
    pthread_cond_signal(&t->wake);
    pthread_mutex_unlock(&j->lock);
    return st;
}

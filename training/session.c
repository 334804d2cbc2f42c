/* Step-wise training: adapters whose owners write the loop. One thread does all calls; tenants take turns. */
#include "training/jobs_int.h"

#include "base/file.h"
#include "base/log.h"
#include "training/publish.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SAVE_SECONDS 60 /* between checkpoints of a session that is used */

struct session {
    struct session *next;
    char id[TRAIN_ID_MAX]; /* "" while it is being opened or dropped */
    char tenant[TENANT_MAX], adapter[ADAPTER_NAME_MAX + 1];
    int64_t number; /* of the adapter */
    char version_before[ADAPTER_VERSION_HEX + 1];
    bool busy; /* somebody works on it without the lock, who alone may touch what follows */
    struct learner *learner;
    struct routing_entry *routing;
    float *start; /* the values it began with: dpo's reference */
    bool changed; /* since the last checkpoint */
    bool gradients;
    size_t bytes;       /* counted in the statistics */
    double used, saved; /* by the clock */
};

struct sessions {
    struct jobs *jobs;
    pthread_t thread;
    bool started;
    pthread_cond_t wake;
    /* Under the jobs' lock: */
    struct session *first;
    struct session_call *calls, **last;
    struct session_call *current;
};

static double clock_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static struct train_path session_path(const struct jobs *j, const struct session *s, const char *name)
{
    return jobs_path(j, "sessions/%s/%s", s->id, name);
}

/* --- opening and closing --- */

static enum status save(struct jobs *j, struct session *s, struct error *err)
{
    struct checkpoint_state state = {
        .optim_steps = s->learner->optim_steps, .loss = NAN, .loss_before = NAN, .held_loss = NAN};
    if (!s->changed) return ST_OK;
    snprintf(state.run, sizeof state.run, "%s", s->id);
    enum status st = checkpoint_write(s->learner, &state, session_path(j, s, "checkpoint").text, err);
    if (st) return st;
    s->changed = false;
    s->saved = clock_seconds();
    return ST_OK;
}

static void count_bytes(struct jobs *j, struct session *s, size_t bytes)
{
    pthread_mutex_lock(&j->lock);
    j->stats.state_bytes += bytes - s->bytes;
    s->bytes = bytes;
    pthread_mutex_unlock(&j->lock);
}

/* Leaves memory. What the learner holds beyond its last checkpoint is lost. */
static void unload(struct jobs *j, struct session *s)
{
    if (!s->learner) return;
    count_bytes(j, s, 0);
    jobs_routing_end(j, s->routing);
    learner_close(s->learner);
    free(s->start);
    jobs_transposed_release(j);
    s->learner = NULL;
    s->start = NULL;
    s->routing = NULL;
}

static void forget(struct jobs *j, struct session *s, struct error *err)
{
    unload(j, s);
    (void)db_run(j->db, err, NULL, NULL, "DELETE FROM session WHERE tenant = ?1 AND adapter = ?2", "tt",
                 s->tenant, s->adapter);
    if (s->id[0]) remove_all(jobs_path(j, "sessions/%s", s->id).text);
}

static enum status read_row(void *ctx, sqlite3_stmt *row)
{
    struct session *s = ctx;
    db_text(row, 0, s->id, sizeof s->id);
    s->number = sqlite3_column_int64(row, 1);
    db_text(row, 2, s->version_before, sizeof s->version_before);
    return ST_OK;
}

static enum status adapter_number(struct jobs *j, const struct session *s, int64_t *out, struct error *err)
{
    struct adapter_info info;
    enum status st = registry_get(j->config.registry, s->tenant, s->adapter, &info, err);
    if (st) return st;
    *out = info.number;
    adapter_info_release(&info);
    return ST_OK;
}

/* A new one, of the adapter's current version. */
static enum status create(struct jobs *j, struct session *s, struct error *err)
{
    jobs_new_id("session", s->id);
    struct train_path start = session_path(j, s, "start");
    enum status st = file_make_folders(jobs_path(j, "sessions/%s", s->id).text, err);
    if (!st) st = jobs_copy_version(j, s->tenant, s->adapter, NULL, start.text, s->version_before, err);
    if (!st)
        st = db_run(j->db, err, NULL, NULL,
                    "INSERT INTO session (id, tenant, adapter, adapter_number, version_before) VALUES (?1, "
                    "?2, ?3, ?4, ?5)",
                    "tttit", s->id, s->tenant, s->adapter, s->number, s->version_before);
    return st;
}

static enum status load_learner(struct jobs *j, struct session *s, struct transposed *t, struct error *err)
{
    struct train_start start = {0};
    struct checkpoint_state state;
    struct train_path checkpoint = session_path(j, s, "checkpoint");
    enum status st = train_start_open(session_path(j, s, "start").text, &j->config.base, &start, err);
    if (!st) st = learner_open(j->config.engine, j->config.device, t, start.bundle, &s->learner, err);
    train_start_close(&start);
    if (st) return st;
    size_t count = s->learner->params->count;
    s->start = malloc(count * sizeof *s->start);
    s->routing = jobs_routing_begin(j, s->tenant, s->adapter, s->id, s->learner->params);
    if (!s->start || !s->routing) return jobs_no_memory(err);
    st = learner_read(s->learner, LEARNER_VALUE, 0, count, s->start);
    if (st) return error_set(err, st, "the device cannot be had: %s", status_text(st));
    return access(checkpoint.text, F_OK) == 0
               ? checkpoint_read(s->learner, checkpoint.text, s->id, &state, err)
               : ST_OK;
}

static enum status load(struct jobs *j, struct session *s, struct error *err)
{
    struct transposed *t;
    enum status st = jobs_transposed_acquire(j, &t, err);
    if (st) return st;
    st = load_learner(j, s, t, err);
    if (st && s->learner) {
        unload(j, s);
    } else if (st) {
        jobs_transposed_release(j);
    } else {
        s->changed = s->gradients = false;
        s->saved = clock_seconds();
    }
    return st;
}

/* Ready for a call: in memory, of the adapter that has the name now. */
static enum status ensure(struct jobs *j, struct session *s, bool may_create, bool *opened, struct error *err)
{
    int64_t number = 0;
    enum status st = adapter_number(j, s, &number, err);
    if (!st && !s->learner)
        st = db_run(
            j->db, err, read_row, s,
            "SELECT id, adapter_number, version_before FROM session WHERE tenant = ?1 AND adapter = ?2", "tt",
            s->tenant, s->adapter);
    if (st) return st;
    if (s->id[0] && s->number != number) { /* the adapter it was of is deleted */
        forget(j, s, NULL);
        s->id[0] = '\0';
    }
    s->number = number;
    if (!s->id[0] && !may_create)
        return error_set(err, ST_CONFLICT, "'%.128s' is not being trained: forward_backward comes first",
                         s->adapter);
    if (!s->id[0]) {
        *opened = true;
        st = create(j, s, err);
    }
    if (!st && !s->learner) st = load(j, s, err);
    return st;
}

/* --- passes --- */

static double weights_of(const struct dataset *d, const struct dataset_sequence *s, float *scratch)
{
    double sum = 0;
    dataset_weights(d, s, scratch);
    for (int i = 1; i < s->count; i++) sum += (double)scratch[i];
    return sum;
}

/* One call's examples. */
struct work {
    struct jobs *jobs;
    struct session *session;
    struct session_call *call;
    struct dataset *data;
    uint32_t *all;     /* [examples] */
    double *reference; /* [sequences], with dpo */
    double divisor;
    int batches;
};

static enum status work_open(struct work *w, struct error *err)
{
    struct session_call *c = w->call;
    struct error why = {0};
    const struct dataset_rules rules = jobs_rules(w->jobs, &c->settings, "examples", &why);
    enum status st =
        dataset_read_bytes(&rules, c->examples ? c->examples : "", c->examples_size, &w->data, err);
    if (st) return st;
    const struct dataset *d = w->data;
    w->all = calloc(d->example_count, sizeof *w->all);
    w->reference = calloc(d->sequence_count, sizeof *w->reference);
    c->result.sequences = calloc(d->sequence_count, sizeof *c->result.sequences);
    float *scratch = malloc((size_t)d->seq_rows_max * sizeof *scratch);
    if (!w->all || !w->reference || !c->result.sequences || !scratch) {
        free(scratch);
        return jobs_no_memory(err);
    }
    for (size_t i = 0; i < d->example_count; i++) w->all[i] = (uint32_t)i;
    for (size_t i = 0; i < d->sequence_count; i++)
        c->result.weight += weights_of(d, &d->sequence[i], scratch);
    free(scratch);
    w->divisor = c->settings.loss == LOSS_DPO ? (double)d->example_count : c->result.weight;
    if (c->settings.reduction == REDUCTION_SUM) w->divisor = 1;
    for (size_t at = 0; at < d->example_count; w->batches++)
        at += batch_fit(d, w->all, d->example_count, at, c->settings.batch_tokens);
    size_t rows = d->token_count, limit = (size_t)c->settings.batch_tokens;
    st = learner_reserve(w->session->learner, (int)(rows < limit ? rows : limit), d->seq_rows_max);
    return st ? error_set(err, st, "memory for the passes: %s", status_text(st)) : ST_OK;
}

static void work_close(struct work *w)
{
    free(w->all);
    free(w->reference);
    dataset_free(w->data);
}

/* All examples under the values that the session began with, which take the place of the present ones for as
 * long. */
static enum status refer(struct work *w)
{
    struct learner *l = w->session->learner;
    size_t count = l->params->count;
    float *now = malloc(count * sizeof *now);
    enum status st = now ? learner_read(l, LEARNER_VALUE, 0, count, now) : ST_NOMEM;
    if (!st) st = learner_write(l, LEARNER_VALUE, 0, count, w->session->start);
    for (size_t at = 0, n; at < w->data->example_count && !st; at += n) {
        n = batch_fit(w->data, w->all, w->data->example_count, at, w->call->settings.batch_tokens);
        st = train_batch_fill(&l->batch, w->data, w->all + at, n);
        if (!st) st = objective_logprobs(l, &w->call->cancelled, w->reference + 2 * at);
    }
    if (now) {
        enum status back = learner_write(l, LEARNER_VALUE, 0, count, now);
        if (!st) st = back;
    }
    free(now);
    return st;
}

static enum status keep_logprobs(struct work *w, size_t first_sequence, const float *logprob)
{
    const struct train_batch *b = &w->session->learner->batch;
    for (int i = 0; i < b->pass.seq_count; i++) {
        struct session_tokens *t = &w->call->result.sequences[first_sequence + (size_t)i];
        size_t n = (size_t)(b->first_row[i + 1] - b->first_row[i]) - 1;
        t->logprob = malloc(n * sizeof *t->logprob);
        if (!t->logprob) return ST_NOMEM;
        memcpy(t->logprob, logprob + b->first_row[i], n * sizeof *t->logprob);
        t->count = n;
        w->call->result.sequence_count = first_sequence + (size_t)i + 1;
    }
    return ST_OK;
}

/* Adds a batch's results to the call's. */
static void add_result(struct work *w, const struct objective_result *r, int64_t rows)
{
    struct session_result *out = &w->call->result;
    double share = 1.0 / w->batches, of_rows = (double)rows / (double)w->data->token_count;
    out->loss += r->loss;
    out->objective += r->objective;
    out->balance += share * r->balance;
    out->contrast += share * r->contrast;
    out->similarity += share * r->similarity;
    out->margin += r->margin;
    out->accuracy += r->accuracy;
    out->clipped += of_rows * r->clipped;
    out->tokens += rows;
}

static enum status run_batch(struct work *w, size_t at, size_t n)
{
    struct session_call *c = w->call;
    struct learner *l = w->session->learner;
    struct objective_result r;
    struct train_settings settings = c->settings;
    /* The auxiliary losses are means over batches. */
    settings.balance /= w->batches;
    settings.contrast /= w->batches;
    int each = w->data->sequences_each;
    enum status st = train_batch_fill(&l->batch, w->data, w->all + at, n);
    if (!st)
        st = objective_run(l, &settings, each == 2 ? w->reference + 2 * at : NULL, w->divisor,
                           c->settings.seed + (uint64_t)l->optim_steps, c->action == SESSION_FORWARD_BACKWARD,
                           &c->cancelled, &r);
    if (!st) st = keep_logprobs(w, at * (size_t)each, r.logprob);
    if (st) return st;
    add_result(w, &r, l->batch.pass.rows);
    if (c->action == SESSION_FORWARD_BACKWARD)
        jobs_routing_add(w->jobs, w->session->routing, l->optim_steps + 1, &r);
    return ST_OK;
}

static enum status run_batches(struct work *w, struct error *err)
{
    enum status st = w->call->settings.loss == LOSS_DPO ? refer(w) : ST_OK;
    for (size_t at = 0, n; at < w->data->example_count && !st; at += n) {
        n = batch_fit(w->data, w->all, w->data->example_count, at, w->call->settings.batch_tokens);
        st = run_batch(w, at, n);
    }
    if (st) return error_set(err, st, "%s", status_text(st));
    if (!isfinite(w->call->result.loss))
        return error_set(err, ST_REJECTED, "the loss is not finite (%g)", w->call->result.loss);
    return ST_OK;
}

static enum status do_pass(struct jobs *j, struct session *s, struct session_call *c, struct error *err)
{
    struct work w = {.jobs = j, .session = s, .call = c};
    double start = clock_seconds();
    enum status st = work_open(&w, err);
    if (!st) {
        st = run_batches(&w, err);
        if (c->action == SESSION_FORWARD_BACKWARD) s->gradients = !st;
        /* Half-made gradients are of no use. */
        if (st && c->action == SESSION_FORWARD_BACKWARD && learner_forget(s->learner)) unload(j, s);
    }
    if (s->learner) count_bytes(j, s, learner_bytes(s->learner));
    work_close(&w);
    c->result.seconds = clock_seconds() - start;
    pthread_mutex_lock(&j->lock);
    j->stats.tokens += (uint64_t)c->result.tokens;
    j->stats.step_seconds += c->result.seconds;
    pthread_mutex_unlock(&j->lock);
    return st;
}

/* --- the other actions --- */

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
    if (clock_seconds() - s->saved >= SAVE_SECONDS && save(j, s, &why))
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
    enum status st = ensure(j, s, passes, &c->result.opened, err);
    if (st) return st;
    memcpy(c->result.version_before, s->version_before, sizeof s->version_before);
    if (passes) st = do_pass(j, s, c, err);
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
        s->used = clock_seconds();
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
    if (save(j, s, &err))
        log_warn("step-wise training of '%s': no checkpoint, what was learned since the last one is lost: %s",
                 s->adapter, err.message);
    unload(j, s);
    pthread_mutex_lock(&j->lock);
    unclaim(t, s);
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
        struct session *old = c ? NULL : to_leave(t, clock_seconds());
        if (c)
            run_call(t, c);
        else if (old)
            leave(t, old);
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
        db_run(j->db, err, read_row, &row,
               "SELECT id, adapter_number, version_before FROM session WHERE tenant = ?1 AND adapter = ?2",
               "tt", tenant, adapter);
    if (!st && !row.id[0])
        st = error_set(err, ST_NOT_FOUND, "'%.128s' is not being trained step by step", adapter);
    if (!st) {
        memcpy(s->id, row.id, sizeof s->id);
        forget(j, s, err);
    }
    pthread_mutex_lock(&j->lock);
    unclaim(t, s);
    pthread_cond_signal(&t->wake);
    pthread_mutex_unlock(&j->lock);
    return st;
}

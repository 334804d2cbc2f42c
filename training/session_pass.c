/* A call's examples through the model. */
#include "training/session_int.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

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
        size_t n = (size_t)(b->first_row[i + 1] - b->first_row[i]);
        t->logprob = malloc(n * sizeof *t->logprob);
        if (!t->logprob) return ST_NOMEM;
        memcpy(t->logprob, logprob + b->first_row[i], n * sizeof *t->logprob);
        t->count = n;
        w->call->result.sequence_count = first_sequence + (size_t)i + 1;
    }
    return ST_OK;
}

/* Adds a batch's results to the call's. */
static void add_result(struct work *w, const struct objective_result *r)
{
    struct session_result *out = &w->call->result;
    double share = 1.0 / w->batches, of_tokens = (double)r->tokens / (double)w->data->token_count;
    out->loss += r->loss;
    out->objective += r->objective;
    out->balance += share * r->balance;
    out->contrast += share * r->contrast;
    out->similarity += share * r->similarity;
    out->cohesion += share * r->cohesion;
    out->margin += r->margin;
    out->accuracy += r->accuracy;
    out->clipped += of_tokens * r->clipped;
    out->tokens += r->tokens;
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
    add_result(w, &r);
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

enum status session_pass(struct jobs *j, struct session *s, struct session_call *c, struct error *err)
{
    struct work w = {.jobs = j, .session = s, .call = c};
    double start = train_clock();
    enum status st = work_open(&w, err);
    if (!st) {
        st = run_batches(&w, err);
        if (c->action == SESSION_FORWARD_BACKWARD) s->gradients = !st;
        /* Half-made gradients are of no use. */
        if (st && c->action == SESSION_FORWARD_BACKWARD && learner_forget(s->learner)) session_unload(j, s);
    }
    if (s->learner) session_count_bytes(j, s, learner_bytes(s->learner));
    work_close(&w);
    c->result.seconds = train_clock() - start;
    pthread_mutex_lock(&j->lock);
    j->stats.tokens += (uint64_t)c->result.tokens;
    j->stats.step_seconds += c->result.seconds;
    pthread_mutex_unlock(&j->lock);
    return st;
}

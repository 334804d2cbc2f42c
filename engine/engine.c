#include "engine/engine.h"

#include "base/log.h"
#include "engine/forward.h"
#include "engine/model.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"
#include "engine/step.h"
#include "engine/turns.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BATCH_MAX 4096
#define QUEUE_MAX (1 << 20)
#define PREFILL_CHUNK_MAX 65536
#define LR_WIDTH_MAX (1 << 20)

struct engine {
    /* Set by engine_open, then read only. */
    struct engine_config config; /* defaults filled in; its pointers are used while opening only */
    struct model *model;
    struct model_shape shape; /* context_length is what is served, not what the model has */
    struct tokenizer *tokenizer;
    struct chat_template chat;
    struct error chat_error; /* status ST_OK where there is a template */
    int32_t *end_tokens;     /* [rules.end_count], owned */
    struct sequence_rules rules;
    int kv_pages;
    pthread_t thread;
    bool thread_started;

    /* The engine thread's. */
    struct forward *forward;
    struct scheduler *scheduler;
    struct sampler_scratch **scratch; /* [device's host_threads] */
    struct verdict *verdicts;         /* [max_batch] */
    struct step *step;

    pthread_mutex_t lock;
    pthread_cond_t wake; /* of the engine thread */
    /* Under the lock. */
    struct sequence *incoming, **incoming_end; /* submitted, not yet seen by the thread */
    struct sequence *live;                     /* every sequence that has not had its last event */
    int waiting;                               /* of those, the ones not admitted */
    uint64_t last_id;
    bool cancels; /* some sequence was newly marked as cancelled */
    bool closing;
    bool failed; /* the device did */
    struct turns turns;
    struct engine_stats stats;
};

/* --- opening ----------------------------------------------------------------------------------- */

static void config_fill(struct engine_config *c)
{
    if (c->max_batch == 0) c->max_batch = 64;
    if (c->max_queue == 0) c->max_queue = 1024;
    if (c->prefill_chunk == 0) c->prefill_chunk = 128;
    if (c->kv_bytes == 0) c->kv_bytes = (size_t)1 << 30;
    if (c->lr_width == 0) c->lr_width = 4096;
    if (c->turn_seconds == 0) c->turn_seconds = 0.01;
}

static enum status config_check(const struct engine_config *c, struct error *err)
{
    const struct { const char *name; int value, max; } range[] = {
        {"max_batch", c->max_batch, BATCH_MAX},
        {"max_queue", c->max_queue, QUEUE_MAX},
        {"prefill_chunk", c->prefill_chunk, PREFILL_CHUNK_MAX},
        {"lr_width", c->lr_width, LR_WIDTH_MAX},
    };
    for (size_t i = 0; i < sizeof range / sizeof *range; i++)
        if (range[i].value < 1 || range[i].value > range[i].max)
            return error_set(err, ST_INVALID, "%s is %d; it must be 1 to %d", range[i].name,
                             range[i].value, range[i].max);
    if (c->kv_type != DTYPE_F16 && c->kv_type != DTYPE_F32)
        return error_set(err, ST_INVALID, "the KV cache can be of F16 or F32");
    return ST_OK;
}

/* How long a context is served, and how many KV pages for it. */
static enum status capacity_plan(struct engine *e, struct error *err)
{
    struct model_shape *s = &e->shape;
    int wanted = e->config.context_length;
    if (wanted < 0 || wanted > s->context_length)
        return error_set(err, ST_INVALID, "context_length is %d; the model was made for 1 to %d",
                         wanted, s->context_length);
    if (wanted > 0) s->context_length = wanted;

    size_t page_bytes = kv_page_bytes(e->config.kv_type, s->layers, s->kv_heads, s->head_dim);
    size_t pages = e->config.kv_bytes / page_bytes;
    size_t useful = (size_t)kv_pages_needed(s->context_length) * (size_t)e->config.max_batch;
    if (pages > useful) pages = useful;
    if (pages == 0)
        return error_set(err, ST_INVALID,
                         "a KV cache of %zu bytes has no room for one page of %zu bytes",
                         e->config.kv_bytes, page_bytes);
    if (pages > INT32_MAX / KV_PAGE_TOKENS) pages = INT32_MAX / KV_PAGE_TOKENS;
    e->kv_pages = (int)pages;
    if (e->kv_pages * KV_PAGE_TOKENS < s->context_length) {
        s->context_length = e->kv_pages * KV_PAGE_TOKENS;
        log_warn("the KV cache of %zu bytes limits the context to %d tokens", e->config.kv_bytes,
                 s->context_length);
    }
    return ST_OK;
}

static enum status tokenizer_bind(struct engine *e, struct error *err)
{
    enum status st = tokenizer_open(e->model->gguf, &e->tokenizer, err);
    if (st) return st;
    size_t vocab = tokenizer_vocab_size(e->tokenizer), count = 0;
    if (vocab != e->shape.vocab)
        return error_set(err, ST_BAD_FORMAT, "the tokenizer has %zu tokens, the model %zu", vocab,
                         e->shape.vocab);
    for (size_t i = 0; i < vocab; i++) count += tokenizer_is_end(e->tokenizer, (int32_t)i);
    e->end_tokens = malloc((count + 1) * sizeof *e->end_tokens);
    if (!e->end_tokens) return error_set(err, ST_NOMEM, "out of memory");
    count = 0;
    for (size_t i = 0; i < vocab; i++)
        if (tokenizer_is_end(e->tokenizer, (int32_t)i)) e->end_tokens[count++] = (int32_t)i;
    e->rules = (struct sequence_rules){.tokenizer = e->tokenizer, .shape = &e->shape,
                                       .lr_width = e->config.lr_width,
                                       .end_tokens = e->end_tokens, .end_count = count};
    return ST_OK;
}

/* A model without a template, or with an unknown one, is served all the same. */
static enum status chat_bind(struct engine *e, struct error *err)
{
    struct gguf_string source;
    if (gguf_get_string(e->model->gguf, "tokenizer.chat_template", &source, NULL) != ST_OK) {
        error_set(&e->chat_error, ST_NOT_FOUND, "the model has no chat template");
        return ST_OK;
    }
    enum status st = chat_template_recognise(source.data, source.size, &e->chat, &e->chat_error);
    if (st == ST_NOMEM) return error_set(err, st, "%s", e->chat_error.message);
    if (st == ST_OK) e->chat_error = (struct error){0};
    return ST_OK;
}

static bool scratch_build(struct engine *e)
{
    int threads = e->config.device->host_threads;
    e->scratch = calloc((size_t)threads, sizeof *e->scratch);
    for (int i = 0; e->scratch && i < threads; i++) {
        e->scratch[i] = sampler_scratch_new(e->shape.vocab);
        if (!e->scratch[i]) return false;
    }
    return e->scratch != NULL;
}

static enum status engine_build(struct engine *e, struct error *err)
{
    const struct engine_config *c = &e->config;
    struct model_config model = {.path = c->model_path, .device = c->device,
                                 .on_progress = c->on_progress, .progress_ctx = c->progress_ctx};
    memcpy(model.pack_path, c->pack_path, sizeof model.pack_path);
    enum status st = model_open(&model, &e->model, err);
    if (st) return st;
    e->shape = e->model->shape;
    st = capacity_plan(e, err);
    if (!st) st = tokenizer_bind(e, err);
    if (!st) st = chat_bind(e, err);
    if (st) return st;

    struct forward_config forward = {.rows = engine_step_rows(e),
                                     .logit_rows = c->max_batch, .lr_width = c->lr_width,
                                     .kv_type = c->kv_type, .kv_pages = e->kv_pages};
    st = forward_open(e->model, &forward, &e->forward, err);
    if (st) return st;
    struct scheduler_config scheduler = {.running_max = c->max_batch, .waiting_max = c->max_queue,
                                         .prefill_rows = c->prefill_chunk, .pages = e->kv_pages,
                                         .share_pages = !c->no_prefix_cache};
    e->scheduler = scheduler_new(&scheduler);
    e->step = step_new(forward.rows, c->max_batch);
    e->verdicts = calloc((size_t)c->max_batch, sizeof *e->verdicts);
    if (!e->scheduler || !e->step || !e->verdicts || !scratch_build(e))
        return error_set(err, ST_NOMEM, "out of memory");
    return ST_OK;
}

/* --- the engine thread ------------------------------------------------------------------------- */

static double now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The last of an ended sequence. Its pages are free and it is unknown to others before its last event. */
static void sequence_retire(struct engine *e, struct sequence *q)
{
    bool waited = !q->sched.running;
    scheduler_remove(e->scheduler, &q->sched);
    pthread_mutex_lock(&e->lock);
    if (q->prev) q->prev->next = q->next;
    else e->live = q->next;
    if (q->next) q->next->prev = q->prev;
    e->waiting -= waited;
    if (!waited && !e->config.no_prefix_cache && !q->sched.reads_all) {
        e->stats.prefix_queries += (uint64_t)q->sched.prompt_count;
        e->stats.prefix_hits += (uint64_t)q->sched.cached;
    }
    pthread_mutex_unlock(&e->lock);
    sequence_done(q);
    sequence_free(q);
}

/* Ends all sequences, or those marked as cancelled. */
static void sequences_end(struct engine *e, bool all, enum finish_reason finish,
                          const struct error *error)
{
    for (int running = 0; running < 2; running++) {
        struct sched_seq *next, *s = scheduler_first(e->scheduler, running);
        for (; s; s = next) {
            struct sequence *q = (struct sequence *)s;
            next = s->next;
            if (!all && !atomic_load(&q->cancelled)) continue;
            if (!q->ended) sequence_end(q, finish, error);
            sequence_retire(e, q);
        }
    }
}

static void device_failed(struct engine *e, enum status st)
{
    struct error error;
    error_set(&error, st, "%s failed during a step", e->config.device->name);
    log_error("%s; nothing more can run", error.message);
    pthread_mutex_lock(&e->lock);
    e->failed = true;
    turns_wake(&e->turns);
    pthread_mutex_unlock(&e->lock);
    sequences_end(e, true, FINISH_ERROR, &error);
}

struct step_cost {
    double device_seconds;
    uint64_t prompt_tokens, output_tokens;
};

struct judging {
    struct engine *e;
    const struct wanted *wanted;
    const float *logits;
};

static void row_judge(void *ctx, size_t i, int worker)
{
    const struct judging *j = ctx;
    sequence_judge(j->wanted[i].seq, j->e->scratch[worker], j->wanted[i].position,
                   j->logits + i * j->e->shape.vocab, &j->e->verdicts[i]);
}

/* Logits of the step's wanted rows, a piece at a time, to their sequences: judged by all threads, then
 * taken in order. */
static enum status logits_feed(struct engine *e, struct step_cost *cost)
{
    const struct step *s = e->step;
    for (int at = 0; at < s->wanted_count;) {
        int n = s->wanted_count - at;
        if (n > e->config.max_batch) n = e->config.max_batch;
        const float *logits;
        double start = now_seconds();
        enum status st = forward_logits(e->forward, n, s->wanted_row + at, &logits);
        cost->device_seconds += now_seconds() - start;
        if (st) return st;
        struct judging judging = {e, s->wanted + at, logits};
        e->config.device->ops->host_run(e->config.device, (size_t)n, row_judge, &judging);
        for (int i = 0; i < n; i++, at++) {
            struct sequence *q = s->wanted[at].seq;
            int before = q->output_count;
            sequence_take(q, s->wanted[at].position, &e->verdicts[i]);
            cost->output_tokens += (uint64_t)(q->output_count - before);
        }
    }
    return ST_OK;
}

static enum status step_run(struct engine *e, struct step_cost *cost)
{
    double start = now_seconds();
    forward_run(e->forward, &e->step->batch);
    enum status st = e->step->wanted_count == 0 ? forward_sync(e->forward) : ST_OK;
    cost->device_seconds += now_seconds() - start;
    return st ? st : logits_feed(e, cost);
}

static void stats_add(struct engine *e, double seconds, const struct step_cost *cost)
{
    pthread_mutex_lock(&e->lock);
    e->stats.steps++;
    e->stats.prompt_tokens += cost->prompt_tokens;
    e->stats.output_tokens += cost->output_tokens;
    e->stats.step_seconds += seconds;
    e->stats.overhead_seconds += seconds - cost->device_seconds;
    pthread_mutex_unlock(&e->lock);
}

/* What a step filled is others' from now on. */
static void pages_publish(struct engine *e, struct sequence *q)
{
    int32_t token[KV_PAGE_TOKENS];
    int first;
    while ((first = scheduler_page_full(e->scheduler, &q->sched)) >= 0) {
        for (int i = 0; i < KV_PAGE_TOKENS; i++) token[i] = sequence_token(q, first + i);
        scheduler_publish(e->scheduler, &q->sched, token);
    }
}

static void engine_step(struct engine *e)
{
    double start = now_seconds();
    struct step_cost cost = {0};
    const struct step_entry *entries;
    int count = scheduler_compose(e->scheduler, &entries);
    step_build(e->step, entries, count);
    enum status st = step_run(e, &cost);
    if (st) {
        device_failed(e, st);
        return;
    }
    for (int i = 0; i < count; i++) {
        struct sequence *q = (struct sequence *)entries[i].seq;
        if (entries[i].first < q->sched.prompt_count) cost.prompt_tokens += (uint64_t)entries[i].rows;
    }
    stats_add(e, now_seconds() - start, &cost);
    for (int i = 0; i < count; i++) {
        struct sequence *q = (struct sequence *)entries[i].seq;
        pages_publish(e, q);
        if (q->ended) sequence_retire(e, q);
    }
}

/* What a step leaves changed, as engine_stats shows it. */
static void stats_show(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    e->stats.running = scheduler_running(e->scheduler);
    e->stats.kv_pages_used = e->kv_pages - scheduler_pages_unused(e->scheduler);
    pthread_mutex_unlock(&e->lock);
}

static void sequences_admit(struct engine *e)
{
    struct sched_seq *s;
    while ((s = scheduler_admit(e->scheduler))) {
        pthread_mutex_lock(&e->lock);
        e->waiting--;
        pthread_mutex_unlock(&e->lock);
        sequence_admitted((struct sequence *)s);
    }
}

/* One turn of background work, if any waits. Nothing else happens meanwhile. */
static void device_lend(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    if (!e->failed) turns_lend(&e->turns, &e->lock, now_seconds() + e->config.turn_seconds);
    pthread_mutex_unlock(&e->lock);
}

/* What other threads asked for since the last look. */
struct requests {
    struct sequence *incoming;
    bool cancels, closing, failed;
};

/* Sleeps while there is nothing to do. */
static struct requests requests_take(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    bool busy = scheduler_running(e->scheduler) > 0 || scheduler_waiting(e->scheduler) > 0;
    while (!busy && !e->incoming && !e->cancels && !e->closing && !e->turns.first)
        pthread_cond_wait(&e->wake, &e->lock);
    struct requests r = {.incoming = e->incoming, .cancels = e->cancels, .closing = e->closing,
                         .failed = e->failed};
    e->incoming = NULL;
    e->incoming_end = &e->incoming;
    e->cancels = false;
    pthread_mutex_unlock(&e->lock);
    return r;
}

static void *engine_main(void *arg)
{
    struct engine *e = arg;
    struct requests r = requests_take(e); /* until the first comes, the device is its opener's */
    e->config.device->ops->attach(e->config.device);
    for (;; r = requests_take(e)) {
        for (struct sequence *next, *q = r.incoming; q; q = next) {
            next = q->next_incoming;
            /* engine_submit counted it among the waiting, within max_queue. */
            CHECK(scheduler_add(e->scheduler, &q->sched) == ST_OK);
        }
        if (r.closing) break;
        if (r.cancels) sequences_end(e, false, FINISH_CANCELLED, NULL);
        if (r.failed) device_failed(e, ST_DEVICE); /* submitted before that was known */
        sequences_admit(e);
        if (scheduler_running(e->scheduler) > 0) engine_step(e);
        stats_show(e);
        device_lend(e);
    }
    sequences_end(e, true, FINISH_CANCELLED, NULL);
    return NULL;
}

/* --- the public face --------------------------------------------------------------------------- */

enum status engine_open(const struct engine_config *config, struct engine **out, struct error *err)
{
    struct engine *e = calloc(1, sizeof *e);
    if (!e) return error_set(err, ST_NOMEM, "out of memory");
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->wake, NULL);
    turns_init(&e->turns);
    e->incoming_end = &e->incoming;
    e->config = *config;
    config_fill(&e->config);
    enum status st = config_check(&e->config, err);
    if (!st) st = engine_build(e, err);
    if (!st) {
        e->stats.kv_pages = e->kv_pages;
        e->thread_started = pthread_create(&e->thread, NULL, engine_main, e) == 0;
        if (!e->thread_started) st = error_set(err, ST_NOMEM, "cannot start the engine's thread");
    }
    if (st) {
        engine_close(e);
        return st;
    }
    *out = e;
    return ST_OK;
}

void engine_close(struct engine *e)
{
    if (!e) return;
    if (e->thread_started) {
        pthread_mutex_lock(&e->lock);
        e->closing = true;
        pthread_cond_signal(&e->wake);
        pthread_mutex_unlock(&e->lock);
        pthread_join(e->thread, NULL);
    }
    step_free(e->step);
    for (int i = 0; e->scratch && i < e->config.device->host_threads; i++)
        sampler_scratch_free(e->scratch[i]);
    free(e->scratch);
    free(e->verdicts);
    scheduler_free(e->scheduler);
    forward_close(e->forward);
    chat_template_release(&e->chat);
    free(e->end_tokens);
    tokenizer_close(e->tokenizer);
    model_close(e->model);
    turns_destroy(&e->turns);
    pthread_cond_destroy(&e->wake);
    pthread_mutex_destroy(&e->lock);
    free(e);
}

const struct model_shape *engine_shape(const struct engine *e) { return &e->shape; }

void engine_weight_row(const struct engine *e, int layer, enum projection p, size_t row, float *out)
{
    model_weight_row(e->model, layer, p, row, out);
}

const struct tokenizer *engine_tokenizer(const struct engine *e) { return e->tokenizer; }

const struct chat_template *engine_chat(const struct engine *e, struct error *err)
{
    if (e->chat_error.status == ST_OK) return &e->chat;
    if (err) *err = e->chat_error;
    return NULL;
}

/* Under the lock. */
static enum status queue_check(const struct engine *e, struct error *err)
{
    if (e->closing) return error_set(err, ST_DRAINING, "the engine is shutting down");
    if (e->failed) return error_set(err, ST_DEVICE, "%s has failed", e->config.device->name);
    if (e->waiting >= e->config.max_queue)
        return error_set(err, ST_FULL, "%d requests are waiting already; try again later",
                         e->waiting);
    return ST_OK;
}

enum status engine_submit(struct engine *e, const struct engine_request *r, uint64_t *id_out,
                          struct error *err)
{
    struct sequence *q;
    enum status st = sequence_new(&e->rules, r, &q, err);
    if (st) return st;

    pthread_mutex_lock(&e->lock);
    st = queue_check(e, err);
    if (!st) {
        q->id = ++e->last_id;
        *id_out = q->id;
        q->next = e->live;
        if (q->next) q->next->prev = q;
        e->live = q;
        *e->incoming_end = q;
        e->incoming_end = &q->next_incoming;
        e->waiting++;
        pthread_cond_signal(&e->wake);
        q = NULL; /* the engine thread's now */
    }
    pthread_mutex_unlock(&e->lock);
    sequence_free(q);
    return st;
}

void engine_cancel(struct engine *e, uint64_t id)
{
    pthread_mutex_lock(&e->lock);
    for (struct sequence *q = e->live; q; q = q->next) {
        if (q->id != id) continue;
        atomic_store(&q->cancelled, true);
        e->cancels = true;
        pthread_cond_signal(&e->wake);
        break;
    }
    pthread_mutex_unlock(&e->lock);
}

/* --- turns --- */

enum status engine_turn_open(struct engine *e, struct engine_turn **out)
{
    struct engine_turn *t = calloc(1, sizeof *t);
    if (!t) return ST_NOMEM;
    t->engine = e;
    pthread_cond_init(&t->granted, NULL);
    *out = t;
    return ST_OK;
}

void engine_turn_close(struct engine_turn *t)
{
    if (!t) return;
    CHECK(!t->holding);
    pthread_cond_destroy(&t->granted);
    free(t);
}

/* Under the lock. */
static enum status turn_wait(struct engine_turn *t)
{
    struct engine *e = t->engine;
    turns_join(&e->turns, t);
    pthread_cond_signal(&e->wake);
    while (!t->holding && !e->failed) pthread_cond_wait(&t->granted, &e->lock);
    if (t->holding) return ST_OK;
    turns_leave(&e->turns, t);
    return ST_DEVICE;
}

enum status engine_turn_begin(struct engine_turn *t)
{
    CHECK(!t->holding);
    pthread_mutex_lock(&t->engine->lock);
    enum status st = turn_wait(t);
    pthread_mutex_unlock(&t->engine->lock);
    return st;
}

/* Under the lock. While sequences run, a turn lasts its time even where requests arrive: they will be admitted after it, and
 * a stream of arrivals cannot stop background work. */
static bool turn_over(const struct engine *e)
{
    bool serving = e->stats.running > 0;
    if (e->closing || e->cancels || (!serving && e->incoming)) return true;
    return (serving || e->turns.first) && now_seconds() >= e->turns.end;
}

enum status engine_turn_continue(struct engine_turn *t)
{
    CHECK(t->holding);
    struct engine *e = t->engine;
    enum status st = e->config.device->ops->sync(e->config.device);
    pthread_mutex_lock(&e->lock);
    if (st) { /* the engine's thread finds it before its next step */
        e->failed = true;
        turns_wake(&e->turns);
    }
    if (st || turn_over(e)) {
        turns_return(&e->turns);
        if (!st) st = turn_wait(t);
    }
    pthread_mutex_unlock(&e->lock);
    return st;
}

void engine_turn_end(struct engine_turn *t)
{
    CHECK(t->holding);
    pthread_mutex_lock(&t->engine->lock);
    turns_return(&t->engine->turns);
    pthread_mutex_unlock(&t->engine->lock);
}

const struct model *engine_model(const struct engine *e) { return e->model; }

int engine_step_rows(const struct engine *e) { return e->config.max_batch + e->config.prefill_chunk; }

void engine_stats(struct engine *e, struct engine_stats *out)
{
    pthread_mutex_lock(&e->lock);
    *out = e->stats;
    out->waiting = e->waiting;
    pthread_mutex_unlock(&e->lock);
}

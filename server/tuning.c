/* /v1/fine_tuning/jobs: training as OpenAI's clients ask for it. */
#include "server/handlers.h"
#include "server/training.h"

#include <inttypes.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>

#define TOKENS_PER_EXAMPLE 256 /* what one of batch_size counts for */
#define LIST_LIMIT         20
#define LIST_LIMIT_MAX     1000

/* ------------------------------------------------------------------ POST */

struct tune {
    struct call call;
    struct fine_tuning_request request;
    struct train_settings settings;
    char key[TRAIN_KEY_MAX]; /* Idempotency-Key; "": none */
    char adapter[ADAPTER_NAME_MAX + 1], version[65];
    bool fresh; /* the model is the base: train a new adapter */
};

/* "name", "name@version" or "base:name", as requests choose adapters. */
static bool name_model(struct tune *t, const char *base_name, struct api_error *err)
{
    const char *model = t->request.model;
    size_t base_size = strlen(base_name);
    t->fresh = !strcmp(model, base_name);
    if (!strncmp(model, base_name, base_size) && model[base_size] == ':') model += base_size + 1;
    size_t n = strcspn(model, "@");
    const char *version = model[n] ? model + n + 1 : "";
    if (!t->fresh && (n >= sizeof t->adapter || strlen(version) >= sizeof t->version)) {
        adapter_not_found(err, model, "model");
        return false;
    }
    snprintf(t->adapter, sizeof t->adapter, "%.*s", (int)n, model);
    snprintf(t->version, sizeof t->version, "%s", version);
    return true;
}

/* SUFFIX-xxxxxxxx, or ft-xxxxxxxx: by chance, or by the key, so that a request that is sent again finds its
 * adapter. */
static void name_fresh(struct tune *t)
{
    unsigned char random[8];
    char hex[sizeof random * 2 + 1];
    if (t->key[0])
        crypto_shorthash(random, (const unsigned char *)t->key, strlen(t->key),
                         (const unsigned char[crypto_shorthash_KEYBYTES]){0});
    else
        randombytes_buf(random, sizeof random);
    sodium_bin2hex(hex, sizeof hex, random, sizeof random);
    snprintf(t->adapter, sizeof t->adapter, "%s-%.8s", t->request.suffix ? t->request.suffix : "ft", hex);
}

static bool make_fresh(struct tune *t, bool *made, struct api_error *err)
{
    struct service *s = t->call.service;
    struct fresh_adapter shape;
    struct put_result result;
    struct error cause = {0};
    name_fresh(t);
    if (!adapter_name_check(s, t->adapter, err)) {
        strcpy(err->param, "suffix");
        return false;
    }
    fresh_default(s, &shape);
    enum status st = adapter_create(s, t->adapter, &shape, &result, &cause);
    if (st && st != ST_CONFLICT) adapter_put_failed(err, st, &cause);
    *made = !st && result.created;
    return !st || st == ST_CONFLICT;
}

/* The job's metadata: OpenAI's parts of the request, and what the client called the model. */
static char *keep(const struct tune *t)
{
    struct strbuf out = {0};
    strbuf_puts(&out, "{\"model\": ");
    json_write_string(&out, t->request.model, strlen(t->request.model));
    strbuf_printf(&out, ", %s", t->request.kept.data + 1);
    char *text = strbuf_take(&out);
    strbuf_release(&out);
    return text;
}

static void submit(struct tune *t, bool *existing, char id[TRAIN_ID_MAX], struct api_error *err)
{
    char *metadata = keep(t);
    struct train_request r = {.adapter = t->adapter,
                              .version = t->version[0] ? t->version : NULL,
                              .settings = t->settings,
                              .file_id = t->request.training_file,
                              .validation_file_id = t->request.validation_file,
                              .idempotency_key = t->key[0] ? t->key : NULL,
                              .suffix = t->request.suffix,
                              .metadata = metadata,
                              .openai = true};
    if (!metadata)
        api_error_from(err, ST_NOMEM, NULL, NULL);
    else if (!training_submit(t->call.service, &r, id, existing, err) && !strcmp(err->param, "name"))
        strcpy(err->param, "model");
    free(metadata);
}

static void work_tune(struct call *c)
{
    struct tune *t = (struct tune *)c;
    char id[TRAIN_ID_MAX];
    bool existing = false, made = false;
    if (t->fresh && !make_fresh(t, &made, &c->error)) return;
    submit(t, &existing, id, &c->error);
    if (c->error.http && made &&
        registry_delete(c->service->registry, TENANT, t->adapter, NULL, &(struct error){0}))
        return;
    if (!c->error.http) training_write_job(c->service, id, &c->body, &c->error);
}

static void release(struct call *c) { fine_tuning_release(&((struct tune *)c)->request); }

static bool take_key(const struct exchange *x, struct tune *t, struct api_error *err)
{
    const char *key = exchange_header(x, "Idempotency-Key");
    if (key && strlen(key) >= sizeof t->key) {
        api_error_set(err, 400, "invalid_value", "idempotency_key", "the Idempotency-Key is too long");
        return false;
    }
    snprintf(t->key, sizeof t->key, "%s", key ? key : "");
    return true;
}

void tuning_post(struct exchange *x)
{
    struct train_settings defaults;
    struct api_error err = {0};
    size_t size;
    if (!training_ready(x)) return;
    train_settings_default(&defaults);
    struct fine_tuning_limits limits = {training_is_setting, defaults.learning_rate, TOKENS_PER_EXAMPLE};
    const char *body = exchange_body(x, &size);
    struct tune *t = calloc(1, sizeof *t);
    if (!t) api_error_from(&err, ST_NOMEM, NULL, NULL);
    if (t && take_key(x, t, &err) && fine_tuning_parse(body, size, &limits, &t->request, &err) &&
        training_settings(t->request.settings, &t->settings, &err) &&
        name_model(t, service_of(x)->config->model_name, &err)) {
        t->call.work = work_tune;
        t->call.release = release;
        call_start(x, &t->call);
        return;
    }
    if (t) fine_tuning_release(&t->request);
    free(t);
    exchange_reply_error(x, &err);
}

/* ------------------------------------------------------------------ one job */

static bool failed(struct call *c, enum status st, const struct error *cause)
{
    if (st) training_failed(&c->error, st, cause, "fine_tuning_job_id");
    return st != ST_OK;
}

static void answer_job(struct call *c)
{
    training_write_job(c->service, training_lookup_of(c)->id, &c->body, &c->error);
}

static void work_cancel(struct call *c)
{
    struct error cause = {0};
    enum status st = jobs_cancel(c->service->training, TENANT, training_lookup_of(c)->id, &cause);
    if (st == ST_CONFLICT)
        api_error_set(&c->error, 400, "invalid_value", "fine_tuning_job_id", "%s", cause.message);
    else if (!failed(c, st, &cause))
        answer_job(c);
}

static void work_delete(struct call *c)
{
    const char *id = training_lookup_of(c)->id;
    struct error cause = {0};
    if (!failed(c, jobs_delete(c->service->training, TENANT, id, &cause), &cause))
        strbuf_printf(&c->body, "{\"id\": \"%s\", \"object\": \"fine_tuning.job\", \"deleted\": true}", id);
}

void tuning_get(struct exchange *x) { training_lookup_start(x, answer_job); }
void tuning_cancel(struct exchange *x) { training_lookup_start(x, work_cancel); }
void tuning_delete(struct exchange *x) { training_lookup_start(x, work_delete); }

/* ------------------------------------------------------------------ lists */

static void list_jobs(struct call *c, const char *adapter)
{
    const struct training_lookup *l = training_lookup_of(c);
    struct train_job *jobs;
    size_t count;
    bool more;
    struct error cause = {0};
    enum status st = jobs_list(c->service->training, TENANT, adapter, l->after[0] ? l->after : NULL,
                               (size_t)l->limit, &jobs, &count, &more, &cause);
    if (st) {
        training_failed(&c->error, st, &cause, adapter && !l->after[0] ? "name" : "after");
        return;
    }
    list_begin(&c->body);
    for (size_t i = 0; i < count; i++) {
        list_separate(&c->body, i == 0);
        train_job_write(&c->body, &jobs[i], NULL);
    }
    page_end(&c->body, count ? jobs[0].id : NULL, count ? jobs[count - 1].id : NULL, more);
    for (size_t i = 0; i < count; i++) train_job_release(&jobs[i]);
    free(jobs);
}

static void work_list(struct call *c) { list_jobs(c, NULL); }
static void work_adapter_list(struct call *c) { list_jobs(c, training_lookup_of(c)->id); }

/* "ftevent-12" is 12; "" is 0. */
static bool event_number(struct training_lookup *l, int64_t *out, struct api_error *err)
{
    static const char prefix[] = "ftevent-";
    const char *text = l->after;
    char *end = NULL;
    if (!strncmp(text, prefix, strlen(prefix))) text += strlen(prefix);
    *out = *text ? strtoll(text, &end, 10) : 0;
    if (!*text || (!*end && *out > 0)) return true;
    api_error_set(err, 400, "invalid_value", "after", "'after' must be the id of an event");
    return false;
}

static void write_events(struct call *c, struct train_event *events, size_t count, bool more)
{
    const char *job = training_lookup_of(c)->id;
    char first[32], last[32];
    list_begin(&c->body);
    for (size_t i = 0; i < count; i++) {
        list_separate(&c->body, i == 0);
        train_event_write(&c->body, job, &events[i]);
    }
    snprintf(first, sizeof first, "ftevent-%" PRId64, count ? events[0].number : 0);
    snprintf(last, sizeof last, "ftevent-%" PRId64, count ? events[count - 1].number : 0);
    page_end(&c->body, count ? first : NULL, count ? last : NULL, more);
}

static void work_events(struct call *c)
{
    struct training_lookup *l = training_lookup_of(c);
    struct train_event *events;
    size_t count;
    int64_t before;
    bool more;
    struct error cause = {0};
    if (!event_number(l, &before, &c->error)) return;
    enum status st = jobs_events_back(c->service->training, TENANT, l->id, before, (size_t)l->limit, &events,
                                      &count, &more, &cause);
    if (failed(c, st, &cause)) return;
    write_events(c, events, count, more);
    for (size_t i = 0; i < count; i++) train_event_release(&events[i]);
    free(events);
}

/* All that are kept, on one page. */
static void work_checkpoints(struct call *c)
{
    const char *job = training_lookup_of(c)->id;
    struct train_checkpoint *checkpoints;
    size_t count;
    struct error cause = {0};
    if (failed(c, jobs_checkpoints(c->service->training, TENANT, job, &checkpoints, &count, &cause), &cause))
        return;
    list_begin(&c->body);
    for (size_t i = 0; i < count; i++) {
        list_separate(&c->body, i == 0);
        train_checkpoint_write(&c->body, job, &checkpoints[i]);
    }
    page_end(&c->body, count ? checkpoints[0].id : NULL, count ? checkpoints[count - 1].id : NULL, false);
    free(checkpoints);
}

void tunings_get(struct exchange *x) { training_lookup_page(x, LIST_LIMIT, LIST_LIMIT_MAX, work_list); }
void adapter_jobs_get(struct exchange *x)
{
    training_lookup_page(x, LIST_LIMIT, LIST_LIMIT_MAX, work_adapter_list);
}
void tuning_events_get(struct exchange *x)
{
    training_lookup_page(x, LIST_LIMIT, LIST_LIMIT_MAX, work_events);
}
void tuning_checkpoints_get(struct exchange *x) { training_lookup_start(x, work_checkpoints); }

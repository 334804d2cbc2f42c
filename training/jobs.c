/* The service's state: opening, the table of jobs, watchers. What a job does is in run.c. */
#include "training/jobs_int.h"

#include "base/file.h"
#include "base/log.h"
#include "training/dataset_int.h"

#include <dirent.h>
#include <math.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* --- small things --- */

enum status jobs_no_memory(struct error *err) { return error_set(err, ST_NOMEM, "out of memory"); }

int64_t jobs_now(void) { return (int64_t)time(NULL); }

struct train_path jobs_path(const struct jobs *j, const char *format, ...)
{
    struct train_path p = j->root;
    size_t n = strlen(p.text);
    va_list values;
    p.text[n++] = '/';
    va_start(values, format);
    vsnprintf(p.text + n, sizeof p.text - n, format, values);
    va_end(values);
    return p;
}

void jobs_new_id(const char *prefix, char out[TRAIN_ID_MAX])
{
    unsigned char bytes[12];
    char hex[sizeof bytes * 2 + 1];
    randombytes_buf(bytes, sizeof bytes);
    snprintf(out, TRAIN_ID_MAX, "%s-%s", prefix, sodium_bin2hex(hex, sizeof hex, bytes, sizeof bytes));
}

const char *train_state_name(enum train_state s)
{
    static const char *const names[TRAIN_STATE_COUNT] = {
        [TRAIN_QUEUED] = "queued",   [TRAIN_VALIDATING] = "validating_files",
        [TRAIN_RUNNING] = "running", [TRAIN_SUCCEEDED] = "succeeded",
        [TRAIN_FAILED] = "failed",   [TRAIN_CANCELLED] = "cancelled"};
    return names[s];
}

struct dataset_rules jobs_rules(const struct jobs *j, const struct train_settings *s, const char *name,
                                struct error *chat_problem)
{
    struct engine *e = j->config.engine;
    struct dataset_rules r = {.tokenizer = engine_tokenizer(e),
                              .chat = engine_chat(e, chat_problem),
                              .chat_problem = chat_problem->message,
                              .context_length = engine_shape(e)->context_length,
                              .batch_tokens = s->batch_tokens,
                              .loss = (enum train_loss)s->loss,
                              .name = name};
    return r;
}

/* --- fairness --- */

uint64_t served_stamp(const struct jobs *j, const char *tenant)
{
    for (const struct served *s = j->served; s; s = s->next)
        if (strcmp(s->tenant, tenant) == 0) return s->stamp;
    return 0;
}

void served_begin(struct jobs *j, const char *tenant)
{
    struct served *s = j->served;
    while (s && strcmp(s->tenant, tenant) != 0) s = s->next;
    if (!s && (s = calloc(1, sizeof *s))) {
        snprintf(s->tenant, sizeof s->tenant, "%s", tenant);
        s->next = j->served;
        j->served = s;
    }
    if (s) s->stamp = ++j->stamp; /* without memory the tenant counts as never served */
}

/* --- rows --- */

static enum status read_settings(struct train_job *job, sqlite3_stmt *row, int column)
{
    cJSON *json = NULL;
    const char *text = (const char *)sqlite3_column_text(row, column);
    train_settings_default(&job->settings);
    enum status st = text ? json_parse(text, strlen(text), &json, NULL) : ST_BAD_FORMAT;
    if (!st) st = train_settings_read(json, &job->settings, NULL);
    cJSON_Delete(json);
    return st;
}

enum status job_row_read(void *ctx, sqlite3_stmt *q)
{
    struct job_row *r = ctx;
    struct train_job *job = &r->job;
    int c = 0;
    r->serial = sqlite3_column_int64(q, c++);
    db_text(q, c++, job->id, sizeof job->id);
    db_text(q, c++, r->tenant, sizeof r->tenant);
    db_text(q, c++, job->adapter, sizeof job->adapter);
    r->adapter_number = sqlite3_column_int64(q, c++);
    db_text(q, c++, r->version, sizeof r->version);
    r->expects = sqlite3_column_type(q, c) != SQLITE_NULL;
    db_text(q, c++, r->expected_version, sizeof r->expected_version);
    enum status st = read_settings(job, q, c++);
    job->openai = sqlite3_column_int(q, c++);
    int state = sqlite3_column_int(q, c++);
    job->state = state >= 0 && state < TRAIN_STATE_COUNT ? (enum train_state)state : TRAIN_FAILED;
    job->cancel_asked = sqlite3_column_int(q, c++);
    db_text(q, c++, job->file_id, sizeof job->file_id);
    db_text(q, c++, job->validation_file_id, sizeof job->validation_file_id);
    db_text(q, c++, job->suffix, sizeof job->suffix);
    const char *metadata = (const char *)sqlite3_column_text(q, c++);
    if (metadata && !(job->metadata = strdup(metadata))) st = ST_NOMEM;
    job->created = sqlite3_column_int64(q, c++);
    job->started = sqlite3_column_int64(q, c++);
    job->finished = sqlite3_column_int64(q, c++);
    db_text(q, c++, job->version_before, sizeof job->version_before);
    db_text(q, c++, job->version_after, sizeof job->version_after);
    job->result = sqlite3_column_int(q, c++);
    job->step = sqlite3_column_int64(q, c++);
    job->steps = sqlite3_column_int64(q, c++);
    job->examples = sqlite3_column_int64(q, c++);
    job->held_out = sqlite3_column_int64(q, c++);
    job->tokens = sqlite3_column_int64(q, c++);
    job->loss = db_real(q, c++);
    job->loss_before = db_real(q, c++);
    job->loss_after = db_real(q, c++);
    int status = sqlite3_column_int(q, c++);
    job->error.status = status >= 0 && status < ST_COUNT ? (enum status)status : ST_IO;
    db_text(q, c++, job->error.message, sizeof job->error.message);
    return st;
}

void train_job_release(struct train_job *job)
{
    free(job->metadata);
    job->metadata = NULL;
}

/* What is known of a job that has not ended beyond its row. */
static void add_live(struct jobs *j, const char *tenant, struct train_job *job)
{
    job->progress = train_state_ended(job->state);
    pthread_mutex_lock(&j->lock);
    for (const struct entry *e = j->first; e; e = e->next) {
        if (strcmp(e->id, job->id) == 0) {
            job->state = e->state;
            job->cancel_asked = e->cancel_asked;
            job->progress = e->progress;
            job->tokens_per_second = e->speed;
            break;
        }
        job->queue_place += strcmp(e->tenant, tenant) == 0 && !e->taken;
    }
    if (job->state != TRAIN_QUEUED) job->queue_place = 0;
    pthread_mutex_unlock(&j->lock);
}

enum status job_find(struct jobs *j, const char *tenant, const char *id, struct job_row *out,
                     struct error *err)
{
    struct job_row row = {0};
    enum status st =
        db_run(j->db, err, job_row_read, &row,
               "SELECT " JOB_COLUMNS " FROM job WHERE tenant = ?1 AND id = ?2", "tt", tenant, id);
    if (!st && !row.serial) st = error_set(err, ST_NOT_FOUND, "there is no training job '%.64s'", id);
    if (st) {
        train_job_release(&row.job);
        return st;
    }
    add_live(j, tenant, &row.job);
    *out = row;
    return ST_OK;
}

enum status job_find_serial(struct jobs *j, const char *tenant, const char *id, int64_t *out,
                            struct error *err)
{
    struct job_row row;
    enum status st = job_find(j, tenant, id, &row, err);
    if (st) return st;
    *out = row.serial;
    train_job_release(&row.job);
    return ST_OK;
}

/* --- asking --- */

enum status jobs_get(struct jobs *j, const char *tenant, const char *id, struct train_job *out,
                     struct error *err)
{
    struct job_row row;
    enum status st = job_find(j, tenant, id, &row, err);
    if (!st) *out = row.job;
    return st;
}

struct job_list {
    struct train_job *job;
    size_t count, capacity;
};

static enum status list_add(void *ctx, sqlite3_stmt *q)
{
    struct job_list *l = ctx;
    struct job_row row = {0};
    enum status st = job_row_read(&row, q);
    if (!st) st = array_grow((void **)&l->job, &l->capacity, l->count, sizeof *l->job);
    if (st)
        train_job_release(&row.job);
    else
        l->job[l->count++] = row.job;
    return st;
}

static void list_release(struct job_list *l)
{
    for (size_t i = 0; i < l->count; i++) train_job_release(&l->job[i]);
    free(l->job);
}

enum status jobs_list(struct jobs *j, const char *tenant, const char *adapter, const char *after,
                      size_t limit, struct train_job **out, size_t *count_out, bool *more, struct error *err)
{
    struct job_list l = {0};
    int64_t before = INT64_MAX;
    enum status st = after ? job_find_serial(j, tenant, after, &before, err) : ST_OK;
    if (!st)
        st = db_run(j->db, err, list_add, &l,
                    "SELECT " JOB_COLUMNS
                    " FROM job WHERE tenant = ?1 AND serial < ?2 AND (?3 IS NULL OR adapter = ?3)"
                    " ORDER BY serial DESC LIMIT ?4",
                    "titi", tenant, before, adapter, (int64_t)limit + 1);
    if (st) {
        list_release(&l);
        return st;
    }
    *more = l.count > limit;
    while (l.count > limit) train_job_release(&l.job[--l.count]);
    for (size_t i = 0; i < l.count; i++) add_live(j, tenant, &l.job[i]);
    *out = l.job;
    *count_out = l.count;
    return ST_OK;
}

/* --- checkpoints --- */

struct checkpoint_list {
    struct train_checkpoint *checkpoint;
    size_t count, capacity;
};

static enum status checkpoint_add(void *ctx, sqlite3_stmt *q)
{
    struct checkpoint_list *l = ctx;
    if (array_grow((void **)&l->checkpoint, &l->capacity, l->count, sizeof *l->checkpoint)) return ST_NOMEM;
    struct train_checkpoint *c = &l->checkpoint[l->count++];
    *c = (struct train_checkpoint){.created = sqlite3_column_int64(q, 1),
                                   .step = sqlite3_column_int64(q, 2),
                                   .bytes = (size_t)sqlite3_column_int64(q, 3),
                                   .loss = db_real(q, 4),
                                   .held_out_loss = db_real(q, 5)};
    db_text(q, 0, c->id, sizeof c->id);
    return ST_OK;
}

enum status jobs_checkpoints(struct jobs *j, const char *tenant, const char *id,
                             struct train_checkpoint **out, size_t *count_out, struct error *err)
{
    int64_t serial;
    struct checkpoint_list l = {0};
    enum status st = job_find_serial(j, tenant, id, &serial, err);
    if (!st)
        st = db_run(j->db, err, checkpoint_add, &l,
                    "SELECT id, created, step, bytes, loss, held_out_loss FROM checkpoint WHERE job = ?1"
                    " ORDER BY step DESC",
                    "i", serial);
    if (st) {
        free(l.checkpoint);
        return st;
    }
    *out = l.checkpoint;
    *count_out = l.count;
    return ST_OK;
}

/* --- ending --- */

static enum status ended_already(struct jobs *j, const char *tenant, const char *id, struct error *err)
{
    struct job_row row;
    enum status st = job_find(j, tenant, id, &row, err);
    if (st) return st;
    train_job_release(&row.job);
    if (row.job.state == TRAIN_CANCELLED) return ST_OK;
    return error_set(err, ST_CONFLICT, "the job has ended already: %s", train_state_name(row.job.state));
}

/* So that a restart does not bring it back. */
static enum status cancel_durably(struct jobs *j, int64_t serial, struct error *err)
{
    enum status st = db_begin(j->db, err);
    if (st) return st;
    st = db_run(j->db, err, NULL, NULL, "UPDATE job SET cancel_asked = 1 WHERE serial = ?1", "i", serial);
    return db_end(j->db, st, err);
}

enum status jobs_cancel(struct jobs *j, const char *tenant, const char *id, struct error *err)
{
    struct job_row row;
    enum status st = job_find(j, tenant, id, &row, err);
    if (st) return st;
    train_job_release(&row.job);
    struct entry *waiting = NULL;
    bool found = false, late = false;
    pthread_mutex_lock(&j->lock);
    for (struct entry *e = j->first; e && !found; e = e->next) {
        if (e->serial != row.serial) continue;
        found = true;
        late = e->committed;
        if (late) break;
        e->cancel_asked = true;
        atomic_store(&e->stop, true);
        if (!e->taken) waiting = e; /* no thread will take it: it is ended here */
        e->taken = true;
    }
    pthread_mutex_unlock(&j->lock);
    if (late)
        return error_set(err, ST_CONFLICT,
                         "the job's result is being published: it is too late to cancel it");
    if (!found) return ended_already(j, tenant, id, err);
    st = cancel_durably(j, row.serial, err);
    if (waiting) job_end(j, waiting, ST_CANCELLED, NULL);
    return st;
}

enum status jobs_delete(struct jobs *j, const char *tenant, const char *id, struct error *err)
{
    struct job_row row;
    enum status st = job_find(j, tenant, id, &row, err);
    if (st) return st;
    train_job_release(&row.job);
    if (!train_state_ended(row.job.state))
        return error_set(err, ST_BUSY, "the job has not ended: cancel it first");
    return job_forget(j, row.serial, id, err);
}

enum status jobs_publish(struct jobs *j, const char *tenant, const char *id, const char *expected_version,
                         struct put_result *out, struct error *err)
{
    struct job_row row;
    enum status st = job_find(j, tenant, id, &row, err);
    if (st) return st;
    train_job_release(&row.job);
    if (!row.job.result || !train_state_ended(row.job.state))
        return error_set(err, ST_CONFLICT, "the job has no result%s",
                         train_state_ended(row.job.state) ? " (any more)" : " yet");
    st = jobs_put(j, tenant, row.job.adapter, row.adapter_number, jobs_path(j, "jobs/%s/result", id).text,
                  expected_version, out, err);
    if (st) return st;
    struct error ignored = {0};
    (void)db_run(j->db, &ignored, NULL, NULL, "UPDATE job SET version_after = ?1 WHERE serial = ?2", "ti",
                 out->version, row.serial);
    return ST_OK;
}

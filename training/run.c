/* One job on a thread of the service: from the queue to its end.
 *
 *   start/ copied -> examples read -> steps, with checkpoints -> result/ written -> published -> ended
 *
 * Each arrow can be the last thing the process did: what comes after is then done by the next one, from what
 * stands in the job's folder. */
#include "training/jobs_int.h"

#include "base/file.h"
#include "base/log.h"
#include "training/publish.h"

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct run {
    struct jobs *jobs;
    struct entry *entry;
    struct job_row row;
    struct train_start start;
    struct dataset *examples, *validation;
    struct transposed *transposed; /* acquired */
    struct trainer *trainer;
    struct routing_entry *routing;
    size_t bytes; /* counted in the statistics */
    double saved; /* the clock at the last checkpoint */
};

static struct train_path job_path(const struct run *r, const char *name)
{
    return jobs_path(r->jobs, "jobs/%s/%s", r->entry->id, name);
}

static bool is_there(struct train_path path)
{
    struct stat info;
    return stat(path.text, &info) == 0;
}

static void event(struct run *r, const char *level, const char *kind, const char *message, const char *data)
{
    job_event(r->jobs, r->entry->serial, r->entry->id, level, kind, message, data);
}

static void set_state(struct run *r, enum train_state state)
{
    pthread_mutex_lock(&r->jobs->lock);
    r->entry->state = state;
    r->entry->progress = 0;
    pthread_mutex_unlock(&r->jobs->lock);
}

/* --- what it needs --- */

static bool on_reading(void *ctx, double done)
{
    struct run *r = ctx;
    pthread_mutex_lock(&r->jobs->lock);
    r->entry->progress = done;
    pthread_mutex_unlock(&r->jobs->lock);
    return !atomic_load(&r->entry->stop);
}

static enum status read_set(struct run *r, const char *name, const char *shown, struct dataset **out,
                            struct error *err)
{
    struct error why = {0};
    struct dataset_rules rules = jobs_rules(r->jobs, &r->row.job.settings, shown, &why);
    struct train_path path = job_path(r, name);
    int fd = open(path.text, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return file_error(err, "open", path.text);
    rules.on_progress = on_reading;
    rules.progress_ctx = r;
    enum status st = dataset_read_file(&rules, fd, out, err);
    close(fd);
    return st;
}

static enum status read_examples(struct run *r, struct error *err)
{
    const struct train_job *job = &r->row.job;
    event(r, "info", "message", "reading the examples", NULL);
    enum status st =
        read_set(r, "examples.jsonl", job->file_id[0] ? job->file_id : "examples", &r->examples, err);
    if (!st && job->validation_file_id[0])
        st = read_set(r, "validation.jsonl", job->validation_file_id, &r->validation, err);
    return st;
}

/* The version it begins with, which stays in the job's folder: others may go on with the adapter as they
 * like. */
static enum status take_start(struct run *r, struct error *err)
{
    struct jobs *j = r->jobs;
    struct train_job *job = &r->row.job;
    struct train_path start = job_path(r, "start");
    enum status st = ST_OK;
    if (!is_there(start) || !job->version_before[0]) {
        remove_all(start.text);
        st = jobs_check_adapter(j, r->entry->tenant, job->adapter, r->row.adapter_number, NULL, err);
        if (!st)
            st = jobs_copy_version(j, r->entry->tenant, job->adapter,
                                   r->row.version[0] ? r->row.version : NULL, start.text, job->version_before,
                                   err);
        if (!st)
            st = db_run(j->db, err, NULL, NULL, "UPDATE job SET version_before = ?1 WHERE serial = ?2", "ti",
                        job->version_before, r->entry->serial);
    }
    return st ? st : train_start_open(start.text, &j->config.base, &r->start, err);
}

static void count_bytes(struct run *r, size_t bytes)
{
    pthread_mutex_lock(&r->jobs->lock);
    r->jobs->stats.state_bytes += bytes - r->bytes;
    r->bytes = bytes;
    pthread_mutex_unlock(&r->jobs->lock);
}

static enum status open_trainer(struct run *r, struct error *err)
{
    struct jobs *j = r->jobs;
    struct trainer_facts facts;
    const struct trainer_config config = {.engine = j->config.engine,
                                          .device = j->config.device,
                                          .transposed = r->transposed,
                                          .bundle = r->start.bundle,
                                          .examples = r->examples,
                                          .validation = r->validation,
                                          .settings = r->row.job.settings,
                                          .identity = r->row.job.version_before};
    enum status st = trainer_open(&config, &r->trainer, err);
    if (st) return st;
    trainer_facts(r->trainer, &facts);
    count_bytes(r, facts.bytes);
    r->routing =
        jobs_routing_begin(j, r->entry->tenant, r->row.job.adapter, r->entry->id, trainer_params(r->trainer));
    if (!r->routing) return jobs_no_memory(err);
    return db_run(j->db, err, NULL, NULL,
                  "UPDATE job SET state = ?1, steps = ?2, examples = ?3, held_out = ?4 WHERE serial = ?5",
                  "iiiii", (int64_t)TRAIN_RUNNING, facts.steps, (int64_t)facts.examples,
                  (int64_t)facts.held_out, r->entry->serial);
}

#define ATTEMPTS_MAX 10

static enum status read_attempts(void *ctx, sqlite3_stmt *row)
{
    *(int *)ctx = sqlite3_column_int(row, 0);
    return ST_OK;
}

/* A job that brings down the process (which may be for want of memory) must not do so for ever. */
static enum status count_attempt(struct run *r, struct error *err)
{
    int attempts = 0;
    enum status st = db_run(r->jobs->db, err, read_attempts, &attempts,
                            "UPDATE job SET attempts = attempts + 1 WHERE serial = ?1 RETURNING attempts",
                            "i", r->entry->serial);
    if (!st && attempts > ATTEMPTS_MAX)
        st = error_set(err, ST_REJECTED,
                       "the server ended %d times while this job ran and before it wrote a checkpoint: it is "
                       "given up. Less "
                       "memory is needed with fewer batch_tokens",
                       ATTEMPTS_MAX);
    return st;
}

/* It came on, or was interrupted in good order. */
static enum status forget_attempts(struct run *r, struct error *err)
{
    return db_run(r->jobs->db, err, NULL, NULL, "UPDATE job SET attempts = 0 WHERE serial = ?1", "i",
                  r->entry->serial);
}

static enum status prepare(struct run *r, struct error *err)
{
    struct jobs *j = r->jobs;
    set_state(r, TRAIN_VALIDATING);
    enum status st =
        db_run(j->db, err, NULL, NULL,
               "UPDATE job SET state = ?1, started = CASE started WHEN 0 THEN ?2 ELSE started END"
               " WHERE serial = ?3",
               "iii", (int64_t)TRAIN_VALIDATING, jobs_now(), r->entry->serial);
    if (!st) st = count_attempt(r, err);
    if (!st) st = take_start(r, err);
    if (!st) st = read_examples(r, err);
    if (!st) st = jobs_transposed_acquire(j, &r->transposed, err);
    if (!st) st = open_trainer(r, err);
    if (!st) set_state(r, TRAIN_RUNNING);
    return st;
}

/* --- checkpoints --- */

#define CHECKPOINTS_KEPT 2
#define METRICS_KEPT     20000 /* events of steps */

static struct train_path checkpoint_path(const struct run *r, const char *id) { return job_path(r, id); }

struct checkpoint_ids {
    char id[16][TRAIN_ID_MAX];
    int count;
};

static enum status add_id(void *ctx, sqlite3_stmt *row)
{
    struct checkpoint_ids *ids = ctx;
    if (ids->count < 16) db_text(row, 0, ids->id[ids->count++], TRAIN_ID_MAX);
    return ST_OK;
}

static void forget_checkpoint(struct run *r, const char *id)
{
    struct error ignored = {0};
    (void)db_run(r->jobs->db, &ignored, NULL, NULL, "DELETE FROM checkpoint WHERE id = ?1", "t", id);
    remove_all(checkpoint_path(r, id).text);
}

static void prune(struct run *r)
{
    struct checkpoint_ids ids = {0};
    struct error ignored = {0};
    (void)db_run(r->jobs->db, &ignored, add_id, &ids,
                 "SELECT id FROM checkpoint WHERE job = ?1 ORDER BY step DESC LIMIT 16 OFFSET ?2", "ii",
                 r->entry->serial, (int64_t)CHECKPOINTS_KEPT);
    for (int i = 0; i < ids.count; i++) forget_checkpoint(r, ids.id[i]);
    (void)db_run(
        r->jobs->db, &ignored, NULL, NULL,
        "DELETE FROM event WHERE job = ?1 AND kind = 'metrics' AND number <= (SELECT number FROM event"
        " WHERE job = ?1 AND kind = 'metrics' ORDER BY number DESC LIMIT 1 OFFSET ?2)",
        "ii", r->entry->serial, (int64_t)METRICS_KEPT);
}

static enum status save(struct run *r, struct error *err)
{
    char id[TRAIN_ID_MAX], data[128];
    struct checkpoint_state s;
    struct checkpoint_ids same = {0}; /* of the same step, which a restart can bring about */
    struct stat info = {0};
    jobs_new_id("ckpt", id);
    struct train_path path = checkpoint_path(r, id);
    r->saved = train_clock();
    enum status st = trainer_save(r->trainer, path.text, &s, err);
    if (st) return st;
    (void)stat(path.text, &info);
    st = db_begin(r->jobs->db, err);
    if (st) return st;
    st = db_run(r->jobs->db, err, add_id, &same, "SELECT id FROM checkpoint WHERE job = ?1 AND step = ?2",
                "ii", r->entry->serial, s.step);
    if (!st)
        st = db_run(r->jobs->db, err, NULL, NULL,
                    "INSERT OR REPLACE INTO checkpoint (id, job, created, step, bytes, loss, held_out_loss)"
                    " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
                    "tiiiidd", id, r->entry->serial, jobs_now(), s.step, (int64_t)info.st_size, s.loss,
                    s.held_loss);
    if (!st) st = forget_attempts(r, err);
    st = db_end(r->jobs->db, st, err);
    if (st) return st;
    snprintf(data, sizeof data, "{\"step\":%lld,\"id\":\"%s\"}", (long long)s.step, id);
    event(r, "info", "checkpoint", "checkpoint written", data);
    for (int i = 0; i < same.count; i++) forget_checkpoint(r, same.id[i]);
    prune(r);
    return ST_OK;
}

/* Where a checkpoint cannot be written training goes on: the one before is still there. */
static void save_if_due(struct run *r, int64_t step)
{
    const struct train_settings *s = &r->row.job.settings;
    struct error err = {0};
    bool due = (s->checkpoint_steps > 0 && step % s->checkpoint_steps == 0) ||
               (s->checkpoint_seconds > 0 && train_clock() - r->saved >= s->checkpoint_seconds);
    if (!due || trainer_done(r->trainer) || save(r, &err) == ST_OK) return;
    event(r, "warn", "message", err.message, NULL);
}

/* From the newest checkpoint that can be read, or from the start. */
static enum status begin(struct run *r, struct error *err)
{
    struct checkpoint_ids ids = {0};
    enum status st =
        db_run(r->jobs->db, err, add_id, &ids,
               "SELECT id FROM checkpoint WHERE job = ?1 ORDER BY step DESC LIMIT 16", "i", r->entry->serial);
    if (st) return st;
    for (int i = 0; i < ids.count; i++) {
        struct error why = {0};
        st = trainer_begin(r->trainer, checkpoint_path(r, ids.id[i]).text, &r->entry->stop, &why);
        if (!st) {
            event(r, "info", "message", "goes on from the last checkpoint", NULL);
            return ST_OK;
        }
        if (st != ST_BAD_FORMAT && st != ST_REJECTED && st != ST_NOT_FOUND)
            return error_set(err, st, "%s", why.message);
        event(r, "warn", "message", why.message, NULL);
        forget_checkpoint(r, ids.id[i]);
    }
    return trainer_begin(r->trainer, NULL, &r->entry->stop, err);
}

/* --- steps --- */

static enum status record_step(struct run *r, const struct trainer_step *s, struct error *err)
{
    struct jobs *j = r->jobs;
    struct strbuf data = {0};
    pthread_mutex_lock(&j->lock);
    double speed = s->seconds > 0 ? (double)s->result.tokens / s->seconds : 0;
    r->entry->speed = r->entry->speed > 0 ? 0.8 * r->entry->speed + 0.2 * speed : speed;
    r->entry->progress = (double)s->step / (double)s->steps;
    j->stats.steps++;
    j->stats.tokens += (uint64_t)s->result.tokens;
    j->stats.step_seconds += s->seconds;
    pthread_mutex_unlock(&j->lock);
    jobs_routing_add(j, r->routing, s->step, &s->result);
    enum status st =
        db_run(j->db, err, NULL, NULL, "UPDATE job SET step = ?1, tokens = ?2, loss = ?3 WHERE serial = ?4",
               "iidi", s->step, s->tokens, s->result.objective, r->entry->serial);
    char message[96];
    trainer_step_write(s, (enum train_loss)r->row.job.settings.loss, &data);
    snprintf(message, sizeof message, "step %lld of %lld: loss %.4f", (long long)s->step, (long long)s->steps,
             s->result.objective);
    if (!st) event(r, "info", "metrics", message, data.data);
    strbuf_release(&data);
    return st;
}

static void record_evaluation(struct run *r, int64_t step, double loss)
{
    char message[96], data[96];
    if (isnan(loss)) return;
    snprintf(message, sizeof message, "held-out loss %.4f after step %lld", loss, (long long)step);
    snprintf(data, sizeof data, "{\"step\":%lld,\"loss\":%.9g}", (long long)step, loss);
    event(r, "info", "evaluation", message, data);
}

static enum status step(struct run *r, struct error *err)
{
    struct trainer_step s;
    struct objective_evaluation e;
    enum status st = trainer_step(r->trainer, &r->entry->stop, &s, err);
    if (!st) st = record_step(r, &s, err);
    if (!st && trainer_evaluation_due(r->trainer)) {
        st = trainer_evaluate(r->trainer, &r->entry->stop, &e, err);
        if (!st) record_evaluation(r, s.step, e.loss);
    }
    if (!st) save_if_due(r, s.step);
    return st;
}

static enum status train(struct run *r, struct error *err)
{
    struct objective_evaluation before, after;
    struct trainer_facts facts;
    enum status st = begin(r, err);
    if (st) return st;
    r->saved = train_clock();
    trainer_facts(r->trainer, &facts);
    trainer_before(r->trainer, &before);
    record_evaluation(r, 0, before.loss);
    st = db_run(r->jobs->db, err, NULL, NULL, "UPDATE job SET loss_before = ?1 WHERE serial = ?2", "di",
                before.loss, r->entry->serial);
    while (!st && !trainer_done(r->trainer)) st = step(r, err);
    if (!st) st = trainer_evaluate(r->trainer, &r->entry->stop, &after, err);
    if (!st) st = save(r, err);
    if (st) return st;
    record_evaluation(r, facts.steps, after.loss);
    r->row.job.loss_before = before.loss;
    r->row.job.loss_after = after.loss;
    return db_run(r->jobs->db, err, NULL, NULL, "UPDATE job SET loss_after = ?1 WHERE serial = ?2", "di",
                  after.loss, r->entry->serial);
}

/* --- the result --- */

static enum status write_result(struct run *r, struct error *err)
{
    struct train_path part = job_path(r, "result.part"), result = job_path(r, "result");
    struct adapter_bundle *bundle = NULL;
    remove_all(part.text);
    remove_all(result.text);
    enum status st = file_make_folders(part.text, err);
    if (!st) st = trainer_bundle(r->trainer, &r->jobs->config.base, &bundle, err);
    if (!st) st = bundle_write(bundle, &r->jobs->config.base, part.text, err);
    if (!st && rename(part.text, result.text)) st = file_error(err, "rename", part.text);
    if (!st) st = file_sync_folder_of(result.text, err);
    adapter_bundle_free(bundle);
    if (st) return st;
    return db_run(r->jobs->db, err, NULL, NULL, "UPDATE job SET result = 1 WHERE serial = ?1", "i",
                  r->entry->serial);
}

/* Whether the result is to be published; why not, in *why, or NULL. */
static bool wanted(const struct run *r, const char **why)
{
    const struct train_job *job = &r->row.job;
    if (job->settings.publish == PUBLISH_ON_IMPROVEMENT && !(job->loss_after < job->loss_before)) {
        *why = "not published: the held-out loss is no better than before";
        return false;
    }
    return job->settings.publish != PUBLISH_MANUAL;
}

/* From here on it is too late to cancel. */
static bool commit(struct run *r)
{
    pthread_mutex_lock(&r->jobs->lock);
    bool cancelled = r->entry->cancel_asked;
    r->entry->committed = !cancelled;
    pthread_mutex_unlock(&r->jobs->lock);
    return !cancelled;
}

static enum status publish(struct run *r, struct error *err)
{
    const struct train_job *job = &r->row.job;
    struct put_result put;
    const char *why = NULL;
    if (!wanted(r, &why)) {
        if (why) error_set(err, ST_OK, "%s", why);
        return ST_OK;
    }
    if (!commit(r)) return ST_CANCELLED;
    enum status st =
        jobs_put(r->jobs, r->entry->tenant, job->adapter, r->row.adapter_number, job_path(r, "result").text,
                 r->row.expects ? r->row.expected_version : NULL, &put, err);
    if (st) return st;
    return db_run(r->jobs->db, err, NULL, NULL, "UPDATE job SET version_after = ?1 WHERE serial = ?2", "ti",
                  put.version, r->entry->serial);
}

/* --- a job's end --- */

/* Decided once: from then on the job cannot be cancelled. */
static enum train_state end_state(struct jobs *j, struct entry *e, enum status st)
{
    pthread_mutex_lock(&j->lock);
    bool cancelled = e->cancel_asked && (st == ST_OK || st == ST_CANCELLED);
    e->committed = true;
    pthread_mutex_unlock(&j->lock);
    return cancelled ? TRAIN_CANCELLED : st ? TRAIN_FAILED : TRAIN_SUCCEEDED;
}

static void unlist(struct jobs *j, struct entry *e, bool failed)
{
    pthread_mutex_lock(&j->lock);
    for (struct entry **at = &j->first; *at; at = &(*at)->next)
        if (*at == e) {
            *at = e->next;
            break;
        }
    j->stats.failed += failed;
    pthread_cond_broadcast(&j->work);
    pthread_mutex_unlock(&j->lock);
}

/* The state and the last event become visible together. */
static enum status record_end(struct jobs *j, const struct entry *e, enum train_state state,
                              const struct error *err, struct error *problem)
{
    char message[640];
    bool failed = state == TRAIN_FAILED;
    enum status st = db_begin(j->db, problem);
    if (st) return st;
    snprintf(message, sizeof message, "%s%s%s", train_state_name(state), err->message[0] ? ": " : "",
             err->message);
    st = db_run(j->db, problem, NULL, NULL,
                "INSERT INTO event (job, created, level, kind, message) VALUES (?1, ?2, ?3, 'message', ?4)",
                "iitt", e->serial, jobs_now(), failed ? "error" : "info", message);
    if (!st)
        st = db_run(j->db, problem, NULL, NULL,
                    "UPDATE job SET state = ?1, finished = ?2, status = ?3, message = ?4 WHERE serial = ?5",
                    "iiiti", (int64_t)state, jobs_now(), failed ? (int64_t)err->status : 0, err->message,
                    e->serial);
    return db_end(j->db, st, problem);
}

/* A job whose end is not on record looks as if it ran until the next start, which runs it again: what fails
 * for a moment, as memory may, is tried again. */
#define RECORD_ATTEMPTS 3

void job_end(struct jobs *j, struct entry *e, enum status st, const struct error *err)
{
    struct error none = {.status = st}, problem = {0};
    enum train_state state = end_state(j, e, st);
    const struct error *shown = err && err->message[0] && state != TRAIN_CANCELLED ? err : &none;
    if (state == TRAIN_FAILED && !none.message[0]) error_set(&none, st, "%s", status_text(st));
    char id[TRAIN_ID_MAX];
    memcpy(id, e->id, sizeof id);
    enum status recorded = ST_NOMEM;
    for (int i = 0; i < RECORD_ATTEMPTS && recorded; i++) recorded = record_end(j, e, state, shown, &problem);
    if (recorded)
        log_error("training job %s: its end cannot be recorded, it will run again: %s", id, problem.message);
    jobs_tidy(j, id);
    unlist(j, e, state == TRAIN_FAILED);
    free(e);
    job_notify(j, id);
    jobs_collect(j);
}

static void release(struct run *r)
{
    jobs_routing_end(r->jobs, r->routing);
    trainer_close(r->trainer);
    if (r->transposed) jobs_transposed_release(r->jobs);
    dataset_free(r->examples);
    dataset_free(r->validation);
    train_start_close(&r->start);
    count_bytes(r, 0);
    train_job_release(&r->row.job);
}

/* The service closes: what is learned so far is kept for the next one. */
static void suspend(struct run *r)
{
    struct error err = {0};
    enum status st = forget_attempts(r, &err);
    if (!st && r->trainer && r->entry->state == TRAIN_RUNNING) st = save(r, &err);
    if (st) log_warn("training job %s: no checkpoint at the end: %s", r->entry->id, err.message);
}

static void job_run(struct jobs *j, struct entry *e)
{
    struct run r = {.jobs = j, .entry = e};
    struct error err = {0};
    enum status st = db_run(j->db, &err, job_row_read, &r.row,
                            "SELECT " JOB_COLUMNS " FROM job WHERE serial = ?1", "i", e->serial);
    if (!st && atomic_load(&e->stop)) st = ST_CANCELLED;
    if (!st) st = prepare(&r, &err);
    if (!st) st = train(&r, &err);
    if (!st) st = write_result(&r, &err);
    if (!st) st = publish(&r, &err);
    pthread_mutex_lock(&j->lock);
    bool closing = j->closing && !e->cancel_asked && (st == ST_CANCELLED || st == ST_DRAINING);
    pthread_mutex_unlock(&j->lock);
    if (closing) suspend(&r);
    release(&r);
    if (!closing) job_end(j, e, st, &err);
}

/* --- threads --- */

static int running_of(const struct jobs *j, const char *tenant)
{
    int n = 0;
    for (const struct entry *e = j->first; e; e = e->next) n += e->taken && strcmp(e->tenant, tenant) == 0;
    return n;
}

/* The tenant that has the fewest jobs running goes first, then the one that was served longest ago; of a
 * tenant the oldest job. The caller holds `lock`. */
static struct entry *pick(struct jobs *j)
{
    struct entry *best = NULL;
    int best_running = 0;
    for (struct entry *e = j->first; e; e = e->next) {
        if (e->taken) continue;
        int running = running_of(j, e->tenant);
        bool better = !best || running < best_running ||
                      (running == best_running && served_stamp(j, e->tenant) < served_stamp(j, best->tenant));
        if (!better) continue;
        best = e;
        best_running = running;
    }
    return best;
}

void *jobs_thread(void *ctx)
{
    struct jobs *j = ctx;
    pthread_mutex_lock(&j->lock);
    while (!j->closing) {
        struct entry *e = pick(j);
        if (!e) {
            pthread_cond_wait(&j->work, &j->lock);
            continue;
        }
        e->taken = true;
        served_begin(j, e->tenant);
        pthread_mutex_unlock(&j->lock);
        job_run(j, e);
        pthread_mutex_lock(&j->lock);
    }
    pthread_mutex_unlock(&j->lock);
    return NULL;
}

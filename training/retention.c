/* What is kept of jobs that have ended, and for how long. */
#include "training/jobs_int.h"

#include "base/log.h"
#include "training/dataset_int.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>

enum status job_forget(struct jobs *j, int64_t serial, const char *id, struct error *err)
{
    enum status st = db_run(j->db, err, NULL, NULL, "DELETE FROM job WHERE serial = ?1", "i", serial);
    if (!st) remove_all(jobs_path(j, "jobs/%s", id).text);
    return st;
}

struct old_job {
    int64_t serial;
    char id[TRAIN_ID_MAX];
};
struct old_jobs {
    struct old_job *job;
    size_t count, capacity;
};

static enum status old_add(void *ctx, sqlite3_stmt *q)
{
    struct old_jobs *o = ctx;
    if (array_grow((void **)&o->job, &o->capacity, o->count, sizeof *o->job)) return ST_NOMEM;
    o->job[o->count].serial = sqlite3_column_int64(q, 0);
    db_text(q, 1, o->job[o->count++].id, sizeof o->job->id);
    return ST_OK;
}

/* Its files, but not what is known of it. */
static enum status clear(struct jobs *j, const struct old_job *o, struct error *err)
{
    remove_all(jobs_path(j, "jobs/%s", o->id).text);
    enum status st = db_run(j->db, err, NULL, NULL, "UPDATE job SET result = 0, kept = 0 WHERE serial = ?1",
                            "i", o->serial);
    return st ? st : db_run(j->db, err, NULL, NULL, "DELETE FROM checkpoint WHERE job = ?1", "i", o->serial);
}

void jobs_collect(struct jobs *j)
{
    struct error err = {0};
    struct old_jobs old = {0}, surplus = {0};
    enum status st = db_run(j->db, &err, old_add, &old,
                            "SELECT serial, id FROM job WHERE state >= ?1 AND kept AND finished < ?2", "ii",
                            (int64_t)TRAIN_SUCCEEDED, jobs_now() - j->config.keep_seconds);
    if (!st)
        st = db_run(j->db, &err, old_add, &surplus,
                    "SELECT serial, id FROM (SELECT serial, id, state, row_number() OVER (PARTITION BY "
                    "tenant ORDER BY"
                    " serial DESC) AS place FROM job) WHERE place > ?1 AND state >= ?2",
                    "ii", (int64_t)j->config.keep_jobs, (int64_t)TRAIN_SUCCEEDED);
    for (size_t i = 0; i < old.count && !st; i++) st = clear(j, &old.job[i], &err);
    for (size_t i = 0; i < surplus.count && !st; i++)
        st = job_forget(j, surplus.job[i].serial, surplus.job[i].id, &err);
    if (st) log_warn("training: old jobs cannot be cleared away: %s", err.message);
    free(old.job);
    free(surplus.job);
}

static enum status is_found(void *ctx, sqlite3_stmt *row)
{
    (void)row;
    *(bool *)ctx = true;
    return ST_OK;
}

/* Checkpoints that a crash left without a row. */
static void tidy_checkpoints(struct jobs *j, const char *id)
{
    DIR *dir = opendir(jobs_path(j, "jobs/%s", id).text);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        bool named = false;
        struct error ignored = {0};
        if (strncmp(e->d_name, "ckpt-", 5) != 0) continue;
        if (!db_run(j->db, &ignored, is_found, &named, "SELECT 1 FROM checkpoint WHERE id = ?1", "t",
                    e->d_name) &&
            !named)
            remove_all(jobs_path(j, "jobs/%s/%s", id, e->d_name).text);
    }
    if (dir) closedir(dir);
}

void jobs_tidy(struct jobs *j, const char *id)
{
    static const char *const names[] = {"start", "start.part", "examples.jsonl", "validation.jsonl",
                                        "result.part"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        remove_all(jobs_path(j, "jobs/%s/%s", id, names[i]).text);
    tidy_checkpoints(j, id);
}

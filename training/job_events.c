/* What happens to jobs: told, listed, watched. */
#include "training/jobs_int.h"

#include "base/log.h"
#include "training/dataset_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void job_notify(struct jobs *j, const char *id)
{
    pthread_mutex_lock(&j->watch_lock);
    for (struct train_watch *w = j->watches; w; w = w->next)
        if (strcmp(w->id, id) == 0) w->on_news(w->ctx);
    pthread_mutex_unlock(&j->watch_lock);
}

void job_event(struct jobs *j, int64_t serial, const char *id, const char *level, const char *kind,
               const char *message, const char *data)
{
    struct error err = {0};
    if (db_run(j->db, &err, NULL, NULL,
               "INSERT INTO event (job, created, level, kind, message, data) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
               "iitttt", serial, jobs_now(), level, kind, message, data))
        log_warn("training job %s: an event is lost: %s", id, err.message);
    job_notify(j, id);
}

void train_event_release(struct train_event *e)
{
    free(e->message);
    free(e->data);
}

struct event_list {
    struct train_event *event;
    size_t count, capacity;
};

static void events_release(struct event_list *l)
{
    for (size_t i = 0; i < l->count; i++) train_event_release(&l->event[i]);
    free(l->event);
}

static enum status event_add(void *ctx, sqlite3_stmt *q)
{
    struct event_list *l = ctx;
    struct train_event e = {.number = sqlite3_column_int64(q, 0), .created = sqlite3_column_int64(q, 1)};
    const char *message = (const char *)sqlite3_column_text(q, 4),
               *data = (const char *)sqlite3_column_text(q, 5);
    db_text(q, 2, e.level, sizeof e.level);
    db_text(q, 3, e.kind, sizeof e.kind);
    e.message = strdup(message ? message : "");
    e.data = data ? strdup(data) : NULL;
    enum status st = e.message && (e.data || !data)
                         ? array_grow((void **)&l->event, &l->capacity, l->count, sizeof *l->event)
                         : ST_NOMEM;
    if (st)
        train_event_release(&e);
    else
        l->event[l->count++] = e;
    return st;
}

#define EVENT_COLUMNS "number, created, level, kind, message, data"

enum status jobs_events(struct jobs *j, const char *tenant, const char *id, int64_t after, size_t limit,
                        struct train_event **out, size_t *count_out, bool *ended, struct error *err)
{
    struct job_row row;
    struct event_list l = {0};
    /* The state first: what ends a job comes before its last event. */
    enum status st = job_find(j, tenant, id, &row, err);
    if (st) return st;
    train_job_release(&row.job);
    st = db_run(j->db, err, event_add, &l,
                "SELECT " EVENT_COLUMNS " FROM event WHERE job = ?1 AND number > ?2 ORDER BY number LIMIT ?3",
                "iii", row.serial, after, (int64_t)limit);
    if (st) {
        events_release(&l);
        return st;
    }
    *out = l.event;
    *count_out = l.count;
    *ended = train_state_ended(row.job.state) && l.count < limit;
    return ST_OK;
}

enum status jobs_events_back(struct jobs *j, const char *tenant, const char *id, int64_t before, size_t limit,
                             struct train_event **out, size_t *count_out, bool *more, struct error *err)
{
    int64_t serial;
    struct event_list l = {0};
    enum status st = job_find_serial(j, tenant, id, &serial, err);
    if (!st)
        st = db_run(j->db, err, event_add, &l,
                    "SELECT " EVENT_COLUMNS
                    " FROM event WHERE job = ?1 AND number < ?2 ORDER BY number DESC LIMIT ?3",
                    "iii", serial, before > 0 ? before : INT64_MAX, (int64_t)limit + 1);
    if (st) {
        events_release(&l);
        return st;
    }
    *more = l.count > limit;
    while (l.count > limit) train_event_release(&l.event[--l.count]);
    *out = l.event;
    *count_out = l.count;
    return ST_OK;
}

enum status jobs_watch(struct jobs *j, const char *tenant, const char *id, void (*on_news)(void *ctx),
                       void *ctx, struct train_watch **out, struct error *err)
{
    struct train_job job;
    struct train_watch *w = calloc(1, sizeof *w);
    if (!w) return jobs_no_memory(err);
    *w = (struct train_watch){.jobs = j, .on_news = on_news, .ctx = ctx};
    snprintf(w->id, sizeof w->id, "%s", id);
    pthread_mutex_lock(&j->watch_lock);
    w->next = j->watches;
    j->watches = w;
    pthread_mutex_unlock(&j->watch_lock);
    /* Looked at after it is listed: an end in between would go unseen. */
    enum status st = jobs_get(j, tenant, id, &job, err);
    if (st) {
        jobs_unwatch(w);
        return st;
    }
    *out = w;
    if (train_state_ended(job.state)) on_news(ctx);
    train_job_release(&job);
    return ST_OK;
}

void jobs_unwatch(struct train_watch *w)
{
    if (!w) return;
    struct jobs *j = w->jobs;
    pthread_mutex_lock(&j->watch_lock);
    for (struct train_watch **at = &j->watches; *at; at = &(*at)->next)
        if (*at == w) {
            *at = w->next;
            break;
        }
    pthread_mutex_unlock(&j->watch_lock);
    free(w);
}

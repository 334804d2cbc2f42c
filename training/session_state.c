/* A session between memory and disk. */
#include "training/session_int.h"

#include "base/file.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct train_path session_path(const struct jobs *j, const struct session *s, const char *name)
{
    return jobs_path(j, "sessions/%s/%s", s->id, name);
}

/* --- opening and closing --- */

enum status session_save(struct jobs *j, struct session *s, struct error *err)
{
    struct checkpoint_state state = {
        .optim_steps = s->learner->optim_steps, .loss = NAN, .loss_before = NAN, .held_loss = NAN};
    if (!s->changed) return ST_OK;
    snprintf(state.run, sizeof state.run, "%s", s->id);
    enum status st = checkpoint_write(s->learner, &state, session_path(j, s, "checkpoint").text, err);
    if (st) return st;
    s->changed = false;
    s->saved = train_clock();
    return ST_OK;
}

void session_count_bytes(struct jobs *j, struct session *s, size_t bytes)
{
    pthread_mutex_lock(&j->lock);
    j->stats.state_bytes += bytes - s->bytes;
    s->bytes = bytes;
    pthread_mutex_unlock(&j->lock);
}

void session_unload(struct jobs *j, struct session *s)
{
    if (!s->learner) return;
    session_count_bytes(j, s, 0);
    jobs_routing_end(j, s->routing);
    learner_close(s->learner);
    free(s->start);
    jobs_transposed_release(j);
    s->learner = NULL;
    s->start = NULL;
    s->routing = NULL;
}

void session_forget(struct jobs *j, struct session *s, struct error *err)
{
    session_unload(j, s);
    (void)db_run(j->db, err, NULL, NULL, "DELETE FROM session WHERE tenant = ?1 AND adapter = ?2", "tt",
                 s->tenant, s->adapter);
    if (s->id[0]) remove_all(jobs_path(j, "sessions/%s", s->id).text);
}

enum status session_row_read(void *ctx, sqlite3_stmt *row)
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
        session_unload(j, s);
    } else if (st) {
        jobs_transposed_release(j);
    } else {
        s->changed = s->gradients = false;
        s->saved = train_clock();
    }
    return st;
}

enum status session_ensure(struct jobs *j, struct session *s, bool may_create, bool *opened,
                           struct error *err)
{
    int64_t number = 0;
    enum status st = adapter_number(j, s, &number, err);
    if (!st && !s->learner)
        st = db_run(
            j->db, err, session_row_read, s,
            "SELECT id, adapter_number, version_before FROM session WHERE tenant = ?1 AND adapter = ?2", "tt",
            s->tenant, s->adapter);
    if (st) return st;
    if (s->id[0] && s->number != number) { /* the adapter it was of is deleted */
        session_forget(j, s, NULL);
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

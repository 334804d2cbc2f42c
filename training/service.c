/* The service as a whole: opening and closing, and what jobs and sessions share. */
#include "training/jobs_int.h"

#include "adapters/package.h"
#include "base/file.h"
#include "base/log.h"
#include "training/publish.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const migrations[] = {
    "CREATE TABLE file (serial INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT "
    "NULL,"
    " name TEXT NOT NULL, purpose TEXT NOT NULL, created INTEGER NOT NULL, bytes INTEGER NOT NULL);"
    "CREATE INDEX file_tenant ON file (tenant, serial);"
    "CREATE TABLE job (serial INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT "
    "NULL,"
    " adapter TEXT NOT NULL, adapter_number INTEGER NOT NULL, version TEXT NOT NULL, expected_version TEXT,"
    " settings TEXT NOT NULL, openai INTEGER NOT NULL, key TEXT, request TEXT NOT NULL,"
    " state INTEGER NOT NULL DEFAULT 0, cancel_asked INTEGER NOT NULL DEFAULT 0, file_id TEXT NOT NULL,"
    " validation_file_id TEXT NOT NULL, suffix TEXT NOT NULL, metadata TEXT, created INTEGER NOT NULL,"
    " started INTEGER NOT NULL DEFAULT 0, finished INTEGER NOT NULL DEFAULT 0, version_before TEXT NOT NULL "
    "DEFAULT '',"
    " version_after TEXT NOT NULL DEFAULT '', result INTEGER NOT NULL DEFAULT 0, step INTEGER NOT NULL "
    "DEFAULT 0,"
    " steps INTEGER NOT NULL DEFAULT 0, examples INTEGER NOT NULL DEFAULT 0, held_out INTEGER NOT NULL "
    "DEFAULT 0,"
    " tokens INTEGER NOT NULL DEFAULT 0, loss REAL, loss_before REAL, loss_after REAL, status INTEGER NOT "
    "NULL DEFAULT 0,"
    " message TEXT NOT NULL DEFAULT '', kept INTEGER NOT NULL DEFAULT 1, UNIQUE (tenant, key));"
    "CREATE INDEX job_tenant ON job (tenant, serial);"
    "CREATE TABLE event (number INTEGER PRIMARY KEY AUTOINCREMENT,"
    " job INTEGER NOT NULL REFERENCES job (serial) ON DELETE CASCADE, created INTEGER NOT NULL, level TEXT "
    "NOT NULL,"
    " kind TEXT NOT NULL, message TEXT NOT NULL, data TEXT);"
    "CREATE INDEX event_job ON event (job, number);"
    "CREATE TABLE checkpoint (id TEXT PRIMARY KEY, job INTEGER NOT NULL REFERENCES job (serial) ON DELETE "
    "CASCADE,"
    " created INTEGER NOT NULL, step INTEGER NOT NULL, bytes INTEGER NOT NULL, loss REAL, held_out_loss REAL,"
    " UNIQUE (job, step));"
    "CREATE TABLE session (id TEXT PRIMARY KEY, tenant TEXT NOT NULL, adapter TEXT NOT NULL,"
    " adapter_number INTEGER NOT NULL, version_before TEXT NOT NULL, UNIQUE (tenant, adapter));",
    "ALTER TABLE job ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;", /* begun since the last checkpoint */
};
#define MIGRATION_COUNT (int)(sizeof migrations / sizeof *migrations)

/* --- adapters --- */

enum status jobs_check_adapter(struct jobs *j, const char *tenant, const char *name, int64_t number,
                               char current[ADAPTER_VERSION_HEX + 1], struct error *err)
{
    struct adapter_info info;
    enum status st = registry_get(j->config.registry, tenant, name, &info, err);
    if (st) return st;
    if (info.number != number)
        st = error_set(err, ST_NOT_FOUND, "the adapter '%s' was deleted; another has its name now", name);
    else if (current)
        memcpy(current, info.versions[0].record.version, ADAPTER_VERSION_HEX + 1);
    adapter_info_release(&info);
    return st;
}

/* The bytes of an open file, at a path. */
static enum status copy_fd(int fd, const char *path, struct error *err)
{
    struct train_path from;
    struct file_map map;
    snprintf(from.text, sizeof from.text, "/proc/self/fd/%d", fd);
    enum status st = file_map(from.text, &map, err);
    if (st) return st;
    st = file_replace(path, map.data, map.size, err);
    file_unmap(&map);
    return st;
}

enum status jobs_copy_version(struct jobs *j, const char *tenant, const char *name, const char *version,
                              const char *folder, char version_out[ADAPTER_VERSION_HEX + 1],
                              struct error *err)
{
    struct version_files files;
    struct train_path part, config, tensors;
    snprintf(part.text, sizeof part.text, "%.4000s.part", folder);
    snprintf(config.text, sizeof config.text, "%.4000s/" PACKAGE_CONFIG, part.text);
    snprintf(tensors.text, sizeof tensors.text, "%.4000s/" PACKAGE_TENSORS, part.text);
    remove_all(part.text);
    enum status st = registry_open_files(j->config.registry, tenant, name, version, &files, err);
    if (st) return st;
    st = file_make_folders(part.text, err);
    if (!st) st = copy_fd(files.config_fd, config.text, err);
    if (!st) st = copy_fd(files.tensors_fd, tensors.text, err);
    if (!st && rename(part.text, folder)) st = file_error(err, "rename", part.text);
    if (!st) st = file_sync_folder_of(folder, err);
    close(files.config_fd);
    close(files.tensors_fd);
    if (!st) memcpy(version_out, files.record.version, ADAPTER_VERSION_HEX + 1);
    return st;
}

/* Publishing over whatever is current must not bring back an adapter that is deleted meanwhile: so it is done
 * over the version that was seen, again and again. */
#define PUT_ATTEMPTS 100

enum status jobs_put(struct jobs *j, const char *tenant, const char *name, int64_t number, const char *folder,
                     const char *expected, struct put_result *out, struct error *err)
{
    enum status st = ST_CONFLICT;
    char current[ADAPTER_VERSION_HEX + 1];
    for (int i = 0; i < PUT_ATTEMPTS && st == ST_CONFLICT; i++) {
        st = jobs_check_adapter(j, tenant, name, number, current, err);
        if (st) return st;
        st =
            folder_publish(j->config.registry, tenant, name, folder, expected ? expected : current, out, err);
        if (expected) break;
    }
    if (st) return st;
    pthread_mutex_lock(&j->lock);
    j->stats.published++;
    pthread_mutex_unlock(&j->lock);
    return ST_OK;
}

/* --- transposed weights --- */

static void stats_transposed(struct jobs *j, size_t bytes)
{
    pthread_mutex_lock(&j->lock);
    j->stats.transposed_bytes = bytes;
    pthread_mutex_unlock(&j->lock);
}

enum status jobs_transposed_acquire(struct jobs *j, struct transposed **out, struct error *err)
{
    enum status st = ST_OK;
    pthread_mutex_lock(&j->transposed_lock);
    if (!j->transposed) st = transposed_open(j->config.engine, &j->transposed, err);
    if (!st) {
        j->transposed_users++;
        *out = j->transposed;
        stats_transposed(j, transposed_bytes(j->transposed));
    }
    pthread_mutex_unlock(&j->transposed_lock);
    return st;
}

void jobs_transposed_release(struct jobs *j)
{
    pthread_mutex_lock(&j->transposed_lock);
    if (--j->transposed_users == 0) {
        transposed_close(j->transposed);
        j->transposed = NULL;
        stats_transposed(j, 0);
    }
    pthread_mutex_unlock(&j->transposed_lock);
}

/* --- routing --- */

static void routing_free(struct routing_entry *r)
{
    routing_log_close(r->log);
    free(r);
}

/* Drops the oldest that are not in use. The caller holds `lock`. */
static void routing_prune(struct jobs *j)
{
    int idle = 0;
    for (struct routing_entry **at = &j->routings; *at;) {
        struct routing_entry *r = *at;
        idle += !r->in_use;
        if (!r->in_use && idle > ROUTING_ENTRIES_MAX) {
            *at = r->next;
            routing_free(r);
        } else {
            at = &r->next;
        }
    }
}

struct routing_entry *jobs_routing_begin(struct jobs *j, const char *tenant, const char *adapter,
                                         const char *id, const struct params *p)
{
    struct routing_entry *r = calloc(1, sizeof *r);
    if (!r || routing_log_open(p, &r->log)) {
        free(r);
        return NULL;
    }
    snprintf(r->tenant, sizeof r->tenant, "%s", tenant);
    snprintf(r->adapter, sizeof r->adapter, "%s", adapter);
    snprintf(r->id, sizeof r->id, "%s", id);
    r->in_use = true;
    pthread_mutex_lock(&j->lock);
    r->next = j->routings;
    j->routings = r;
    routing_prune(j);
    pthread_mutex_unlock(&j->lock);
    return r;
}

void jobs_routing_add(struct jobs *j, struct routing_entry *r, int64_t step,
                      const struct objective_result *result)
{
    pthread_mutex_lock(&j->lock);
    routing_log_add(r->log, step, result);
    pthread_mutex_unlock(&j->lock);
}

void jobs_routing_end(struct jobs *j, struct routing_entry *r)
{
    if (!r) return;
    pthread_mutex_lock(&j->lock);
    r->in_use = false;
    pthread_mutex_unlock(&j->lock);
}

/* The newest of an adapter's (id NULL) or of a job's that has seen a step. */
static enum status routing_read(struct jobs *j, const char *tenant, const char *adapter, const char *id,
                                struct train_routing *out, struct error *err)
{
    enum status st = ST_NOT_FOUND;
    pthread_mutex_lock(&j->lock);
    for (const struct routing_entry *r = j->routings; r && st == ST_NOT_FOUND; r = r->next)
        if (strcmp(r->tenant, tenant) == 0 && strcmp(id ? r->id : r->adapter, id ? id : adapter) == 0)
            st = routing_log_read(r->log, out);
    pthread_mutex_unlock(&j->lock);
    if (st == ST_NOMEM) return jobs_no_memory(err);
    return st ? error_set(err, st, "'%.128s' has not been trained since the server started",
                          id ? id : adapter)
              : ST_OK;
}

enum status jobs_routing(struct jobs *j, const char *tenant, const char *id, struct train_routing *out,
                         struct error *err)
{
    return routing_read(j, tenant, NULL, id, out, err);
}

enum status jobs_adapter_routing(struct jobs *j, const char *tenant, const char *adapter,
                                 struct train_routing *out, struct error *err)
{
    return routing_read(j, tenant, adapter, NULL, out, err);
}

/* --- opening --- */

static enum status fill_config(struct jobs *j, const struct jobs_config *c, struct error *err)
{
    struct jobs_config *k = &j->config;
    *k = *c;
    if (!c->device->grad)
        return error_set(err, ST_UNSUPPORTED, "the device '%s' cannot train", c->device->name);
    if (!k->running_max) k->running_max = 2;
    if (!k->queue_max) k->queue_max = 64;
    if (!k->session_max) k->session_max = 8;
    if (k->session_seconds <= 0) k->session_seconds = 600;
    if (!k->file_bytes_max) k->file_bytes_max = (size_t)1 << 30;
    if (!k->tenant_bytes_max) k->tenant_bytes_max = (size_t)8 << 30;
    if (!k->keep_jobs) k->keep_jobs = 1000;
    if (!k->keep_seconds) k->keep_seconds = 7 * 24 * 3600;
    if (snprintf(j->root.text, sizeof j->root.text, "%s/training", c->data_dir) > 3000)
        return error_set(err, ST_INVALID, "the data folder's path is too long");
    return ST_OK;
}

static enum status make_folders(struct jobs *j, struct error *err)
{
    static const char *const names[] = {"files", "jobs", "sessions", "staging"};
    enum status st = ST_OK;
    remove_all(jobs_path(j, "staging").text);
    for (int i = 0; i < 4 && !st; i++) st = file_make_folders(jobs_path(j, "%s", names[i]).text, err);
    return st;
}

static enum status open_database(struct jobs *j, struct error *err)
{
    struct train_path path;
    snprintf(path.text, sizeof path.text, "%.3000s/training.db", j->config.data_dir);
    return db_open(path.text, migrations, MIGRATION_COUNT, &j->db, err);
}

static enum status found(void *ctx, sqlite3_stmt *row)
{
    (void)row;
    *(bool *)ctx = true;
    return ST_OK;
}

/* A crash can leave what no row names. */
static enum status sweep(struct jobs *j, const char *name, const char *sql, struct error *err)
{
    struct train_path folder = jobs_path(j, "%s", name);
    enum status st = ST_OK;
    DIR *dir = opendir(folder.text);
    if (!dir) return file_error(err, "list", folder.text);
    for (struct dirent *e; !st && (e = readdir(dir));) {
        bool named = false;
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        st = db_run(j->db, err, found, &named, sql, "t", e->d_name);
        if (!st && !named) remove_all(jobs_path(j, "%s/%s", name, e->d_name).text);
    }
    closedir(dir);
    return st;
}

static enum status add_entry(void *ctx, sqlite3_stmt *row)
{
    struct entry ***last = ctx;
    struct entry *e = calloc(1, sizeof *e);
    if (!e) return ST_NOMEM;
    e->serial = sqlite3_column_int64(row, 0);
    db_text(row, 1, e->id, sizeof e->id);
    db_text(row, 2, e->tenant, sizeof e->tenant);
    e->cancel_asked = sqlite3_column_int(row, 3);
    atomic_init(&e->stop, e->cancel_asked);
    **last = e;
    *last = &e->next;
    return ST_OK;
}

/* Jobs that had not ended when the last process did. */
static enum status load_queue(struct jobs *j, struct error *err)
{
    struct entry **last = &j->first;
    enum status st = db_run(j->db, err, NULL, NULL, "UPDATE job SET state = 0 WHERE state < ?1", "i",
                            (int64_t)TRAIN_SUCCEEDED);
    if (st) return st;
    return db_run(j->db, err, add_entry, &last,
                  "SELECT serial, id, tenant, cancel_asked FROM job WHERE state < ?1 ORDER BY serial", "i",
                  (int64_t)TRAIN_SUCCEEDED);
}

static enum status start_threads(struct jobs *j, struct error *err)
{
    j->thread = calloc((size_t)j->config.running_max, sizeof *j->thread);
    if (!j->thread) return jobs_no_memory(err);
    for (; j->thread_count < j->config.running_max; j->thread_count++)
        if (pthread_create(&j->thread[j->thread_count], NULL, jobs_thread, j)) return jobs_no_memory(err);
    return sessions_open(j, err);
}

enum status jobs_open(const struct jobs_config *config, struct jobs **out, struct error *err)
{
    struct jobs *j = calloc(1, sizeof *j);
    if (!j) return jobs_no_memory(err);
    pthread_mutex_init(&j->lock, NULL);
    pthread_mutex_init(&j->watch_lock, NULL);
    pthread_mutex_init(&j->transposed_lock, NULL);
    pthread_cond_init(&j->work, NULL);
    enum status st = fill_config(j, config, err);
    if (!st) st = make_folders(j, err);
    if (!st) st = open_database(j, err);
    if (!st) st = sweep(j, "files", "SELECT 1 FROM file WHERE id = ?1", err);
    if (!st) st = sweep(j, "jobs", "SELECT 1 FROM job WHERE id = ?1", err);
    if (!st) st = sweep(j, "sessions", "SELECT 1 FROM session WHERE id = ?1", err);
    if (!st) st = load_queue(j, err);
    if (!st) jobs_collect(j);
    if (!st) st = start_threads(j, err);
    if (st)
        jobs_close(j);
    else
        *out = j;
    return st;
}

static void stop_threads(struct jobs *j)
{
    pthread_mutex_lock(&j->lock);
    j->closing = true;
    for (struct entry *e = j->first; e; e = e->next) atomic_store(&e->stop, true);
    pthread_cond_broadcast(&j->work);
    pthread_mutex_unlock(&j->lock);
    for (int i = 0; i < j->thread_count; i++) pthread_join(j->thread[i], NULL);
}

void jobs_close(struct jobs *j)
{
    if (!j) return;
    stop_threads(j);
    sessions_close(j);
    for (struct entry *e; (e = j->first);) {
        j->first = e->next;
        free(e);
    }
    for (struct routing_entry *r; (r = j->routings);) {
        j->routings = r->next;
        routing_free(r);
    }
    for (struct served *s; (s = j->served);) {
        j->served = s->next;
        free(s);
    }
    db_close(j->db);
    free(j->thread);
    pthread_cond_destroy(&j->work);
    pthread_mutex_destroy(&j->transposed_lock);
    pthread_mutex_destroy(&j->watch_lock);
    pthread_mutex_destroy(&j->lock);
    free(j);
}

void jobs_stats(struct jobs *j, struct jobs_stats *out)
{
    pthread_mutex_lock(&j->lock);
    *out = j->stats;
    for (const struct entry *e = j->first; e; e = e->next) {
        out->queued += !e->taken;
        out->running += e->taken;
    }
    pthread_mutex_unlock(&j->lock);
    out->sessions = sessions_count(j);
}

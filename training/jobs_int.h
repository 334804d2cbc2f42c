/* What the files of the service share.
 *
 * Locks, in the order in which they may be taken: `transposed_lock` or `watch_lock`; then `lock`; then the
 * database's own, which is never held while waiting for one of the others. `lock` is for memory only: no
 * disk, no device, no waiting. */
#ifndef TRAINING_JOBS_INT_H
#define TRAINING_JOBS_INT_H

#include "training/db.h"
#include "training/jobs.h"
#include "training/start.h"
#include "training/trainer.h"

#include <pthread.h>

#define TENANT_MAX 256 /* bytes of a tenant's name, with its NUL */

struct train_path {
    char text[4096];
};

/* A job that has not ended. All but stop under `lock`; the thread that took it may read what only it writes.
 */
struct entry {
    struct entry *next; /* older ones first */
    int64_t serial;
    char id[TRAIN_ID_MAX];
    char tenant[TENANT_MAX];
    enum train_state state;
    bool taken;        /* by a thread */
    bool cancel_asked; /* by its owner */
    bool committed;    /* it is being published: too late to cancel */
    atomic_bool stop;  /* cancelled, or the service closes */
    double progress, speed;
};

/* The routing of an adapter in training, or of the last ones that were. */
struct routing_entry {
    struct routing_entry *next;                                               /* the newest first */
    char tenant[TENANT_MAX], adapter[ADAPTER_NAME_MAX + 1], id[TRAIN_ID_MAX]; /* id: of a job or session */
    bool in_use;
    struct routing_log *log; /* owned; under `lock` */
};
#define ROUTING_ENTRIES_MAX 64 /* that are no longer in use */

struct train_watch {
    struct train_watch *next;
    struct jobs *jobs;
    char id[TRAIN_ID_MAX];
    void (*on_news)(void *ctx);
    void *ctx;
};

/* When a tenant's job or call was last begun. */
struct served {
    struct served *next;
    char tenant[TENANT_MAX];
    uint64_t stamp;
};

struct sessions;

struct jobs {
    struct jobs_config config; /* without zeros */
    struct train_path root;    /* data/training */
    struct db *db;

    pthread_mutex_t lock;
    pthread_cond_t work; /* something to do, or closing */
    bool closing;
    struct entry *first;
    struct routing_entry *routings;
    struct served *served;
    uint64_t stamp;
    struct jobs_stats stats;

    pthread_mutex_t watch_lock; /* held while on_news is called */
    struct train_watch *watches;

    pthread_mutex_t transposed_lock;
    struct transposed *transposed;
    int transposed_users;

    pthread_t *thread; /* [thread_count], owned */
    int thread_count;
    struct sessions *sessions;
};

/* --- jobs.c --- */

/* root/<format> */
struct train_path jobs_path(const struct jobs *j, const char *format, ...) PRINTF_LIKE(2, 3);
/* Writes "<prefix>-<random>". */
void jobs_new_id(const char *prefix, char out[TRAIN_ID_MAX]);
int64_t jobs_now(void); /* unix seconds */
enum status jobs_no_memory(struct error *err);

/* What a tenant's examples must be. */
struct dataset_rules jobs_rules(const struct jobs *j, const struct train_settings *s, const char *name,
                                struct error *chat_problem);

/* The stamp of a tenant, under `lock`: 0 where nothing of it was begun yet. Beginning sets it. */
uint64_t served_stamp(const struct jobs *j, const char *tenant);
void served_begin(struct jobs *j, const char *tenant);

/* A job as the database has it. */
struct job_row {
    struct train_job job;
    int64_t serial, adapter_number;
    char tenant[TENANT_MAX], version[80], expected_version[80]; /* "" where not given */
    bool expects;                                               /* expected_version was given */
};
#define JOB_COLUMNS                                                                                     \
    "serial, id, tenant, adapter, adapter_number, version, expected_version, settings, openai, state, " \
    "cancel_asked,"                                                                                     \
    " file_id, validation_file_id, suffix, metadata, created, started, finished, version_before, "      \
    "version_after, result,"                                                                            \
    " step, steps, examples, held_out, tokens, loss, loss_before, loss_after, status, message"
/* db_row: into a struct job_row, zeroed before. */
enum status job_row_read(void *ctx, sqlite3_stmt *row);

/* A tenant's job; the caller owes train_job_release. ST_NOT_FOUND. */
NODISCARD enum status job_find(struct jobs *j, const char *tenant, const char *id, struct job_row *out,
                               struct error *err);
/* Its serial number alone. */
NODISCARD enum status job_find_serial(struct jobs *j, const char *tenant, const char *id, int64_t *out,
                                      struct error *err);

/* --- job_events.c --- */

/* Adds an event and tells the watchers. A failing database is logged, not the job's trouble. data may be
 * NULL. */
void job_event(struct jobs *j, int64_t serial, const char *id, const char *level, const char *kind,
               const char *message, const char *data);
void job_notify(struct jobs *j, const char *id); /* watchers only */

/* --- service.c --- */

/* ST_NOT_FOUND where the adapter is gone, or another has its name now; *current (may be NULL) is its current
 * version. */
NODISCARD enum status jobs_check_adapter(struct jobs *j, const char *tenant, const char *name, int64_t number,
                                         char current[ADAPTER_VERSION_HEX + 1], struct error *err);
/* The version's files into a folder, which is whole or not there; *version_out its name. */
NODISCARD enum status jobs_copy_version(struct jobs *j, const char *tenant, const char *name,
                                        const char *version, const char *folder,
                                        char version_out[ADAPTER_VERSION_HEX + 1], struct error *err);
/* A folder's two files as the adapter's next version; expected NULL: whatever is current. ST_NOT_FOUND where
 * the adapter is gone. */
NODISCARD enum status jobs_put(struct jobs *j, const char *tenant, const char *name, int64_t number,
                               const char *folder, const char *expected, struct put_result *out,
                               struct error *err);

/* The transposed weights, while anything trains. */
NODISCARD enum status jobs_transposed_acquire(struct jobs *j, struct transposed **out, struct error *err);
void jobs_transposed_release(struct jobs *j);

/* An entry for routing, in use until jobs_routing_end; p as routing_log_open. NULL when out of memory. */
struct routing_entry *jobs_routing_begin(struct jobs *j, const char *tenant, const char *adapter,
                                         const char *id, const struct params *p);
void jobs_routing_add(struct jobs *j, struct routing_entry *r, int64_t step,
                      const struct objective_result *result);
void jobs_routing_end(struct jobs *j, struct routing_entry *r);

/* --- retention.c --- */

/* Forgets what is too old: checkpoints, results, ended jobs. */
void jobs_collect(struct jobs *j);
/* Of a job's folder all but its result and last checkpoints. */
void jobs_tidy(struct jobs *j, const char *id);
/* A job with all that is known of it. */
NODISCARD enum status job_forget(struct jobs *j, int64_t serial, const char *id, struct error *err);

/* --- run.c --- */

void *jobs_thread(void *jobs);
/* Ends a job that the caller has taken: state, last event, files. e is gone afterwards. err: why it failed;
 * NULL: nothing to say. */
void job_end(struct jobs *j, struct entry *e, enum status st, const struct error *err);

/* --- session.c --- */

NODISCARD enum status sessions_open(struct jobs *j, struct error *err);
void sessions_close(struct jobs *j);
int sessions_count(struct jobs *j);

#endif

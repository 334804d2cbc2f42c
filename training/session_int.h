/* What the files of step-wise training share. */
#ifndef TRAINING_SESSION_INT_H
#define TRAINING_SESSION_INT_H

#include "training/jobs_int.h"

struct session {
    struct session *next;
    char id[TRAIN_ID_MAX]; /* "" while it is being opened or dropped */
    char tenant[TENANT_MAX], adapter[ADAPTER_NAME_MAX + 1];
    int64_t number; /* of the adapter */
    char version_before[ADAPTER_VERSION_HEX + 1];
    bool busy; /* somebody works on it without the lock, who alone may touch what follows */
    struct learner *learner;
    struct routing_entry *routing;
    float *start; /* the values it began with: dpo's reference */
    bool changed; /* since the last checkpoint */
    bool gradients;
    size_t bytes;       /* counted in the statistics */
    double used, saved; /* by the clock */
};

struct sessions {
    struct jobs *jobs;
    pthread_t thread;
    bool started;
    pthread_cond_t wake;
    /* Under the jobs' lock: */
    struct session *first;
    struct session_call *calls, **last;
    struct session_call *current;
};

/* --- session_state.c: a busy session between memory and disk --- */

/* sessions/<id>/<name> */
struct train_path session_path(const struct jobs *j, const struct session *s, const char *name);
/* db_row: id, adapter_number, version_before. */
enum status session_row_read(void *ctx, sqlite3_stmt *row);
/* In memory, of the adapter that has the name now; *opened: it is new. ST_CONFLICT where it would be new and
 * may not. */
NODISCARD enum status session_ensure(struct jobs *j, struct session *s, bool may_create, bool *opened,
                                     struct error *err);
/* A checkpoint of what changed since the last one. */
NODISCARD enum status session_save(struct jobs *j, struct session *s, struct error *err);
/* Out of memory; what the learner holds beyond its last checkpoint is lost. */
void session_unload(struct jobs *j, struct session *s);
/* Out of memory and off the disk. */
void session_forget(struct jobs *j, struct session *s, struct error *err);
void session_count_bytes(struct jobs *j, struct session *s, size_t bytes);

/* --- session_pass.c --- */

/* SESSION_FORWARD and SESSION_FORWARD_BACKWARD. */
NODISCARD enum status session_pass(struct jobs *j, struct session *s, struct session_call *c,
                                   struct error *err);

#endif

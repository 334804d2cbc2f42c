/* Training as a service: files of examples, a queue of jobs, and adapters trained step by step.
 *
 * A job trains one adapter of a tenant on a set of examples and publishes a new version. Jobs wait in a
 * queue; a few run at once, taken from the tenants in turn. All of it survives a restart: state in SQLite
 * (data/training.db), examples, checkpoints and results below data/training/. A job that was running
 * goes on from its last checkpoint.
 *
 * What happens to the adapter meanwhile does not disturb a job: it begins with the version that is current
 * when it starts (or the one it names), of which it keeps a copy. Its result becomes the newest version,
 * whatever was published or rolled back since, unless the request says expected_version. Where the adapter
 * was deleted (also if the name was given out again), the job fails and nothing is published.
 *
 * Thread-safe. Calls block on disks and locks (never for a training step), so they belong on a worker thread,
 * but those marked (quick). Tenants never see each other's: what belongs to another is ST_NOT_FOUND. */
#ifndef TRAINING_JOBS_H
#define TRAINING_JOBS_H

#include "adapters/registry.h"
#include "engine/engine.h"
#include "training/routing.h"
#include "training/settings.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct jobs;

struct jobs_config {
    const char *data_dir;
    struct engine *engine; /* these three are not owned and outlive the jobs */
    struct device *device;
    struct registry *registry;
    struct adapter_base base;
    int running_max;         /* jobs at once; 0: 2 */
    int queue_max;           /* jobs of a tenant that wait or run; 0: 64 */
    int session_max;         /* adapters in step-wise training, of all tenants; 0: 8 */
    double session_seconds;  /* an idle one is put to disk after so long; 0: 600 */
    size_t file_bytes_max;   /* of one file of examples; 0: 1 GiB */
    size_t tenant_bytes_max; /* of all a tenant's files; 0: 8 GiB */
    int keep_jobs;           /* ended jobs of a tenant that are remembered; 0: 1000 */
    int64_t keep_seconds;    /* checkpoints and results of ended jobs are kept so long; 0: 7 days */
};

/* Takes up what was queued or running when the last process ended. ST_UNSUPPORTED: the device cannot train,
 * or a later program wrote the database. */
NODISCARD enum status jobs_open(const struct jobs_config *config, struct jobs **out, struct error *err);
/* Stops what runs at its next op, leaving checkpoints; the next jobs_open goes on. Ends sessions' calls with
 * ST_DRAINING. Watches must have been ended. No callback comes after it. To be called before engine_close. */
void jobs_close(struct jobs *j);

/* --- files of examples
 * ----------------------------------------------------------------------------------------- The bytes are
 * looked at when a job reads them. A job that has begun no longer needs its file. */

#define TRAIN_ID_MAX        40 /* "file-" or "ftjob-" and hexadecimal digits */
#define TRAIN_FILE_NAME_MAX 256
#define TRAIN_KEY_MAX       256 /* of an idempotency key */

struct train_file {
    char id[TRAIN_ID_MAX];
    char name[TRAIN_FILE_NAME_MAX]; /* as the client called it: UTF-8, no path */
    char purpose[32];
    int64_t created; /* unix seconds */
    size_t bytes;
};

/* A file on its way: written as it comes. */
struct train_upload;
NODISCARD enum status train_upload_open(struct jobs *j, const char *tenant, struct train_upload **out,
                                        struct error *err);
/* ST_TOO_LARGE beyond file_bytes_max, ST_FULL beyond tenant_bytes_max, ST_NO_SPACE, ST_IO. */
NODISCARD enum status train_upload_write(struct train_upload *u, const void *bytes, size_t size,
                                         struct error *err);
/* Durable on ST_OK. u is gone either way. */
NODISCARD enum status train_upload_finish(struct train_upload *u, const char *name, const char *purpose,
                                          struct train_file *out, struct error *err);
void train_upload_drop(struct train_upload *u); /* NULL is fine */

NODISCARD enum status jobs_file_get(struct jobs *j, const char *tenant, const char *id,
                                    struct train_file *out, struct error *err);
/* The newest first; malloc'd array. after: the id of the last one seen, or NULL. ST_NOT_FOUND: no such
 * `after`. */
NODISCARD enum status jobs_file_list(struct jobs *j, const char *tenant, const char *after, size_t limit,
                                     struct train_file **out, size_t *count_out, bool *more,
                                     struct error *err);
/* An open file, for reading; the caller closes it. It stays whole whatever happens to the file. */
NODISCARD enum status jobs_file_content(struct jobs *j, const char *tenant, const char *id, int *fd_out,
                                        size_t *bytes_out, struct error *err);
NODISCARD enum status jobs_file_delete(struct jobs *j, const char *tenant, const char *id, struct error *err);

/* --- jobs
 * ---------------------------------------------------------------------------------------------------- */

enum train_state {
    TRAIN_QUEUED,
    TRAIN_VALIDATING,
    TRAIN_RUNNING,
    TRAIN_SUCCEEDED,
    TRAIN_FAILED,
    TRAIN_CANCELLED
};
#define TRAIN_STATE_COUNT (TRAIN_CANCELLED + 1)
/* OpenAI's words: "queued", "validating_files", "running", "succeeded", "failed", "cancelled". */
const char *train_state_name(enum train_state s);
static inline bool train_state_ended(enum train_state s) { return s >= TRAIN_SUCCEEDED; }

/* Examples are given here as JSON lines, or by the id of a file; validation likewise, or not at all: then a
 * share of the examples (settings.held_out) is held out. Copied by jobs_submit. */
struct train_request {
    const char *adapter;
    const char *version;          /* to begin with; NULL: the current one when the job starts */
    const char *expected_version; /* to be replaced by the result: registry.h; NULL: any */
    struct train_settings settings;
    const char *examples; /* NULL: of the file */
    size_t examples_size;
    const char *file_id;
    const char *validation_file_id; /* NULL: none */
    const char *idempotency_key;    /* NULL: none */
    const char *suffix;             /* what the client calls the job, up to 64 bytes; NULL: nothing */
    const char *metadata;           /* a JSON object handed back as it came, up to 16 KiB; NULL: none */
    bool openai;                    /* it came as a fine-tuning job: only a mark that is handed back */
};

struct train_job {
    char id[TRAIN_ID_MAX];
    char adapter[ADAPTER_NAME_MAX + 1];
    enum train_state state;
    struct train_settings settings;
    bool openai, cancel_asked;
    char file_id[TRAIN_ID_MAX], validation_file_id[TRAIN_ID_MAX]; /* "" where there are none */
    char suffix[65];
    char *metadata;                               /* owned: train_job_release. NULL: none */
    int64_t created, started, finished;           /* unix seconds; 0: not yet */
    int queue_place;                              /* jobs of the tenant before it; 0: it runs, or is next */
    char version_before[ADAPTER_VERSION_HEX + 1]; /* "" until it starts */
    char version_after[ADAPTER_VERSION_HEX + 1];  /* "" where nothing was published */
    bool result;                                  /* there is a result that jobs_publish can publish */
    int64_t step, steps;                          /* done; of all, 0 while that is not known */
    int64_t examples, held_out;                   /* how many; trained on, and not */
    int64_t tokens;                               /* trained on so far, over all epochs */
    double loss;                                  /* cross-entropy (or DPO) of the last step; NAN: none yet */
    double loss_before, loss_after;               /* of the held-out examples; NAN: none */
    double tokens_per_second;                     /* lately; 0: not known */
    double progress;                              /* of the present state, 0..1: reading examples, or steps */
    struct error error; /* of a failed job; a successful job that published nothing says why here, with
                           ST_OK */
};
void train_job_release(struct train_job *job);

/* Reads inline examples at once, so their errors are this call's (ST_INVALID, with the line); a file's are
 * the job's. *existing: the key was used before with the same request, whose job this is. ST_NOT_FOUND: no
 * such adapter, version or file; ST_CONFLICT: the key was used with another request, or the adapter's version
 * is not the expected one; ST_FULL: the tenant has queue_max jobs. Durable on ST_OK. */
NODISCARD enum status jobs_submit(struct jobs *j, const char *tenant, const struct train_request *r,
                                  char id_out[TRAIN_ID_MAX], bool *existing, struct error *err);
/* The caller owes train_job_release. */
NODISCARD enum status jobs_get(struct jobs *j, const char *tenant, const char *id, struct train_job *out,
                               struct error *err);
/* The newest first; adapter NULL: of all. malloc'd array: release each, then free. after as for files. */
NODISCARD enum status jobs_list(struct jobs *j, const char *tenant, const char *adapter, const char *after,
                                size_t limit, struct train_job **out, size_t *count_out, bool *more,
                                struct error *err);
/* A job that waits is cancelled at once, one that runs within an op; of an ended one, ST_CONFLICT says so,
 * unless it was cancelled. Nothing is published by a job of which this answered ST_OK. */
NODISCARD enum status jobs_cancel(struct jobs *j, const char *tenant, const char *id, struct error *err);
/* Forgets an ended job with its events and checkpoints. ST_BUSY: it has not ended. */
NODISCARD enum status jobs_delete(struct jobs *j, const char *tenant, const char *id, struct error *err);
/* Publishes the result of an ended job, again or for the first time. ST_CONFLICT: it has none (any
 * more), or as registry_put. */
NODISCARD enum status jobs_publish(struct jobs *j, const char *tenant, const char *id,
                                   const char *expected_version, struct put_result *out, struct error *err);

/* Events are numbered within the service, ascending. After a restart, steps since the last checkpoint come
 * again. */
struct train_event {
    int64_t number;
    int64_t created; /* unix seconds */
    char level[8];   /* "info", "warn", "error" */
    char kind[12];   /* "message", "metrics" (a step), "evaluation" (held-out examples), "checkpoint" */
    char *message;   /* owned; for people */
    /* Owned; a JSON object, or NULL. metrics: step, steps, epoch, loss (all together), cross_entropy (or dpo,
     * with margin and accuracy), balance, contrast, similarity (mean cosine of different experts' outputs), cohesion (of
     * one expert's for different tokens), learning_rate, grad_norm, tokens, weight (sum), tokens_per_second, seconds. evaluation: step, loss.
     * checkpoint: step, id. */
    char *data;
};
void train_event_release(struct train_event *e);
/* Those after number `after` (0: from the first), oldest first, at most `limit`; malloc'd array. ended: the
 * job has ended and there are no more. */
NODISCARD enum status jobs_events(struct jobs *j, const char *tenant, const char *id, int64_t after,
                                  size_t limit, struct train_event **out, size_t *count_out, bool *ended,
                                  struct error *err);
/* The newest first, before number `before` (0: from the last), as OpenAI lists them. */
NODISCARD enum status jobs_events_back(struct jobs *j, const char *tenant, const char *id, int64_t before,
                                       size_t limit, struct train_event **out, size_t *count_out, bool *more,
                                       struct error *err);

/* on_news is called, on a thread of the jobs', after each new event or change of state of the job; it must
 * not block nor call back into jobs. The caller then asks for what is new. jobs_unwatch waits for a call that
 * is under way; after it none comes. Watching an ended job is fine: on_news is then called once by jobs_watch
 * itself. (quick) */
struct train_watch;
NODISCARD enum status jobs_watch(struct jobs *j, const char *tenant, const char *id,
                                 void (*on_news)(void *ctx), void *ctx, struct train_watch **out,
                                 struct error *err);
void jobs_unwatch(struct train_watch *w); /* NULL is fine (quick) */

struct train_checkpoint {
    char id[TRAIN_ID_MAX];
    int64_t created, step;
    size_t bytes;
    double loss;          /* of its step */
    double held_out_loss; /* NAN: not measured there */
};
/* Those that are kept, the newest first; malloc'd array. */
NODISCARD enum status jobs_checkpoints(struct jobs *j, const char *tenant, const char *id,
                                       struct train_checkpoint **out, size_t *count_out, struct error *err);

/* --- routing: whether experts specialise
 * ---------------------------------------------------------------------- */

/* Of a job that runs or has run in this process. ST_NOT_FOUND: there is no such job, or nothing is known of
 * it. */
NODISCARD enum status jobs_routing(struct jobs *j, const char *tenant, const char *id,
                                   struct train_routing *out, struct error *err);
/* Of whatever trained the adapter last, in this process: a job or step-wise calls. */
NODISCARD enum status jobs_adapter_routing(struct jobs *j, const char *tenant, const char *adapter,
                                           struct train_routing *out, struct error *err);

/* --- step by step
 * ------------------------------------------------------------------------------------------------ An adapter
 * has at most one session: parameters, gradients, moments. The first forward_backward opens it with the
 * current version; it lasts until it is dropped, however often it publishes. Gradients add up until the next
 * optim_step. An idle session goes to disk after its last optim_step, as at jobs_close: gradients that no
 * optim_step used are lost, nothing else. Calls on one session are done in order. */

enum session_action { SESSION_FORWARD, SESSION_FORWARD_BACKWARD, SESSION_OPTIM_STEP, SESSION_PUBLISH };

struct session_tokens {
    size_t count;
    float *logprob; /* owned: of tokens 1 .. count, that is of each token but the first; 0 where its weight is
                       0 */
};
struct session_call;
struct session_result {
    enum status status;
    struct error error;
    bool opened;                                  /* this call opened the session anew */
    int64_t optim_steps;                          /* done in this session */
    char version_before[ADAPTER_VERSION_HEX + 1]; /* the session began with it */
    /* FORWARD, FORWARD_BACKWARD */
    double loss, objective; /* all together; without balance and contrast */
    double balance, contrast, similarity, cohesion;
    double margin,
        accuracy;   /* DPO: mean reward margin, share of pairs where chosen is preferred. NAN otherwise */
    double clipped; /* PPO: share of tokens whose ratio was clipped. NAN otherwise */
    double weight;  /* sum of weights */
    int64_t tokens;
    double seconds;
    size_t sequence_count;            /* one per example; two with DPO: chosen, rejected */
    struct session_tokens *sequences; /* owned by the call, until session_call_release */
    /* OPTIM_STEP */
    double grad_norm, learning_rate;
    /* PUBLISH */
    struct put_result put;
};

/* Filled in by the caller with what the action needs, zeroed otherwise; strings must last until `done`. */
struct session_call {
    enum session_action action;
    const char *tenant, *adapter;
    struct train_settings
        settings; /* FORWARD..: loss, reduction, balance, contrast.., dpo_beta, clip_low, clip_high, seed,
                     batch_tokens. OPTIM_STEP: learning_rate, beta1, beta2, eps, weight_decay, clip */
    const char *examples; /* JSON lines: dataset.h */
    size_t examples_size;
    const char *expected_version;         /* PUBLISH; NULL: any */
    void (*done)(struct session_call *c); /* on a thread of the jobs'; must not block. result is filled in */
    void *ctx;
    struct session_result result;
    struct session_call *next; /* these two are private */
    atomic_bool cancelled;
};
/* Queues the call: done comes exactly once, maybe before this returns. (quick) */
void session_start(struct jobs *j, struct session_call *c);
/* Ends the call soon, with ST_CANCELLED, if it still waits or runs: an optim_step or publish that has begun
 * is done. `done` comes as ever. (quick) */
void session_cancel(struct jobs *j, struct session_call *c);
void session_call_release(struct session_call *c); /* what its result owns; after done */
/* Forgets the session and what it has not published. ST_NOT_FOUND: there is none. ST_BUSY: a call waits or
 * runs. */
NODISCARD enum status session_drop(struct jobs *j, const char *tenant, const char *adapter,
                                   struct error *err);

struct jobs_stats {
    int queued, running, sessions;
    uint64_t steps, tokens, published, failed;
    double step_seconds; /* summed */
    size_t transposed_bytes,
        state_bytes; /* memory: transposed weights; parameters, moments and activations */
};
void jobs_stats(struct jobs *j, struct jobs_stats *out); /* (quick) */

#endif

/* What the handlers of calls about training share: submission, failures, and how jobs are written. */
#ifndef SERVER_TRAINING_H
#define SERVER_TRAINING_H

#include "api/response.h"
#include "api/training.h"
#include "server/adapters.h"
#include "server/service.h"
#include "training/jobs.h"
#include "training/params.h"

/* false, and the exchange is answered: this server does not train. */
bool training_ready(struct exchange *x);

/* A failure of the jobs'. What was not found is `missing`: an adapter, a file, a job, ... */
void training_failed(struct api_error *err, enum status st, const struct error *cause, const char *missing);

/* A call about what the path names, or about a page of a list. */
struct training_lookup {
    struct call call;
    char id[160];    /* the path's parameter */
    char after[160]; /* where the page begins; "": at the beginning */
    int limit;
};
struct training_lookup *training_lookup_of(struct call *c);
/* Both check training_ready first. The second reads `after` and `limit` of the query. */
void training_lookup_start(struct exchange *x, void (*work)(struct call *c));
void training_lookup_page(struct exchange *x, int limit, int limit_max, void (*work)(struct call *c));
/* What closes a page that list_begin opened; ids NULL where it is empty. */
void page_end(struct strbuf *out, const char *first_id, const char *last_id, bool more);

bool training_is_setting(const char *name);
/* Defaults, then what is in object (NULL: nothing). */
NODISCARD bool training_settings(const cJSON *object, struct train_settings *out, struct api_error *err);

/* Files, then the job; *existing as jobs_submit says. Blocks. */
NODISCARD bool training_submit(struct service *s, const struct train_request *r, char id_out[TRAIN_ID_MAX],
                               bool *existing, struct api_error *err);
/* The job's object as it is now, or err. Blocks. */
void training_write_job(struct service *s, const char *id, struct strbuf *out, struct api_error *err);

/* A new adapter that nothing has trained. ST_CONFLICT: the name is taken. Blocks. */
NODISCARD enum status adapter_create(struct service *s, const char *name, const struct fresh_adapter *shape,
                                     struct put_result *out, struct error *err);
/* What a new adapter is where nothing else is said. */
void fresh_default(const struct service *s, struct fresh_adapter *out);

/* A request that waits for a job or follows its steps. */
struct follow;
/* Ends them all: the jobs go on. */
void follow_end_all(struct service *s, const struct api_error *err);
void follow_ping_all(struct service *s);
/* Step-wise calls that still wait or run are ended soon. */
void session_cancel_all(struct service *s);

/* ------------------------------------------------------------------ JSON: train_json.c */

/* OpenAI's fine_tuning.job with members of our own. routing NULL: nothing is known of it. */
void train_job_write(struct strbuf *out, const struct train_job *job, const struct train_routing *routing);
/* OpenAI's fine_tuning.job.event. */
void train_event_write(struct strbuf *out, const char *job_id, const struct train_event *e);
void train_checkpoint_write(struct strbuf *out, const char *job_id, const struct train_checkpoint *c);
void train_file_write(struct strbuf *out, const struct train_file *f);
/* {"0.q_proj": [0.25, ..], ..}: shares of rows that chose each expert. */
void train_load_write(struct strbuf *out, const struct train_routing *r);
void session_result_write(struct strbuf *out, enum session_action action, const struct session_result *r);

#endif

/* Training as a service over a data folder of its own, on a small model. Every function fails the running test where it
 * cannot do its work. */
#ifndef TESTS_SUPPORT_TRAIN_SERVICE_H
#define TESTS_SUPPORT_TRAIN_SERVICE_H

#include "base/strbuf.h"
#include "tests/support/rig.h"
#include "tests/support/temp_folder.h"
#include "training/jobs.h"

#define TENANT "one"

struct train_service {
    struct rig rig;
    struct registry *registry;
    struct jobs *jobs;
};

/* The data folder of the running test. */
extern struct temp_folder train_service_folder;

/* config: what is not said by the folder and the model. */
void train_service_open(struct train_service *s, struct jobs_config config);
void train_service_close(struct train_service *s);
/* The two with a new folder that is gone afterwards, and an adapter "a" in it. */
void train_service_start(struct train_service *s);
void train_service_stop(struct train_service *s);

/* A new mixture of 4 experts. */
void train_service_adapter(struct train_service *s, const char *tenant, const char *name);
/* The adapter's current version and number of versions; false where it does not exist. */
bool train_service_look(struct train_service *s, const char *name, char version[ADAPTER_VERSION_HEX + 1],
                        int *count);
/* The adapter "a" has so many. */
void train_service_versions(struct train_service *s, int wanted);

/* To train "a" on these JSON lines, which must outlive it. */
struct train_request train_service_request(const struct strbuf *examples);
void train_service_submit(struct train_service *s, const struct train_request *r, char id[TRAIN_ID_MAX]);
/* The caller owes train_job_release. */
struct train_job train_service_job(struct train_service *s, const char *id);
/* The same when it has ended. */
struct train_job train_service_end(struct train_service *s, const char *id);
/* Waits until it has done so many steps, or ended. */
void train_service_await_step(struct train_service *s, const char *id, int64_t step);
void train_service_state(const struct train_job *job, enum train_state wanted);
/* How many events of a kind it has; their numbers ascend. */
int train_service_events(struct train_service *s, const char *id, const char *kind);
void train_service_pause(long ms);

#endif

#include "tests/support/train_service.h"

#include "tests/support/check.h"
#include "tests/support/train_set.h"
#include "training/publish.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

struct temp_folder train_service_folder;

void train_service_open(struct train_service *s, struct jobs_config config)
{
    struct error err;
    *s = (struct train_service){.rig = rig_open_at("models/gqa_tied.gguf", CPU_LEVEL_BEST, 2,
                                             (struct engine_config){.kv_bytes = 1 << 20})};
    struct registry_config registry = {.data_dir = train_service_folder.path, .device = s->rig.device};
    train_set_base(s->rig.engine, &registry.base);
    assert_ok(registry_open(&registry, &s->registry, &err), err);
    config.data_dir = train_service_folder.path;
    config.engine = s->rig.engine;
    config.device = s->rig.device;
    config.registry = s->registry;
    config.base = registry.base;
    assert_ok(jobs_open(&config, &s->jobs, &err), err);
}

void train_service_close(struct train_service *s)
{
    jobs_close(s->jobs);
    registry_close(s->registry);
    rig_close(&s->rig);
}

void train_service_adapter(struct train_service *s, const char *tenant, const char *name)
{
    struct fresh_adapter f = {.rank = 4, .experts = 4, .top_k = 2, .rule = GATE_TOPK, .alpha = 8, .seed = 3};
    struct adapter_bundle *bundle;
    struct adapter_base base;
    struct put_result put;
    struct error err;
    for (int p = 0; p < PROJ_COUNT; p++) f.target[p] = true;
    train_set_base(s->rig.engine, &base);
    assert_ok(bundle_fresh(&f, &base, &bundle, &err), err);
    assert_ok(bundle_publish(s->registry, tenant, name, bundle, &base, "", &put, &err), err);
    adapter_bundle_free(bundle);
}

void train_service_start(struct train_service *s)
{
    temp_folder_make(&train_service_folder);
    train_service_open(s, (struct jobs_config){0});
    train_service_adapter(s, TENANT, "a");
}

void train_service_stop(struct train_service *s)
{
    train_service_close(s);
    temp_folder_remove(&train_service_folder);
}

/* The adapter's current version and number of versions; false where it does not exist. */
bool train_service_look(struct train_service *s, const char *name, char version[ADAPTER_VERSION_HEX + 1], int *count)
{
    struct adapter_info info;
    if (registry_get(s->registry, TENANT, name, &info, NULL)) return false;
    memcpy(version, info.versions[0].record.version, ADAPTER_VERSION_HEX + 1);
    *count = info.version_count;
    adapter_info_release(&info);
    return true;
}

void train_service_versions(struct train_service *s, int wanted)
{
    char version[ADAPTER_VERSION_HEX + 1];
    int count;
    assert_true(train_service_look(s, "a", version, &count));
    assert_int_equal(count, wanted);
}

struct train_request train_service_request(const struct strbuf *examples)
{
    return (struct train_request){.adapter = "a",
                                  .settings = train_set_settings(),
                                  .examples = examples->data,
                                  .examples_size = examples->size};
}

void train_service_submit(struct train_service *s, const struct train_request *r, char id[TRAIN_ID_MAX])
{
    bool existing;
    struct error err;
    assert_ok(jobs_submit(s->jobs, TENANT, r, id, &existing, &err), err);
}

struct train_job train_service_job(struct train_service *s, const char *id)
{
    struct train_job job;
    struct error err;
    assert_ok(jobs_get(s->jobs, TENANT, id, &job, &err), err);
    return job;
}

void train_service_pause(long ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

/* Waits until the job has ended; the caller owes train_job_release. */
struct train_job train_service_end(struct train_service *s, const char *id)
{
    for (;;) {
        struct train_job job = train_service_job(s, id);
        if (train_state_ended(job.state)) return job;
        train_job_release(&job);
        train_service_pause(2);
    }
}

/* The same until it has done so many steps. */
void train_service_await_step(struct train_service *s, const char *id, int64_t step)
{
    for (;;) {
        struct train_job job = train_service_job(s, id);
        train_job_release(&job);
        if (job.step >= step || train_state_ended(job.state)) return;
        train_service_pause(1);
    }
}

void train_service_state(const struct train_job *job, enum train_state wanted)
{
    if (job->state != wanted)
        fail_msg("the job is %s, not %s: %s", train_state_name(job->state), train_state_name(wanted),
                 job->error.message);
}

int train_service_events(struct train_service *s, const char *id, const char *kind)
{
    struct train_event *events;
    struct error err;
    size_t n;
    bool ended;
    int found = 0;
    assert_ok(jobs_events(s->jobs, TENANT, id, 0, 10000, &events, &n, &ended, &err), err);
    for (size_t i = 0; i < n; i++) {
        found += strcmp(events[i].kind, kind) == 0;
        assert_true(i == 0 || events[i].number > events[i - 1].number);
        train_event_release(&events[i]);
    }
    free(events);
    return found;
}

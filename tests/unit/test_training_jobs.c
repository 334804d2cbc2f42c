/* Training as a service: jobs from the queue to a published version, over restarts and kills; files;
 * sessions. */
#include "tests/support/check.h"
#include "tests/support/temp_folder.h"
#include "tests/support/train_set.h"
#include "training/jobs.h"
#include "training/publish.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TENANT "one"

/* --- a data folder with an adapter "a", and the service over it --- */

struct service {
    struct rig rig;
    struct registry *registry;
    struct jobs *jobs;
};

static struct temp_folder folder;

static void service_open(struct service *s, struct jobs_config config)
{
    struct error err;
    *s = (struct service){.rig = rig_open_at("models/gqa_tied.gguf", CPU_LEVEL_BEST, 2,
                                             (struct engine_config){.kv_bytes = 1 << 20})};
    struct registry_config registry = {.data_dir = folder.path, .device = s->rig.device};
    train_set_base(s->rig.engine, &registry.base);
    assert_ok(registry_open(&registry, &s->registry, &err), err);
    config.data_dir = folder.path;
    config.engine = s->rig.engine;
    config.device = s->rig.device;
    config.registry = s->registry;
    config.base = registry.base;
    assert_ok(jobs_open(&config, &s->jobs, &err), err);
}

static void service_close(struct service *s)
{
    jobs_close(s->jobs);
    registry_close(s->registry);
    rig_close(&s->rig);
}

static void make_adapter(struct service *s, const char *tenant, const char *name)
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

static void start(struct service *s)
{
    temp_folder_make(&folder);
    service_open(s, (struct jobs_config){0});
    make_adapter(s, TENANT, "a");
}

static void stop(struct service *s)
{
    service_close(s);
    temp_folder_remove(&folder);
}

/* The adapter's current version and number of versions; false where it does not exist. */
static bool look(struct service *s, const char *name, char version[ADAPTER_VERSION_HEX + 1], int *count)
{
    struct adapter_info info;
    if (registry_get(s->registry, TENANT, name, &info, NULL)) return false;
    memcpy(version, info.versions[0].record.version, ADAPTER_VERSION_HEX + 1);
    *count = info.version_count;
    adapter_info_release(&info);
    return true;
}

static void assert_versions(struct service *s, int wanted)
{
    char version[ADAPTER_VERSION_HEX + 1];
    int count;
    assert_true(look(s, "a", version, &count));
    assert_int_equal(count, wanted);
}

/* --- jobs --- */

static struct train_request request_of(const struct strbuf *examples)
{
    return (struct train_request){.adapter = "a",
                                  .settings = train_set_settings(),
                                  .examples = examples->data,
                                  .examples_size = examples->size};
}

static void submit(struct service *s, const struct train_request *r, char id[TRAIN_ID_MAX])
{
    bool existing;
    struct error err;
    assert_ok(jobs_submit(s->jobs, TENANT, r, id, &existing, &err), err);
}

static struct train_job get(struct service *s, const char *id)
{
    struct train_job job;
    struct error err;
    assert_ok(jobs_get(s->jobs, TENANT, id, &job, &err), err);
    return job;
}

static void pause_ms(long ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

/* Waits until the job has ended; the caller owes train_job_release. */
static struct train_job end_of(struct service *s, const char *id)
{
    for (;;) {
        struct train_job job = get(s, id);
        if (train_state_ended(job.state)) return job;
        train_job_release(&job);
        pause_ms(2);
    }
}

/* The same until it has done so many steps. */
static void await_step(struct service *s, const char *id, int64_t step)
{
    for (;;) {
        struct train_job job = get(s, id);
        train_job_release(&job);
        if (job.step >= step || train_state_ended(job.state)) return;
        pause_ms(1);
    }
}

static void assert_state(const struct train_job *job, enum train_state wanted)
{
    if (job->state != wanted)
        fail_msg("the job is %s, not %s: %s", train_state_name(job->state), train_state_name(wanted),
                 job->error.message);
}

static void count_news(void *ctx) { atomic_fetch_add((atomic_int *)ctx, 1); }

static int count_events(struct service *s, const char *id, const char *kind)
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

static void a_job_publishes_what_it_learned(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct train_watch *watch;
    struct train_routing routing;
    struct train_checkpoint *checkpoints;
    struct error err;
    atomic_int news = 0;
    char id[TRAIN_ID_MAX], version[ADAPTER_VERSION_HEX + 1];
    size_t n;
    int count;
    start(&s);
    train_set_text(&examples);
    struct train_request r = request_of(&examples);
    r.metadata = "{\"x\": 1}";
    r.suffix = "mine";
    submit(&s, &r, id);
    assert_ok(jobs_watch(s.jobs, TENANT, id, count_news, &news, &watch, &err), err);
    struct train_job job = end_of(&s, id);
    assert_state(&job, TRAIN_SUCCEEDED);
    assert_int_equal(job.step, 8);
    assert_int_equal(job.steps, 8);
    assert_int_equal(job.examples, 22);
    assert_int_equal(job.held_out, 2);
    assert_true(job.loss_after < job.loss_before && job.loss > 0 && job.tokens > 0 && job.result);
    assert_string_equal(job.metadata, "{\"x\": 1}");
    assert_string_equal(job.suffix, "mine");
    assert_true(job.progress == 1 && job.started >= job.created && job.finished >= job.started);
    assert_true(look(&s, "a", version, &count) && count == 2);
    assert_string_equal(version, job.version_after);
    assert_string_not_equal(job.version_before, job.version_after);
    train_job_release(&job);
    while (atomic_load(&news) < 8) pause_ms(1); /* a step each at least */
    jobs_unwatch(watch);
    assert_int_equal(count_events(&s, id, "metrics"), 8);
    assert_int_equal(count_events(&s, id, "evaluation"), 2);
    assert_ok(jobs_checkpoints(s.jobs, TENANT, id, &checkpoints, &n, &err), err);
    assert_true(n == 1 && checkpoints[0].step == 8 && checkpoints[0].bytes > 0);
    free(checkpoints);
    assert_ok(jobs_adapter_routing(s.jobs, TENANT, "a", &routing, &err), err);
    assert_int_equal(routing.site_count, 14);
    double sum = 0;
    for (int e = 0; e < 4; e++) sum += routing.sites[0].share[e];
    assert_float_equal(sum, 2, 1e-9); /* every row chooses two */
    train_routing_release(&routing);

    struct adapter_info info;
    assert_ok(registry_get(s.registry, TENANT, "a", &info, &err), err);
    assert_int_equal(info.versions[0].record.source, VERSION_TRAIN);
    adapter_info_release(&info);
    strbuf_release(&examples);
    stop(&s);
}

static void bad_examples_are_told_with_their_line(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct train_upload *u;
    struct train_file file;
    struct error err = {0};
    char id[TRAIN_ID_MAX] = "";
    bool existing, more;
    struct train_job *list;
    size_t n;
    start(&s);
    for (int i = 0; i < 16; i++) strbuf_puts(&examples, "{\"text\": \"fine\"}\n");
    strbuf_puts(&examples, "{\"text\": oops}\n");
    struct train_request r = request_of(&examples);
    assert_refused(jobs_submit(s.jobs, TENANT, &r, id, &existing, &err), ST_INVALID, err,
                   "examples, line 17: not JSON");
    assert_ok(jobs_list(s.jobs, TENANT, NULL, NULL, 10, &list, &n, &more, &err), err);
    assert_int_equal(n, 0);
    free(list);

    assert_ok(train_upload_open(s.jobs, TENANT, &u, &err), err);
    assert_ok(train_upload_write(u, examples.data, examples.size, &err), err);
    assert_ok(train_upload_finish(u, "bad.jsonl", "fine-tune", &file, &err), err);
    r.examples = NULL;
    r.file_id = file.id;
    submit(&s, &r, id);
    struct train_job job = end_of(&s, id);
    assert_state(&job, TRAIN_FAILED);
    assert_non_null(strstr(job.error.message, "line 17: not JSON"));
    assert_int_equal(job.error.status, ST_INVALID);
    train_job_release(&job);
    assert_versions(&s, 1);
    strbuf_release(&examples);
    stop(&s);
}

static void requests_are_checked(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct error err = {0};
    char id[TRAIN_ID_MAX];
    bool existing;
    start(&s);
    train_set_text(&examples);
    const struct train_request good = request_of(&examples);
    struct train_request r = good;
#define REFUSED(wanted, message) \
    assert_refused(jobs_submit(s.jobs, TENANT, &r, id, &existing, &err), wanted, err, message)
    r.adapter = "nobody";
    REFUSED(ST_NOT_FOUND, "nobody");
    r = good;
    r.version = "0123456789abcdef";
    REFUSED(ST_NOT_FOUND, "");
    r = good;
    r.expected_version = "0123456789abcdef";
    REFUSED(ST_CONFLICT, "not the expected");
    r = good;
    r.examples = NULL;
    REFUSED(ST_INVALID, "give examples");
    r.file_id = "file-0";
    REFUSED(ST_NOT_FOUND, "file-0");
    r = good;
    r.metadata = "[1]";
    REFUSED(ST_INVALID, "metadata");
    r = good;
    r.settings.loss = LOSS_PPO;
    REFUSED(ST_UNSUPPORTED, "step-wise");
    r = good;
    r.idempotency_key = "";
    REFUSED(ST_INVALID, "idempotency_key");
    strbuf_release(&examples);
    stop(&s);
}

static void a_key_names_one_request(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct error err = {0};
    char id[TRAIN_ID_MAX], again[TRAIN_ID_MAX];
    bool existing;
    start(&s);
    train_set_text(&examples);
    struct train_request r = request_of(&examples);
    r.settings.publish = PUBLISH_MANUAL;
    r.settings.steps = 1;
    r.idempotency_key = "k";
    submit(&s, &r, id);
    assert_ok(jobs_submit(s.jobs, TENANT, &r, again, &existing, &err), err);
    assert_true(existing);
    assert_string_equal(id, again);
    r.settings.seed = 9;
    assert_refused(jobs_submit(s.jobs, TENANT, &r, again, &existing, &err), ST_CONFLICT, err,
                   "another request");
    r.idempotency_key = "other";
    submit(&s, &r, again);
    assert_string_not_equal(id, again);
    struct train_job job = end_of(&s, again);
    train_job_release(&job);
    strbuf_release(&examples);
    stop(&s);
}

static void publishing_is_as_asked(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct put_result put;
    struct error err = {0};
    char id[TRAIN_ID_MAX];
    start(&s);
    train_set_text(&examples);
    struct train_request r = request_of(&examples);
    r.settings.steps = 2;
    r.settings.publish = PUBLISH_MANUAL;
    submit(&s, &r, id);
    struct train_job job = end_of(&s, id);
    assert_state(&job, TRAIN_SUCCEEDED);
    assert_true(job.result && !job.version_after[0]);
    train_job_release(&job);
    assert_versions(&s, 1);
    assert_refused(jobs_publish(s.jobs, TENANT, id, "0123456789abcdef", &put, &err), ST_CONFLICT, err,
                   "expected");
    assert_ok(jobs_publish(s.jobs, TENANT, id, NULL, &put, &err), err);
    assert_versions(&s, 2);

    r.settings.publish = PUBLISH_ON_IMPROVEMENT;
    r.settings.learning_rate = 0; /* nothing moves, so nothing improves */
    submit(&s, &r, id);
    job = end_of(&s, id);
    assert_state(&job, TRAIN_SUCCEEDED);
    assert_non_null(strstr(job.error.message, "no better than before"));
    assert_int_equal(job.error.status, ST_OK);
    train_job_release(&job);
    assert_versions(&s, 2);
    strbuf_release(&examples);
    stop(&s);
}

static void a_cancelled_job_publishes_nothing(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct error err = {0};
    char running[3][TRAIN_ID_MAX];
    start(&s);
    train_set_text(&examples);
    struct train_request r = request_of(&examples);
    r.settings.steps = 100000;
    for (int i = 0; i < 3; i++) submit(&s, &r, running[i]); /* two run, one waits */
    await_step(&s, running[0], 2);
    await_step(&s, running[1], 2);
    struct train_job job = get(&s, running[2]);
    assert_state(&job, TRAIN_QUEUED);
    train_job_release(&job);
    for (int i = 2; i >= 0; i--) {
        assert_ok(jobs_cancel(s.jobs, TENANT, running[i], &err), err);
        job = end_of(&s, running[i]);
        assert_state(&job, TRAIN_CANCELLED);
        train_job_release(&job);
        assert_ok(jobs_cancel(s.jobs, TENANT, running[i], &err), err); /* again is fine */
    }
    assert_versions(&s, 1);
    r.settings.steps = 1;
    submit(&s, &r, running[0]);
    job = end_of(&s, running[0]);
    assert_state(&job, TRAIN_SUCCEEDED);
    train_job_release(&job);
    assert_refused(jobs_cancel(s.jobs, TENANT, running[0], &err), ST_CONFLICT, err,
                   "has ended already: succeeded");
    assert_ok(jobs_delete(s.jobs, TENANT, running[0], &err), err);
    assert_refused(jobs_get(s.jobs, TENANT, running[0], &job, &err), ST_NOT_FOUND, err, "no training job");
    strbuf_release(&examples);
    stop(&s);
}

static void a_deleted_adapter_stays_deleted(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct error err = {0};
    char id[2][TRAIN_ID_MAX], version[ADAPTER_VERSION_HEX + 1];
    int count;
    start(&s);
    train_set_text(&examples);
    struct train_request r = request_of(&examples);
    r.settings.steps = 60;
    submit(&s, &r, id[0]);
    await_step(&s, id[0], 2);
    assert_ok(registry_delete(s.registry, TENANT, "a", NULL, &err), err);
    struct train_job job = end_of(&s, id[0]);
    assert_state(&job, TRAIN_FAILED);
    assert_int_equal(job.error.status, ST_NOT_FOUND);
    train_job_release(&job);
    assert_false(look(&s, "a", version, &count));

    make_adapter(&s, TENANT, "a");
    submit(&s, &r, id[1]);
    await_step(&s, id[1], 2);
    assert_ok(registry_delete(s.registry, TENANT, "a", NULL, &err), err);
    make_adapter(&s, TENANT, "a"); /* another of that name */
    job = end_of(&s, id[1]);
    assert_state(&job, TRAIN_FAILED);
    assert_non_null(strstr(job.error.message, "was deleted"));
    train_job_release(&job);
    assert_versions(&s, 1);
    strbuf_release(&examples);
    stop(&s);
}

static void tenants_do_not_see_each_other(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct train_upload *u;
    struct train_file file, *files;
    struct train_job job, *list;
    struct train_event *events;
    struct train_routing routing;
    struct error err = {0};
    char id[TRAIN_ID_MAX];
    size_t n;
    bool more, ended;
    start(&s);
    train_set_text(&examples);
    struct train_request r = request_of(&examples);
    r.settings.steps = 1;
    submit(&s, &r, id);
    job = end_of(&s, id);
    train_job_release(&job);
    assert_ok(train_upload_open(s.jobs, TENANT, &u, &err), err);
    assert_ok(train_upload_write(u, "{}", 2, &err), err);
    assert_ok(train_upload_finish(u, "x", "fine-tune", &file, &err), err);
    int fd;
    assert_int_equal(jobs_get(s.jobs, "two", id, &job, &err), ST_NOT_FOUND);
    assert_int_equal(jobs_cancel(s.jobs, "two", id, &err), ST_NOT_FOUND);
    assert_int_equal(jobs_events(s.jobs, "two", id, 0, 9, &events, &n, &ended, &err), ST_NOT_FOUND);
    assert_int_equal(jobs_routing(s.jobs, "two", id, &routing, &err), ST_NOT_FOUND);
    assert_int_equal(jobs_adapter_routing(s.jobs, "two", "a", &routing, &err), ST_NOT_FOUND);
    assert_int_equal(jobs_file_get(s.jobs, "two", file.id, &file, &err), ST_NOT_FOUND);
    assert_int_equal(jobs_file_content(s.jobs, "two", file.id, &fd, &n, &err), ST_NOT_FOUND);
    assert_int_equal(jobs_file_delete(s.jobs, "two", file.id, &err), ST_NOT_FOUND);
    assert_int_equal(jobs_list(s.jobs, "two", NULL, NULL, 9, &list, &n, &more, &err), ST_OK);
    assert_true(n == 0 && !more);
    free(list);
    assert_int_equal(jobs_file_list(s.jobs, "two", NULL, 9, &files, &n, &more, &err), ST_OK);
    assert_int_equal(n, 0);
    free(files);
    strbuf_release(&examples);
    stop(&s);
}

/* --- files and limits --- */

static void files_have_limits(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct train_upload *u;
    struct train_file file[2], *files;
    struct error err = {0};
    char id[TRAIN_ID_MAX], text[8] = "";
    size_t n, bytes;
    bool more, existing;
    int fd;
    temp_folder_make(&folder);
    service_open(&s, (struct jobs_config){.file_bytes_max = 4, .tenant_bytes_max = 7, .queue_max = 1});
    make_adapter(&s, TENANT, "a");
    assert_ok(train_upload_open(s.jobs, TENANT, &u, &err), err);
    assert_ok(train_upload_write(u, "1234", 4, &err), err);
    assert_refused(train_upload_write(u, "5", 1, &err), ST_TOO_LARGE, err, "4 bytes at most");
    assert_ok(train_upload_finish(u, "first", "fine-tune", &file[0], &err), err);
    assert_ok(train_upload_open(s.jobs, TENANT, &u, &err), err);
    assert_ok(train_upload_write(u, "123", 3, &err), err);
    assert_refused(train_upload_write(u, "4", 1, &err), ST_FULL, err, "7 bytes");
    assert_ok(train_upload_finish(u, "second", "fine-tune", &file[1], &err), err);
    assert_ok(train_upload_open(s.jobs, TENANT, &u, &err), err);
    assert_refused(train_upload_finish(u, "third", "assistants", &file[1], &err), ST_INVALID, err, "purpose");
    assert_ok(train_upload_open(s.jobs, TENANT, &u, &err), err);
    train_upload_drop(u);
    assert_ok(jobs_file_list(s.jobs, TENANT, NULL, 1, &files, &n, &more, &err), err);
    assert_true(n == 1 && more && strcmp(files[0].name, "second") == 0);
    assert_ok(jobs_file_content(s.jobs, TENANT, file[0].id, &fd, &bytes, &err), err);
    assert_ok(jobs_file_delete(s.jobs, TENANT, file[0].id, &err), err);
    assert_true(read(fd, text, sizeof text) == 4 && bytes == 4);
    close(fd);
    free(files);

    strbuf_puts(&examples, "[]\n"); /* fits, and is no example */
    struct train_request r = request_of(&examples);
    assert_int_equal(jobs_submit(s.jobs, TENANT, &r, id, &existing, &err), ST_INVALID);
    strbuf_release(&examples);
    service_close(&s);
    service_open(&s, (struct jobs_config){.queue_max = 1});
    train_set_text(&examples);
    r = request_of(&examples);
    r.settings.steps = 100000;
    submit(&s, &r, id);
    char second[TRAIN_ID_MAX];
    assert_refused(jobs_submit(s.jobs, TENANT, &r, second, &existing, &err), ST_FULL, err, "1 training jobs");
    assert_ok(jobs_cancel(s.jobs, TENANT, id, &err), err);
    strbuf_release(&examples);
    stop(&s);
}

static void only_the_last_jobs_are_remembered(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct train_job *list;
    struct train_checkpoint *checkpoints;
    struct error err;
    char id[3][TRAIN_ID_MAX];
    size_t n;
    bool more;
    temp_folder_make(&folder);
    service_open(&s, (struct jobs_config){.keep_jobs = 2});
    make_adapter(&s, TENANT, "a");
    train_set_text(&examples);
    struct train_request r = request_of(&examples);
    r.settings.publish = PUBLISH_MANUAL;
    for (int i = 0; i < 3; i++) {
        r.settings.steps = 1 + i;
        submit(&s, &r, id[i]);
        struct train_job job = end_of(&s, id[i]);
        train_job_release(&job);
    }
    service_close(&s); /* the last one's end is over */
    service_open(&s, (struct jobs_config){.keep_jobs = 2, .keep_seconds = -1});
    assert_ok(jobs_list(s.jobs, TENANT, "a", NULL, 10, &list, &n, &more, &err), err);
    assert_true(n == 2 && strcmp(list[0].id, id[2]) == 0 && strcmp(list[1].id, id[1]) == 0);
    for (size_t i = 0; i < n; i++) {
        assert_false(list[i].result); /* is over its time, as its checkpoints */
        train_job_release(&list[i]);
    }
    free(list);
    assert_ok(jobs_checkpoints(s.jobs, TENANT, id[2], &checkpoints, &n, &err), err);
    assert_int_equal(n, 0);
    free(checkpoints);
    assert_int_equal(file_count(path_in(folder.path, "training/jobs")), 0);
    strbuf_release(&examples);
    stop(&s);
}

static void tenants_take_turns(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct error err;
    char mine[3][TRAIN_ID_MAX], theirs[TRAIN_ID_MAX];
    bool existing;
    temp_folder_make(&folder);
    service_open(&s, (struct jobs_config){.running_max = 1});
    make_adapter(&s, TENANT, "a");
    make_adapter(&s, "two", "a");
    train_set_text(&examples);
    struct train_request r = request_of(&examples);
    r.settings.publish = PUBLISH_MANUAL;
    r.settings.steps = 40;
    for (int i = 0; i < 3; i++) submit(&s, &r, mine[i]);
    await_step(&s, mine[0], 1);
    assert_ok(jobs_submit(s.jobs, "two", &r, theirs, &existing, &err), err);
    struct train_job job = end_of(&s, mine[1]); /* came before, and is taken after */
    train_job_release(&job);
    assert_ok(jobs_get(s.jobs, "two", theirs, &job, &err), err);
    assert_state(&job, TRAIN_SUCCEEDED);
    train_job_release(&job);
    strbuf_release(&examples);
    stop(&s);
}

static void a_job_that_is_not_finite_fails(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct adapter_bundle *bundle;
    struct adapter_base base;
    struct put_result put;
    struct error err;
    char id[TRAIN_ID_MAX];
    struct fresh_adapter f = {.rank = 2, .experts = 1, .alpha = 2, .target = {true}, .seed = 3};
    temp_folder_make(&folder);
    service_open(&s, (struct jobs_config){0});
    train_set_base(s.rig.engine, &base);
    assert_ok(bundle_fresh(&f, &base, &bundle, &err), err);
    /* B is zero, so this changes no output, but the gradient of B overflows. */
    float *a = (float *)(uintptr_t)bundle->sites[PROJ_Q]->a[0];
    for (size_t i = 0; i < 2 * base.d_in[PROJ_Q]; i++) a[i] *= 1e37f;
    assert_ok(bundle_publish(s.registry, TENANT, "a", bundle, &base, "", &put, &err), err);
    adapter_bundle_free(bundle);
    train_set_text(&examples);
    struct train_request r = request_of(&examples);
    submit(&s, &r, id);
    struct train_job job = end_of(&s, id);
    assert_state(&job, TRAIN_FAILED);
    assert_int_equal(job.error.status, ST_REJECTED);
    assert_non_null(strstr(job.error.message, "step 1: the gradient is not finite"));
    train_job_release(&job);
    assert_versions(&s, 1);
    strbuf_release(&examples);
    stop(&s);
}

/* --- restarts --- */

static void leftovers_are_cleared_away(void **state)
{
    (void)state;
    static const char *const folders[] = {"training/files", "training/jobs", "training/sessions",
                                          "training/staging"};
    struct service s;
    start(&s);
    service_close(&s);
    for (int i = 0; i < 4; i++) file_write(path_in(folder.path, folders[i]), "left", "x", 1);
    service_open(&s, (struct jobs_config){0});
    for (int i = 0; i < 4; i++) assert_int_equal(file_count(path_in(folder.path, folders[i])), 0);
    stop(&s);
}

#define RESTART_STEPS 30

static struct train_request long_request(const struct strbuf *examples)
{
    struct train_request r = request_of(examples);
    r.settings.steps = RESTART_STEPS;
    r.settings.checkpoint_steps = 3;
    r.settings.schedule = SCHEDULE_COSINE;
    return r;
}

/* The version that an uninterrupted run publishes: the hash of its bytes. */
static void uninterrupted(char version[ADAPTER_VERSION_HEX + 1])
{
    struct service s;
    struct strbuf examples = {0};
    char id[TRAIN_ID_MAX];
    start(&s);
    train_set_text(&examples);
    struct train_request r = long_request(&examples);
    submit(&s, &r, id);
    struct train_job job = end_of(&s, id);
    assert_state(&job, TRAIN_SUCCEEDED);
    memcpy(version, job.version_after, ADAPTER_VERSION_HEX + 1);
    train_job_release(&job);
    strbuf_release(&examples);
    stop(&s);
}

static void a_closed_service_goes_on(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    char id[TRAIN_ID_MAX], wanted[ADAPTER_VERSION_HEX + 1];
    uninterrupted(wanted);
    start(&s);
    train_set_text(&examples);
    struct train_request r = long_request(&examples);
    submit(&s, &r, id);
    for (int64_t step = 4; step < RESTART_STEPS; step += 9) {
        await_step(&s, id, step);
        service_close(&s);
        service_open(&s, (struct jobs_config){0});
    }
    struct train_job job = end_of(&s, id);
    assert_state(&job, TRAIN_SUCCEEDED);
    assert_string_equal(job.version_after, wanted);
    train_job_release(&job);
    assert_versions(&s, 2);
    strbuf_release(&examples);
    stop(&s);
}

/* A process that is killed after a while; true if it came to the job's end before. */
static bool run_and_kill(const char *id, long ms)
{
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct service s;
        service_open(&s, (struct jobs_config){0});
        struct train_job job = end_of(&s, id);
        _exit(job.state == TRAIN_SUCCEEDED ? 0 : 1);
    }
    int status = 0;
    for (long waited = 0; waited < ms; waited++) {
        if (waitpid(child, &status, WNOHANG) == child) {
            assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
            return true;
        }
        pause_ms(1);
    }
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, &status, 0), child);
    return false;
}

static void submit_in_a_process(char id[TRAIN_ID_MAX])
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct service s;
        struct strbuf examples = {0};
        service_open(&s, (struct jobs_config){0});
        make_adapter(&s, TENANT, "a");
        train_set_text(&examples);
        struct train_request r = long_request(&examples);
        submit(&s, &r, id);
        _exit(write(ends[1], id, TRAIN_ID_MAX) == TRAIN_ID_MAX ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_int_equal(read(ends[0], id, TRAIN_ID_MAX), TRAIN_ID_MAX);
    close(ends[0]);
    close(ends[1]);
}

/* Kills at moments that move through opening, reading, steps, checkpoints and publishing. */
static void a_killed_service_goes_on(void **state)
{
    (void)state;
    struct service s;
    char id[TRAIN_ID_MAX], wanted[ADAPTER_VERSION_HEX + 1];
    uninterrupted(wanted);
    temp_folder_make(&folder);
    submit_in_a_process(id);
    bool ended = false;
    for (long ms = 20; !ended && ms < 60000; ms += 17 + ms / 3) ended = run_and_kill(id, ms);
    assert_true(ended);
    service_open(&s, (struct jobs_config){0});
    struct train_job job = get(&s, id);
    assert_state(&job, TRAIN_SUCCEEDED);
    assert_string_equal(job.version_after, wanted);
    assert_int_equal(job.step, RESTART_STEPS);
    train_job_release(&job);
    assert_versions(&s, 2);
    stop(&s);
}

/* The process is killed whenever the job has begun, before its first checkpoint. */
static void run_until_begun(const char *id)
{
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct service s;
        service_open(&s, (struct jobs_config){0});
        for (;;) {
            struct train_job job = get(&s, id);
            train_job_release(&job);
            if (job.state == TRAIN_RUNNING || train_state_ended(job.state)) _exit(0);
            pause_ms(1);
        }
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void a_job_that_ends_the_process_is_given_up(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    char id[TRAIN_ID_MAX];
    start(&s);
    train_set_text(&examples);
    struct train_request r = request_of(&examples);
    r.settings.steps = 100000;
    submit(&s, &r, id);
    await_step(&s, id, 1);
    service_close(&s); /* in good order: that counts for nothing */
    strbuf_release(&examples);
    for (int i = 0; i < 10; i++) run_until_begun(id);
    service_open(&s, (struct jobs_config){0});
    struct train_job job = end_of(&s, id);
    assert_state(&job, TRAIN_FAILED);
    assert_non_null(strstr(job.error.message, "ended 10 times"));
    train_job_release(&job);
    assert_versions(&s, 1);
    stop(&s);
}

/* --- step by step --- */

static void signal_done(struct session_call *c) { atomic_store((atomic_bool *)c->ctx, true); }

static enum status call(struct service *s, enum session_action action, const struct train_settings *settings,
                        const struct strbuf *examples, struct session_call *c)
{
    atomic_bool done = false;
    *c = (struct session_call){.action = action,
                               .tenant = TENANT,
                               .adapter = "a",
                               .settings = *settings,
                               .done = signal_done,
                               .ctx = &done};
    if (examples) {
        c->examples = examples->data;
        c->examples_size = examples->size;
    }
    session_start(s->jobs, c);
    while (!atomic_load(&done)) pause_ms(1);
    return c->result.status;
}

/* Some steps; the loss before the last one. */
static double loop(struct service *s, const struct train_settings *settings, const struct strbuf *examples,
                   int steps)
{
    struct session_call c;
    double loss = 0;
    for (int i = 0; i < steps; i++) {
        assert_ok(call(s, SESSION_FORWARD_BACKWARD, settings, examples, &c), c.result.error);
        loss = c.result.objective;
        session_call_release(&c);
        assert_ok(call(s, SESSION_OPTIM_STEP, settings, NULL, &c), c.result.error);
        assert_true(c.result.grad_norm > 0);
    }
    return loss;
}

static void a_session_trains_and_publishes(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct session_call c;
    struct error err = {0};
    struct train_settings settings = train_set_settings();
    start(&s);
    train_set_text(&examples);
    assert_int_equal(call(&s, SESSION_OPTIM_STEP, &settings, NULL, &c), ST_CONFLICT);
    assert_ok(call(&s, SESSION_FORWARD_BACKWARD, &settings, &examples, &c), c.result.error);
    assert_true(c.result.opened && c.result.optim_steps == 0 && c.result.version_before[0]);
    assert_int_equal(c.result.sequence_count, TRAIN_SET_EXAMPLES);
    assert_int_equal(c.result.sequences[0].count, 5);
    assert_true(c.result.sequences[3].logprob[4] < 0 && c.result.sequences[3].logprob[0] == 0);
    double first = c.result.objective, mean = 0;
    for (int i = 0; i < TRAIN_SET_EXAMPLES; i++)
        for (int k = 2; k < 5; k++)
            mean -= (double)c.result.sequences[i].logprob[k] / (3 * TRAIN_SET_EXAMPLES);
    assert_float_equal(first, mean, 1e-6); /* over batches, it is still the mean over all */
    session_call_release(&c);
    assert_ok(call(&s, SESSION_OPTIM_STEP, &settings, NULL, &c), c.result.error);
    assert_int_equal(call(&s, SESSION_OPTIM_STEP, &settings, NULL, &c),
                     ST_CONFLICT); /* the gradients are used up */
    assert_true(loop(&s, &settings, &examples, 6) < 0.9 * first);
    assert_versions(&s, 1);
    assert_ok(call(&s, SESSION_PUBLISH, &settings, NULL, &c), c.result.error);
    assert_int_equal(c.result.optim_steps, 7);
    assert_versions(&s, 2);
    assert_ok(session_drop(s.jobs, TENANT, "a", &err), err);
    assert_int_equal(session_drop(s.jobs, TENANT, "a", &err), ST_NOT_FOUND);
    assert_int_equal(call(&s, SESSION_PUBLISH, &settings, NULL, &c), ST_CONFLICT);
    strbuf_release(&examples);
    stop(&s);
}

static void a_session_survives_on_disk(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct session_call c;
    struct train_settings settings = train_set_settings();
    char version[2][ADAPTER_VERSION_HEX + 1];
    train_set_text(&examples);
    for (int round = 0; round < 2; round++) {
        start(&s);
        (void)loop(&s, &settings, &examples, 3);
        if (round) {
            service_close(&s);
            service_open(&s, (struct jobs_config){.session_seconds = 0.001});
            pause_ms(1500); /* it leaves memory, and comes back */
        }
        (void)loop(&s, &settings, &examples, 2);
        assert_ok(call(&s, SESSION_PUBLISH, &settings, NULL, &c), c.result.error);
        memcpy(version[round], c.result.put.version, sizeof version[round]);
        stop(&s);
    }
    assert_string_equal(version[0], version[1]);
    strbuf_release(&examples);
}

static void a_session_learns_preferences(void **state)
{
    (void)state;
    struct service s;
    struct strbuf pairs = {0};
    struct session_call c;
    struct train_settings settings = train_set_settings();
    settings.loss = LOSS_DPO;
    start(&s);
    train_set_pairs(&pairs);
    (void)loop(&s, &settings, &pairs, 5);
    assert_ok(call(&s, SESSION_FORWARD, &settings, &pairs, &c), c.result.error);
    assert_true(c.result.margin > 0.01 && c.result.objective < log(2) && c.result.accuracy > 0.8);
    assert_int_equal(c.result.sequence_count, 2 * TRAIN_SET_EXAMPLES);
    session_call_release(&c);
    strbuf_release(&pairs);
    stop(&s);
}

static void a_session_tells_its_mistakes(void **state)
{
    (void)state;
    struct service s;
    struct strbuf examples = {0};
    struct session_call c;
    struct train_settings settings = train_set_settings();
    start(&s);
    strbuf_puts(&examples, "{\"tokens\": [1, 2]}\n{\"tokens\": [1]}\n");
    assert_refused(call(&s, SESSION_FORWARD_BACKWARD, &settings, &examples, &c), ST_INVALID, c.result.error,
                   "examples, line 2: a sequence needs");
    session_call_release(&c);
    settings.loss = LOSS_PPO;
    assert_refused(call(&s, SESSION_FORWARD_BACKWARD, &settings, &examples, &c), ST_INVALID, c.result.error,
                   "examples, line 1: 'logprobs'");
    session_call_release(&c);
    strbuf_release(&examples);
    stop(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_job_publishes_what_it_learned),
        cmocka_unit_test(bad_examples_are_told_with_their_line),
        cmocka_unit_test(requests_are_checked),
        cmocka_unit_test(a_key_names_one_request),
        cmocka_unit_test(publishing_is_as_asked),
        cmocka_unit_test(a_cancelled_job_publishes_nothing),
        cmocka_unit_test(a_deleted_adapter_stays_deleted),
        cmocka_unit_test(tenants_do_not_see_each_other),
        cmocka_unit_test(files_have_limits),
        cmocka_unit_test(only_the_last_jobs_are_remembered),
        cmocka_unit_test(tenants_take_turns),
        cmocka_unit_test(a_job_that_is_not_finite_fails),
        cmocka_unit_test(leftovers_are_cleared_away),
        cmocka_unit_test(a_closed_service_goes_on),
        cmocka_unit_test(a_killed_service_goes_on),
        cmocka_unit_test(a_job_that_ends_the_process_is_given_up),
        cmocka_unit_test(a_session_trains_and_publishes),
        cmocka_unit_test(a_session_survives_on_disk),
        cmocka_unit_test(a_session_learns_preferences),
        cmocka_unit_test(a_session_tells_its_mistakes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

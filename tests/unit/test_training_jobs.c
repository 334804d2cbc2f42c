/* Jobs from the queue to a published version; files; limits. */
#include "tests/support/check.h"
#include "tests/support/train_service.h"
#include "tests/support/train_set.h"
#include "training/publish.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void count_news(void *ctx) { atomic_fetch_add((atomic_int *)ctx, 1); }

static void a_job_publishes_what_it_learned(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct train_watch *watch;
    struct train_routing routing;
    struct train_checkpoint *checkpoints;
    struct error err;
    atomic_int news = 0;
    char id[TRAIN_ID_MAX], version[ADAPTER_VERSION_HEX + 1];
    size_t n;
    int count;
    train_service_start(&s);
    train_set_text(&examples);
    struct train_request r = train_service_request(&examples);
    r.metadata = "{\"x\": 1}";
    r.suffix = "mine";
    train_service_submit(&s, &r, id);
    assert_ok(jobs_watch(s.jobs, TENANT, id, count_news, &news, &watch, &err), err);
    struct train_job job = train_service_end(&s, id);
    train_service_state(&job, TRAIN_SUCCEEDED);
    assert_int_equal(job.step, 8);
    assert_int_equal(job.steps, 8);
    assert_int_equal(job.examples, 22);
    assert_int_equal(job.held_out, 2);
    assert_true(job.loss_after < job.loss_before && job.loss > 0 && job.tokens > 0 && job.result);
    assert_string_equal(job.metadata, "{\"x\": 1}");
    assert_string_equal(job.suffix, "mine");
    assert_true(job.progress == 1 && job.started >= job.created && job.finished >= job.started);
    assert_true(train_service_look(&s, "a", version, &count) && count == 2);
    assert_string_equal(version, job.version_after);
    assert_string_not_equal(job.version_before, job.version_after);
    train_job_release(&job);
    while (atomic_load(&news) < 8) train_service_pause(1); /* a step each at least */
    jobs_unwatch(watch);
    assert_int_equal(train_service_events(&s, id, "metrics"), 8);
    assert_int_equal(train_service_events(&s, id, "evaluation"), 2);
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
    train_service_stop(&s);
}

static void bad_examples_are_told_with_their_line(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct train_upload *u;
    struct train_file file;
    struct error err = {0};
    char id[TRAIN_ID_MAX] = "";
    bool existing, more;
    struct train_job *list;
    size_t n;
    train_service_start(&s);
    for (int i = 0; i < 16; i++) strbuf_puts(&examples, "{\"text\": \"fine\"}\n");
    strbuf_puts(&examples, "{\"text\": oops}\n");
    struct train_request r = train_service_request(&examples);
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
    train_service_submit(&s, &r, id);
    struct train_job job = train_service_end(&s, id);
    train_service_state(&job, TRAIN_FAILED);
    assert_non_null(strstr(job.error.message, "line 17: not JSON"));
    assert_int_equal(job.error.status, ST_INVALID);
    train_job_release(&job);
    train_service_versions(&s, 1);
    strbuf_release(&examples);
    train_service_stop(&s);
}

static void requests_are_checked(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct error err = {0};
    char id[TRAIN_ID_MAX];
    bool existing;
    train_service_start(&s);
    train_set_text(&examples);
    const struct train_request good = train_service_request(&examples);
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
    train_service_stop(&s);
}

static void a_key_names_one_request(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct error err = {0};
    char id[TRAIN_ID_MAX], again[TRAIN_ID_MAX];
    bool existing;
    train_service_start(&s);
    train_set_text(&examples);
    struct train_request r = train_service_request(&examples);
    r.settings.publish = PUBLISH_MANUAL;
    r.settings.steps = 1;
    r.idempotency_key = "k";
    train_service_submit(&s, &r, id);
    assert_ok(jobs_submit(s.jobs, TENANT, &r, again, &existing, &err), err);
    assert_true(existing);
    assert_string_equal(id, again);
    r.settings.seed = 9;
    assert_refused(jobs_submit(s.jobs, TENANT, &r, again, &existing, &err), ST_CONFLICT, err,
                   "another request");
    r.idempotency_key = "other";
    train_service_submit(&s, &r, again);
    assert_string_not_equal(id, again);
    struct train_job job = train_service_end(&s, again);
    train_job_release(&job);
    strbuf_release(&examples);
    train_service_stop(&s);
}

static void publishing_is_as_asked(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct put_result put;
    struct error err = {0};
    char id[TRAIN_ID_MAX];
    train_service_start(&s);
    train_set_text(&examples);
    struct train_request r = train_service_request(&examples);
    r.settings.steps = 2;
    r.settings.publish = PUBLISH_MANUAL;
    train_service_submit(&s, &r, id);
    struct train_job job = train_service_end(&s, id);
    train_service_state(&job, TRAIN_SUCCEEDED);
    assert_true(job.result && !job.version_after[0]);
    train_job_release(&job);
    train_service_versions(&s, 1);
    assert_refused(jobs_publish(s.jobs, TENANT, id, "0123456789abcdef", &put, &err), ST_CONFLICT, err,
                   "expected");
    assert_ok(jobs_publish(s.jobs, TENANT, id, NULL, &put, &err), err);
    train_service_versions(&s, 2);

    r.settings.publish = PUBLISH_ON_IMPROVEMENT;
    r.settings.learning_rate = 0; /* nothing moves, so nothing improves */
    train_service_submit(&s, &r, id);
    job = train_service_end(&s, id);
    train_service_state(&job, TRAIN_SUCCEEDED);
    assert_non_null(strstr(job.error.message, "no better than before"));
    assert_int_equal(job.error.status, ST_OK);
    train_job_release(&job);
    train_service_versions(&s, 2);
    strbuf_release(&examples);
    train_service_stop(&s);
}

static void a_cancelled_job_publishes_nothing(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct error err = {0};
    char running[3][TRAIN_ID_MAX];
    train_service_start(&s);
    train_set_text(&examples);
    struct train_request r = train_service_request(&examples);
    r.settings.steps = 100000;
    for (int i = 0; i < 3; i++) train_service_submit(&s, &r, running[i]); /* two run, one waits */
    train_service_await_step(&s, running[0], 2);
    train_service_await_step(&s, running[1], 2);
    struct train_job job = train_service_job(&s, running[2]);
    train_service_state(&job, TRAIN_QUEUED);
    train_job_release(&job);
    for (int i = 2; i >= 0; i--) {
        assert_ok(jobs_cancel(s.jobs, TENANT, running[i], &err), err);
        job = train_service_end(&s, running[i]);
        train_service_state(&job, TRAIN_CANCELLED);
        train_job_release(&job);
        assert_ok(jobs_cancel(s.jobs, TENANT, running[i], &err), err); /* again is fine */
    }
    train_service_versions(&s, 1);
    r.settings.steps = 1;
    train_service_submit(&s, &r, running[0]);
    job = train_service_end(&s, running[0]);
    train_service_state(&job, TRAIN_SUCCEEDED);
    train_job_release(&job);
    assert_refused(jobs_cancel(s.jobs, TENANT, running[0], &err), ST_CONFLICT, err,
                   "has ended already: succeeded");
    assert_ok(jobs_delete(s.jobs, TENANT, running[0], &err), err);
    assert_refused(jobs_get(s.jobs, TENANT, running[0], &job, &err), ST_NOT_FOUND, err, "no training job");
    strbuf_release(&examples);
    train_service_stop(&s);
}

static void a_deleted_adapter_stays_deleted(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct error err = {0};
    char id[2][TRAIN_ID_MAX], version[ADAPTER_VERSION_HEX + 1];
    int count;
    train_service_start(&s);
    train_set_text(&examples);
    struct train_request r = train_service_request(&examples);
    r.settings.steps = 60;
    train_service_submit(&s, &r, id[0]);
    train_service_await_step(&s, id[0], 2);
    assert_ok(registry_delete(s.registry, TENANT, "a", NULL, &err), err);
    struct train_job job = train_service_end(&s, id[0]);
    train_service_state(&job, TRAIN_FAILED);
    assert_int_equal(job.error.status, ST_NOT_FOUND);
    train_job_release(&job);
    assert_false(train_service_look(&s, "a", version, &count));

    train_service_adapter(&s, TENANT, "a");
    train_service_submit(&s, &r, id[1]);
    train_service_await_step(&s, id[1], 2);
    assert_ok(registry_delete(s.registry, TENANT, "a", NULL, &err), err);
    train_service_adapter(&s, TENANT, "a"); /* another of that name */
    job = train_service_end(&s, id[1]);
    train_service_state(&job, TRAIN_FAILED);
    assert_non_null(strstr(job.error.message, "was deleted"));
    train_job_release(&job);
    train_service_versions(&s, 1);
    strbuf_release(&examples);
    train_service_stop(&s);
}

static void tenants_do_not_see_each_other(void **state)
{
    (void)state;
    struct train_service s;
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
    train_service_start(&s);
    train_set_text(&examples);
    struct train_request r = train_service_request(&examples);
    r.settings.steps = 1;
    train_service_submit(&s, &r, id);
    job = train_service_end(&s, id);
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
    train_service_stop(&s);
}

/* --- files and limits --- */

static void files_have_limits(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct train_upload *u;
    struct train_file file[2], *files;
    struct error err = {0};
    char id[TRAIN_ID_MAX], text[8] = "";
    size_t n, bytes;
    bool more, existing;
    int fd;
    temp_folder_make(&train_service_folder);
    train_service_open(&s, (struct jobs_config){.file_bytes_max = 4, .tenant_bytes_max = 7, .queue_max = 1});
    train_service_adapter(&s, TENANT, "a");
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
    struct train_request r = train_service_request(&examples);
    assert_int_equal(jobs_submit(s.jobs, TENANT, &r, id, &existing, &err), ST_INVALID);
    strbuf_release(&examples);
    train_service_close(&s);
    train_service_open(&s, (struct jobs_config){.queue_max = 1});
    train_set_text(&examples);
    r = train_service_request(&examples);
    r.settings.steps = 100000;
    train_service_submit(&s, &r, id);
    char second[TRAIN_ID_MAX];
    assert_refused(jobs_submit(s.jobs, TENANT, &r, second, &existing, &err), ST_FULL, err, "1 training jobs");
    assert_ok(jobs_cancel(s.jobs, TENANT, id, &err), err);
    strbuf_release(&examples);
    train_service_stop(&s);
}

static void only_the_last_jobs_are_remembered(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct train_job *list;
    struct train_checkpoint *checkpoints;
    struct error err;
    char id[3][TRAIN_ID_MAX];
    size_t n;
    bool more;
    temp_folder_make(&train_service_folder);
    train_service_open(&s, (struct jobs_config){.keep_jobs = 2});
    train_service_adapter(&s, TENANT, "a");
    train_set_text(&examples);
    struct train_request r = train_service_request(&examples);
    r.settings.publish = PUBLISH_MANUAL;
    for (int i = 0; i < 3; i++) {
        r.settings.steps = 1 + i;
        train_service_submit(&s, &r, id[i]);
        struct train_job job = train_service_end(&s, id[i]);
        train_job_release(&job);
    }
    train_service_close(&s); /* the last one's end is over */
    train_service_open(&s, (struct jobs_config){.keep_jobs = 2, .keep_seconds = -1});
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
    assert_int_equal(file_count(path_in(train_service_folder.path, "training/jobs")), 0);
    strbuf_release(&examples);
    train_service_stop(&s);
}

static void tenants_take_turns(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct error err;
    char mine[3][TRAIN_ID_MAX], theirs[TRAIN_ID_MAX];
    bool existing;
    temp_folder_make(&train_service_folder);
    train_service_open(&s, (struct jobs_config){.running_max = 1});
    train_service_adapter(&s, TENANT, "a");
    train_service_adapter(&s, "two", "a");
    train_set_text(&examples);
    struct train_request r = train_service_request(&examples);
    r.settings.publish = PUBLISH_MANUAL;
    r.settings.steps = 40;
    for (int i = 0; i < 3; i++) train_service_submit(&s, &r, mine[i]);
    train_service_await_step(&s, mine[0], 1);
    assert_ok(jobs_submit(s.jobs, "two", &r, theirs, &existing, &err), err);
    struct train_job job = train_service_end(&s, mine[1]); /* came before, and is taken after */
    train_job_release(&job);
    assert_ok(jobs_get(s.jobs, "two", theirs, &job, &err), err);
    train_service_state(&job, TRAIN_SUCCEEDED);
    train_job_release(&job);
    strbuf_release(&examples);
    train_service_stop(&s);
}

static void a_job_that_is_not_finite_fails(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    struct adapter_bundle *bundle;
    struct adapter_base base;
    struct put_result put;
    struct error err;
    char id[TRAIN_ID_MAX];
    struct fresh_adapter f = {.rank = 2, .experts = 1, .alpha = 2, .target = {true}, .seed = 3};
    temp_folder_make(&train_service_folder);
    train_service_open(&s, (struct jobs_config){0});
    train_set_base(s.rig.engine, &base);
    assert_ok(bundle_fresh(&f, &base, &bundle, &err), err);
    /* B is zero, so this changes no output, but the gradient of B overflows. */
    float *a = (float *)(uintptr_t)bundle->sites[PROJ_Q]->a[0];
    for (size_t i = 0; i < 2 * base.d_in[PROJ_Q]; i++) a[i] *= 1e37f;
    assert_ok(bundle_publish(s.registry, TENANT, "a", bundle, &base, "", &put, &err), err);
    adapter_bundle_free(bundle);
    train_set_text(&examples);
    struct train_request r = train_service_request(&examples);
    train_service_submit(&s, &r, id);
    struct train_job job = train_service_end(&s, id);
    train_service_state(&job, TRAIN_FAILED);
    assert_int_equal(job.error.status, ST_REJECTED);
    assert_non_null(strstr(job.error.message, "step 1: the gradient is not finite"));
    train_job_release(&job);
    train_service_versions(&s, 1);
    strbuf_release(&examples);
    train_service_stop(&s);
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
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Jobs over restarts and kills. */
#include "tests/support/check.h"
#include "tests/support/train_service.h"
#include "tests/support/train_set.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void leftovers_are_cleared_away(void **state)
{
    (void)state;
    static const char *const folders[] = {"training/files", "training/jobs", "training/sessions",
                                          "training/staging"};
    struct train_service s;
    train_service_start(&s);
    train_service_close(&s);
    for (int i = 0; i < 4; i++) file_write(path_in(train_service_folder.path, folders[i]), "left", "x", 1);
    train_service_open(&s, (struct jobs_config){0});
    for (int i = 0; i < 4; i++) assert_int_equal(file_count(path_in(train_service_folder.path, folders[i])), 0);
    train_service_stop(&s);
}

#define RESTART_STEPS 30

static struct train_request long_request(const struct strbuf *examples)
{
    struct train_request r = train_service_request(examples);
    r.settings.steps = RESTART_STEPS;
    r.settings.checkpoint_steps = 3;
    r.settings.schedule = SCHEDULE_COSINE;
    return r;
}

/* The version that an uninterrupted run publishes: the hash of its bytes. */
static void uninterrupted(char version[ADAPTER_VERSION_HEX + 1])
{
    struct train_service s;
    struct strbuf examples = {0};
    char id[TRAIN_ID_MAX];
    train_service_start(&s);
    train_set_text(&examples);
    struct train_request r = long_request(&examples);
    train_service_submit(&s, &r, id);
    struct train_job job = train_service_end(&s, id);
    train_service_state(&job, TRAIN_SUCCEEDED);
    memcpy(version, job.version_after, ADAPTER_VERSION_HEX + 1);
    train_job_release(&job);
    strbuf_release(&examples);
    train_service_stop(&s);
}

static void a_closed_service_goes_on(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    char id[TRAIN_ID_MAX], wanted[ADAPTER_VERSION_HEX + 1];
    uninterrupted(wanted);
    train_service_start(&s);
    train_set_text(&examples);
    struct train_request r = long_request(&examples);
    train_service_submit(&s, &r, id);
    for (int64_t step = 4; step < RESTART_STEPS; step += 9) {
        train_service_await_step(&s, id, step);
        train_service_close(&s);
        train_service_open(&s, (struct jobs_config){0});
    }
    struct train_job job = train_service_end(&s, id);
    train_service_state(&job, TRAIN_SUCCEEDED);
    assert_string_equal(job.version_after, wanted);
    train_job_release(&job);
    train_service_versions(&s, 2);
    strbuf_release(&examples);
    train_service_stop(&s);
}

/* A process that is killed after a while; true if it came to the job's end before. */
static bool run_and_kill(const char *id, long ms)
{
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct train_service s;
        train_service_open(&s, (struct jobs_config){0});
        struct train_job job = train_service_end(&s, id);
        _exit(job.state == TRAIN_SUCCEEDED ? 0 : 1);
    }
    int status = 0;
    for (long waited = 0; waited < ms; waited++) {
        if (waitpid(child, &status, WNOHANG) == child) {
            assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
            return true;
        }
        train_service_pause(1);
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
        struct train_service s;
        struct strbuf examples = {0};
        train_service_open(&s, (struct jobs_config){0});
        train_service_adapter(&s, TENANT, "a");
        train_set_text(&examples);
        struct train_request r = long_request(&examples);
        train_service_submit(&s, &r, id);
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
    struct train_service s;
    char id[TRAIN_ID_MAX], wanted[ADAPTER_VERSION_HEX + 1];
    uninterrupted(wanted);
    temp_folder_make(&train_service_folder);
    submit_in_a_process(id);
    bool ended = false;
    for (long ms = 20; !ended && ms < 60000; ms += 17 + ms / 3) ended = run_and_kill(id, ms);
    assert_true(ended);
    train_service_open(&s, (struct jobs_config){0});
    struct train_job job = train_service_job(&s, id);
    train_service_state(&job, TRAIN_SUCCEEDED);
    assert_string_equal(job.version_after, wanted);
    assert_int_equal(job.step, RESTART_STEPS);
    train_job_release(&job);
    train_service_versions(&s, 2);
    train_service_stop(&s);
}

/* The process is killed whenever the job has begun, before its first checkpoint. */
static void run_until_begun(const char *id)
{
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct train_service s;
        train_service_open(&s, (struct jobs_config){0});
        for (;;) {
            struct train_job job = train_service_job(&s, id);
            train_job_release(&job);
            if (job.state == TRAIN_RUNNING || train_state_ended(job.state)) _exit(0);
            train_service_pause(1);
        }
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void a_job_that_ends_the_process_is_given_up(void **state)
{
    (void)state;
    struct train_service s;
    struct strbuf examples = {0};
    char id[TRAIN_ID_MAX];
    train_service_start(&s);
    train_set_text(&examples);
    struct train_request r = train_service_request(&examples);
    r.settings.steps = 100000;
    train_service_submit(&s, &r, id);
    train_service_await_step(&s, id, 1);
    train_service_close(&s); /* in good order: that counts for nothing */
    strbuf_release(&examples);
    for (int i = 0; i < 10; i++) run_until_begun(id);
    train_service_open(&s, (struct jobs_config){0});
    struct train_job job = train_service_end(&s, id);
    train_service_state(&job, TRAIN_FAILED);
    assert_non_null(strstr(job.error.message, "ended 10 times"));
    train_job_release(&job);
    train_service_versions(&s, 1);
    train_service_stop(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(leftovers_are_cleared_away),
        cmocka_unit_test(a_closed_service_goes_on),
        cmocka_unit_test(a_killed_service_goes_on),
        cmocka_unit_test(a_job_that_ends_the_process_is_given_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

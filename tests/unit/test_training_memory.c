/* Each allocation of training failing in turn: a clear refusal, and nothing left behind. Reading examples is
 * in test_training_dataset. */
#include "base/file.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"
#include "tests/support/train_service.h"
#include "tests/support/train_set.h"
#include "training/publish.h"

#include <math.h>

struct stage {
    struct train_set set;
    struct temp_folder folder;
    struct test_path checkpoint, other;
    bool resume;
};

static enum status transposed_attempt(void *ctx)
{
    const struct stage *s = ctx;
    struct transposed *t;
    struct error err = {0};
    enum status st = transposed_open(s->set.rig.engine, &t, &err);
    if (!st) transposed_close(t);
    if (st) assert_true(*err.message);
    return st;
}

static enum status fresh_attempt(void *ctx)
{
    const struct stage *s = ctx;
    struct fresh_adapter f = {
        .rank = 2, .experts = 2, .top_k = 1, .rule = GATE_TOPK, .alpha = 4, .target = {true}};
    struct adapter_bundle *b;
    struct params *p;
    enum status st = bundle_fresh(&f, &s->set.base, &b, NULL);
    if (st) return st;
    st = params_open(s->set.rig.device, b, &p, NULL);
    adapter_bundle_free(b);
    if (!st) params_close(p);
    return st;
}

/* A run from its beginning or a checkpoint: a step, a look at the held-out examples, a checkpoint, the
 * adapter. */
static enum status run_attempt(void *ctx)
{
    const struct stage *s = ctx;
    struct train_settings settings = train_set_settings();
    struct trainer_config config = train_set_config(&s->set, &settings);
    struct trainer *t;
    struct trainer_step step;
    struct objective_evaluation e;
    struct checkpoint_state c;
    struct adapter_bundle *b;
    struct error err = {0};
    enum status st = trainer_open(&config, &t, &err);
    if (st) {
        assert_true(*err.message);
        return st;
    }
    st = trainer_begin(t, s->resume ? s->checkpoint.text : NULL, NULL, &err);
    if (!st) st = trainer_step(t, NULL, &step, &err);
    if (!st) st = trainer_evaluate(t, NULL, &e, &err);
    if (!st) st = trainer_save(t, s->resume ? s->other.text : s->checkpoint.text, &c, &err);
    if (!st) st = trainer_bundle(t, &s->set.base, &b, &err);
    if (!st) adapter_bundle_free(b);
    if (st) assert_true(*err.message);
    trainer_close(t);
    return st;
}

static void runs_are_refused_whole(void **state)
{
    struct stage s = {0};
    (void)state;
    if (!alloc_fail_available()) skip();
    temp_folder_make(&s.folder);
    s.checkpoint = test_path("%s/checkpoint", s.folder.path);
    s.other = test_path("%s/other", s.folder.path);
    train_set_open(&s.set, "gqa_tied.gguf", 4, 8);
    assert_int_equal(run_attempt(&s), ST_OK); /* the device keeps the scratch that is made here */
    assert_true(alloc_fail_sweep(transposed_attempt, &s) > 20);
    assert_true(alloc_fail_sweep(fresh_attempt, &s) > 20);
    /* Not all that a run asks for is needed: qsort, and a message of an evaluation, get by without. */
    assert_true(alloc_fail_sweep_lenient(run_attempt, &s) > 40);
    s.resume = true;
    assert_true(alloc_fail_sweep_lenient(run_attempt, &s) > 40);
    train_set_close(&s.set);
    temp_folder_remove(&s.folder);
}

/* SQLite keeps what it has allocated, and gets by without some of it. What counts: a refusal publishes
 * nothing, and no lock or upload stays behind. */
static void publishing_is_whole_or_not_at_all(void **state)
{
    struct train_service s;
    char version[ADAPTER_VERSION_HEX + 1];
    int count, refused = 0;
    (void)state;
    if (!alloc_fail_available()) skip();
    train_service_start(&s);
    struct adapter_base base;
    train_set_base(s.rig.engine, &base);
    for (bool failed = true; failed;) {
        /* Another one each time: what is there already is not published again. */
        struct fresh_adapter f = {.rank = 2,
                                  .experts = 1,
                                  .rule = GATE_NONE,
                                  .alpha = 2,
                                  .target = {true},
                                  .seed = (uint64_t)refused};
        struct adapter_bundle *b;
        struct put_result put;
        struct error err = {0};
        assert_int_equal(bundle_fresh(&f, &base, &b, NULL), ST_OK);
        assert_true(train_service_look(&s, "a", version, &count));
        int before = count;
        alloc_fail_after(refused);
        enum status st = bundle_publish(s.registry, TENANT, "a", b, &base, NULL, &put, &err);
        failed = alloc_fail_stop();
        adapter_bundle_free(b);
        assert_true(train_service_look(&s, "a", version, &count));
        if (st) {
            assert_true(failed && *err.message);
            assert_int_equal(count, before);
        } else {
            assert_int_equal(count, before + 1);
        }
        refused++;
    }
    assert_true(refused > 50);
    train_service_stop(&s);
}

/* A service that lacks memory at one point, or a job in it, goes on with the next. */
static void jobs_fail_alone(void **state)
{
    struct train_service s;
    struct strbuf text = {0};
    (void)state;
    if (!alloc_fail_available()) skip();
    train_service_start(&s);
    train_set_text(&text);
    int submitted = 0, failures = 0;
    bool failed = true;
    for (long n = 0; failed; n += 1 + n / 4) {
        struct train_request r = train_service_request(&text);
        r.settings.steps = 1;
        char id[TRAIN_ID_MAX];
        bool existing;
        struct error err = {0};
        alloc_fail_after(n);
        enum status st = jobs_submit(s.jobs, TENANT, &r, id, &existing, &err);
        if (st) {
            failed = alloc_fail_stop();
            assert_true(failed && *err.message);
            continue;
        }
        submitted++;
        struct jobs_stats stats; /* asked for a job, the service allocates; asked for these, it does not */
        for (jobs_stats(s.jobs, &stats); stats.queued + stats.running > 0; jobs_stats(s.jobs, &stats))
            train_service_pause(1);
        failed = alloc_fail_stop();
        struct train_job job = {0};
        assert_int_equal(jobs_get(s.jobs, TENANT, id, &job, NULL), ST_OK);
        assert_true(job.state == TRAIN_SUCCEEDED || (failed && job.state == TRAIN_FAILED));
        failures += job.state == TRAIN_FAILED;
        train_job_release(&job);
    }
    assert_true(submitted > 5 && failures > 2);
    strbuf_release(&text);
    train_service_stop(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(runs_are_refused_whole),
        cmocka_unit_test(publishing_is_whole_or_not_at_all),
        cmocka_unit_test(jobs_fail_alone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

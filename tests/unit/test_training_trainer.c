/* Runs: what they learn, that they repeat themselves to the last bit, interrupted or not, and where they
 * stop. */
#include "base/file.h"
#include "tests/support/check.h"
#include "tests/support/temp_folder.h"
#include "tests/support/train_set.h"

#include <math.h>
#include <stdlib.h>
#include <unistd.h>

static struct train_set set;

static int setup(void **state)
{
    (void)state;
    train_set_open(&set, "gqa_tied.gguf", 4, 8);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    train_set_close(&set);
    return 0;
}

static struct trainer *open_run(const struct train_set *s, const struct train_settings *settings,
                                const char *checkpoint)
{
    const struct trainer_config config = train_set_config(s, settings);
    struct trainer *t;
    struct error err;
    assert_ok(trainer_open(&config, &t, &err), err);
    assert_ok(trainer_begin(t, checkpoint, NULL, &err), err);
    return t;
}

static struct trainer_step step(struct trainer *t)
{
    struct trainer_step s;
    struct error err;
    assert_ok(trainer_step(t, NULL, &s, &err), err);
    return s;
}

static struct trainer_step run_to(struct trainer *t, int64_t last)
{
    struct trainer_step s = {0};
    while (!trainer_done(t) && s.step < last) s = step(t);
    return s;
}

static double held_out_loss(struct trainer *t)
{
    struct objective_evaluation e;
    struct error err;
    assert_ok(trainer_evaluate(t, NULL, &e, &err), err);
    return e.loss;
}

/* --- learning --- */

static void learns(const struct train_set *s, struct train_settings settings, double factor)
{
    settings.steps = 40;
    struct trainer *t = open_run(s, &settings, NULL);
    struct objective_evaluation before;
    double first = step(t).result.objective, last = run_to(t, 40).result.objective;
    assert_true(trainer_done(t));
    if (!(last < factor * first)) fail_msg("from %g to %g", first, last);
    trainer_before(t, &before);
    assert_true(held_out_loss(t) < before.loss);
    trainer_close(t);
}

static void the_loss_falls(void **state)
{
    (void)state;
    learns(&set, train_set_settings(), 0.7);
}

static void the_loss_of_plain_lora_falls(void **state)
{
    (void)state;
    struct train_set lora;
    train_set_open(&lora, "mha_untied.gguf", 1, 8);
    learns(&lora, train_set_settings(), 0.7);
    train_set_close(&lora);
}

static void preferences_are_learned(void **state)
{
    (void)state;
    struct train_settings settings = train_set_settings();
    settings.loss = LOSS_DPO;
    settings.steps = 12;
    struct trainer *t = open_run(&set, &settings, NULL);
    struct objective_evaluation before;
    trainer_before(t, &before);
    struct trainer_step first = step(t), last = run_to(t, 12);
    /* Nothing has moved yet: both completions are as likely as for the reference. A new adapter is exactly a
     * no-op, and both passes are the same, so the only error is of log(2) itself. */
    assert_float_equal(first.result.objective, log(2), 1e-12);
    assert_float_equal(before.loss, log(2), 1e-12);
    assert_true(first.result.margin == 0);
    assert_true(last.result.margin > 0.05 && last.result.objective < 0.9 * log(2));
    assert_true(last.result.accuracy > 0.9);
    assert_true(held_out_loss(t) < before.loss);
    trainer_close(t);
}

/* --- repetition --- */

static void assert_same_values(struct trainer *a, struct trainer *b, bool same)
{
    size_t n, m;
    float *x = train_set_values(a, &set, &n), *y = train_set_values(b, &set, &m);
    assert_int_equal(n, m);
    assert_true((memcmp(x, y, n * sizeof *x) == 0) == same);
    free(x);
    free(y);
}

static void the_same_seed_gives_the_same_bits(void **state)
{
    (void)state;
    struct train_settings settings = train_set_settings();
    struct trainer *a = open_run(&set, &settings, NULL), *b = open_run(&set, &settings, NULL);
    settings.seed = 1;
    struct trainer *other = open_run(&set, &settings, NULL);
    while (!trainer_done(a)) {
        struct trainer_step x = step(a), y = step(b); /* in turn: neither disturbs the other */
        step(other);
        assert_true(x.result.loss == y.result.loss && x.grad_norm == y.grad_norm);
    }
    assert_same_values(a, b, true);
    assert_same_values(a, other, false);
    trainer_close(a);
    trainer_close(b);
    trainer_close(other);
}

static void resumed_with(enum train_loss loss)
{
    struct temp_folder folder;
    struct train_settings settings = train_set_settings();
    struct checkpoint_state saved;
    struct error err;
    settings.loss = loss;
    settings.schedule = SCHEDULE_COSINE;
    settings.warmup_steps = 2;
    settings.weight_decay = 0.01;
    temp_folder_make(&folder);
    const char *path = path_in(folder.path, "checkpoint");
    struct trainer *whole = open_run(&set, &settings, NULL), *first = open_run(&set, &settings, NULL);
    double before = held_out_loss(first);
    run_to(first, 3);
    assert_ok(trainer_save(first, path, &saved, &err), err);
    assert_int_equal(saved.step, 3);
    step(first); /* what comes after a checkpoint is lost */
    trainer_close(first);
    struct trainer *rest = open_run(&set, &settings, path);
    run_to(whole, 3);
    while (!trainer_done(whole)) {
        struct trainer_step x = step(whole), y = step(rest);
        assert_true(x.step == y.step && x.result.loss == y.result.loss && x.grad_norm == y.grad_norm &&
                    x.learning_rate == y.learning_rate && x.tokens == y.tokens);
    }
    assert_true(trainer_done(rest));
    assert_same_values(whole, rest, true);
    assert_true(held_out_loss(whole) == held_out_loss(rest));
    struct objective_evaluation e;
    trainer_before(rest, &e);
    assert_true(e.loss == before);
    trainer_close(whole);
    trainer_close(rest);
    temp_folder_remove(&folder);
}

static void a_resumed_run_is_the_uninterrupted_one(void **state)
{
    (void)state;
    resumed_with(LOSS_CROSS_ENTROPY);
    resumed_with(LOSS_DPO);
}

/* --- stopping --- */

static void a_cancelled_step_changes_nothing(void **state)
{
    (void)state;
    struct train_settings settings = train_set_settings();
    struct trainer *a = open_run(&set, &settings, NULL), *b = open_run(&set, &settings, NULL);
    struct trainer_step s;
    struct error err;
    atomic_bool cancel = true;
    step(a);
    step(b);
    assert_int_equal(trainer_step(a, &cancel, &s, &err), ST_CANCELLED);
    assert_same_values(a, b, true);
    assert_true(step(a).result.loss == step(b).result.loss);
    assert_same_values(a, b, true);
    trainer_close(a);
    trainer_close(b);
}

static void a_run_stops_where_it_is_not_finite(void **state)
{
    (void)state;
    struct train_set huge;
    struct train_settings settings = train_set_settings();
    struct trainer_step s;
    struct error err = {0};
    size_t n;
    train_set_open(&huge, "gqa_tied.gguf", 4, 1e38f); /* B is zero: the first gradient overflows */
    struct trainer *t = open_run(&huge, &settings, NULL);
    float *before = train_set_values(t, &huge, &n);
    assert_refused(trainer_step(t, NULL, &s, &err), ST_REJECTED, err, "step 1: the gradient is not finite");
    assert_true(trainer_done(t));
    float *after = train_set_values(t, &huge, &n);
    assert_memory_equal(before, after, n * sizeof *before);
    free(before);
    free(after);
    trainer_close(t);
    train_set_close(&huge);
}

/* --- refusals --- */

static void refused(const struct train_settings *settings, enum status wanted, const char *message)
{
    const struct trainer_config config = train_set_config(&set, settings);
    struct trainer *t = NULL;
    struct error err = {0};
    assert_refused(trainer_open(&config, &t, &err), wanted, err, message);
    assert_null(t);
}

static void settings_must_go_together(void **state)
{
    (void)state;
    struct train_settings s = train_set_settings();
    s.warmup_steps = 9;
    refused(&s, ST_INVALID, "warmup_steps: 9 are more than the run's 8 steps");
    s = train_set_settings();
    s.loss = LOSS_PPO;
    refused(&s, ST_UNSUPPORTED, "step-wise");
    s = train_set_settings();
    s.reduction = REDUCTION_SUM;
    refused(&s, ST_UNSUPPORTED, "reduction");
    s = train_set_settings();
    s.publish = PUBLISH_ON_IMPROVEMENT;
    s.held_out = 0;
    refused(&s, ST_INVALID, "on_improvement needs held-out examples");
}

static void only_its_own_checkpoint_is_continued(void **state)
{
    (void)state;
    struct temp_folder folder;
    struct train_settings settings = train_set_settings();
    struct checkpoint_state saved;
    struct error err = {0};
    size_t n;
    temp_folder_make(&folder);
    struct trainer *t = open_run(&set, &settings, NULL);
    step(t);
    assert_ok(trainer_save(t, path_in(folder.path, "good"), &saved, &err), err);
    trainer_close(t);
    assert_int_equal(file_count(folder.path), 1);

    settings.seed = 7;
    const struct trainer_config config = train_set_config(&set, &settings);
    assert_ok(trainer_open(&config, &t, &err), err);
    assert_refused(trainer_begin(t, path_in(folder.path, "good"), NULL, &err), ST_REJECTED, err,
                   "other examples, settings");
    assert_refused(trainer_begin(t, path_in(folder.path, "none"), NULL, &err), ST_NOT_FOUND, err, "none");
    char *bytes = test_read_file(path_in(folder.path, "good"), &n);
    bytes[n / 2] ^= 1;
    file_write(folder.path, "flipped", bytes, n);
    file_write(folder.path, "short", bytes, 100);
    bytes[0] ^= 1;
    file_write(folder.path, "foreign", bytes, n);
    assert_refused(trainer_begin(t, path_in(folder.path, "flipped"), NULL, &err), ST_BAD_FORMAT, err,
                   "is damaged");
    assert_refused(trainer_begin(t, path_in(folder.path, "short"), NULL, &err), ST_BAD_FORMAT, err,
                   "too short");
    assert_refused(trainer_begin(t, path_in(folder.path, "foreign"), NULL, &err), ST_BAD_FORMAT, err,
                   "no checkpoint of this");
    free(bytes);
    trainer_close(t);
    temp_folder_remove(&folder);
}

static void a_full_disk_leaves_the_last_checkpoint(void **state)
{
    (void)state;
    struct temp_folder folder;
    struct train_settings settings = train_set_settings();
    struct checkpoint_state saved;
    struct error err = {0};
    temp_folder_make(&folder);
    struct trainer *t = open_run(&set, &settings, NULL);
    step(t);
    assert_ok(trainer_save(t, path_in(folder.path, "c"), &saved, &err), err);
    step(t);
    assert_int_equal(symlink("/dev/full", path_in(folder.path, "c.part")), 0);
    assert_refused(trainer_save(t, path_in(folder.path, "c"), &saved, &err), ST_NO_SPACE, err, "c.part");
    assert_int_equal(file_count(folder.path), 1);
    trainer_close(t);
    t = open_run(&set, &settings, path_in(folder.path, "c"));
    assert_int_equal(step(t).step, 2);
    trainer_close(t);
    temp_folder_remove(&folder);
}

/* --- losses of step-wise training --- */

/* One sequence with the log-probabilities the model gives it. */
static struct learner *open_learner(struct train_batch *batch, float *logprob)
{
    struct learner *l;
    struct error err;
    struct pass_result pass;
    static const uint32_t first[] = {0};
    assert_ok(learner_open(set.rig.engine, set.rig.device, set.transposed, set.bundle, &l, &err), err);
    assert_int_equal(learner_reserve(l, 64, 64), ST_OK);
    assert_int_equal(train_batch_fill(&l->batch, set.examples, first, 1), ST_OK);
    assert_int_equal(pass_forward(l->pass, &l->batch.pass, NULL, NULL, &pass), ST_OK);
    memcpy(logprob, pass.logprob, (size_t)l->batch.pass.rows * sizeof *logprob);
    *batch = l->batch;
    return l;
}

/* The gradient's sum of squares after one objective. */
static double gradient_of(struct learner *l, const struct train_settings *s, struct objective_result *out)
{
    double norm;
    assert_int_equal(objective_run(l, s, NULL, objective_divisor(&l->batch, s), 0, true, NULL, out), ST_OK);
    struct train_settings still = *s;
    still.clip = 0;
    assert_int_equal(learner_update(l, &still, 0, &norm), ST_OK); /* at rate 0 nothing moves */
    return norm;
}

static void ratios_weigh_by_their_advantage(void **state)
{
    (void)state;
    struct train_settings s = train_set_settings();
    struct train_batch b;
    struct objective_result r;
    float logprob[64];
    s.balance = s.contrast = 0;
    struct learner *l = open_learner(&b, logprob);
    float *weight = b.weight;
    float weights[64];
    memcpy(weights, weight, sizeof(float) * (size_t)b.pass.rows);
    double plain = gradient_of(l, &s, &r);

    /* Sampled from this very model, with equal advantages: the policy gradient is that of cross-entropy,
     * times them. */
    s.loss = LOSS_IMPORTANCE_SAMPLING;
    memcpy(weight, weights, sizeof(float) * (size_t)b.pass.rows);
    for (int i = 0; i < b.pass.rows; i++) b.old[i] = (struct old_token){logprob[i], 2};
    double policy = gradient_of(l, &s, &r);
    assert_float_equal(r.objective, -2, 1e-6);
    assert_float_equal(policy, 2 * plain, 1e-5 * plain);
    assert_true(isnan(r.clipped));

    /* Twice as likely now as when it was sampled: the ratio is 2, over PPO's bound where that is an
     * advantage. */
    s.loss = LOSS_PPO;
    memcpy(weight, weights, sizeof(float) * (size_t)b.pass.rows);
    for (int i = 0; i < b.pass.rows; i++) b.old[i] = (struct old_token){logprob[i] - (float)log(2), 1};
    policy = gradient_of(l, &s, &r);
    assert_float_equal(r.objective, -1.2, 1e-6);
    assert_true(policy == 0 && r.clipped == 1);
    memcpy(weight, weights, sizeof(float) * (size_t)b.pass.rows);
    for (int i = 0; i < b.pass.rows; i++) b.old[i].advantage = -1;
    policy = gradient_of(l, &s, &r);
    assert_float_equal(r.objective, 2, 1e-6);
    assert_true(r.clipped == 0);
    assert_float_equal(policy, 2 * plain, 1e-5 * plain);
    learner_close(l);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_loss_falls),
        cmocka_unit_test(the_loss_of_plain_lora_falls),
        cmocka_unit_test(preferences_are_learned),
        cmocka_unit_test(the_same_seed_gives_the_same_bits),
        cmocka_unit_test(a_resumed_run_is_the_uninterrupted_one),
        cmocka_unit_test(a_cancelled_step_changes_nothing),
        cmocka_unit_test(a_run_stops_where_it_is_not_finite),
        cmocka_unit_test(settings_must_go_together),
        cmocka_unit_test(only_its_own_checkpoint_is_continued),
        cmocka_unit_test(a_full_disk_leaves_the_last_checkpoint),
        cmocka_unit_test(ratios_weigh_by_their_advantage),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}

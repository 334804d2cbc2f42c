#include "training/trainer.h"

#include "base/memory.h"
#include "training/random.h"

#include <math.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct trainer {
    struct trainer_config config;
    struct learner *learner;
    struct batch_plan plan;
    /* Examples that judge: of which set, and which ones. */
    const struct dataset *judge;
    const uint32_t *judge_examples;
    size_t judge_count;
    uint32_t *judge_owned; /* [judge_count] where they are a set of their own */
    double *reference;     /* dpo: [2 * examples] of the examples, then of the validation set; else NULL */
    int64_t step, steps, tokens;             /* done; in all */
    double last_loss;                        /* NAN: no step yet */
    struct objective_evaluation before, now; /* now: as of step now_step */
    int64_t now_step;
    char run[CHECKPOINT_RUN_MAX];
    bool over;           /* after ST_REJECTED */
    double last_seconds; /* the clock when the last step ended; 0: none */
};

static const struct objective_evaluation not_evaluated = {.loss = NAN, .similarity = NAN, .cohesion = NAN};

static enum status no_memory(struct error *err) { return error_set(err, ST_NOMEM, "out of memory"); }

/* Where no better sentence is known. */
static enum status explain(enum status st, const char *what, struct error *err)
{
    return st ? error_set(err, st, "%s: %s", what, status_text(st)) : ST_OK;
}

double train_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- opening --- */

enum status trainer_check(const struct train_settings *s, struct error *err)
{
    if (s->loss != LOSS_CROSS_ENTROPY && s->loss != LOSS_DPO)
        return error_set(err, ST_UNSUPPORTED,
                         "loss: importance_sampling and ppo need fresh samples between steps: they are for "
                         "step-wise training");
    if (s->reduction != REDUCTION_MEAN)
        return error_set(err, ST_UNSUPPORTED,
                         "reduction: sum is for step-wise training; a run's loss is a mean");
    return ST_OK;
}

static enum status choose_judges(struct trainer *t)
{
    t->judge = t->config.validation ? t->config.validation : t->config.examples;
    t->judge_examples = t->plan.held;
    t->judge_count = t->plan.held_count;
    if (!t->config.validation) return ST_OK;
    t->judge_count = t->config.validation->example_count;
    t->judge_owned = memory_zalloc(t->judge_count, sizeof *t->judge_owned);
    if (!t->judge_owned) return ST_NOMEM;
    for (size_t i = 0; i < t->judge_count; i++) t->judge_owned[i] = (uint32_t)i;
    t->judge_examples = t->judge_owned;
    return ST_OK;
}

static enum status plan_run(struct trainer *t, struct error *err)
{
    const struct train_settings *s = &t->config.settings;
    double share = t->config.validation ? 0 : s->held_out;
    enum status st = batch_plan_init(&t->plan, t->config.examples, s->seed, share, s->batch_tokens);
    if (!st) st = choose_judges(t);
    if (st) return no_memory(err);
    if (s->publish == PUBLISH_ON_IMPROVEMENT && t->judge_count == 0)
        return error_set(err, ST_INVALID,
                         "publish: on_improvement needs held-out examples: give at least ten examples and a "
                         "held_out above 0, "
                         "or examples for validation");
    t->steps = s->steps ? s->steps : batch_plan_steps(&t->plan, s->epochs);
    if (s->warmup_steps > t->steps)
        return error_set(err, ST_INVALID, "warmup_steps: %lld are more than the run's %lld steps",
                         (long long)s->warmup_steps, (long long)t->steps);
    return ST_OK;
}

/* Of a batch of the plan at most: no more than all tokens there are. */
static enum status reserve(struct trainer *t, struct error *err)
{
    const struct dataset *d = t->config.examples, *v = t->config.validation;
    size_t rows = d->token_count, limit = (size_t)t->config.settings.batch_tokens;
    int seq_rows = d->seq_rows_max;
    if (v && v->token_count > rows) rows = v->token_count;
    if (v && v->seq_rows_max > seq_rows) seq_rows = v->seq_rows_max;
    return explain(learner_reserve(t->learner, (int)(rows < limit ? rows : limit), seq_rows),
                   "memory for the passes", err);
}

/* All that decides what the next step will do, but for the learner's state. */
static void identify_run(struct trainer *t, struct strbuf *text)
{
    const struct dataset *sets[] = {t->config.examples, t->config.validation};
    crypto_generichash_state hash;
    unsigned char digest[16];
    crypto_generichash_init(&hash, NULL, 0, sizeof digest);
    train_settings_write(&t->config.settings, text);
    strbuf_printf(text, "\n%s\n%lld", t->config.identity ? t->config.identity : "", (long long)t->steps);
    if (!text->failed) crypto_generichash_update(&hash, (const unsigned char *)text->data, text->size);
    for (int i = 0; i < 2 && sets[i]; i++) {
        crypto_generichash_update(&hash, (const unsigned char *)sets[i]->token,
                                  sets[i]->token_count * sizeof *sets[i]->token);
        crypto_generichash_update(&hash, (const unsigned char *)sets[i]->run,
                                  sets[i]->run_count * sizeof *sets[i]->run);
    }
    crypto_generichash_final(&hash, digest, sizeof digest);
    sodium_bin2hex(t->run, sizeof t->run, digest, sizeof digest);
}

static enum status identify(struct trainer *t, struct error *err)
{
    struct strbuf text = {0};
    identify_run(t, &text);
    enum status st = text.failed ? no_memory(err) : ST_OK;
    strbuf_release(&text);
    return st;
}

static enum status build(struct trainer *t, struct error *err)
{
    const struct trainer_config *c = &t->config;
    enum status st = plan_run(t, err);
    if (!st) st = learner_open(c->engine, c->device, c->transposed, c->bundle, &t->learner, err);
    if (!st) st = reserve(t, err);
    if (!st) st = identify(t, err);
    if (st || c->settings.loss != LOSS_DPO) return st;
    size_t examples = c->examples->example_count + (c->validation ? c->validation->example_count : 0);
    t->reference = memory_zalloc(2 * examples, sizeof *t->reference);
    return t->reference ? ST_OK : no_memory(err);
}

enum status trainer_open(const struct trainer_config *config, struct trainer **out, struct error *err)
{
    enum status st = trainer_check(&config->settings, err);
    if (st) return st;
    struct trainer *t = calloc(1, sizeof *t);
    if (!t) return no_memory(err);
    t->config = *config;
    t->before = t->now = not_evaluated;
    t->last_loss = NAN;
    t->now_step = -1;
    st = build(t, err);
    if (st)
        trainer_close(t);
    else
        *out = t;
    return st;
}

void trainer_close(struct trainer *t)
{
    if (!t) return;
    learner_close(t->learner);
    batch_plan_release(&t->plan);
    memory_free(t->judge_owned);
    memory_free(t->reference);
    free(t);
}

void trainer_facts(const struct trainer *t, struct trainer_facts *out)
{
    *out = (struct trainer_facts){.steps = t->steps,
                                  .examples = t->plan.train_count,
                                  .held_out = t->judge_count,
                                  .parameters = t->learner->params->count,
                                  .bytes = learner_bytes(t->learner)};
}

const struct params *trainer_params(const struct trainer *t) { return t->learner->params; }

/* --- before the first step --- */

/* Log-probabilities of a set's pairs under the values as they are. */
static enum status refer(struct trainer *t, const struct dataset *d, double *out, const atomic_bool *cancel)
{
    struct learner *l = t->learner;
    enum status st = ST_OK;
    uint32_t *all = memory_zalloc(d->example_count, sizeof *all);
    if (!all) return ST_NOMEM;
    for (size_t i = 0; i < d->example_count; i++) all[i] = (uint32_t)i;
    for (size_t at = 0, n; at < d->example_count && !st; at += n) {
        n = batch_fit(d, all, d->example_count, at, t->config.settings.batch_tokens);
        st = train_batch_fill(&l->batch, d, all + at, n);
        if (!st) st = objective_logprobs(l, cancel, out + 2 * at);
    }
    memory_free(all);
    return st;
}

/* Of the judging set. */
static const double *judge_reference(const struct trainer *t)
{
    if (!t->reference || !t->config.validation) return t->reference;
    return t->reference + 2 * t->config.examples->example_count;
}

static enum status evaluate(struct trainer *t, const atomic_bool *cancel, struct objective_evaluation *out)
{
    *out = not_evaluated;
    if (t->judge_count == 0) return ST_OK;
    return objective_evaluate(t->learner, &t->config.settings, t->judge, t->judge_examples, t->judge_count,
                              judge_reference(t), cancel, out);
}

static enum status resume(struct trainer *t, const char *checkpoint, struct error *err)
{
    struct checkpoint_state s;
    enum status st = checkpoint_read(t->learner, checkpoint, t->run, &s, err);
    if (st) return st;
    t->step = s.step;
    t->tokens = s.tokens;
    t->last_loss = s.loss;
    t->before.loss = s.loss_before;
    return ST_OK;
}

enum status trainer_begin(struct trainer *t, const char *checkpoint, const atomic_bool *cancel,
                          struct error *err)
{
    enum status st = ST_OK;
    const struct dataset *d = t->config.examples, *v = t->config.validation;
    if (t->reference) st = refer(t, d, t->reference, cancel);
    if (!st && t->reference && v) st = refer(t, v, t->reference + 2 * d->example_count, cancel);
    if (!st && checkpoint) return resume(t, checkpoint, err);
    if (!st) st = evaluate(t, cancel, &t->before);
    if (st) return explain(st, "before the first step", err);
    t->now = t->before;
    t->now_step = 0;
    if (t->judge_count && !isfinite(t->before.loss))
        return error_set(err, ST_REJECTED,
                         "the loss of the held-out examples is not finite before the first step");
    return ST_OK;
}

/* --- steps --- */

bool trainer_done(const struct trainer *t) { return t->over || t->step >= t->steps; }

/* The batch of step number `step` (0..) into the learner, and its reference into `reference`. */
static enum status fill(struct trainer *t, double **reference, double *epoch)
{
    size_t count;
    const uint32_t *examples = batch_plan_step(&t->plan, t->step, &count, epoch);
    enum status st = train_batch_fill(&t->learner->batch, t->config.examples, examples, count);
    if (st || !t->reference) return st;
    *reference = memory_zalloc(2 * count, sizeof **reference);
    if (!*reference) return ST_NOMEM;
    for (size_t i = 0; i < 2 * count; i++) (*reference)[i] = t->reference[2 * examples[i / 2] + i % 2];
    return ST_OK;
}

static enum status not_finite(struct trainer *t, const char *what, double value, struct error *err)
{
    t->over = true;
    return error_set(
        err, ST_REJECTED,
        "step %lld: %s is not finite (%g); the adapter stands as after step %lld. A lower learning_rate or a "
        "longer warm-up may help",
        (long long)t->step + 1, what, value, (long long)t->step);
}

/* Gradients of the step at hand, checked. */
static enum status gradients(struct trainer *t, const atomic_bool *cancel, struct trainer_step *out,
                             struct error *err)
{
    double *reference = NULL;
    enum status st = fill(t, &reference, &out->epoch);
    if (!st)
        st = objective_run(t->learner, &t->config.settings, reference,
                           objective_divisor(&t->learner->batch, &t->config.settings),
                           random_hash(t->config.settings.seed) + (uint64_t)t->step, true, cancel,
                           &out->result);
    memory_free(reference);
    if (st) return explain(st, "a training step", err);
    return isfinite(out->result.loss) ? ST_OK : not_finite(t, "the loss", out->result.loss, err);
}

static enum status update(struct trainer *t, struct trainer_step *out, struct error *err)
{
    out->learning_rate = train_rate(&t->config.settings, t->step + 1, t->steps);
    enum status st = learner_update(t->learner, &t->config.settings, out->learning_rate, &out->grad_norm);
    if (st == ST_REJECTED) return not_finite(t, "the gradient", NAN, err);
    return explain(st, "a training step", err);
}

enum status trainer_step(struct trainer *t, const atomic_bool *cancel, struct trainer_step *out,
                         struct error *err)
{
    CHECK(!trainer_done(t));
    struct trainer_step s = {.step = t->step + 1, .steps = t->steps};
    double start = t->last_seconds > 0 ? t->last_seconds : train_clock();
    enum status st = gradients(t, cancel, &s, err);
    if (!st) st = update(t, &s, err);
    if (st) {
        /* Half-made gradients must not be found by the next step; where the device is gone there is none. */
        enum status forgotten = learner_forget(t->learner);
        return forgotten && st != ST_CANCELLED ? st
               : forgotten                     ? explain(forgotten, "a training step", err)
                                               : st;
    }
    t->step++;
    t->tokens += s.result.tokens;
    t->last_loss = s.result.objective;
    t->last_seconds = train_clock();
    s.tokens = t->tokens;
    s.seconds = t->last_seconds - start;
    *out = s;
    return ST_OK;
}

static void write_known(struct strbuf *out, const char *key, double x)
{
    if (isnan(x)) return;
    strbuf_printf(out, ",\"%s\":", key);
    json_write_f64(out, x);
}

void trainer_step_write(const struct trainer_step *s, enum train_loss loss, struct strbuf *out)
{
    const struct objective_result *r = &s->result;
    strbuf_printf(out, "{\"step\":%lld,\"steps\":%lld", (long long)s->step, (long long)s->steps);
    write_known(out, "epoch", s->epoch);
    write_known(out, "loss", r->loss);
    write_known(out, loss == LOSS_DPO ? "dpo" : "cross_entropy", r->objective);
    write_known(out, "margin", r->margin);
    write_known(out, "accuracy", r->accuracy);
    write_known(out, "balance", r->balance);
    write_known(out, "contrast", r->contrast);
    write_known(out, "similarity", r->similarity);
    write_known(out, "cohesion", r->cohesion);
    write_known(out, "learning_rate", s->learning_rate);
    write_known(out, "grad_norm", s->grad_norm);
    write_known(out, "weight", r->weight);
    strbuf_printf(out, ",\"tokens\":%lld", (long long)r->tokens);
    write_known(out, "tokens_per_second", s->seconds > 0 ? (double)r->tokens / s->seconds : NAN);
    write_known(out, "seconds", s->seconds);
    strbuf_putc(out, '}');
}

/* --- results --- */

void trainer_before(const struct trainer *t, struct objective_evaluation *out) { *out = t->before; }

enum status trainer_evaluate(struct trainer *t, const atomic_bool *cancel, struct objective_evaluation *out,
                             struct error *err)
{
    if (t->now_step != t->step) {
        enum status st = evaluate(t, cancel, &t->now);
        if (st) return explain(st, "evaluation", err);
        t->now_step = t->step;
    }
    *out = t->now;
    return ST_OK;
}

bool trainer_evaluation_due(const struct trainer *t)
{
    int64_t every = t->config.settings.evaluate_steps;
    return t->judge_count > 0 && every > 0 && t->step % every == 0 && t->now_step != t->step;
}

enum status trainer_bundle(struct trainer *t, const struct adapter_base *base, struct adapter_bundle **out,
                           struct error *err)
{
    return learner_bundle(t->learner, base, out, err);
}

enum status trainer_save(struct trainer *t, const char *path, struct checkpoint_state *out, struct error *err)
{
    struct checkpoint_state s = {.step = t->step,
                                 .optim_steps = t->learner->optim_steps,
                                 .tokens = t->tokens,
                                 .loss = t->last_loss,
                                 .loss_before = t->before.loss,
                                 .held_loss = t->now_step == t->step ? t->now.loss : NAN};
    memcpy(s.run, t->run, sizeof s.run);
    enum status st = checkpoint_write(t->learner, &s, path, err);
    if (!st) *out = s;
    return st;
}

/* One run: an adapter trained on a set of examples, step by step.
 *
 * A run is a function of its adapter, examples and settings, bit for bit on one device and number of threads,
 * whether it was interrupted or not: what happens in a step depends on its number and on the state that a
 * checkpoint holds. */
#ifndef TRAINING_TRAINER_H
#define TRAINING_TRAINER_H

#include "training/checkpoint.h"
#include "training/objective.h"

struct trainer;

/* Seconds, by a clock that only goes forward. */
double train_clock(void);

/* What is pointed to outlives the trainer, but for the bundle. */
struct trainer_config {
    struct engine *engine;
    struct device *device;
    struct transposed *transposed;
    const struct adapter_bundle *bundle;
    const struct dataset *examples;
    const struct dataset *validation; /* NULL: a share of the examples is held out, as the settings say */
    struct train_settings settings;
    const char *identity; /* of adapter and examples, for the checkpoint: any text */
};

/* Whether a run can have such settings. ST_UNSUPPORTED: losses that are for step-wise training only. */
NODISCARD enum status trainer_check(const struct train_settings *s, struct error *err);

/* ST_INVALID: settings that do not go together, or that ask for held-out examples where there are none;
 * ST_UNSUPPORTED: as params_open, and losses that are for step-wise training only; ST_NOMEM, ST_DRAINING,
 * ST_DEVICE. */
NODISCARD enum status trainer_open(const struct trainer_config *config, struct trainer **out,
                                   struct error *err);
void trainer_close(struct trainer *t);

struct trainer_facts {
    int64_t steps;             /* of the whole run */
    size_t examples, held_out; /* trained on, and not */
    size_t parameters, bytes;  /* memory it holds */
};
void trainer_facts(const struct trainer *t, struct trainer_facts *out);

/* Before the first step: from the start (checkpoint NULL), with the loss on held-out examples; or where a
 * checkpoint of this run left off. With dpo also what its reference says of all examples. */
NODISCARD enum status trainer_begin(struct trainer *t, const char *checkpoint, const atomic_bool *cancel,
                                    struct error *err);

struct trainer_step {
    int64_t step, steps; /* 1.. */
    double epoch;        /* so many are over */
    struct objective_result result;
    double learning_rate, grad_norm; /* before clipping */
    double seconds;                  /* from one step's beginning to the next */
    int64_t tokens;                  /* over all steps so far */
};
/* Appends it as a JSON object: step, steps, epoch, loss, the objective by its name, and for dpo margin and
 * accuracy; balance, contrast, similarity and cohesion where they are known; learning_rate, grad_norm, weight, tokens
 * (of the step), tokens_per_second, seconds. */
void trainer_step_write(const struct trainer_step *s, enum train_loss loss, struct strbuf *out);
bool trainer_done(const struct trainer *t);
/* The next step. ST_REJECTED: loss or gradient are not finite, err says at which step: nothing has changed,
 * and the run is over. ST_CANCELLED, ST_DRAINING, ST_DEVICE: nothing has changed, the step can be done again.
 */
NODISCARD enum status trainer_step(struct trainer *t, const atomic_bool *cancel, struct trainer_step *out,
                                   struct error *err);

/* On held-out examples, at the beginning and as of now; loss NAN without any. */
void trainer_before(const struct trainer *t, struct objective_evaluation *out);
NODISCARD enum status trainer_evaluate(struct trainer *t, const atomic_bool *cancel,
                                       struct objective_evaluation *out, struct error *err);

/* Whether settings.evaluate_steps asks for it now. */
bool trainer_evaluation_due(const struct trainer *t);

/* Where it stands, to a file (checkpoint.h). */
NODISCARD enum status trainer_save(struct trainer *t, const char *path, struct checkpoint_state *out,
                                   struct error *err);
/* As learner_bundle. */
NODISCARD enum status trainer_bundle(struct trainer *t, const struct adapter_base *base,
                                     struct adapter_bundle **out, struct error *err);
const struct params *trainer_params(const struct trainer *t);

#endif

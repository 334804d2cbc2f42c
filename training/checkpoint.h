/* A learner's state in a file: values, moments, and where its run stands.
 *
 * Written beside its place, synced and renamed: a crash leaves the old file or the new one. Hashed, so that a
 * damaged one is refused instead of trained on. */
#ifndef TRAINING_CHECKPOINT_H
#define TRAINING_CHECKPOINT_H

#include "training/learner.h"

#define CHECKPOINT_RUN_MAX 40

struct checkpoint_state {
    /* Of the run: adapter, examples and settings (run_identity). A checkpoint of another is not continued. */
    char run[CHECKPOINT_RUN_MAX];
    int64_t step;        /* done */
    int64_t optim_steps; /* as the learner counts them */
    int64_t tokens;
    double loss;                   /* of that step; NAN: none */
    double loss_before, held_loss; /* of the held-out examples: at the start, and here; NAN: none */
};

/* ST_NO_SPACE, ST_IO, ST_NOMEM, ST_DEVICE. */
NODISCARD enum status checkpoint_write(struct learner *l, const struct checkpoint_state *s, const char *path,
                                       struct error *err);
/* Into a learner of the same adapter. ST_NOT_FOUND: no such file; ST_BAD_FORMAT: damaged; ST_REJECTED: of
 * another adapter or run (run NULL: of any). The learner is changed only on ST_OK, but for ST_DEVICE. */
NODISCARD enum status checkpoint_read(struct learner *l, const char *path, const char *run,
                                      struct checkpoint_state *out, struct error *err);

#endif

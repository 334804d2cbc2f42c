/* Which examples a step is made of, and their rows.
 *
 * The order of an epoch depends on the seed and the epoch's number alone, so a step's examples depend on its
 * number alone: a run that goes on from a checkpoint needs no other position than its step. */
#ifndef TRAINING_BATCH_H
#define TRAINING_BATCH_H

#include "training/dataset.h"
#include "training/pass.h"

struct batch_plan {
    const struct dataset *data; /* not owned */
    uint64_t seed;
    int64_t batch_tokens;
    size_t train_count, held_count;
    uint32_t *train, *held; /* examples, ascending; owned as the rest */
    /* The epoch at hand. */
    int64_t epoch, first_step;
    uint32_t *order; /* [train_count] */
    size_t batch_count;
    size_t *batch_start; /* [train_count + 1]: of order; batch_count + 1 are used */
};

/* Holds out a share of the examples, chosen by the seed: rounded to the nearest number, at least one where
 * there are ten examples, none where there are fewer, 1000 at most. ST_NOMEM. */
NODISCARD enum status batch_plan_init(struct batch_plan *p, const struct dataset *d, uint64_t seed,
                                      double held_out, int64_t batch_tokens);
void batch_plan_release(struct batch_plan *p);

/* Steps of so many epochs, the last one cut short. */
int64_t batch_plan_steps(struct batch_plan *p, double epochs);
/* The examples of step 0..; *epoch_out is how many epochs are over after it. */
const uint32_t *batch_plan_step(struct batch_plan *p, int64_t step, size_t *count_out, double *epoch_out);
/* How many of the examples from `at` on fit into one batch, at least one. */
size_t batch_fit(const struct dataset *d, const uint32_t *examples, size_t count, size_t at,
                 int64_t batch_tokens);

/* The rows of some examples, for a pass. */
struct train_batch {
    int rows_max, seq_max;
    struct pass_batch pass; /* arrays owned. weight [row]: that of the token after it, as the data says */
    int *first_row;
    int32_t *token, *target;
    float *weight;
    float *logprob;        /* [rows], for whoever runs passes */
    struct old_token *old; /* [rows] of the token after each; 0 where the data has none */
    double weight_sum;
    int tokens; /* of the examples: as many as rows, and one more for each sequence */
};

/* Room for rows and sequences. ST_NOMEM. */
NODISCARD enum status train_batch_reserve(struct train_batch *b, int rows, int sequences);
void train_batch_release(struct train_batch *b);
/* ST_NOMEM. */
NODISCARD enum status train_batch_fill(struct train_batch *b, const struct dataset *d,
                                       const uint32_t *examples, size_t count);

#endif

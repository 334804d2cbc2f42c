/* What a batch is trained by: the loss of its examples, as weights of a pass.
 *
 * A pass knows sums of weight * -log p only. cross_entropy is one of these. The others take two passes: one
 * for log p, from which the loss and its derivative by each log p follow; the second with these as weights.
 */
#ifndef TRAINING_OBJECTIVE_H
#define TRAINING_OBJECTIVE_H

#include "training/learner.h"

struct objective_result {
    double loss;      /* objective + balance and contrast with their coefficients */
    double objective; /* cross_entropy: mean over weights. dpo (arXiv 2305.18290): mean over pairs.
                         importance_sampling:
                         - mean ratio * advantage. ppo (arXiv 1707.06347): the same, clipped */
    /* As struct pass_result; NAN where nothing is routed, and all but balance where the coefficient of contrast
     * is 0. */
    double balance, contrast, similarity, cohesion;
    double margin,
        accuracy;   /* dpo: mean of beta * (chosen - rejected), share of pairs above 0. NAN otherwise */
    double clipped; /* ppo: share of tokens whose ratio is clipped. NAN otherwise */
    double weight;  /* sum over tokens */
    int64_t tokens; /* of the examples */
    int64_t rows;   /* of the pass: those that routing counts */
    /* Until the next pass. logprob [rows]: before the update, of tokens that weigh anything in the data. */
    const float *logprob;
    const struct pass_routing *routing;
};

/* What the sum over a batch is divided by: its weights, or with dpo its pairs; 1 with REDUCTION_SUM. */
double objective_divisor(const struct train_batch *b, const struct train_settings *s);

/* Of l->batch, which holds the data's weights; they are overwritten. divisor: objective_divisor of all
 * batches whose gradients are added up. reference: with dpo, [sequences] log-probabilities of the model the
 * run began with; NULL otherwise. seed: of the contrastive loss' sample. backward: gradients are added to
 * params.grad; else nothing of l changes. As pass_backward; a result may be not finite. */
NODISCARD enum status objective_run(struct learner *l, const struct train_settings *s,
                                    const double *reference, double divisor, uint64_t seed, bool backward,
                                    const atomic_bool *cancel, struct objective_result *out);

/* Of l->batch: each sequence's sum of weight * log p: out [sequences]. */
NODISCARD enum status objective_logprobs(struct learner *l, const atomic_bool *cancel, double *out);

struct objective_evaluation {
    double loss;       /* mean objective, without the auxiliary losses */
    /* Means over batches of struct pass_result's; NAN where nothing is routed, and with other losses than
     * cross_entropy. */
    double similarity, cohesion;
    int64_t tokens;
};
/* Over examples of a set, at least one, in batches; reference: [2 * examples of the set], or NULL. */
NODISCARD enum status objective_evaluate(struct learner *l, const struct train_settings *s,
                                         const struct dataset *d, const uint32_t *examples, size_t count,
                                         const double *reference, const atomic_bool *cancel,
                                         struct objective_evaluation *out);

#endif

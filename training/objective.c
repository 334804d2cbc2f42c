#include "training/objective.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One run of a batch. */
struct objective {
    struct learner *l;
    const struct train_settings *s;
    const double *reference;
    double divisor; /* of the sum over weights or pairs */
    struct objective_result *out;
};

static double sequence_sum(const struct train_batch *b, int sequence, const float *logprob)
{
    double sum = 0;
    for (int r = b->first_row[sequence]; r < b->first_row[sequence + 1]; r++)
        sum += (double)b->weight[r] * (double)logprob[r];
    return sum;
}

/* --- the losses --- */

/* log(1 + e^x) without overflow. */
static double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

/* L = mean over pairs of -log sigmoid(m), m = beta ((chosen - its reference) - (rejected - its reference));
 * dL/d log p of chosen is -beta sigmoid(-m), of rejected the opposite, times the token's weight. */
static void dpo(struct objective *o, const float *logprob)
{
    struct train_batch *b = &o->l->batch;
    struct objective_result *out = o->out;
    double beta = o->s->dpo_beta;
    out->objective = out->margin = out->accuracy = 0;
    for (int i = 0; i < b->pass.seq_count; i += 2) {
        double chosen = sequence_sum(b, i, logprob) - o->reference[i];
        double rejected = sequence_sum(b, i + 1, logprob) - o->reference[i + 1];
        double m = beta * (chosen - rejected), pull = beta * exp(-softplus(m)) / o->divisor;
        out->objective += softplus(-m) / o->divisor;
        out->margin += m / o->divisor;
        out->accuracy += (m > 0) / o->divisor;
        for (int r = b->first_row[i]; r < b->first_row[i + 1]; r++) b->weight[r] *= (float)pull;
        for (int r = b->first_row[i + 1]; r < b->first_row[i + 2]; r++) b->weight[r] *= (float)-pull;
    }
}

/* L = -sum of weight * min(ratio A, clip(ratio) A) / divisor, ratio = p / p_old; where the clipped one is the
 * smaller, it has no gradient. importance_sampling has no clipping. */
static void ratios(struct objective *o, const float *logprob)
{
    struct train_batch *b = &o->l->batch;
    bool clip = o->s->loss == LOSS_PPO;
    int counted = 0, clipped = 0;
    o->out->objective = 0;
    for (int r = 0; r < b->pass.rows; r++) {
        if (b->weight[r] == 0) continue;
        double advantage = b->old[r].advantage, ratio = exp((double)logprob[r] - (double)b->old[r].logprob);
        double bound = advantage > 0 ? 1 + o->s->clip_high : 1 - o->s->clip_low;
        bool over = clip && advantage != 0 && (advantage > 0 ? ratio > bound : ratio < bound);
        double weight = (double)b->weight[r] / o->divisor;
        o->out->objective -= weight * (over ? bound : ratio) * advantage;
        b->weight[r] = over ? 0 : (float)(weight * ratio * advantage);
        counted++;
        clipped += over;
    }
    if (clip) o->out->clipped = counted ? (double)clipped / counted : 0;
}

static void cross_entropy(struct objective *o)
{
    struct train_batch *b = &o->l->batch;
    for (int r = 0; r < b->pass.rows; r++) b->weight[r] = (float)((double)b->weight[r] / o->divisor);
}

double objective_divisor(const struct train_batch *b, const struct train_settings *s)
{
    if (s->reduction == REDUCTION_SUM) return 1;
    return s->loss == LOSS_DPO ? b->pass.seq_count / 2 : b->weight_sum;
}

/* Weights for the pass that makes gradients. */
static enum status weigh(struct objective *o, const atomic_bool *cancel)
{
    struct pass_result first;
    if (o->s->loss == LOSS_CROSS_ENTROPY) {
        cross_entropy(o);
        return ST_OK;
    }
    enum status st = pass_forward(o->l->pass, &o->l->batch.pass, NULL, cancel, &first);
    if (st) return st;
    /* The second pass sees other weights, and where they are 0 no log p. */
    memcpy(o->l->batch.logprob, first.logprob, (size_t)o->l->batch.pass.rows * sizeof *first.logprob);
    if (o->s->loss == LOSS_DPO)
        dpo(o, first.logprob);
    else
        ratios(o, first.logprob);
    return ST_OK;
}

enum status objective_run(struct learner *l, const struct train_settings *s, const double *reference,
                          double divisor, uint64_t seed, bool backward, const atomic_bool *cancel,
                          struct objective_result *out)
{
    struct train_batch *b = &l->batch;
    const struct pass_loss loss = {.balance = s->balance,
                                   .contrast = s->contrast,
                                   .temperature = s->contrast_temperature,
                                   .pairs = (int)s->contrast_pairs,
                                   .seed = seed};
    struct objective_result result = {
        .margin = NAN, .accuracy = NAN, .clipped = NAN, .weight = b->weight_sum, .tokens = b->tokens, .rows = b->pass.rows};
    struct objective o = {l, s, reference, divisor, &result};
    struct pass_result pass;
    enum status st = weigh(&o, cancel);
    if (!st)
        st = backward ? pass_backward(l->pass, &b->pass, &loss, cancel, &pass)
                      : pass_forward(l->pass, &b->pass, &loss, cancel, &pass);
    if (st) return st;
    if (s->loss == LOSS_CROSS_ENTROPY) result.objective = pass.ce;
    bool routed = l->params->routed_count > 0, compared = routed && s->contrast > 0;
    result.balance = routed ? pass.balance : NAN;
    result.contrast = compared ? pass.contrast : NAN;
    result.similarity = compared ? pass.similarity : NAN;
    result.cohesion = compared ? pass.cohesion : NAN;
    result.loss = result.objective;
    if (routed) result.loss += s->balance * pass.balance;
    if (compared) result.loss += s->contrast * pass.contrast;
    result.logprob = s->loss == LOSS_CROSS_ENTROPY ? pass.logprob : b->logprob;
    result.routing = pass.routing;
    *out = result;
    return ST_OK;
}

enum status objective_logprobs(struct learner *l, const atomic_bool *cancel, double *out)
{
    struct pass_result pass;
    enum status st = pass_forward(l->pass, &l->batch.pass, NULL, cancel, &pass);
    for (int i = 0; !st && i < l->batch.pass.seq_count; i++)
        out[i] = sequence_sum(&l->batch, i, pass.logprob);
    return st;
}

/* --- a set --- */

/* Of the batch in l->batch: adds the sum of the loss, and what it is divided by. */
static enum status evaluate_batch(struct learner *l, const struct train_settings *s, const double *reference,
                                  const atomic_bool *cancel, struct objective_evaluation *out,
                                  double *divisor)
{
    struct train_settings whole = *s;
    struct objective_result result = {0};
    struct objective o = {l, &whole, reference, 1, &result};
    whole.reduction = REDUCTION_SUM;
    *divisor += objective_divisor(&l->batch, s);
    out->tokens += l->batch.tokens;
    enum status st = weigh(&o, cancel);
    if (!st && s->loss == LOSS_CROSS_ENTROPY) {
        struct pass_result pass;
        const struct pass_loss look = {.contrast = 1,
                                       .temperature = s->contrast_temperature,
                                       .pairs = (int)s->contrast_pairs,
                                       .seed = s->seed};
        st = pass_forward(l->pass, &l->batch.pass, &look, cancel, &pass);
        if (st) return st;
        result.objective = pass.ce;
        out->similarity += pass.similarity;
        out->cohesion += pass.cohesion;
    }
    if (!st) out->loss += result.objective;
    return st;
}

enum status objective_evaluate(struct learner *l, const struct train_settings *s, const struct dataset *d,
                               const uint32_t *examples, size_t count, const double *reference,
                               const atomic_bool *cancel, struct objective_evaluation *out)
{
    struct objective_evaluation sum = {0};
    double divisor = 0, *batch_reference = NULL;
    int batches = 0;
    enum status st = ST_OK;
    if (reference && !(batch_reference = malloc(2 * count * sizeof *batch_reference))) return ST_NOMEM;
    for (size_t at = 0, n; at < count && !st; at += n, batches++) {
        n = batch_fit(d, examples, count, at, s->batch_tokens);
        st = train_batch_fill(&l->batch, d, examples + at, n);
        for (size_t i = 0; reference && i < 2 * n; i++)
            batch_reference[i] = reference[2 * examples[at + i / 2] + i % 2];
        if (!st) st = evaluate_batch(l, s, batch_reference, cancel, &sum, &divisor);
    }
    free(batch_reference);
    if (st) return st;
    bool known = l->params->routed_count > 0 && s->loss == LOSS_CROSS_ENTROPY;
    *out = (struct objective_evaluation){.loss = sum.loss / divisor,
                                         .similarity = known ? sum.similarity / batches : NAN,
                                         .cohesion = known ? sum.cohesion / batches : NAN,
                                         .tokens = sum.tokens};
    return ST_OK;
}

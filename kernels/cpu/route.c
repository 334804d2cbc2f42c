#include "kernels/cpu/route.h"

#include <math.h>
#include <stdbool.h>

static bool logit_above(float a, float b) { return a > b || (isnan(b) && !isnan(a)); }

static int choose_all(const struct lr_site *s, int32_t *chosen)
{
    for (int i = 0; i < s->experts; i++) chosen[i] = i;
    return s->experts;
}

/* Takes the highest logits in turn, `most` of them, or fewer where the sum of their p passes `enough`;
 * lists them in ascending order of index. */
static int choose_highest(const struct lr_site *s, const float *logits, int most, const float *p,
                          float enough, int32_t *chosen)
{
    bool taken[LR_EXPERTS_MAX] = {false};
    float sum = 0;
    for (int j = 0; j < most && !(sum > enough); j++) {
        int best = -1;
        for (int i = 0; i < s->experts; i++)
            if (!taken[i] && (best < 0 || logit_above(logits[i], logits[best]))) best = i;
        taken[best] = true;
        if (p) sum += p[best];
    }
    int count = 0;
    for (int i = 0; i < s->experts; i++)
        if (taken[i]) chosen[count++] = i;
    return count;
}

static int choose_top(const struct lr_site *s, const float *logits, int32_t *chosen)
{
    if (s->top_k == s->experts) return choose_all(s, chosen);
    return choose_highest(s, logits, s->top_k, NULL, INFINITY, chosen);
}

/* The softmax over the listed logits alone: for a choice of experts that is their p, renormalised. */
static void softmax(float temperature, const float *logits, int count, const int32_t *of, float *p)
{
    float max = -INFINITY, total = 0;
    for (int j = 0; j < count; j++) max = fmaxf(max, logits[of[j]]);
    for (int j = 0; j < count; j++) {
        p[j] = expf((logits[of[j]] - max) / temperature);
        total += p[j];
    }
    for (int j = 0; j < count; j++) p[j] /= total;
}

/* p over all experts, all of them chosen: the rule that calls this drops some. */
static int softmax_all(const struct lr_site *s, const float *logits, int32_t *chosen, float *p)
{
    int count = choose_all(s, chosen);
    softmax(s->temperature, logits, count, chosen, p);
    return count;
}

/* Those whose p is not below the threshold: NaN is kept, so that it shows. */
static int choose_above(const struct lr_site *s, const float *p, int32_t *chosen)
{
    int count = 0;
    for (int i = 0; i < s->experts; i++)
        if (!(p[i] < s->threshold)) chosen[count++] = i;
    return count;
}

static int route_adaptive(const struct lr_site *s, const float *logits, int32_t *chosen, float *gate)
{
    float p[LR_EXPERTS_MAX], total = 0;
    softmax_all(s, logits, chosen, p);
    float tau = s->threshold / (1 + expf(-(logits[s->experts] + s->threshold_bias)));
    int count = 0;
    for (int i = 0; i < s->experts; i++) {
        if (p[i] - tau <= 0) continue;
        chosen[count] = i;
        gate[count++] = p[i] - tau;
        total += p[i] - tau;
    }
    for (int j = 0; j < count; j++) gate[j] /= total;
    return count;
}

/* MixLoRA's dynamic routing, whose temperature divides the probabilities and not the logits. */
static int route_top_p(const struct lr_site *s, const float *logits, int32_t *chosen, float *gate)
{
    float q[LR_EXPERTS_MAX];
    softmax(1, logits, choose_all(s, chosen), chosen, q);
    for (int i = 0; i < s->experts; i++) q[i] /= s->temperature;
    int count = choose_highest(s, logits, s->experts, q, s->top_p, chosen);
    for (int j = 0; j < count; j++) gate[j] = q[chosen[j]];
    return count;
}

int route_gates(const struct lr_site *s, const float *logits, int32_t *chosen, float *gate)
{
    float p[LR_EXPERTS_MAX];
    int count = 0;
    switch (s->rule) {
    case GATE_DENSE: return softmax_all(s, logits, chosen, gate);
    case GATE_TOPK:
        count = choose_top(s, logits, chosen);
        softmax(s->temperature, logits, count, chosen, gate);
        return count;
    case GATE_TOPK_RAW:
        softmax_all(s, logits, chosen, p);
        count = choose_top(s, logits, chosen);
        for (int j = 0; j < count; j++) gate[j] = p[chosen[j]];
        return count;
    case GATE_TOP_P: return route_top_p(s, logits, chosen, gate);
    case GATE_THRESHOLD:
        softmax_all(s, logits, chosen, p);
        count = choose_above(s, p, chosen);
        softmax(s->temperature, logits, count, chosen, gate);
        return count;
    case GATE_ADA_THRESHOLD: return route_adaptive(s, logits, chosen, gate);
    default: /* GATE_NONE */
        count = choose_all(s, chosen);
        for (int j = 0; j < count; j++) gate[j] = 1;
        return count;
    }
}

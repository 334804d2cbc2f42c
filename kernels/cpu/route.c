#include "kernels/cpu/route.h"

#include <math.h>
#include <stdbool.h>

int route_chosen_count(const struct lr_site *s)
{
    bool top = s->rule == GATE_TOPK || s->rule == GATE_TOPK_RAW;
    return top ? s->top_k : s->experts;
}

static bool logit_above(float a, float b) { return a > b || (isnan(b) && !isnan(a)); }

/* Marks the k highest logits, and lists them in ascending order of index. */
static void choose_top(const struct lr_site *s, const float *logits, int32_t *chosen)
{
    bool taken[LR_EXPERTS_MAX] = {false};
    for (int j = 0; j < s->top_k; j++) {
        int best = -1;
        for (int i = 0; i < s->experts; i++)
            if (!taken[i] && (best < 0 || logit_above(logits[i], logits[best]))) best = i;
        taken[best] = true;
    }
    for (int i = 0, j = 0; i < s->experts; i++)
        if (taken[i]) chosen[j++] = i;
}

/* Softmax over all experts (GATE_DENSE, GATE_TOPK_RAW) or over the chosen ones, which is the same as
 * renormalising their shares of the whole (GATE_TOPK). */
static void softmax_gates(const struct lr_site *s, const float *logits, int count, const int32_t *chosen,
                          float *gate)
{
    bool over_chosen = s->rule == GATE_TOPK;
    int terms = over_chosen ? count : s->experts;

    float max = -INFINITY, total = 0;
    for (int j = 0; j < count; j++) max = fmaxf(max, logits[chosen[j]]); /* the highest is among the chosen */
    for (int j = 0; j < terms; j++)
        total += expf((logits[over_chosen ? chosen[j] : j] - max) / s->temperature);
    for (int j = 0; j < count; j++) gate[j] = expf((logits[chosen[j]] - max) / s->temperature) / total;
}

void route_gates(const struct lr_site *s, const float *logits, int32_t *chosen, float *gate)
{
    int count = route_chosen_count(s);
    if (count < s->experts)
        choose_top(s, logits, chosen);
    else
        for (int i = 0; i < count; i++) chosen[i] = i;

    if (s->rule == GATE_NONE)
        for (int i = 0; i < count; i++) gate[i] = 1;
    else
        softmax_gates(s, logits, count, chosen, gate);
}

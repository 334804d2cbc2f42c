/* The routed low-rank adapters as kernels see them: sites, adapters, and which rows use which.
 *
 * A site is one (layer, projection). For its input row x, in fp32:
 *
 *     u = Wg x                         router logits, (experts)
 *     g = gate(u)                      by `rule`; most entries 0
 *     delta(x) = sum_i g_i scale_i B_i (A_i x) + gain o (W x) + bias
 *
 * and a row's set of adapters adds y += sum_j weight_j delta_j(x) (MoELoRA, arXiv 2402.12851; LoRA is
 * experts = 1 with GATE_NONE; gain is DoRA's, arXiv 2402.09353; most sites have neither gain nor bias).
 * Where no expert is chosen, nothing is added for experts at all: the sum is empty, not zero.
 *
 * MixLoRA (arXiv 2404.15159) routes a whole FFN: one router on the FFN's input, and the experts' activations
 * meet before the down projection. W' x stands for W x and the deltas of the set's other members:
 *
 *     a_i = silu(W'_gate x + s B_i A_i x) * (W'_up x + s B_i A_i x)    each with its own site's s, B, A
 *     a   = silu(W'_gate x) * (W'_up x)
 *     h   = a + weight (sum_i g_i a_i - a)                             what gate and up give
 *     y   = W'_down h + weight sum_i g_i s B_i (A_i a_i)
 *
 * which for a set of one with weight 1 is MixLoRA's own sum_i g_i expert_i(x), whatever the gates sum to. So the
 * other members of a set act as if they were merged into W, and several FFN-routed members add up.
 *
 * Sites are packed by the backend at load time and immutable afterwards, so any number of steps
 * may read one concurrently. */
#ifndef KERNELS_LOWRANK_H
#define KERNELS_LOWRANK_H

#include "base/dtype.h"
#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The projections an adapter may touch, in the order of a layer's computation. */
enum projection { PROJ_Q, PROJ_K, PROJ_V, PROJ_O, PROJ_GATE, PROJ_UP, PROJ_DOWN, PROJ_COUNT };

/* p = softmax(u / temperature) in fp32. Ties go to the lower expert index, on every backend. A logit that is
 * NaN is below all others, and makes the gates of the chosen NaN where p is over all experts. */
enum gate_rule {
    GATE_NONE,          /* g = 1 */
    GATE_DENSE,         /* g = p */
    GATE_TOPK,          /* p_i / (sum of the k largest) on the k largest */
    GATE_TOPK_RAW,      /* p_i on the k largest */
    GATE_TOP_P,         /* with q = softmax(u) / temperature: q_i on the fewest of the largest whose sum is above
                           top_p, or on all (MixLoRA's dynamic routing; these need not sum to 1) */
    GATE_THRESHOLD,     /* p_i / (their sum) where p_i >= threshold */
    GATE_ADA_THRESHOLD, /* p_i - tau over the sum of those where it is above 0, tau =
                           threshold sigmoid(threshold_row . x + threshold_bias) (AdaMoLE, arXiv 2405.00361)
                         */
    GATE_FFN,           /* the gates are those of the layer's FFN router: lr_adapter.ffn */
    GATE_RULE_COUNT
};

#define LR_EXPERTS_MAX 256
#define LR_RANK_MAX    1024 /* of one expert */

/* What a reader hands over for packing: row-major matrices of one dtype (F32, F16 or BF16),
 * not necessarily aligned; vectors of floats are. With rank 0, and a, b and scale NULL, it is an FFN's
 * router and nothing else; nobody looks at its d_out. Sites with GATE_FFN have no gain and no bias. */
struct lr_site_source {
    int experts, rank, top_k; /* top_k in 1..experts; ignored by rules without k */
    size_t d_in, d_out;
    enum gate_rule rule;
    bool shared_a;             /* a[0] is every expert's (HydraLoRA) */
    float temperature;         /* > 0, of rules with a router */
    float top_p;               /* 0..1, of GATE_TOP_P */
    float threshold;           /* >= 0, of GATE_THRESHOLD; the most tau can be, of GATE_ADA_THRESHOLD */
    float threshold_bias;      /* of GATE_ADA_THRESHOLD */
    enum dtype type;           /* of a and b */
    enum dtype router_type;    /* of router and threshold_row */
    const void *router;        /* (experts, d_in), or NULL with GATE_NONE and GATE_FFN */
    const void *threshold_row; /* (d_in), of GATE_ADA_THRESHOLD */
    const void *const *a;      /* [experts] of (rank, d_in) */
    const void *const *b;      /* [experts] of (d_out, rank) */
    const float *scale;        /* [experts]: alpha/rank or alpha/sqrt(rank) */
    const float *base_gain;    /* (d_out) or NULL. DoRA: m / rownorm(W + s B A) - 1, with B rows already
                                  multiplied by m / rownorm */
    const float *bias;         /* (d_out) or NULL, scaled */
};

/* One packed site. Fields after the header belong to the backend that packed it, which embeds
 * this struct first in its own. */
struct lr_site {
    int experts, rank, top_k;
    size_t d_in, d_out;
    enum gate_rule rule;
    float temperature, top_p, threshold, threshold_bias;
    size_t bytes; /* device memory it holds */
};

/* What a site's router has done since the site was packed: rows that it routed, how many of them chose each expert,
 * and the sums of their gates. Counted while rows are computed, without order: a reader may see part of a step. */
struct lr_usage {
    uint64_t rows;
    uint64_t *chosen; /* [experts], the caller's */
    double *gate;     /* [experts], the caller's */
};

/* A whole adapter version: its sites by [layer * PROJ_COUNT + projection], NULL where it has none. */
struct lr_adapter {
    size_t width; /* scratch a row needs, or more: see lr_width */
    int layers;
    const struct lr_site **sites;
    const struct lr_site **ffn; /* [layers] FFN routers, or NULL: where gate, up or down is GATE_FFN, and only
                                   there */
};

/* The most experts a row may choose. */
int lr_chosen_max(enum gate_rule rule, int experts, int top_k);
/* Floats of scratch a row of an adapter takes at most: the largest over layers and groups that share an input
 * of the sum over sites of experts * (rank + 1). Where an FFN is routed, its experts' activations stand
 * beside those of gate and up and of down: lr_chosen_max * (d_out of gate and up + 2). */
size_t lr_width(int layers, struct lr_site_source *const *sites, struct lr_site_source *const *ffn);

/* One member of a row's set. */
struct lr_member {
    const struct lr_adapter *adapter;
    float weight; /* never 0: the scheduler drops such members, so weight 0 is exactly the base */
};

/* Consecutive rows of a batch that share one set. Rows of the bare base belong to no segment. */
struct lr_segment {
    int first_row, row_count;
    int member_count;
    const struct lr_member *members;
};

#endif

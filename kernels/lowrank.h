/* The routed low-rank adapters as kernels see them: sites, adapters, and which rows use which.
 *
 * A site is one (layer, projection). For its input row x, in fp32:
 *
 *     u = Wg x                         router logits, (experts)
 *     g = gate(u)                      by `rule`; most entries 0
 *     delta(x) = sum_i g_i scale_i B_i (A_i x)
 *
 * and a row's set of adapters adds y += sum_j weight_j delta_j(x) (MoELoRA, arXiv 2402.12851; LoRA is
 * experts = 1 with GATE_NONE). Ties in top-k go to the lower expert index, on every backend.
 *
 * Sites are packed by the backend at load time and immutable afterwards, so any number of steps
 * may read one concurrently. */
#ifndef KERNELS_LOWRANK_H
#define KERNELS_LOWRANK_H

#include "base/dtype.h"
#include "base/status.h"

#include <stddef.h>
#include <stdint.h>

/* The projections an adapter may touch, in the order of a layer's computation. */
enum projection { PROJ_Q, PROJ_K, PROJ_V, PROJ_O, PROJ_GATE, PROJ_UP, PROJ_DOWN, PROJ_COUNT };

enum gate_rule {
    GATE_NONE,     /* g = 1 */
    GATE_DENSE,    /* g = p, p = softmax(u / temperature) */
    GATE_TOPK,     /* p_i / (sum of the k largest) on the k largest */
    GATE_TOPK_RAW, /* p_i on the k largest */
    GATE_RULE_COUNT
};

#define LR_EXPERTS_MAX 256
#define LR_RANK_MAX    1024 /* of one expert */

/* What a reader hands over for packing: row-major matrices of one dtype (F32, F16 or BF16),
 * not necessarily aligned. */
struct lr_site_source {
    int experts, rank, top_k; /* top_k in 1..experts; ignored by rules without k */
    size_t d_in, d_out;
    enum gate_rule rule;
    float temperature; /* > 0 */
    enum dtype type;   /* of a and b */
    enum dtype router_type;
    const void *router;   /* (experts, d_in), or NULL with GATE_NONE */
    const void *const *a; /* [experts] of (rank, d_in) */
    const void *const *b; /* [experts] of (d_out, rank) */
    const float *scale;   /* [experts]: alpha/rank or alpha/sqrt(rank) */
};

/* One packed site. Fields after the header belong to the backend that packed it, which embeds
 * this struct first in its own. */
struct lr_site {
    int experts, rank, top_k;
    size_t d_in, d_out;
    enum gate_rule rule;
    float temperature;
    size_t bytes; /* device memory it holds */
};

/* A whole adapter version: its sites by [layer * PROJ_COUNT + projection], NULL where it has none. */
struct lr_adapter {
    size_t width; /* scratch a row needs: the largest over layers and input-sharing groups of the sum
                     over sites of experts * (rank + 1) */
    int layers;
    const struct lr_site **sites;
};

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

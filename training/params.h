/* The parameters of an adapter in training: fp32 masters, gradients and moments, on the device.
 *
 * All parameters stand one after the other in one vector, so that the optimiser, a checkpoint and the gradient's norm
 * are loops over it; a site says where its parts begin. B is kept transposed, the experts of A and B
 * stacked: z = A x and delta = Bt^T (gate o z) are then one matrix product each for all experts. */
#ifndef TRAINING_PARAMS_H
#define TRAINING_PARAMS_H

#include "adapters/reader.h"
#include "kernels/grad.h"

struct train_site {
    int layer;
    enum projection projection;
    int experts, rank, top_k;
    enum gate_rule rule; /* NONE, DENSE, TOPK or TOPK_RAW */
    float temperature;
    int routed; /* which of the sites with a router; -1 without one */
    size_t d_in, d_out;
    /* Offsets into the vector, in floats. */
    size_t router; /* (experts, d_in); none with GATE_NONE */
    size_t a;      /* (experts * rank, d_in) */
    size_t bt;     /* (experts * rank, d_out), rows in the base model's order */
    float *scale;  /* (experts), device memory: constant */
    float *scale_host;
};

struct params {
    struct device *device; /* not owned */
    int layers, site_count;
    struct train_site *site;   /* by layer, then projection */
    struct train_site **place; /* [layers * PROJ_COUNT], NULL where the adapter has none */
    int routed_count;          /* sites with a router */
    size_t count;
    float *value, *grad, *m, *v; /* (count) each, device memory; all but value are zero at first */
};

/* From an adapter that was read: values as they stand. ST_UNSUPPORTED, saying which site and why: what cannot be
 * trained (DoRA, a bias on B, an A for all experts, FFN routing, gates by threshold). ST_NOMEM. */
NODISCARD enum status params_open(struct device *d, const struct adapter_bundle *b, struct params **out,
                                  struct error *err);
void params_close(struct params *p);

/* The current values as a bundle for bundle_convert or packing, matrices in `type` (F32, F16 or BF16). Reads from the
 * device: a turn on it is needed. The caller owes adapter_bundle_free. */
NODISCARD enum status params_bundle(const struct params *p, const struct adapter_base *base, enum dtype type,
                                    struct adapter_bundle **out, struct error *err);

/* A new adapter, as the README of adapters/ names its formats: sites at `targets` of all layers, A kaiming-uniform
 * (a = sqrt 5: uniform within 1 / sqrt(d_in)), B zero, router normal with deviation 0.02; a no-op. */
struct fresh_adapter {
    int rank, experts, top_k;    /* experts 1: plain LoRA */
    enum gate_rule rule;         /* of more experts: GATE_TOPK, GATE_TOPK_RAW or GATE_DENSE */
    float alpha;                 /* scale = alpha / rank, or alpha / sqrt(rank) */
    bool rslora;
    bool target[PROJ_COUNT];
    uint64_t seed;
};
NODISCARD enum status bundle_fresh(const struct fresh_adapter *f, const struct adapter_base *base,
                                   struct adapter_bundle **out, struct error *err);

#endif

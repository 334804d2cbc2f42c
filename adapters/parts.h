/* From a file's tensors to the sites of a bundle.
 *
 * A format's reader claims each tensor as one part of one site (an expert's A, its B, or the
 * router); parts_build then checks that the parts make whole sites that fit the configuration and
 * the base model, and lays them out as kernels want them. */
#ifndef ADAPTERS_PARTS_H
#define ADAPTERS_PARTS_H

#include "adapters/lora_config.h"
#include "adapters/reader.h"

struct safetensor;

enum part_kind { PART_A, PART_B, PART_ROUTER };

/* The module that a tensor's name begins with. */
struct module {
    int layer;
    enum projection projection;
    const char *root; /* what the base model's module names begin with: "model." or "" */
    const char *rest; /* of the tensor's name, after the module and its dot */
};

/* "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight" to layer 3, q, "lora_A.weight".
 * Also without "base_model.model." and without "model.". False for any other name. */
bool module_parse(const char *tensor_name, struct module *out);

struct part {
    const char *name; /* the tensor's, owned by the file's table */
    struct module module;
    enum part_kind kind;
    int expert; /* 0 for a router */
    enum dtype type;
    size_t rows, cols;
    const void *data;
};

/* A zeroed struct is empty. */
struct parts {
    struct part *part; /* owned */
    size_t count, capacity;
};
void parts_release(struct parts *p);

/* ST_UNSUPPORTED or ST_REJECTED, naming the tensor: its dtype or shape cannot be such a part. */
NODISCARD enum status parts_claim(struct parts *p, const struct safetensor *t, const struct module *m,
                                  enum part_kind kind, int expert, struct error *err);

/* How a file's sites choose experts. */
struct gate {
    enum gate_rule rule;
    int experts; /* each site must have as many; 0: as the tensors say */
    int top_k;
    float temperature;
};

/* Sorts the parts. Every refusal names a tensor or a module. */
NODISCARD enum status parts_build(struct parts *p, const char *format, const struct lora_config *config,
                                  const struct gate *gate, const struct adapter_base *base,
                                  struct adapter_bundle **out, struct error *err);

#endif

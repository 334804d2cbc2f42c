/* From a file's tensors to the sites of a bundle.
 *
 * A format says which names its tensors have and what its configuration fixes; parts_collect claims each
 * tensor as one part of one site, parts_build (sites.c) checks that the parts make whole sites that fit the
 * configuration and the base model, and layout.h lays them out as kernels want them. */
#ifndef ADAPTERS_PARTS_H
#define ADAPTERS_PARTS_H

#include "adapters/lora_config.h"
#include "adapters/reader.h"

struct safetensor;
struct safetensors;

enum part_kind {
    PART_A,
    PART_B,
    PART_BIAS,      /* of B, a vector */
    PART_MAGNITUDE, /* of DoRA, a vector */
    PART_ROUTER,
    PART_THRESHOLD,      /* AdaMoLE's row (1, d_in) */
    PART_THRESHOLD_BIAS, /* and its bias, one number */
    PART_KIND_COUNT
};

/* What a whole FFN's tensors have for a projection: MixLoRA's router. */
#define PROJ_FFN PROJ_COUNT

/* What a tensor belongs to. */
struct module {
    int layer;
    enum projection projection; /* or PROJ_FFN */
    const char *root;           /* what the base model's module names begin with: "model." or "" */
};

#define MODULE_NAME_SIZE 64
/* As in the base model: "model.layers.3.self_attn.q_proj". */
const char *module_name(const struct module *m, char buffer[MODULE_NAME_SIZE]);

/* How a tensor's name may go on after "layers.N.": '@' stands for a projection's path
 * ("self_attn.q_proj"), '%' for the number of an expert. A table ends with a NULL pattern. */
struct part_name {
    const char *pattern;
    enum part_kind kind;
    enum projection projection; /* where the pattern has no '@' */
    bool copy;                  /* a second name of a parameter: left out where both are there and equal */
};

struct part {
    const char *name; /* the tensor's */
    struct module module;
    enum part_kind kind;
    int expert; /* 0 where the name has none */
    bool copy;
    enum dtype type;
    size_t rows, cols; /* of a vector: its length, 1 */
    const void *data;
};

/* A zeroed struct is empty. */
struct parts {
    struct part *part; /* owned */
    size_t count, capacity;
    struct adapter_block *memory; /* owned: names that the file's table does not keep */
};
void parts_release(struct parts *p);

/* ST_UNSUPPORTED or ST_REJECTED, naming the tensor: its dtype or shape cannot be such a part.
 * The tensor may be of a type that only GGUF has. */
NODISCARD enum status parts_claim(struct parts *p, const struct safetensor *t, const struct module *m,
                                  const struct part_name *name, int expert, struct error *err);

/* Claims every tensor, or refuses the file by one's name. Names begin with `prefix` and "layers.N."; with
 * prefix NULL as PEFT writes them: "base_model.model." and "model.", or without either. */
NODISCARD enum status parts_collect(struct parts *p, const struct safetensors *tensors, const char *prefix,
                                    const struct part_name *names, struct error *err);

/* What the configuration fixes about a group of sites. */
struct site_rules {
    const struct lora_config *config;
    enum gate_rule rule;
    int experts;             /* each site must have as many; 0: as the tensors say */
    const char *experts_key; /* what the configuration calls them */
    int top_k;
    const cJSON *top_k_by_layer; /* in place of top_k: an array of whole numbers from 1 */
    float temperature;
    float top_p;
    float threshold; /* 0 with GATE_ADA_THRESHOLD: one over the number of experts */
    bool shared_a;   /* one A for all experts */
    bool rank_total; /* the stated rank is that of all experts together */
    bool dora, bias; /* the parts that there must be; otherwise there must be none */
};

struct format_rules {
    struct site_rules attention, mlp;
    struct site_rules ffn;      /* of the FFN's router, where mlp.rule is GATE_FFN */
    bool in_base_order;         /* B rows of q and k are in the base model's order already */
    const char *const *aliases; /* [PROJ_COUNT] what else target_modules may call a projection; or NULL */
};

/* One of a site's parts: A of experts 0.., then B of experts 0.., then at most one of each other kind. */
struct site_parts {
    const struct part *a, *b, *bias, *magnitude, *router, *threshold, *threshold_bias;
    int a_count, experts;
};

/* Sorts the parts. Every refusal names a tensor or a module. */
NODISCARD enum status parts_build(struct parts *p, const char *format, const struct format_rules *rules,
                                  const struct adapter_base *base, struct adapter_bundle **out,
                                  struct error *err);

#endif

/* What a format's reader gets, and the table it stands in. Only this folder includes it. */
#ifndef ADAPTERS_READER_INT_H
#define ADAPTERS_READER_INT_H

#include "adapters/parts.h"
#include "adapters/reader.h"
#include "base/gguf.h"
#include "base/json.h"

/* A format: what is particular to it. The rest, from checking keys to building sites, is common. */
struct adapter_format {
    const char *name; /* of its bundles */
    const char *peft_type;
    /* Whether a configuration of that peft_type is of this format; NULL: it is. */
    bool (*recognise)(const cJSON *config);
    const char *const *known_keys;             /* beyond those of every format */
    const struct config_refusal *refused_keys; /* beyond those of every format; may be NULL */
    const char *rank_key;                      /* what it calls "r" */
    const char *prefix;                        /* as parts_collect's */
    const struct part_name *names;
    /* One of the two fills what is not as plain LoRA: rules come with GATE_NONE and `config` everywhere. ST_INVALID
     * where a key is wrong. The first is for formats with the same rules at every site. */
    enum status (*site_rules_read)(const cJSON *config, struct site_rules *r, struct error *err);
    /* *mlp_config may be changed to give the FFN's modules ranks and scales of their own. */
    enum status (*rules_read)(const cJSON *config, struct format_rules *rules, struct lora_config *mlp_config,
                              struct error *err);
};

extern const struct adapter_format format_moelora, format_peft_lora, format_hydralora, format_mola,
    format_adamole, format_mole, format_coin, format_moe_peft_mola, format_moe_peft_loramoe, format_mixlora,
    format_mixlora_legacy;

/* LoRA in a GGUF file, as llama.cpp has it. It needs no configuration. */
NODISCARD enum status gguf_lora_read(const struct gguf *file, const struct adapter_base *base,
                                     struct adapter_bundle **out, struct error *err);

/* How many experts the configuration says each site has, under that key; left 0 where it does not say. */
NODISCARD enum status rules_experts(const cJSON *config, const char *key, struct site_rules *rules,
                                    struct error *err);
/* 'top_k', which must be there. */
NODISCARD enum status rules_top_k(const cJSON *config, struct site_rules *rules, struct error *err);
/* A number that must be there. */
NODISCARD enum status rules_number(const cJSON *config, const char *key, double min, double max, float *out,
                                   struct error *err);

/* Zeroed blocks, freed together; NULL where there is no memory left. */
void *blocks_alloc(struct adapter_block **list, size_t count, size_t size);
void blocks_free(struct adapter_block **list);

#endif

/* HydraLoRA (arXiv 2404.19245): one A, several B, and a router that weighs them all.
 *
 *   P.lora_A.weight       (rank, d_in)
 *   P.lora_B{i}.weight    (d_out, rank)
 *   P.lora_route.weight   (lora_nums, d_in) */
#include "adapters/reader_int.h"

static const char *const known_keys[] = {"r", "lora_nums", "merge_weights", NULL};
static const struct config_refusal refused_keys[] = {
    {"enable_lora", "'enable_lora' (parts of a merged projection) is not supported"},
    {"modules_to_save", "'modules_to_save' replaces weights of the base model, which is not supported"},
    {NULL, NULL},
};
static const struct part_name names[] = {
    {.pattern = "@.lora_A.weight", .kind = PART_A},
    {.pattern = "@.lora_B%.weight", .kind = PART_B},
    {.pattern = "@.lora_route.weight", .kind = PART_ROUTER},
    {.pattern = NULL},
};

static bool hydralora_recognise(const cJSON *config) { return config_on(json_get(config, "lora_nums")); }

static enum status hydralora_rules(const cJSON *config, struct format_rules *rules,
                                   struct lora_config *mlp_config, struct error *err)
{
    (void)mlp_config;
    rules->attention.rule = GATE_DENSE;
    rules->attention.shared_a = true;
    enum status st = rules_experts(config, "lora_nums", &rules->attention, err);
    rules->mlp = rules->attention;
    return st;
}

const struct adapter_format format_hydralora = {
    .name = "hydralora",
    .peft_type = "LORA",
    .recognise = hydralora_recognise,
    .known_keys = known_keys,
    .refused_keys = refused_keys,
    .rank_key = "r",
    .names = names,
    .rules_read = hydralora_rules,
};

/* HydraLoRA (arXiv 2404.19245): one A, several B, and a router that weighs them all.
 *
 *   P.lora_A.weight       (rank, d_in)
 *   P.lora_B{i}.weight    (d_out, rank)
 *   P.lora_route.weight   (lora_nums, d_in) */
#include "adapters/reader_int.h"

static const char *const known_keys[] = {"r", "lora_nums", "merge_weights", NULL};
static const struct config_refusal refused_keys[] = {
    {"enable_lora", "'enable_lora' (parts of a merged projection) is not supported"},
    {NULL, NULL},
};
static const struct part_name names[] = {
    {.pattern = "@.lora_A.weight", .kind = PART_A},
    {.pattern = "@.lora_B%.weight", .kind = PART_B},
    {.pattern = "@.lora_route.weight", .kind = PART_ROUTER},
    {.pattern = NULL},
};

static bool hydralora_recognise(const cJSON *config) { return config_on(json_get(config, "lora_nums")); }

static enum status hydralora_rules(const cJSON *config, struct site_rules *r, struct error *err)
{
    r->rule = GATE_DENSE;
    r->shared_a = true;
    enum status st = rules_experts(config, "lora_nums", r, err);
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
    .site_rules_read = hydralora_rules,
};

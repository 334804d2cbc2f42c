/* AdaMoLE (arXiv 2405.00361) and the MoLE of the same code.
 *
 *   P.lora_A.{e}.weight              (rank, d_in)
 *   P.lora_B.{e}.weight              (d_out, rank)
 *   P.lora_gating.weight             (num_experts, d_in)
 *   P.lora_threshold.weight, .bias   (1, d_in), (1): AdaMoLE only
 *   P.moe_layer.experts.{e}...       the first two again */
#include "adapters/reader_int.h"

static const char *const known_keys[] = {
    "lora_rank", "num_experts", "max_threshold", "threshold", "top_k", "init_lora_weights", NULL,
};
static const struct part_name names[] = {
    {.pattern = "@.lora_A.%.weight", .kind = PART_A},
    {.pattern = "@.lora_B.%.weight", .kind = PART_B},
    {.pattern = "@.moe_layer.experts.%.lora_A.weight", .kind = PART_A, .copy = true},
    {.pattern = "@.moe_layer.experts.%.lora_B.weight", .kind = PART_B, .copy = true},
    {.pattern = "@.lora_gating.weight", .kind = PART_ROUTER},
    {.pattern = "@.lora_threshold.weight", .kind = PART_THRESHOLD},
    {.pattern = "@.lora_threshold.bias", .kind = PART_THRESHOLD_BIAS},
    {.pattern = NULL},
};

static enum status adamole_rules(const cJSON *config, struct site_rules *r, struct error *err)
{
    r->rule = GATE_ADA_THRESHOLD;
    enum status st = rules_experts(config, "num_experts", r, err);
    /* Left out, it is one over the number of experts. */
    if (!st && json_get(config, "max_threshold"))
        st = rules_number(config, "max_threshold", 1e-6, 1, &r->threshold, err);
    return st;
}

static enum status mole_rules(const cJSON *config, struct site_rules *r, struct error *err)
{
    bool top_k = json_get(config, "top_k"), threshold = json_get(config, "threshold");
    enum status st = rules_experts(config, "num_experts", r, err);
    if (!st && top_k == threshold)
        st = error_set(err, ST_INVALID, "one of 'top_k' and 'threshold' must be given, and not both");
    r->rule = top_k ? GATE_TOPK : GATE_THRESHOLD;
    if (!st)
        st =
            top_k ? rules_top_k(config, r, err) : rules_number(config, "threshold", 0, 1, &r->threshold, err);
    return st;
}

const struct adapter_format format_adamole = {
    .name = "adamole",
    .peft_type = "ADAMOLE",
    .known_keys = known_keys,
    .rank_key = "lora_rank",
    .names = names,
    .site_rules_read = adamole_rules,
};

const struct adapter_format format_mole = {
    .name = "mole",
    .peft_type = "MOLE",
    .known_keys = known_keys,
    .rank_key = "lora_rank",
    .names = names,
    .site_rules_read = mole_rules,
};

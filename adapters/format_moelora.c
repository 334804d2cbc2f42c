/* The native format: `experts` low-rank pairs and a router per site.
 *
 *   P.moe_gate.weight             (experts, d_in)
 *   P.experts.{e}.lora_A.weight   (rank, d_in)
 *   P.experts.{e}.lora_B.weight   (d_out, rank)
 *   P.moe_threshold.weight, .bias (1, d_in), (1), with gate "ada_threshold" */
#include "adapters/reader_int.h"

#include <string.h>

static const char *const known_keys[] = {
    "r", "num_experts", "top_k", "gate", "temperature", "top_p", "threshold", "max_threshold", NULL,
};
static const struct config_refusal refused_keys[] = {
    {"use_dora", "DoRA ('use_dora') is for plain LoRA only"},
    {NULL, NULL},
};
static const struct part_name names[] = {
    {.pattern = "@.moe_gate.weight", .kind = PART_ROUTER},
    {.pattern = "@.experts.%.lora_A.weight", .kind = PART_A},
    {.pattern = "@.experts.%.lora_B.weight", .kind = PART_B},
    {.pattern = "@.moe_threshold.weight", .kind = PART_THRESHOLD},
    {.pattern = "@.moe_threshold.bias", .kind = PART_THRESHOLD_BIAS},
    {.pattern = NULL},
};

static const struct {
    const char *name;
    enum gate_rule rule;
} gate_names[] = {
    {"topk", GATE_TOPK}, {"topk_raw", GATE_TOPK_RAW},   {"dense", GATE_DENSE},
    {"none", GATE_NONE}, {"threshold", GATE_THRESHOLD}, {"ada_threshold", GATE_ADA_THRESHOLD},
};

static enum status gate_rule_read(const cJSON *config, enum gate_rule *out, struct error *err)
{
    const char *name = "topk";
    enum status st = json_get_string(config, "gate", &name, err);
    if (st && st != ST_NOT_FOUND) return st;
    for (size_t i = 0; i < sizeof gate_names / sizeof *gate_names; i++) {
        if (strcmp(name, gate_names[i].name) != 0) continue;
        *out = gate_names[i].rule;
        return ST_OK;
    }
    return error_set(err, ST_INVALID,
                     "'gate' is '%.40s'; it must be topk, topk_raw, dense, none, threshold or ada_threshold",
                     name);
}

static enum status moelora_rules(const cJSON *config, struct site_rules *r, struct error *err)
{
    double temperature = 1;
    enum status st = gate_rule_read(config, &r->rule, err);
    if (!st) st = rules_experts(config, "num_experts", r, err);
    if (!st && (r->rule == GATE_TOPK || r->rule == GATE_TOPK_RAW)) st = rules_top_k(config, r, err);
    if (!st && r->rule == GATE_THRESHOLD) st = rules_number(config, "threshold", 0, 1, &r->threshold, err);
    if (!st && r->rule == GATE_ADA_THRESHOLD)
        st = rules_number(config, "max_threshold", 0, 1, &r->threshold, err);
    if (st) return st;
    st = json_get_f64(config, "temperature", 1e-6, 1e6, &temperature, err);
    if (st && st != ST_NOT_FOUND) return st;
    r->temperature = (float)temperature;
    return ST_OK;
}

const struct adapter_format format_moelora = {
    .name = "moelora",
    .peft_type = "MOELORA",
    .known_keys = known_keys,
    .refused_keys = refused_keys,
    .rank_key = "r",
    .names = names,
    .site_rules_read = moelora_rules,
};

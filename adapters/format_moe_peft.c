/* The mixtures of MoE-PEFT: MoLA, LoRAMoE (arXiv 2312.09979) and MixLoRA (arXiv 2404.15159).
 *
 *   {mola,loramoe,mixlora}.layers.{N}.{self_attn or mlp}.{projection}
 *       .moe_gate.weight                                   (experts, d_in): MoLA, LoRAMoE
 *       .experts.{e}.lora_A.weight, .lora_B.weight         (rank, d_in), (d_out, rank)
 *       .lora_A.weight, .lora_B.weight                     LoRAMoE's and MixLoRA's attention: plain LoRA
 *   mixlora.layers.{N}.mlp.moe_gate.weight                 (experts, d_in): of the whole FFN
 *
 * and in files of MixLoRA's first version, with w1 = gate, w2 = down, w3 = up:
 *
 *   mixlora.layers.{N}.gate.weight
 *   mixlora.layers.{N}.experts.{e}.{w1,w2,w3}_proj.lora_A.weight, .lora_B.weight */
#include "adapters/reader_int.h"

#include <string.h>

/* Those from router_aux_loss_coef on matter in training only. */
static const char *const known_keys[] = {
    "r",
    "num_experts",
    "top_k",
    "top_p",
    "temperature",
    "routing_strategy",
    "act_fn",
    "lora_init",
    "router_aux_loss_coef",
    "jitter_noise",
    "router_loss",
    "router_init_range",
    "expert_lora",
    NULL,
};
static const struct config_refusal refused_keys[] = {
    {"use_dora", "DoRA ('use_dora') is not supported here: MoE-PEFT does not save its magnitudes"},
    {NULL, NULL},
};

/* The two halves of an expert or of plain LoRA; `to` is of use where the path has no '@'. */
#define PAIR(path, to)                                                     \
    {.pattern = path ".lora_A.weight", .kind = PART_A, .projection = to},  \
    {                                                                      \
        .pattern = path ".lora_B.weight", .kind = PART_B, .projection = to \
    }
/* What these formats have in common. */
#define FORMAT_COMMON .known_keys = known_keys, .refused_keys = refused_keys, .rank_key = "r"

/* A setting that may have but one value, which it also has where it is missing. */
static enum status setting_check(const cJSON *config, const char *key, const char *wanted, struct error *err)
{
    const char *value = wanted;
    enum status st = json_get_string(config, key, &value, err);
    if (st && st != ST_NOT_FOUND) return st;
    if (strcmp(value, wanted) == 0) return ST_OK;
    return error_set(err, ST_UNSUPPORTED, "'%s' is '%.40s'; it must be '%s'", key, value, wanted);
}

/* --- MoLA, LoRAMoE --- */

static const struct part_name names[] = {
    {.pattern = "@.moe_gate.weight", .kind = PART_ROUTER},
    PAIR("@.experts.%", PROJ_Q),
    PAIR("@", PROJ_Q),
    {.pattern = NULL},
};

static enum status mola_rules(const cJSON *config, struct site_rules *r, struct error *err)
{
    r->rule = GATE_TOPK;
    enum status st = setting_check(config, "routing_strategy", "mola", err);
    if (!st) st = rules_experts(config, "num_experts", r, err);
    if (!st) st = rules_top_k(config, r, err);
    return st;
}

static enum status loramoe_rules(const cJSON *config, struct format_rules *rules,
                                 struct lora_config *mlp_config, struct error *err)
{
    (void)mlp_config;
    rules->mlp.rule = GATE_DENSE;
    enum status st = setting_check(config, "routing_strategy", "loramoe", err);
    return st ? st : rules_experts(config, "num_experts", &rules->mlp, err);
}

const struct adapter_format format_moe_peft_mola = {
    .name = "moe-peft-mola",
    .peft_type = "MOLA",
    FORMAT_COMMON,
    .prefix = "mola.",
    .names = names,
    .site_rules_read = mola_rules,
};

const struct adapter_format format_moe_peft_loramoe = {
    .name = "moe-peft-loramoe",
    .peft_type = "LORAMOE",
    FORMAT_COMMON,
    .prefix = "loramoe.",
    .names = names,
    .rules_read = loramoe_rules,
};

/* --- MixLoRA --- */

static const struct part_name mixlora_names[] = {
    {.pattern = "mlp.moe_gate.weight", .kind = PART_ROUTER, .projection = PROJ_FFN},
    PAIR("@.experts.%", PROJ_Q),
    PAIR("@", PROJ_Q),
    {.pattern = NULL},
};
static const struct part_name legacy_names[] = {
    {.pattern = "gate.weight", .kind = PART_ROUTER, .projection = PROJ_FFN},
    PAIR("experts.%.w1_proj", PROJ_GATE),
    PAIR("experts.%.w2_proj", PROJ_DOWN),
    PAIR("experts.%.w3_proj", PROJ_UP),
    PAIR("experts.%.gate_proj", PROJ_GATE),
    PAIR("experts.%.down_proj", PROJ_DOWN),
    PAIR("experts.%.up_proj", PROJ_UP),
    PAIR("@", PROJ_Q),
    {.pattern = NULL},
};
static const char *const legacy_aliases[PROJ_COUNT] = {
    [PROJ_GATE] = "w1_proj",
    [PROJ_DOWN] = "w2_proj",
    [PROJ_UP] = "w3_proj",
};

static bool legacy_recognise(const cJSON *config)
{
    const char *strategy = "";
    return json_get_string(config, "routing_strategy", &strategy, NULL) == ST_OK &&
           strcmp(strategy, "mixtral") == 0;
}

/* Ranks and scales of the experts, where they are not those of the attention. */
static enum status expert_config_read(const cJSON *config, struct lora_config *out, struct error *err)
{
    static const char *const none[] = {"r", "lora_init", NULL};
    const cJSON *own = json_get(config, "expert_lora");
    if (!own) return ST_OK;
    if (!cJSON_IsObject(own)) return error_set(err, ST_INVALID, "'expert_lora' must be an object");
    for (const cJSON *v = own->child; v; v = v->next)
        if (!strcmp(v->string, "rank_pattern") || !strcmp(v->string, "alpha_pattern") ||
            !strcmp(v->string, "target_modules"))
            return error_set(err, ST_INVALID, "'%s' in 'expert_lora' is not supported", v->string);
    enum status st = config_keys_check(own, none, refused_keys, err);
    return st ? st : lora_config_override(out, own, err);
}

/* The router's rule of dynamic routing. MoE-PEFT divides the probabilities by the temperature, not the
 * logits, and 0 stands for 1. */
static enum status dynamic_rules(const cJSON *config, struct site_rules *rules, struct error *err)
{
    double temperature = 0;
    rules->rule = GATE_TOP_P;
    enum status st = rules_number(config, "top_p", 0, 1, &rules->top_p, err);
    if (st) return st;
    st = json_get_f64(config, "temperature", 0, 1e6, &temperature, err);
    if (st && st != ST_NOT_FOUND) return st;
    if (temperature > 0) rules->temperature = (float)temperature;
    return ST_OK;
}

static enum status router_rules(const cJSON *config, const char *strategy, struct site_rules *rules,
                                struct error *err)
{
    enum status st = rules_experts(config, "num_experts", rules, err);
    if (st) return st;
    if (strcmp(strategy, "mixlora-dynamic") == 0) return dynamic_rules(config, rules, err);
    rules->rule = GATE_TOPK;
    if (strcmp(strategy, "mixlora") == 0 || strcmp(strategy, "mixtral") == 0)
        return rules_top_k(config, rules, err);
    if (strcmp(strategy, "mixlora-switch") == 0)
        return error_set(
            err, ST_UNSUPPORTED,
            "'routing_strategy' is 'mixlora-switch', in which a token's experts depend on the other "
            "tokens of its batch; that is not supported");
    return error_set(err, ST_UNSUPPORTED,
                     "'routing_strategy' is '%.40s'; it must be mixlora or mixlora-dynamic", strategy);
}

static enum status mixlora_rules(const cJSON *config, struct format_rules *rules,
                                 struct lora_config *mlp_config, struct error *err)
{
    const char *strategy = "";
    enum status st = json_get_string(config, "routing_strategy", &strategy, err);
    if (st == ST_NOT_FOUND) return error_set(err, ST_INVALID, "'routing_strategy' is missing");
    if (st) return st;
    rules->mlp.rule = GATE_FFN;
    st = setting_check(config, "act_fn", "silu", err);
    if (!st) st = router_rules(config, strategy, &rules->ffn, err);
    if (!st) st = expert_config_read(config, mlp_config, err);
    return st;
}

static enum status legacy_rules(const cJSON *config, struct format_rules *rules,
                                struct lora_config *mlp_config, struct error *err)
{
    rules->aliases = legacy_aliases;
    return mixlora_rules(config, rules, mlp_config, err);
}

const struct adapter_format format_mixlora = {
    .name = "mixlora",
    .peft_type = "MIXLORA",
    FORMAT_COMMON,
    .prefix = "mixlora.",
    .names = mixlora_names,
    .rules_read = mixlora_rules,
};

const struct adapter_format format_mixlora_legacy = {
    .name = "mixlora-legacy",
    .peft_type = "MIXLORA",
    .recognise = legacy_recognise,
    FORMAT_COMMON,
    .prefix = "mixlora.",
    .names = legacy_names,
    .rules_read = legacy_rules,
};

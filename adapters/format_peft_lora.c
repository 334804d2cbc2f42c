/* LoRA as Hugging Face PEFT saves it, and DoRA.
 *
 *   P.lora_A.weight           (rank, d_in)
 *   P.lora_B.weight           (d_out, rank)
 *   P.lora_B.bias             (d_out), with `lora_bias`
 *   P.lora_magnitude_vector   (d_out), with `use_dora`; ".weight" after it in some files
 *
 * `fan_in_fan_out` speaks of how the base model stores its weights; A and B have these shapes
 * either way, so it changes nothing here. */
#include "adapters/reader_int.h"

#include <string.h>

static const char *const known_keys[] = {
    "r",
    "use_dora",
    "lora_bias",
    "init_lora_weights",
    "parent_library",
    "megatron_core",
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
    "runtime_config",
    "ensure_weight_tying",
    "qalora_group_size",
    NULL,
};
static const struct config_refusal refused_keys[] = {
    {"trainable_token_indices",
     "'trainable_token_indices' changes weights of the base model itself, which is not supported"},
    {"target_parameters", "'target_parameters' (LoRA on parameters rather than modules) is not supported"},
    {"layer_replication", "'layer_replication' changes the layers of the base model, which is not supported"},
    {"use_qalora", "QALoRA ('use_qalora') pools its input, which is not supported"},
    {"use_bdlora", "BD-LoRA ('use_bdlora') is not supported"},
    {"kasa_config", "KaSA ('kasa_config') is not supported"},
    {"arrow_config", "Arrow routing ('arrow_config') is not supported"},
    {"monteclora_config", "MonteCLoRA ('monteclora_config') is not supported"},
    {"alora_invocation_tokens",
     "activated LoRA ('alora_invocation_tokens') applies to part of a prompt only, which is not supported"},
    {"megatron_config", "layers of Megatron ('megatron_config') are not supported"},
    {NULL, NULL},
};

static const struct part_name names[] = {
    {.pattern = "@.lora_A.weight", .kind = PART_A},
    {.pattern = "@.lora_B.weight", .kind = PART_B},
    {.pattern = "@.lora_B.bias", .kind = PART_BIAS},
    {.pattern = "@.lora_magnitude_vector", .kind = PART_MAGNITUDE},
    {.pattern = "@.lora_magnitude_vector.weight", .kind = PART_MAGNITUDE},
    {.pattern = NULL},
};

/* MoLA and HydraLoRA call themselves LORA too. */
static bool peft_lora_recognise(const cJSON *config)
{
    return !config_on(json_get(config, "lora_nums")) && !cJSON_IsArray(json_get(config, "r"));
}

/* Initialisations that leave the base model's weights alone; the others subtract the first A and B
 * from them, so their adapters fit no unchanged base. */
static enum status init_check(const cJSON *config, struct error *err)
{
    static const char *const harmless[] = {"gaussian", "eva", "orthogonal"};
    const cJSON *v = json_get(config, "init_lora_weights");
    if (!cJSON_IsString(v)) return ST_OK;
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++)
        if (strcmp(v->valuestring, harmless[i]) == 0) return ST_OK;
    return error_set(
        err, ST_UNSUPPORTED,
        "'init_lora_weights' is '%.40s', which changes the base model's weights; "
        "convert the adapter to plain LoRA when saving it (PEFT: path_initial_model_for_weight_conversion)",
        v->valuestring);
}

static enum status peft_lora_rules(const cJSON *config, struct site_rules *r, struct error *err)
{
    enum status st = init_check(config, err);
    if (st) return st;
    st = json_get_bool(config, "use_dora", &r->dora, err);
    if (st && st != ST_NOT_FOUND) return st;
    st = json_get_bool(config, "lora_bias", &r->bias, err);
    if (st && st != ST_NOT_FOUND) return st;
    if (r->dora && r->bias)
        return error_set(err, ST_INVALID, "'use_dora' and 'lora_bias' do not go together");
    return ST_OK;
}

const struct adapter_format format_peft_lora = {
    .name = "peft-lora",
    .peft_type = "LORA",
    .recognise = peft_lora_recognise,
    .known_keys = known_keys,
    .refused_keys = refused_keys,
    .rank_key = "r",
    .names = names,
    .site_rules_read = peft_lora_rules,
};

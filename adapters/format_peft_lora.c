/* LoRA as Hugging Face PEFT saves it.
 *
 *   P.lora_A.weight   (rank, d_in)
 *   P.lora_B.weight   (d_out, rank)
 *
 * `fan_in_fan_out` speaks of how the base model stores its weights; A and B have these shapes
 * either way, so it changes nothing here. */
#include "adapters/reader_int.h"

#include <string.h>

static const char *const known_keys[] = {
    "peft_type",
    "task_type",
    "peft_version",
    "auto_mapping",
    "parent_library",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
    "bias",
    "init_lora_weights",
    "megatron_core",
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    NULL,
};
#define REPLACES_WEIGHTS "changes weights of the base model itself, which is not supported"
static const struct config_refusal refused_keys[] = {
    {"use_dora", "DoRA ('use_dora') is not supported; train without it"},
    {"lora_bias", "'lora_bias' (a bias on B) is not supported"},
    {"modules_to_save", "'modules_to_save' " REPLACES_WEIGHTS},
    {"trainable_token_indices", "'trainable_token_indices' " REPLACES_WEIGHTS},
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

static bool peft_lora_recognise(const struct adapter_source *src)
{
    return strcmp(src->peft_type, "LORA") == 0 && !config_on(json_get(src->config, "lora_nums")) &&
           !cJSON_IsArray(json_get(src->config, "r"));
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
        "adapter_config.json: 'init_lora_weights' is '%.40s', which changes the base model's weights; "
        "convert the adapter to plain LoRA when saving it (PEFT: path_initial_model_for_weight_conversion)",
        v->valuestring);
}

static enum status config_check(const cJSON *config, struct error *err)
{
    enum status st = config_keys_check(config, known_keys, refused_keys, err);
    if (!st) st = init_check(config, err);
    if (st) return st;
    const cJSON *bias = json_get(config, "bias");
    if (config_on(bias) && !(cJSON_IsString(bias) && strcmp(bias->valuestring, "none") == 0))
        return error_set(err, ST_UNSUPPORTED,
                         "adapter_config.json: 'bias' must be 'none': trained biases are not supported");
    return ST_OK;
}

static enum status tensor_refused(const struct safetensor *t, const char *rest, struct error *err)
{
    if (rest && strncmp(rest, "lora_magnitude_vector", 21) == 0)
        return error_set(err, ST_UNSUPPORTED, "tensor '%.200s' is of DoRA, which is not supported", t->name);
    if (rest && strcmp(rest, "lora_B.bias") == 0)
        return error_set(err, ST_UNSUPPORTED, "tensor '%.200s': a bias on B ('lora_bias') is not supported",
                         t->name);
    return tensor_unclaimed(t, err);
}

static enum status peft_lora_parts(const struct safetensors *tensors, struct parts *parts, struct error *err)
{
    for (size_t i = 0; i < safetensors_count(tensors); i++) {
        const struct safetensor *t = safetensors_at(tensors, i);
        struct module m = {.rest = NULL};
        bool parsed = module_parse(t->name, &m);
        bool is_a = parsed && strcmp(m.rest, "lora_A.weight") == 0;
        bool is_b = parsed && strcmp(m.rest, "lora_B.weight") == 0;
        if (!is_a && !is_b) return tensor_refused(t, m.rest, err);
        enum status st = parts_claim(parts, t, &m, is_a ? PART_A : PART_B, 0, err);
        if (st) return st;
    }
    return ST_OK;
}

static enum status peft_lora_read(const struct adapter_source *src, const char *format,
                                  struct adapter_bundle **out, struct error *err)
{
    struct lora_config config;
    enum status st = config_check(src->config, err);
    if (st) return st;
    st = lora_config_read(src->config, &config, err);
    if (st) return st;

    static const struct gate no_gate = {.rule = GATE_NONE, .top_k = 1, .temperature = 1};
    struct parts parts = {0};
    st = peft_lora_parts(src->tensors, &parts, err);
    if (!st) st = parts_build(&parts, format, &config, &no_gate, src->base, out, err);
    parts_release(&parts);
    lora_config_release(&config);
    return st;
}

const struct adapter_format format_peft_lora = {"peft-lora", peft_lora_recognise, peft_lora_read};

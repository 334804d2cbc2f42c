/* The native format: `experts` low-rank pairs and a router per site.
 *
 *   P.moe_gate.weight             (experts, d_in)
 *   P.experts.{e}.lora_A.weight   (rank, d_in)
 *   P.experts.{e}.lora_B.weight   (d_out, rank) */
#include "adapters/reader_int.h"

#include <stdio.h>
#include <string.h>

static const char *const known_keys[] = {
    "peft_type",
    "r",
    "lora_alpha",
    "num_experts",
    "top_k",
    "gate",
    "temperature",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "auto_mapping",
    NULL,
};
static const struct config_refusal refused_keys[] = {
    {"use_dora", "DoRA ('use_dora') is not supported"},
    {"modules_to_save", "'modules_to_save' replaces weights of the base model, which is not supported"},
    {NULL, NULL},
};

static const struct {
    const char *name;
    enum gate_rule rule;
} gate_names[] = {
    {"topk", GATE_TOPK},
    {"topk_raw", GATE_TOPK_RAW},
    {"dense", GATE_DENSE},
    {"none", GATE_NONE},
};

static bool moelora_recognise(const struct adapter_source *src)
{
    return strcmp(src->peft_type, "MOELORA") == 0;
}

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
    return error_set(err, ST_INVALID, "'gate' is '%.40s'; it must be topk, topk_raw, dense or none", name);
}

static enum status gate_read(const cJSON *config, struct gate *out, struct error *err)
{
    struct gate g = {0};
    int64_t experts = 0, top_k = 0;
    double temperature = 1;
    enum status st = gate_rule_read(config, &g.rule, err);
    if (st) return st;
    st = json_get_i64(config, "num_experts", 1, LR_EXPERTS_MAX, &experts, err);
    if (st && st != ST_NOT_FOUND) return st;
    st = json_get_i64(config, "top_k", 1, LR_EXPERTS_MAX, &top_k, err);
    if (st && st != ST_NOT_FOUND) return st;
    bool chooses = g.rule == GATE_TOPK || g.rule == GATE_TOPK_RAW;
    if (st == ST_NOT_FOUND && chooses)
        return error_set(err, ST_INVALID, "'top_k' is missing: how many experts a token uses");
    st = json_get_f64(config, "temperature", 1e-6, 1e6, &temperature, err);
    if (st && st != ST_NOT_FOUND) return st;

    g.experts = (int)experts;
    g.top_k = chooses ? (int)top_k : 0;
    g.temperature = (float)temperature;
    *out = g;
    return ST_OK;
}

/* "experts.{e}.lora_A.weight" and the like. False where rest is nothing of this format. */
static bool part_parse(const char *rest, enum part_kind *kind, int *expert)
{
    char half;
    int end = 0;
    *expert = 0;
    *kind = PART_ROUTER;
    if (strcmp(rest, "moe_gate.weight") == 0) return true;
    /* At most five digits, and no sign or space, which %d would take. */
    if (strncmp(rest, "experts.", 8) != 0 || rest[8] < '0' || rest[8] > '9') return false;
    if (sscanf(rest, "experts.%5d.lora_%c.weight%n", expert, &half, &end) != 2 || !end || rest[end])
        return false;
    *kind = half == 'A' ? PART_A : PART_B;
    return half == 'A' || half == 'B';
}

static enum status moelora_parts(const struct safetensors *tensors, struct parts *parts, struct error *err)
{
    for (size_t i = 0; i < safetensors_count(tensors); i++) {
        const struct safetensor *t = safetensors_at(tensors, i);
        struct module m;
        enum part_kind kind;
        int expert;
        if (!module_parse(t->name, &m) || !part_parse(m.rest, &kind, &expert))
            return tensor_unclaimed(t, err);
        enum status st = parts_claim(parts, t, &m, kind, expert, err);
        if (st) return st;
    }
    return ST_OK;
}

static enum status moelora_read(const struct adapter_source *src, const char *format,
                                struct adapter_bundle **out, struct error *err)
{
    struct lora_config config;
    enum status st = config_keys_check(src->config, known_keys, refused_keys, err);
    if (st) return st;
    st = lora_config_read(src->config, &config, err);
    if (st) return st;

    struct parts parts = {0};
    struct gate gate;
    struct error inner = {0};
    st = gate_read(src->config, &gate, &inner);
    if (st) {
        st = config_error(err, st, &inner);
        goto done;
    }
    st = moelora_parts(src->tensors, &parts, err);
    if (!st) st = parts_build(&parts, format, &config, &gate, src->base, out, err);
done:
    parts_release(&parts);
    lora_config_release(&config);
    return st;
}

const struct adapter_format format_moelora = {"moelora", moelora_recognise, moelora_read};

#include "adapters/reader.h"

#include "adapters/reader_int.h"
#include "base/memory.h"
#include "base/safetensors.h"

#include <stdlib.h>
#include <string.h>

#define CONFIG_BYTES_MAX (1u << 20)

/* Formats that share a peft_type each say what else they are known by. */
static const struct adapter_format *const formats[] = {
    &format_moelora,          &format_hydralora,      &format_mola,    &format_peft_lora,
    &format_adamole,          &format_mole,           &format_coin,    &format_moe_peft_mola,
    &format_moe_peft_loramoe, &format_mixlora_legacy, &format_mixlora,
};
#define FORMAT_COUNT (sizeof formats / sizeof *formats)

/* Known by their peft_type, so that the answer can say why. */
static const struct {
    const char *peft_type, *reason;
} refused_types[] = {
    {"XLORA", "X-LoRA runs the model twice for each token, which is not supported"},
    {"ADALORA", "AdaLoRA is not supported; convert it to LORA"},
};

static enum status format_find(const cJSON *config, const struct adapter_format **out, struct error *err)
{
    const char *type = NULL;
    struct error inner = {0};
    enum status st = json_get_string(config, "peft_type", &type, &inner);
    if (st == ST_NOT_FOUND)
        return error_set(err, ST_REJECTED,
                         "adapter_config.json has no 'peft_type', so its format is unknown");
    if (st) return config_error(err, st, &inner);
    for (size_t i = 0; i < FORMAT_COUNT; i++) {
        if (strcmp(type, formats[i]->peft_type) != 0) continue;
        if (formats[i]->recognise && !formats[i]->recognise(config)) continue;
        *out = formats[i];
        return ST_OK;
    }
    for (size_t i = 0; i < sizeof refused_types / sizeof *refused_types; i++)
        if (strcmp(type, refused_types[i].peft_type) == 0)
            return error_set(err, ST_UNSUPPORTED, "adapter_config.json: %s", refused_types[i].reason);
    return error_set(err, ST_UNSUPPORTED,
                     "adapters of peft_type '%.60s' are not supported; see the table of formats", type);
}

/* --- rules from a configuration --- */

enum status rules_experts(const cJSON *config, const char *key, struct site_rules *rules, struct error *err)
{
    int64_t experts = 0;
    enum status st = json_get_i64(config, key, 1, LR_EXPERTS_MAX, &experts, err);
    rules->experts = (int)experts;
    rules->experts_key = key;
    return st == ST_NOT_FOUND ? ST_OK : st;
}

enum status rules_top_k(const cJSON *config, struct site_rules *rules, struct error *err)
{
    int64_t top_k = 0;
    enum status st = json_get_i64(config, "top_k", 1, LR_EXPERTS_MAX, &top_k, err);
    if (st == ST_NOT_FOUND)
        return error_set(err, ST_INVALID, "'top_k' is missing: how many experts a token uses");
    rules->top_k = (int)top_k;
    return st;
}

enum status rules_number(const cJSON *config, const char *key, double min, double max, float *out,
                         struct error *err)
{
    double value = 0;
    enum status st = json_get_f64(config, key, min, max, &value, err);
    if (st == ST_NOT_FOUND)
        return error_set(err, ST_INVALID, "'%s' is missing: a number from %g to %g", key, min, max);
    *out = (float)value;
    return st;
}

/* --- reading --- */

static enum status parts_read(const struct adapter_format *f, const struct safetensors *tensors,
                              const struct format_rules *rules, const struct adapter_base *base,
                              struct adapter_bundle **out, struct error *err)
{
    struct parts parts = {0};
    enum status st = parts_collect(&parts, tensors, f->prefix, f->names, err);
    if (!st) st = parts_build(&parts, f->name, rules, base, out, err);
    parts_release(&parts);
    return st;
}

static enum status format_read(const struct adapter_format *f, const cJSON *json,
                               const struct safetensors *tensors, const struct adapter_base *base,
                               struct adapter_bundle **out, struct error *err)
{
    struct lora_config config;
    struct error inner = {0};
    enum status st = config_keys_check(json, f->known_keys, f->refused_keys, &inner);
    if (st) return config_error(err, st, &inner);
    st = lora_config_read(json, f->rank_key, &config, err);
    if (st) return st;

    struct lora_config mlp_config = config; /* what it points to is config's */
    struct site_rules plain = {.config = &config, .rule = GATE_NONE, .temperature = 1};
    struct format_rules rules = {.attention = plain, .mlp = plain, .ffn = plain};
    rules.mlp.config = &mlp_config;
    if (f->rules_read) {
        st = f->rules_read(json, &rules, &mlp_config, &inner);
    } else {
        st = f->site_rules_read(json, &rules.attention, &inner);
        rules.mlp = rules.attention;
    }
    st = st ? config_error(err, st, &inner) : parts_read(f, tensors, &rules, base, out, err);
    lora_config_release(&config);
    return st;
}

static enum status config_parse(const void *config, size_t size, cJSON **out, struct error *err)
{
    if (size > CONFIG_BYTES_MAX)
        return error_set(err, ST_TOO_LARGE, "adapter_config.json has %zu bytes; at most %u are allowed", size,
                         CONFIG_BYTES_MAX);
    struct error inner = {0};
    enum status st = json_parse(config, size, out, &inner);
    return st ? config_error(err, st, &inner) : ST_OK;
}

static enum status pair_read(const void *config, size_t config_size, const void *tensors, size_t tensors_size,
                             const struct adapter_base *base, struct adapter_bundle **out, struct error *err)
{
    cJSON *json = NULL;
    struct safetensors *table = NULL;
    const struct adapter_format *format;
    enum status st = config_parse(config, config_size, &json, err);
    if (!st && !cJSON_IsObject(json))
        st = error_set(err, ST_BAD_FORMAT, "adapter_config.json must hold a JSON object");
    if (!st) st = format_find(json, &format, err);
    if (!st) st = safetensors_parse(tensors, tensors_size, &table, err);
    if (!st) st = format_read(format, json, table, base, out, err);
    safetensors_free(table);
    cJSON_Delete(json);
    return st;
}

static enum status gguf_read(const void *data, size_t size, const struct adapter_base *base,
                             struct adapter_bundle **out, struct error *err)
{
    struct gguf *file = NULL;
    enum status st = gguf_parse(data, size, &file, err);
    if (!st) st = gguf_lora_read(file, base, out, err);
    gguf_free(file);
    return st;
}

enum status adapter_read(const void *config, size_t config_size, const void *tensors, size_t tensors_size,
                         const struct adapter_base *base, struct adapter_bundle **out, struct error *err)
{
    enum status st = tensors_size >= 4 && memcmp(tensors, "GGUF", 4) == 0
                         ? gguf_read(tensors, tensors_size, base, out, err)
                         : pair_read(config, config_size, tensors, tensors_size, base, out, err);
    if (st == ST_NOMEM) error_set(err, st, "not enough memory to read the adapter");
    return st;
}

/* --- memory: a list of blocks, freed together --- */

struct adapter_block {
    struct adapter_block *next;
    _Alignas(max_align_t) unsigned char bytes[];
};

void *blocks_alloc(struct adapter_block **list, size_t count, size_t size)
{
    size_t bytes = size_add(size_mul(count, size), sizeof(struct adapter_block));
    struct adapter_block *block = bytes == SIZE_MAX ? NULL : calloc(1, bytes);
    if (!block) return NULL;
    block->next = *list;
    *list = block;
    return block->bytes;
}

void blocks_free(struct adapter_block **list)
{
    for (struct adapter_block *next; *list; *list = next) {
        next = (*list)->next;
        free(*list);
    }
}

void *bundle_alloc(struct adapter_bundle *b, size_t count, size_t size)
{
    return blocks_alloc(&b->memory, count, size);
}

struct adapter_bundle *bundle_new(const struct adapter_base *base)
{
    struct adapter_bundle *b = calloc(1, sizeof *b);
    if (!b) return NULL;
    b->layers = base->layers;
    b->qk_permuted = base->qk_permuted;
    b->sites = bundle_alloc(b, (size_t)b->layers * PROJ_COUNT, sizeof *b->sites);
    if (b->sites) return b;
    free(b);
    return NULL;
}

void adapter_bundle_free(struct adapter_bundle *b)
{
    if (!b) return;
    blocks_free(&b->memory);
    free(b);
}

#include "adapters/reader.h"

#include "adapters/reader_int.h"
#include "base/memory.h"

#include <stdlib.h>
#include <string.h>

#define CONFIG_BYTES_MAX (1u << 20)

/* Asked in this order; the first that recognises the files reads them. */
static const struct adapter_format *const formats[] = {&format_moelora, &format_peft_lora};

/* Known by their configuration, so that the answer can name them. */
static const struct {
    const char *peft_type, *title;
} foreign_formats[] = {
    {"MOLA", "MoE-PEFT MoLA"},
    {"LORAMOE", "MoE-PEFT LoRAMoE"},
    {"MIXLORA", "MoE-PEFT MixLoRA"},
    {"ADAMOLE", "AdaMoLE"},
    {"MOLE", "MoLE"},
    {"MOE_LORA_CoIN", "CoIN MoELoRA"},
    {"XLORA", "X-LoRA"},
    {"ADALORA", "AdaLoRA"},
};

static const char *foreign_title(const struct adapter_source *src)
{
    if (strcmp(src->peft_type, "LORA") == 0)
        return config_on(json_get(src->config, "lora_nums")) ? "HydraLoRA (LORA with 'lora_nums')"
                                                             : "MoLA (LORA with a list of ranks)";
    for (size_t i = 0; i < sizeof foreign_formats / sizeof *foreign_formats; i++)
        if (strcmp(src->peft_type, foreign_formats[i].peft_type) == 0) return foreign_formats[i].title;
    return NULL;
}

static enum status format_unknown(const struct adapter_source *src, struct error *err)
{
    if (!src->peft_type[0])
        return error_set(err, ST_REJECTED,
                         "adapter_config.json has no 'peft_type'; expected MOELORA or LORA");
    const char *title = foreign_title(src);
    if (title)
        return error_set(err, ST_UNSUPPORTED,
                         "adapters of the format %s are not supported; convert it to MOELORA or PEFT LORA",
                         title);
    return error_set(err, ST_UNSUPPORTED,
                     "adapters of peft_type '%.60s' are not supported; expected MOELORA or LORA",
                     src->peft_type);
}

static enum status source_read(const struct adapter_source *src, struct adapter_bundle **out,
                               struct error *err)
{
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if (formats[i]->recognise(src)) return formats[i]->read(src, formats[i]->name, out, err);
    return format_unknown(src, err);
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

enum status adapter_read(const void *config, size_t config_size, const void *tensors, size_t tensors_size,
                         const struct adapter_base *base, struct adapter_bundle **out, struct error *err)
{
    cJSON *json = NULL;
    struct safetensors *table = NULL;
    struct error inner = {0};
    enum status st = config_parse(config, config_size, &json, err);
    if (st) goto done;
    if (!cJSON_IsObject(json)) {
        st = error_set(err, ST_BAD_FORMAT, "adapter_config.json must hold a JSON object");
        goto done;
    }
    const char *peft_type = "";
    st = json_get_string(json, "peft_type", &peft_type, &inner);
    if (st && st != ST_NOT_FOUND) {
        st = config_error(err, st, &inner);
        goto done;
    }
    st = safetensors_parse(tensors, tensors_size, &table, err);
    if (st) goto done;
    struct adapter_source src = {.config = json, .peft_type = peft_type, .tensors = table, .base = base};
    st = source_read(&src, out, err);
done:
    if (st == ST_NOMEM) error_set(err, st, "not enough memory to read the adapter");
    safetensors_free(table);
    cJSON_Delete(json);
    return st;
}

enum status tensor_unclaimed(const struct safetensor *t, struct error *err)
{
    struct module m;
    const char *reason =
        module_parse(t->name, &m)
            ? "it is no part of an adapter of this format"
            : "adapters apply to q, k, v, o, gate, up and down projections of the layers only";
    return error_set(err, ST_REJECTED, "tensor '%.200s' cannot be used: %s", t->name, reason);
}

/* --- a bundle's memory: a list of blocks, freed together --- */

struct adapter_block {
    struct adapter_block *next;
    _Alignas(max_align_t) unsigned char bytes[];
};

void *bundle_alloc(struct adapter_bundle *b, size_t count, size_t size)
{
    size_t bytes = size_add(size_mul(count, size), sizeof(struct adapter_block));
    struct adapter_block *block = bytes == SIZE_MAX ? NULL : calloc(1, bytes);
    if (!block) return NULL;
    block->next = b->memory;
    b->memory = block;
    return block->bytes;
}

void adapter_bundle_free(struct adapter_bundle *b)
{
    if (!b) return;
    for (struct adapter_block *next; b->memory; b->memory = next) {
        next = b->memory->next;
        free(b->memory);
    }
    free(b);
}

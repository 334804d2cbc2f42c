/* LoRA in a GGUF file, as llama.cpp has it.
 *
 *   general.type "adapter", general.architecture "llama", adapter.type "lora"
 *   adapter.lora.alpha                    scale = alpha / rank, or 1 where alpha is 0
 *   blk.{N}.attn_q.weight.lora_a          (rank, d_in)
 *   blk.{N}.attn_q.weight.lora_b          (d_out, rank)
 *
 * Rows of q and k are in the order of the base model's GGUF file already. */
#include "adapters/reader_int.h"
#include "base/safetensors.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static const struct part_name half_a = {.kind = PART_A}, half_b = {.kind = PART_B};

static const char *const projection_tensors[PROJ_COUNT] = {
    [PROJ_Q] = "attn_q",      [PROJ_K] = "attn_k",  [PROJ_V] = "attn_v",      [PROJ_O] = "attn_output",
    [PROJ_GATE] = "ffn_gate", [PROJ_UP] = "ffn_up", [PROJ_DOWN] = "ffn_down",
};

static enum status string_check(const struct gguf *file, const char *key, const char *wanted,
                                struct error *err)
{
    struct gguf_string s;
    enum status st = gguf_get_string(file, key, &s, err);
    if (st == ST_NOT_FOUND)
        return error_set(err, ST_REJECTED, "the GGUF file has no '%s'; expected '%s', as LoRA adapters have",
                         key, wanted);
    if (st) return st;
    if (s.size == strlen(wanted) && memcmp(s.data, wanted, s.size) == 0) return ST_OK;
    return error_set(err, ST_UNSUPPORTED, "'%s' of the GGUF file is '%.*s'; it must be '%s'", key,
                     (int)(s.size < 60 ? s.size : 60), s.data, wanted);
}

static enum status metadata_read(const struct gguf *file, struct lora_config *out, struct error *err)
{
    enum status st = string_check(file, "general.type", "adapter", err);
    if (!st) st = string_check(file, "adapter.type", "lora", err);
    if (!st) st = string_check(file, "general.architecture", "llama", err);
    if (st) return st;
    struct gguf_array tokens;
    if (gguf_get_array(file, "adapter.alora.invocation_tokens", &tokens, NULL) != ST_NOT_FOUND)
        return error_set(
            err, ST_UNSUPPORTED,
            "activated LoRA ('adapter.alora.invocation_tokens') applies to part of a prompt only, "
            "which is not supported");
    st = gguf_get_f64(file, "adapter.lora.alpha", &out->alpha, err);
    if (st == ST_NOT_FOUND)
        return error_set(
            err, ST_REJECTED,
            "the GGUF file has no 'adapter.lora.alpha', so its scale is unknown; convert it again");
    out->unscaled = out->alpha == 0;
    return st;
}

/* "blk.3.attn_q.weight.lora_a" */
static bool tensor_parse(const char *name, struct module *m, const struct part_name **half)
{
    char tensor[16], which;
    int end = 0;
    *m = (struct module){.root = "model."};
    if (strncmp(name, "blk.", 4) != 0 || name[4] < '0' || name[4] > '9') return false;
    if (sscanf(name, "blk.%5d.%15[a-z_].weight.lora_%c%n", &m->layer, tensor, &which, &end) != 3 || !end ||
        name[end] || (which != 'a' && which != 'b'))
        return false;
    *half = which == 'a' ? &half_a : &half_b;
    for (int p = 0; p < PROJ_COUNT; p++) {
        if (strcmp(tensor, projection_tensors[p]) != 0) continue;
        m->projection = (enum projection)p;
        return true;
    }
    return false;
}

/* As a safetensor: named with a NUL, outermost dimension first. */
static enum status tensor_take(struct parts *parts, const struct gguf_tensor *t, struct error *err)
{
    char *name = blocks_alloc(&parts->memory, t->name.size + 1, 1);
    if (!name) return ST_NOMEM;
    memcpy(name, t->name.data, t->name.size);

    struct module m;
    const struct part_name *half;
    if (!tensor_parse(name, &m, &half))
        return error_set(
            err, ST_REJECTED,
            "tensor '%.200s' cannot be used: adapters apply to attn_q, attn_k, attn_v, attn_output, "
            "ffn_gate, ffn_up and ffn_down of the layers only",
            name);
    struct safetensor s = {
        .name = name, .type = t->type, .dim_count = t->dim_count, .data = t->data, .bytes = t->bytes};
    for (int i = 0; i < 4; i++) s.dim[i] = i < t->dim_count ? t->dim[t->dim_count - 1 - i] : 1;
    return parts_claim(parts, &s, &m, half, 0, err);
}

enum status gguf_lora_read(const struct gguf *file, const struct adapter_base *base,
                           struct adapter_bundle **out, struct error *err)
{
    struct lora_config config = {0};
    enum status st = metadata_read(file, &config, err);
    if (st) return st;
    if (base && !base->qk_permuted)
        return error_set(err, ST_UNSUPPORTED, "LoRA in a GGUF file needs a base model in a GGUF file");

    struct site_rules plain = {.config = &config, .rule = GATE_NONE, .temperature = 1};
    struct format_rules rules = {.attention = plain, .mlp = plain, .in_base_order = true};
    struct parts parts = {0};
    for (size_t i = 0; i < gguf_tensor_count(file) && !st; i++)
        st = tensor_take(&parts, gguf_tensor_at(file, i), err);
    if (!st) st = parts_build(&parts, "gguf-lora", &rules, base, out, err);
    parts_release(&parts);
    return st;
}

#include "tests/support/adapter_maker.h"

#include "adapters/package.h"
#include "tests/support/temp_folder.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void fill(struct safetensor *t, unsigned seed)
{
    size_t size = dtype_block_bytes(t->type), n = t->bytes / size;
    unsigned char *data = malloc(t->bytes ? t->bytes : 1);
    CHECK(data);
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        float f = (float)(seed >> 8) / (float)(1 << 24) - 0.5f;
        uint16_t half = t->type == DTYPE_F16 ? f32_to_f16(f) : f32_to_bf16(f);
        memcpy(data + i * size, t->type == DTYPE_F32 ? (const void *)&f : &half, size);
    }
    t->data = data;
}

struct safetensor *maker_add(struct adapter_maker *m, enum dtype type, uint64_t rows, uint64_t cols,
                             unsigned seed, const char *name_fmt, ...)
{
    CHECK(m->count < MAKER_TENSORS_MAX);
    char name[256];
    va_list args;
    va_start(args, name_fmt);
    vsnprintf(name, sizeof name, name_fmt, args);
    va_end(args);
    struct safetensor *t = &m->tensor[m->count++];
    *t = (struct safetensor){.name = strdup(name), .type = type, .dim_count = 2, .dim = {rows, cols, 1, 1}};
    t->bytes = (size_t)(rows * cols) * dtype_block_bytes(type);
    fill(t, seed + (unsigned)m->count * 7919u);
    return t;
}

struct safetensor *maker_find(struct adapter_maker *m, const char *name)
{
    for (size_t i = 0; i < m->count; i++)
        if (strcmp(m->tensor[i].name, name) == 0) return &m->tensor[i];
    check_failed(name, __FILE__, __LINE__);
}

static void tensor_release(struct safetensor *t)
{
    free((void *)t->name);
    free((void *)t->data);
}

void maker_remove(struct adapter_maker *m, const char *name)
{
    struct safetensor *t = maker_find(m, name);
    tensor_release(t);
    *t = m->tensor[--m->count];
}

void maker_write(const struct adapter_maker *m, struct strbuf *out)
{
    safetensors_write(m->tensor, m->count, out);
    CHECK(!out->failed);
}

void maker_release(struct adapter_maker *m)
{
    for (size_t i = 0; i < m->count; i++) tensor_release(&m->tensor[i]);
    m->count = 0;
}

struct adapter_base small_base(void)
{
    return (struct adapter_base){
        .layers = 2,
        .d_in = {[PROJ_Q] = 16,
                 [PROJ_K] = 16,
                 [PROJ_V] = 16,
                 [PROJ_O] = 16,
                 [PROJ_GATE] = 16,
                 [PROJ_UP] = 16,
                 [PROJ_DOWN] = 24},
        .d_out = {[PROJ_Q] = 16,
                  [PROJ_K] = 8,
                  [PROJ_V] = 8,
                  [PROJ_O] = 16,
                  [PROJ_GATE] = 24,
                  [PROJ_UP] = 24,
                  [PROJ_DOWN] = 16},
        .heads = 4,
        .kv_heads = 2,
        .head_dim = 4,
    };
}

#define MODULE "base_model.model.model.layers.%d.self_attn.%s_proj"

void maker_lora(struct adapter_maker *m, int rank, unsigned seed)
{
    for (int layer = 0; layer < 2; layer++) {
        for (int p = 0; p < 2; p++) {
            const char *name = p ? "v" : "q";
            maker_add(m, DTYPE_F32, (uint64_t)rank, 16, seed, MODULE ".lora_A.weight", layer, name);
            maker_add(m, DTYPE_F32, p ? 8 : 16, (uint64_t)rank, seed, MODULE ".lora_B.weight", layer, name);
        }
    }
}

void maker_moelora(struct adapter_maker *m, int experts, int rank, unsigned seed)
{
    for (int layer = 0; layer < 2; layer++) {
        for (int p = 0; p < 2; p++) {
            const char *name = p ? "v" : "q";
            maker_add(m, DTYPE_F32, (uint64_t)experts, 16, seed, MODULE ".moe_gate.weight", layer, name);
            for (int e = 0; e < experts; e++) {
                maker_add(m, DTYPE_F32, (uint64_t)rank, 16, seed, MODULE ".experts.%d.lora_A.weight", layer,
                          name, e);
                maker_add(m, DTYPE_F32, p ? 8 : 16, (uint64_t)rank, seed, MODULE ".experts.%d.lora_B.weight",
                          layer, name, e);
            }
        }
    }
}

#define CONFIG "{\"peft_type\":\"LORA\",\"lora_alpha\":3,\"target_modules\":[\"q_proj\",\"v_proj\"]}"

enum status maker_put(struct registry *r, const char *tenant, const char *name, int rank, unsigned seed,
                      const char *expected_version, struct put_result *out, struct error *err)
{
    struct adapter_maker m = {0};
    struct strbuf bytes = {0};
    struct upload *u = NULL;
    maker_lora(&m, rank, seed);
    maker_write(&m, &bytes);
    enum status st = upload_open(r, &u, err);
    if (!st) {
        file_write(upload_path(u), PACKAGE_CONFIG, CONFIG, strlen(CONFIG));
        file_write(upload_path(u), PACKAGE_TENSORS, bytes.data, bytes.size);
        st = registry_put(r, tenant, name, u, expected_version, out, err);
    }
    upload_close(u);
    strbuf_release(&bytes);
    maker_release(&m);
    return st;
}

/* --- the device --- */

static enum status count_pack(struct device *device, const struct lr_site_source *src, struct lr_site **out)
{
    struct counting_device *d = (struct counting_device *)device;
    int packing = atomic_fetch_add(&d->packing, 1) + 1, peak = atomic_load(&d->packing_peak);
    while (packing > peak && !atomic_compare_exchange_weak(&d->packing_peak, &peak, packing)) continue;
    if (d->pack_delay_us) usleep((unsigned)d->pack_delay_us);
    atomic_fetch_sub(&d->packing, 1);
    if (atomic_load(&d->packs_left) >= 0 && atomic_fetch_sub(&d->packs_left, 1) <= 0) {
        atomic_store(&d->packs_left, 0);
        return ST_NOMEM;
    }
    struct lr_site *s = calloc(1, sizeof *s);
    if (!s) return ST_NOMEM;
    *s = (struct lr_site){
        .experts = src->experts,
        .rank = src->rank,
        .top_k = src->top_k,
        .d_in = src->d_in,
        .d_out = src->d_out,
        .rule = src->rule,
        .temperature = src->temperature,
        .bytes = (size_t)src->experts * (size_t)src->rank * (src->d_in + src->d_out) * sizeof(float),
    };
    atomic_fetch_add(&d->live_sites, 1);
    atomic_fetch_add(&d->packs, 1);
    *out = s;
    return ST_OK;
}

static void count_free(struct device *device, struct lr_site *s)
{
    struct counting_device *d = (struct counting_device *)device;
    atomic_fetch_sub(&d->live_sites, 1);
    free(s);
}

void counting_device_init(struct counting_device *d)
{
    static const struct device_ops ops = {.lr_site_pack = count_pack, .lr_site_free = count_free};
    *d = (struct counting_device){.device = {.ops = &ops, .name = "counting"}};
    atomic_init(&d->packs_left, -1);
}

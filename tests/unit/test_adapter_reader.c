/* Adapter files: what PEFT saved gives PEFT's deltas; what cannot be used is refused by name. */
#include "adapters/reader.h"
#include "base/file.h"
#include "tests/support/adapter_maker.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <setjmp.h>

#include <cmocka.h>

#define FILES "tests/fixtures/adapter_files/"
#define P0    "base_model.model.model.layers.0.self_attn.q_proj."

/* --- against PEFT --- */

/* y[i][j] of scale_e B_e A_e, summed over experts. */
static double delta_at(const struct lr_site_source *s, size_t i, size_t j)
{
    double sum = 0;
    float a[64], b[64];
    for (int e = 0; e < s->experts; e++) {
        size_t row = dtype_row_bytes(s->type, (size_t)s->rank), size = dtype_row_bytes(s->type, 1);
        dtype_decode(s->type, (const char *)s->b[e] + i * row, b, (size_t)s->rank);
        for (int r = 0; r < s->rank; r++) {
            dtype_decode(s->type, (const char *)s->a[e] + ((size_t)r * s->d_in + j) * size, &a[r], 1);
            sum += (double)s->scale[e] * b[r] * a[r];
        }
    }
    return sum;
}

/* PEFT multiplies in fp32: at most rank 9 products of values below 2, so rounding stays below
 * 9 * 4 * 2^-24 = 2e-6. */
static void site_expect(const struct lr_site_source *s, const struct safetensor *expected)
{
    assert_int_equal(expected->dim[0], s->d_out);
    assert_int_equal(expected->dim[1], s->d_in);
    for (size_t i = 0; i < s->d_out; i++) {
        for (size_t j = 0; j < s->d_in; j++) {
            float want;
            memcpy(&want, (const char *)expected->data + 4 * (i * s->d_in + j), sizeof want);
            double got = delta_at(s, i, j);
            if (!(fabs(got - want) <= 2e-6))
                fail_msg("%s [%zu, %zu]: %g, not %g", expected->name, i, j, got, want);
        }
    }
}

static struct adapter_bundle *read_folder(const char *name, const struct adapter_base *base,
                                          struct file_map files[2])
{
    char path[256];
    struct error err = {0};
    snprintf(path, sizeof path, FILES "%s/adapter_config.json", name);
    assert_int_equal(file_map(path, &files[0], &err), ST_OK);
    snprintf(path, sizeof path, FILES "%s/adapter_model.safetensors", name);
    assert_int_equal(file_map(path, &files[1], &err), ST_OK);
    struct adapter_bundle *b = NULL;
    enum status st = adapter_read(files[0].data, files[0].size, files[1].data, files[1].size, base, &b, &err);
    if (st) fail_msg("%s: %s", name, err.message);
    return b;
}

/* All sites of one adapter; returns how many the expected file has. */
static int folder_check(const char *name, const struct safetensors *expected, bool permuted)
{
    struct file_map files[2];
    struct adapter_base base = small_base();
    base.qk_permuted = permuted;
    struct adapter_bundle *b = read_folder(name, &base, files);
    assert_string_equal(b->format, "peft-lora");
    int count = 0;
    for (int i = 0; i < base.layers * PROJ_COUNT; i++) {
        char key[128];
        int p = i % PROJ_COUNT;
        snprintf(key, sizeof key, "%s/model.layers.%d.%s.%s%s", name, i / PROJ_COUNT,
                 p <= PROJ_O ? "self_attn" : "mlp", projection_name((enum projection)p),
                 permuted && p <= PROJ_K ? "/permuted" : "");
        const struct safetensor *want = safetensors_find(expected, key);
        if (!want != !b->sites[i]) fail_msg("%s is %s", key, want ? "missing" : "unexpected");
        if (want) site_expect(b->sites[i], want);
        count += want != NULL;
    }
    assert_int_equal(count, b->site_count);
    adapter_bundle_free(b);
    file_unmap(&files[0]);
    file_unmap(&files[1]);
    return count;
}

static void peft_files_give_pefts_deltas(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int sites;
    } folders[] = {{"plain", 14},   {"rslora", 4},         {"patterns", 6}, {"regex", 3}, {"all_linear", 14},
                   {"excluded", 4}, {"excluded_regex", 2}, {"layers", 2},   {"bf16", 4}};
    struct file_map map;
    struct safetensors *expected;
    assert_int_equal(file_map(FILES "expected.safetensors", &map, NULL), ST_OK);
    assert_int_equal(safetensors_parse(map.data, map.size, &expected, NULL), ST_OK);
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++)
        for (int permuted = 0; permuted < 2; permuted++)
            assert_int_equal(folder_check(folders[i].name, expected, permuted), folders[i].sites);
    safetensors_free(expected);
    file_unmap(&map);
}

/* --- what a bundle says --- */

#define MOE_CONFIG                                                                       \
    "{\"peft_type\":\"MOELORA\",\"r\":2,\"lora_alpha\":3,\"num_experts\":4,\"top_k\":2," \
    "\"target_modules\":[\"q_proj\",\"v_proj\"]}"
#define LORA_CONFIG \
    "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":3,\"target_modules\":[\"q_proj\",\"v_proj\"]}"

static enum status read_made(struct adapter_maker *m, const char *config, const struct adapter_base *base,
                             struct strbuf *bytes, struct adapter_bundle **out, struct error *err)
{
    maker_write(m, bytes);
    return adapter_read(config, strlen(config), bytes->data, bytes->size, base, out, err);
}

static void moelora_is_read(void **state)
{
    (void)state;
    struct adapter_maker m = {0};
    maker_moelora(&m, 4, 2, 1);
    struct adapter_base base = small_base();
    struct strbuf bytes = {0};
    struct adapter_bundle *b = NULL;
    struct error err = {0};
    if (read_made(&m, MOE_CONFIG, &base, &bytes, &b, &err)) fail_msg("%s", err.message);
    assert_string_equal(b->format, "moelora");
    assert_string_equal(b->targets, "q_proj, v_proj");
    assert_int_equal(b->site_count, 4);
    assert_int_equal(b->experts_max, 4);
    assert_int_equal(b->rank_max, 2);
    assert_int_equal(b->top_k, 2);
    assert_int_equal(b->lr_width, 2 * 4 * (2 + 1)); /* q and v share an input */
    assert_int_equal(b->parameters, 2 * (2 * 4 * 16 + 4 * (2 * 2 * 16 + 2 * (16 + 8))));

    const struct lr_site_source *s = b->sites[PROJ_COUNT + PROJ_V];
    assert_int_equal(s->rule, GATE_TOPK);
    assert_true(s->scale[3] == 1.5f && s->temperature == 1.0f);
    const struct safetensor *a3 =
        maker_find(&m, "base_model.model.model.layers.1.self_attn.v_proj.experts.3.lora_A.weight");
    const struct safetensor *gate =
        maker_find(&m, "base_model.model.model.layers.1.self_attn.v_proj.moe_gate.weight");
    assert_memory_equal(s->a[3], a3->data, a3->bytes);
    assert_memory_equal(s->router, gate->data, gate->bytes);
    adapter_bundle_free(b);
    strbuf_release(&bytes);
    maker_release(&m);
}

static void moelora_thresholds_are_read(void **state)
{
    (void)state;
#define T "{\"peft_type\":\"MOELORA\",\"lora_alpha\":3,\"gate\":"
    static const char ada[] = T "\"ada_threshold\",\"max_threshold\":0.5}";
    static const char fixed[] = T "\"threshold\",\"threshold\":0.25}";
#undef T
    struct adapter_base base = small_base();
    for (int adaptive = 0; adaptive < 2; adaptive++) {
        struct adapter_maker m = {0};
        maker_moelora(&m, 4, 2, 1);
        for (int layer = 0; layer < 2 && adaptive; layer++) {
            for (int v = 0; v < 2; v++) {
                const char *p = "base_model.model.model.layers.%d.self_attn.%c_proj.moe_threshold.%s";
                maker_add(&m, DTYPE_F16, 1, 16, 7, p, layer, "qv"[v], "weight");
                maker_add(&m, DTYPE_F32, 1, 1, 8, p, layer, "qv"[v], "bias");
            }
        }
        struct strbuf bytes = {0};
        struct adapter_bundle *b = NULL;
        struct error err = {0};
        if (read_made(&m, adaptive ? ada : fixed, &base, &bytes, &b, &err)) fail_msg("%s", err.message);
        const struct lr_site_source *s = b->sites[PROJ_V];
        assert_int_equal(s->rule, adaptive ? GATE_ADA_THRESHOLD : GATE_THRESHOLD);
        assert_true(s->threshold == (adaptive ? 0.5f : 0.25f));
        assert_true(!s->threshold_row == !adaptive);
        if (adaptive) {
            const struct safetensor *t =
                maker_find(&m, "base_model.model.model.layers.0.self_attn.v_proj.moe_threshold.bias");
            assert_memory_equal(&s->threshold_bias, t->data, sizeof s->threshold_bias);
        }
        adapter_bundle_free(b);
        strbuf_release(&bytes);
        maker_release(&m);
    }
}

static void mixed_types_become_f32(void **state)
{
    (void)state;
    struct adapter_maker m = {0};
    const struct safetensor *a = maker_add(&m, DTYPE_BF16, 2, 16, 1, P0 "lora_A.weight");
    const struct safetensor *b = maker_add(&m, DTYPE_F16, 16, 2, 2, P0 "lora_B.weight");
    struct adapter_base base = small_base();
    struct strbuf bytes = {0};
    struct adapter_bundle *bundle = NULL;
    assert_int_equal(read_made(&m, "{\"peft_type\":\"LORA\",\"lora_alpha\":2}", &base, &bytes, &bundle, NULL),
                     ST_OK);
    const struct lr_site_source *s = bundle->sites[PROJ_Q];
    assert_int_equal(s->type, DTYPE_F32);
    for (size_t i = 0; i < 32; i++) {
        float want[2], got[2];
        dtype_decode(DTYPE_BF16, (const char *)a->data + 2 * i, &want[0], 1);
        dtype_decode(DTYPE_F16, (const char *)b->data + 2 * i, &want[1], 1);
        memcpy(&got[0], (const char *)s->a[0] + 4 * i, 4);
        memcpy(&got[1], (const char *)s->b[0] + 4 * i, 4);
        assert_true(got[0] == want[0] && got[1] == want[1]);
    }
    adapter_bundle_free(bundle);
    strbuf_release(&bytes);
    maker_release(&m);
}

static void width_is_that_of_the_widest_group(void **state)
{
    (void)state;
    struct adapter_maker m = {0};
    maker_lora(&m, 2, 1);
    maker_add(&m, DTYPE_F32, 9, 24, 2, "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight");
    maker_add(&m, DTYPE_F32, 16, 9, 3, "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight");
    struct strbuf bytes = {0};
    struct adapter_bundle *b = NULL;
    assert_int_equal(read_made(&m, "{\"peft_type\":\"LORA\",\"lora_alpha\":2}", NULL, &bytes, &b, NULL),
                     ST_OK);
    assert_int_equal(b->lr_width, 10);
    assert_int_equal(b->rank_max, 9);
    assert_string_equal(b->targets, "q_proj, v_proj, down_proj");
    adapter_bundle_free(b);
    strbuf_release(&bytes);
    maker_release(&m);
}

/* --- refusals --- */

/* The answer to `config` with m's tensors must have this status and contain this text. */
static void expect_refusal(struct adapter_maker *m, const char *config, enum status want, const char *text)
{
    struct adapter_base base = small_base();
    struct strbuf bytes = {0};
    struct adapter_bundle *b = NULL;
    struct error err = {0};
    enum status st = read_made(m, config, &base, &bytes, &b, &err);
    if (st != want) fail_msg("status %s for %s: %s", status_text(st), config, err.message);
    if (!strstr(err.message, text)) fail_msg("'%s' is not in: %s", text, err.message);
    assert_null(b);
    strbuf_release(&bytes);
}

static void configurations_are_refused(void **state)
{
    (void)state;
#define L "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":3,"
    static const struct {
        const char *config;
        enum status st;
        const char *text;
    } cases[] = {
        {"", ST_BAD_FORMAT, "adapter_config.json"},
        {"{\"peft_type\":", ST_BAD_FORMAT, "adapter_config.json"},
        {"[]", ST_BAD_FORMAT, "object"},
        {"{}", ST_REJECTED, "no 'peft_type'"},
        {"{\"peft_type\":7}", ST_REJECTED, "peft_type"},
        {"{\"peft_type\":\"IA3\"}", ST_UNSUPPORTED, "'IA3'"},
        {"{\"peft_type\":\"XLORA\"}", ST_UNSUPPORTED, "X-LoRA"},
        {"{\"peft_type\":\"ADALORA\"}", ST_UNSUPPORTED, "AdaLoRA"},
        {L "\"use_dora\":true}", ST_REJECTED, "has no DoRA magnitude beside it"},
        {L "\"lora_bias\":true}", ST_REJECTED, "has no bias of B beside it"},
        {L "\"use_dora\":true,\"lora_bias\":true}", ST_REJECTED, "do not go together"},
        {L "\"bias\":\"all\"}", ST_UNSUPPORTED, "'bias'"},
        {L "\"modules_to_save\":[\"lm_head\"]}", ST_UNSUPPORTED, "modules_to_save"},
        {"{\"peft_type\":\"ADAMOLE\",\"modules_to_save\":[\"lm_head\"]}", ST_UNSUPPORTED, "modules_to_save"},
        {L "\"trainable_token_indices\":[1]}", ST_UNSUPPORTED, "trainable_token_indices"},
        {L "\"init_lora_weights\":\"pissa_niter_16\"}", ST_UNSUPPORTED, "pissa_niter_16"},
        {L "\"init_lora_weights\":\"olora\"}", ST_UNSUPPORTED, "olora"},
        {L "\"layer_replication\":[[0,2]]}", ST_UNSUPPORTED, "layer_replication"},
        {L "\"alora_invocation_tokens\":[5]}", ST_UNSUPPORTED, "activated LoRA"},
        {L "\"something_new\":{\"x\":1}}", ST_REJECTED, "something_new"},
        {"{\"peft_type\":\"LORA\",\"r\":2}", ST_REJECTED, "lora_alpha"},
        {"{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":0}", ST_REJECTED, "'lora_alpha' is 0"},
        {"{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":\"8\"}", ST_REJECTED, "lora_alpha"},
        {"{\"peft_type\":\"LORA\",\"r\":3,\"lora_alpha\":3}", ST_REJECTED, "rank 2, but"},
        {"{\"peft_type\":\"LORA\",\"r\":0,\"lora_alpha\":3}", ST_REJECTED, "'r'"},
        {L "\"rank_pattern\":{\"v_proj\":5}}", ST_REJECTED, "v_proj"},
        {L "\"rank_pattern\":{\"v_proj\":1.5}}", ST_REJECTED, "rank_pattern"},
        {L "\"rank_pattern\":{\"v(\":2}}", ST_REJECTED, "regular expression"},
        {L "\"rank_pattern\":{\"((.+)+)+[!?]\":2}}", ST_REJECTED, "too long to compare"},
        {L "\"rank_pattern\":[]}", ST_REJECTED, "rank_pattern"},
        {L "\"target_modules\":[\"q_proj\"]}", ST_REJECTED, "v_proj"},
        {L "\"target_modules\":[\"q_proj\",3]}", ST_REJECTED, "target_modules"},
        {L "\"target_modules\":[\"q_proj\",\"v_proj\",\"o_proj\"]}", ST_REJECTED,
         "targets model.layers.0.self_attn.o_proj"},
        {L "\"target_modules\":\"all-linear\"}", ST_REJECTED, "k_proj"},
        {L "\"target_modules\":\".*[\"}", ST_REJECTED, "regular expression"},
        {L "\"layers_to_transform\":0}", ST_REJECTED, "layers.1"},
        {L "\"layers_to_transform\":[\"a\"]}", ST_REJECTED, "layers_to_transform"},
        {L "\"layers_to_transform\":[0,1],\"layers_pattern\":\"h\"}", ST_REJECTED, "does not target"},
    };
#undef L
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct adapter_maker m = {0};
        maker_lora(&m, 2, 1);
        expect_refusal(&m, cases[i].config, cases[i].st, cases[i].text);
        maker_release(&m);
    }
}

static void moelora_configurations_are_refused(void **state)
{
    (void)state;
#define M "{\"peft_type\":\"MOELORA\",\"r\":2,\"lora_alpha\":3"
    static const struct {
        const char *config, *text;
    } cases[] = {
        {M "}", "'top_k' is missing"},
        {M ",\"top_k\":5}", "'top_k' is 5"},
        {M ",\"top_k\":0}", "top_k"},
        {M ",\"top_k\":2,\"num_experts\":3}", "num_experts"},
        {M ",\"top_k\":2,\"gate\":\"switch\"}", "'switch'"},
        {M ",\"gate\":\"none\"}", "is a router"},
        {M ",\"top_k\":2,\"temperature\":0}", "temperature"},
        {M ",\"top_k\":2,\"lora_nums\":4}", "lora_nums"},
    };
#undef M
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct adapter_maker m = {0};
        maker_moelora(&m, 4, 2, 1);
        expect_refusal(&m, cases[i].config, ST_REJECTED, cases[i].text);
        maker_release(&m);
    }
}

static void no_tensors_are_refused(void **state)
{
    (void)state;
    struct adapter_maker m = {0};
    expect_refusal(&m, LORA_CONFIG, ST_REJECTED, "no adapter tensors");
    expect_refusal(&m, MOE_CONFIG, ST_REJECTED, "no adapter tensors");
}

static void set_value(struct safetensor *t, size_t index, uint32_t bits)
{
    size_t size = dtype_block_bytes(t->type);
    memcpy((char *)(uintptr_t)t->data + index * size, &bits, size);
}

/* What is done to a good LoRA file, and what the answer must say. */
static void nan_in_f32(struct adapter_maker *m)
{
    set_value(maker_find(m, P0 "lora_B.weight"), 31, 0x7fc00000);
}
static void infinity_in_f32(struct adapter_maker *m)
{
    set_value(maker_find(m, P0 "lora_A.weight"), 0, 0xff800000);
}
static void half_missing(struct adapter_maker *m) { maker_remove(m, P0 "lora_B.weight"); }
static void other_half_missing(struct adapter_maker *m) { maker_remove(m, P0 "lora_A.weight"); }
static void wrong_width(struct adapter_maker *m)
{
    maker_remove(m, P0 "lora_A.weight");
    maker_add(m, DTYPE_F32, 2, 17, 1, P0 "lora_A.weight");
}
static void wrong_height(struct adapter_maker *m)
{
    maker_remove(m, P0 "lora_B.weight");
    maker_add(m, DTYPE_F32, 8, 2, 1, P0 "lora_B.weight");
}
static void ranks_differ(struct adapter_maker *m)
{
    maker_remove(m, P0 "lora_B.weight");
    maker_add(m, DTYPE_F32, 16, 3, 1, P0 "lora_B.weight");
}
static void not_a_matrix(struct adapter_maker *m) { maker_find(m, P0 "lora_A.weight")->dim_count = 3; }
static void empty_matrix(struct adapter_maker *m)
{
    maker_remove(m, P0 "lora_A.weight");
    maker_add(m, DTYPE_F32, 0, 16, 1, P0 "lora_A.weight");
}
static void head_tensor(struct adapter_maker *m)
{
    maker_add(m, DTYPE_F32, 2, 2, 1, "base_model.model.lm_head.lora_A.weight");
}
static void magnitude(struct adapter_maker *m)
{
    maker_add(m, DTYPE_F32, 16, 1, 1, P0 "lora_magnitude_vector");
}
static void bias_of_b(struct adapter_maker *m) { maker_add(m, DTYPE_F32, 16, 1, 1, P0 "lora_B.bias"); }
static void strange_part(struct adapter_maker *m) { maker_add(m, DTYPE_F32, 16, 2, 1, P0 "lora_C.weight"); }
static void layer_beyond(struct adapter_maker *m)
{
    maker_add(m, DTYPE_F32, 2, 16, 1, "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight");
    maker_add(m, DTYPE_F32, 16, 2, 1, "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight");
}
static void layer_huge(struct adapter_maker *m)
{
    maker_add(m, DTYPE_F32, 2, 16, 1, "base_model.model.model.layers.123456.self_attn.q_proj.lora_A.weight");
}
static void twice(struct adapter_maker *m)
{
    maker_add(m, DTYPE_F32, 2, 16, 1, "layers.0.self_attn.q_proj.lora_A.weight");
}

static void lora_tensors_are_refused(void **state)
{
    (void)state;
    static const struct {
        void (*spoil)(struct adapter_maker *m);
        enum status st;
        const char *text;
    } cases[] = {
        {nan_in_f32, ST_REJECTED, "q_proj.lora_B.weight' holds NaN or infinity"},
        {infinity_in_f32, ST_REJECTED, "q_proj.lora_A.weight' holds NaN or infinity"},
        {half_missing, ST_REJECTED, P0 "lora_A.weight' has no matching B"},
        {other_half_missing, ST_REJECTED, P0 "lora_B.weight' has no matching A"},
        {wrong_width, ST_REJECTED, "is 2 x 17; it should be 2 x 16"},
        {wrong_height, ST_REJECTED, "is 8 x 2; it should be 16 x 2"},
        {ranks_differ, ST_REJECTED, "is 16 x 3; it should be 16 x 2"},
        {not_a_matrix, ST_REJECTED, "must be a matrix"},
        {empty_matrix, ST_REJECTED, "must be a matrix"},
        {head_tensor, ST_REJECTED, "lm_head.lora_A.weight' cannot be used"},
        {magnitude, ST_REJECTED, "does not set 'use_dora'"},
        {bias_of_b, ST_REJECTED, "does not set 'lora_bias'"},
        {strange_part, ST_REJECTED, "lora_C.weight' cannot be used"},
        {layer_beyond, ST_REJECTED, "layer 2, but the base model has 2 layers"},
        {layer_huge, ST_REJECTED, "cannot be used"},
        {twice, ST_REJECTED, "the same part of one site"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct adapter_maker m = {0};
        maker_lora(&m, 2, 1);
        cases[i].spoil(&m);
        expect_refusal(&m, LORA_CONFIG, cases[i].st, cases[i].text);
        maker_release(&m);
    }
}

static void nan_in_halves_is_refused(void **state)
{
    (void)state;
    static const struct {
        enum dtype type;
        uint32_t bits;
    } cases[] = {{DTYPE_F16, 0x7c00}, {DTYPE_F16, 0xfe01}, {DTYPE_BF16, 0x7f80}, {DTYPE_BF16, 0xffc0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct adapter_maker m = {0};
        maker_add(&m, cases[i].type, 2, 16, 1, P0 "lora_A.weight");
        set_value(maker_add(&m, cases[i].type, 16, 2, 1, P0 "lora_B.weight"), 17, cases[i].bits);
        expect_refusal(&m, "{\"peft_type\":\"LORA\",\"lora_alpha\":3}", ST_REJECTED,
                       "lora_B.weight' holds NaN");
        maker_release(&m);
    }
}

static void router_missing(struct adapter_maker *m) { maker_remove(m, P0 "moe_gate.weight"); }
static void router_narrow(struct adapter_maker *m)
{
    maker_remove(m, P0 "moe_gate.weight");
    maker_add(m, DTYPE_F32, 3, 16, 1, P0 "moe_gate.weight");
}
static void router_alone(struct adapter_maker *m)
{
    maker_add(m, DTYPE_F32, 4, 16, 1, "model.layers.0.self_attn.o_proj.moe_gate.weight");
}
static void expert_gap(struct adapter_maker *m)
{
    maker_remove(m, P0 "experts.1.lora_A.weight");
    maker_remove(m, P0 "experts.1.lora_B.weight");
}
static void expert_half(struct adapter_maker *m) { maker_remove(m, P0 "experts.2.lora_A.weight"); }
static void expert_rank(struct adapter_maker *m)
{
    maker_remove(m, P0 "experts.3.lora_A.weight");
    maker_add(m, DTYPE_F32, 1, 16, 1, P0 "experts.3.lora_A.weight");
}
static void expert_beyond(struct adapter_maker *m)
{
    maker_add(m, DTYPE_F32, 2, 16, 1, P0 "experts.256.lora_A.weight");
}
static void expert_negative(struct adapter_maker *m)
{
    maker_add(m, DTYPE_F32, 2, 16, 1, P0 "experts.-1.lora_A.weight");
}
static void expert_third(struct adapter_maker *m)
{
    maker_add(m, DTYPE_F32, 2, 16, 1, P0 "experts.0.lora_C.weight");
}
static void plain_part(struct adapter_maker *m) { maker_add(m, DTYPE_F32, 2, 16, 1, P0 "lora_A.weight"); }

static void moelora_tensors_are_refused(void **state)
{
    (void)state;
    static const struct {
        void (*spoil)(struct adapter_maker *m);
        const char *text;
    } cases[] = {
        {router_missing, "has no router"},
        {router_narrow, "is 3 x 16; it should be 4 x 16"},
        {router_alone, "routes to experts that are not there"},
        {expert_gap, "expert 1 of that site is missing"},
        {expert_half, "experts.2.lora_B.weight' has no matching A"},
        {expert_rank, "is 1 x 16; it should be 2 x 16"},
        {expert_beyond, "at most 256 experts"},
        {expert_negative, "cannot be used"},
        {expert_third, "cannot be used"},
        {plain_part, "cannot be used"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct adapter_maker m = {0};
        maker_moelora(&m, 4, 2, 1);
        cases[i].spoil(&m);
        expect_refusal(&m, MOE_CONFIG, ST_REJECTED, cases[i].text);
        maker_release(&m);
    }
}

static void maxima_are_kept(void **state)
{
    (void)state;
    struct adapter_base base = small_base();
    base.rank_max = 3;
    base.experts_max = 3;
    static const struct {
        int experts, rank;
        const char *text;
    } cases[] = {{3, 3, NULL}, {3, 4, "at most 3 is allowed"}, {4, 3, "at most 3 are allowed"}};
    for (size_t i = 0; i < 3; i++) {
        struct adapter_maker m = {0};
        maker_moelora(&m, cases[i].experts, cases[i].rank, 1);
        struct strbuf bytes = {0};
        struct adapter_bundle *b = NULL;
        struct error err = {0};
        enum status st = read_made(&m, "{\"peft_type\":\"MOELORA\",\"lora_alpha\":1,\"top_k\":1}", &base,
                                   &bytes, &b, &err);
        assert_int_equal(st, cases[i].text ? ST_REJECTED : ST_OK);
        if (cases[i].text) assert_non_null(strstr(err.message, cases[i].text));
        adapter_bundle_free(b);
        strbuf_release(&bytes);
        maker_release(&m);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(peft_files_give_pefts_deltas),       cmocka_unit_test(moelora_is_read),
        cmocka_unit_test(moelora_thresholds_are_read),        cmocka_unit_test(mixed_types_become_f32),
        cmocka_unit_test(width_is_that_of_the_widest_group),  cmocka_unit_test(configurations_are_refused),
        cmocka_unit_test(moelora_configurations_are_refused), cmocka_unit_test(no_tensors_are_refused),
        cmocka_unit_test(lora_tensors_are_refused),           cmocka_unit_test(nan_in_halves_is_refused),
        cmocka_unit_test(moelora_tensors_are_refused),        cmocka_unit_test(maxima_are_kept),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

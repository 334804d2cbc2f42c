/* Adapters of every format that is read, against independent forwards of each in fp32 (tests/fixtures/
 * make_formats.py), and what is refused of each. */
#include "adapters/inspect.h"
#include "tests/support/adapter_maker.h"
#include "tests/support/cases.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"
#include "tests/support/gguf_writer.h"

#include <math.h>
#include <stdlib.h>

static const char *const models[] = {"gqa_tied", "gqa_scaled", "mha_tied", "mha_untied"};
#define MODEL_COUNT (sizeof models / sizeof *models)

/* Largest absolute error of a logit, as in test_logits. */
#define TOLERANCE 1e-4f

static struct device *device_at(enum cpu_level level)
{
    struct cpu_device_config config = {.level = level, .threads = 1};
    struct device *d;
    struct error err;
    if (cpu_device_open(&config, &d, &err)) fail_msg("%s", err.message);
    return d;
}

static float case_error(struct case_book *b, const struct logit_case *c, int member_count)
{
    size_t n = (size_t)c->count * b->teacher.model->shape.vocab;
    float *logits = malloc(n * sizeof *logits), worst = 0;
    assert_non_null(logits);
    assert_int_equal(
        teacher_run(&b->teacher, c->tokens, c->count, CASE_TOKENS_MAX, c->members, member_count, logits),
        ST_OK);
    for (size_t i = 0; i < n; i++) {
        float e = fabsf(logits[i] - c->expected[i]);
        if (!(e <= worst)) worst = isnan(e) ? INFINITY : e;
    }
    free(logits);
    return worst;
}

static void check_level(enum cpu_level level)
{
    struct device *d = device_at(level);
    for (size_t m = 0; m < MODEL_COUNT; m++) {
        struct case_book b;
        case_book_open_formats(&b, models[m], d, DTYPE_F32);
        for (int i = 0; i < b.case_count; i++) {
            struct logit_case *c = &b.cases[i];
            float worst = case_error(&b, c, c->member_count);
            if (!(worst <= TOLERANCE))
                fail_msg("%s, %s: a logit is off by %g, more than %g", d->name, c->name, (double)worst,
                         (double)TOLERANCE);
            /* Leaving the adapter out must not pass. */
            assert_true(case_error(&b, c, 0) > 0.1f);
        }
        case_book_close(&b);
    }
    d->ops->close(d);
}

static void every_format_at_every_level(void **state)
{
    (void)state;
    for (int level = CPU_REFERENCE; level < CPU_LEVEL_COUNT; level++)
        if (cpu_level_usable((enum cpu_level)level)) check_level((enum cpu_level)level);
}

static void inspect_knows_every_format(void **state)
{
    (void)state;
    static const struct {
        const char *path, *text;
    } cases[] = {
        {"dora", "format      peft-lora\n"},
        {"gguf_lora/adapter.gguf", "format      gguf-lora\n"},
        {"hydralora", "gate        dense\n"},
        {"adamole", "gate        ada_threshold\n"},
        {"mole_threshold", "gate        threshold\n"},
        {"mola", "rank        1 to 3\n"},
        {"coin", "rank        2\n"},
        {"moe_peft_mola", "gate        topk, top 2\n"},
        {"moe_peft_loramoe", "experts     1 to 3\n"},
        {"mixlora", "gate        topk, top 2, of whole FFNs\n"},
        {"mixlora_dynamic", "gate        top_p, of whole FFNs\n"},
        {"mixlora_legacy", "targets     q_proj, gate_proj, up_proj, down_proj\n"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct test_path part = test_path("formats/%s", cases[i].path), path = fixture_path(part.text);
        struct strbuf text = {0};
        struct error err;
        assert_ok(adapter_inspect(path.text, &text, &err), err);
        if (!strstr(text.data, cases[i].text)) fail_msg("'%s' is not in: %s", cases[i].text, text.data);
        strbuf_release(&text);
    }
}

/* --- what is refused --- */

#define P0 "base_model.model.model.layers.0.self_attn.q_proj."

/* q_proj of layer 0 of small_base(), whose names each format has its own way. */
static enum status read_made(struct adapter_maker *m, const char *config, struct adapter_bundle **out,
                             struct strbuf *bytes, struct error *err)
{
    struct adapter_base base = small_base();
    *bytes = (struct strbuf){0};
    maker_write(m, bytes);
    return adapter_read(config, strlen(config), bytes->data, bytes->size, &base, out, err);
}

static void expect_refusal(struct adapter_maker *m, const char *config, enum status want, const char *text)
{
    struct strbuf bytes;
    struct adapter_bundle *b = NULL;
    struct error err = {0};
    enum status st = read_made(m, config, &b, &bytes, &err);
    if (st != want || !strstr(err.message, text))
        fail_msg("%s for %s, not '%s': %s", status_text(st), config, text, err.message);
    assert_null(b);
    strbuf_release(&bytes);
    maker_release(m);
}

static void pairs(struct adapter_maker *m, int experts, uint64_t rank, const char *a, const char *b)
{
    for (int e = 0; e < experts; e++) {
        maker_add(m, DTYPE_F32, rank, 16, 1, a, e);
        maker_add(m, DTYPE_F32, 16, rank, 2, b, e);
    }
}

#define HYDRA "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":3,\"lora_nums\":2"
static void hydra(struct adapter_maker *m)
{
    maker_add(m, DTYPE_F32, 2, 16, 1, P0 "lora_A.weight");
    maker_add(m, DTYPE_F32, 16, 2, 1, P0 "lora_B0.weight");
    maker_add(m, DTYPE_F32, 16, 2, 1, P0 "lora_B1.weight");
    maker_add(m, DTYPE_F32, 2, 16, 1, P0 "lora_route.weight");
}

static void hydralora_is_refused(void **state)
{
    (void)state;
    struct adapter_maker m = {0};
    hydra(&m);
    expect_refusal(&m, HYDRA ",\"enable_lora\":[true]}", ST_UNSUPPORTED, "enable_lora");
    hydra(&m);
    maker_remove(&m, P0 "lora_A.weight");
    expect_refusal(&m, HYDRA "}", ST_REJECTED, "lora_B0.weight' has no matching A");
    hydra(&m);
    maker_remove(&m, P0 "lora_B0.weight");
    expect_refusal(&m, HYDRA "}", ST_REJECTED, "expert 0 of that site is missing");
    hydra(&m);
    maker_remove(&m, P0 "lora_B1.weight");
    expect_refusal(&m, HYDRA "}", ST_REJECTED, "lora_route.weight' is 2 x 16; it should be 1 x 16");
    hydra(&m);
    maker_add(&m, DTYPE_F32, 16, 2, 1, P0 "lora_B2.weight");
    maker_remove(&m, P0 "lora_route.weight");
    maker_add(&m, DTYPE_F32, 3, 16, 1, P0 "lora_route.weight");
    expect_refusal(&m, HYDRA "}", ST_REJECTED, "3 experts, but adapter_config.json says 2 (lora_nums)");
}

#define ADAMOLE "{\"peft_type\":\"ADAMOLE\",\"lora_rank\":2,\"lora_alpha\":3,\"num_experts\":2"
#define MOLE    "{\"peft_type\":\"MOLE\",\"lora_rank\":2,\"lora_alpha\":3,\"num_experts\":2"
static void mole(struct adapter_maker *m)
{
    pairs(m, 2, 2, P0 "lora_A.%d.weight", P0 "lora_B.%d.weight");
    maker_add(m, DTYPE_F32, 2, 16, 3, P0 "lora_gating.weight");
}
static void adamole(struct adapter_maker *m)
{
    mole(m);
    maker_add(m, DTYPE_F32, 1, 16, 4, P0 "lora_threshold.weight");
    maker_add(m, DTYPE_F32, 1, 1, 5, P0 "lora_threshold.bias");
}

static void adamole_is_refused(void **state)
{
    (void)state;
    struct adapter_maker m = {0};
    adamole(&m);
    maker_remove(&m, P0 "lora_threshold.bias");
    expect_refusal(&m, ADAMOLE "}", ST_REJECTED, "has no threshold's bias beside it");
    adamole(&m);
    maker_remove(&m, P0 "lora_threshold.weight");
    maker_add(&m, DTYPE_F32, 2, 16, 1, P0 "lora_threshold.weight");
    expect_refusal(&m, ADAMOLE "}", ST_REJECTED, "is 2 x 16; it should be 1 x 16");
    adamole(&m);
    expect_refusal(&m, ADAMOLE ",\"max_threshold\":7}", ST_REJECTED, "max_threshold");
    adamole(&m);
    expect_refusal(&m, MOLE ",\"top_k\":1}", ST_REJECTED, "lora_threshold.weight' is a threshold");
    mole(&m);
    expect_refusal(&m, MOLE ",\"top_k\":1,\"threshold\":0.5}", ST_REJECTED, "not both");
    mole(&m);
    expect_refusal(&m, MOLE ",\"top_k\":null,\"threshold\":null}", ST_REJECTED, "'top_k' and 'threshold'");
    /* the same expert under its second name, with other values */
    mole(&m);
    maker_add(&m, DTYPE_F32, 2, 16, 9, P0 "moe_layer.experts.1.lora_A.weight");
    expect_refusal(&m, MOLE ",\"top_k\":1}", ST_REJECTED, "are one parameter, but their values differ");
}

/* Adds `from`'s experts to `to` by their second names. */
static void copies(const struct adapter_maker *from, struct adapter_maker *to)
{
    for (size_t i = 0; i < 4; i++) {
        const struct safetensor *t = &from->tensor[i];
        struct safetensor *copy =
            maker_add(to, t->type, t->dim[0], t->dim[1], 1, P0 "moe_layer.experts.%d.lora_%c.weight",
                      (int)i / 2, "AB"[i % 2]);
        memcpy((void *)(uintptr_t)copy->data, t->data, t->bytes);
    }
}

/* With the copies, without them, or with them alone: one adapter. */
static void copies_are_left_out(void **state)
{
    (void)state;
    struct adapter_maker m[3] = {0};
    mole(&m[0]);
    mole(&m[1]);
    copies(&m[0], &m[1]);
    copies(&m[0], &m[2]);
    maker_add(&m[2], DTYPE_F32, 2, 16, 3, P0 "lora_gating.weight");
    for (int i = 0; i < 3; i++) {
        struct strbuf bytes;
        struct adapter_bundle *b;
        struct error err;
        assert_ok(read_made(&m[i], MOLE ",\"top_k\":1}", &b, &bytes, &err), err);
        assert_int_equal(b->parameters, 2 * (2 * 16 + 16 * 2) + 2 * 16);
        adapter_bundle_free(b);
        strbuf_release(&bytes);
    }
    for (int i = 0; i < 3; i++) maker_release(&m[i]);
}

#define MOLA "{\"peft_type\":\"LORA\",\"r\":[2,3],\"lora_alpha\":3"
static void mola(struct adapter_maker *m)
{
    pairs(m, 3, 2, P0 "lora_A_%d.weight", P0 "lora_B_%d.weight");
    maker_add(m, DTYPE_F32, 3, 16, 3, P0 "router.router.weight");
}

static void mola_is_refused(void **state)
{
    (void)state;
    static const struct {
        const char *config, *text;
    } cases[] = {
        {MOLA "}", "MoLA does not save how many experts a token uses"},
        {MOLA ",\"top_k\":[]}", "'top_k' must be whole numbers"},
        {MOLA ",\"top_k\":[1.5]}", "'top_k' must be whole numbers"},
        {MOLA ",\"top_k\":[4,1]}", "'top_k' is 4, but model.layers.0.self_attn.q_proj has 3 experts"},
        {"{\"peft_type\":\"LORA\",\"r\":[3,2],\"lora_alpha\":3,\"top_k\":2}", "has rank 2, but"},
        {"{\"peft_type\":\"LORA\",\"r\":[0,2],\"lora_alpha\":3,\"top_k\":2}", "'r' must be a rank"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct adapter_maker m = {0};
        mola(&m);
        expect_refusal(&m, cases[i].config, ST_REJECTED, cases[i].text);
    }
}

static void layers_need_ranks_and_top_k(void **state)
{
    (void)state;
#define P1 "base_model.model.model.layers.1.self_attn.q_proj."
    struct adapter_maker m = {0};
    pairs(&m, 2, 2, P1 "lora_A_%d.weight", P1 "lora_B_%d.weight");
    maker_add(&m, DTYPE_F32, 2, 16, 3, P1 "router.router.weight");
    expect_refusal(&m, "{\"peft_type\":\"LORA\",\"r\":[2],\"lora_alpha\":3,\"top_k\":1}", ST_REJECTED,
                   "ranks for 1 layers only");
    pairs(&m, 2, 2, P1 "lora_A_%d.weight", P1 "lora_B_%d.weight");
    maker_add(&m, DTYPE_F32, 2, 16, 3, P1 "router.router.weight");
    expect_refusal(&m, MOLA ",\"top_k\":[1]}", ST_REJECTED, "rank 2, but");
    pairs(&m, 2, 3, P1 "lora_A_%d.weight", P1 "lora_B_%d.weight");
    maker_add(&m, DTYPE_F32, 2, 16, 3, P1 "router.router.weight");
    expect_refusal(&m, MOLA ",\"top_k\":[1]}", ST_REJECTED, "'top_k' has no number for layer 1");
}

static void coin_is_refused(void **state)
{
    (void)state;
    struct adapter_maker m = {0};
    pairs(&m, 2, 2, P0 "lora_A.loraA.%d.mlp.weight", P0 "lora_B.loraB.%d.mlp.weight");
    maker_add(&m, DTYPE_F32, 2, 16, 3, P0 "lora_router.weight");
    expect_refusal(&m, "{\"peft_type\":\"MOE_LORA_CoIN\",\"r\":2,\"lora_alpha\":3,\"expert_num\":2}",
                   ST_REJECTED, "has rank 2 for each expert, but adapter_config.json says 2");
}

#define MIX   "{\"peft_type\":\"MIXLORA\",\"r\":2,\"lora_alpha\":3,\"num_experts\":2,\"routing_strategy\":"
#define MLP_0 "mixlora.layers.0.mlp."
static void mixlora(struct adapter_maker *m)
{
    maker_add(m, DTYPE_F32, 2, 16, 1, MLP_0 "moe_gate.weight");
    for (int e = 0; e < 2; e++) {
        maker_add(m, DTYPE_F32, 2, 16, 1, MLP_0 "up_proj.experts.%d.lora_A.weight", e);
        maker_add(m, DTYPE_F32, 24, 2, 1, MLP_0 "up_proj.experts.%d.lora_B.weight", e);
    }
}

static void mixlora_configurations_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *config;
        enum status st;
        const char *text;
    } cases[] = {
        {"{\"peft_type\":\"MIXLORA\"}", ST_REJECTED, "'routing_strategy' is missing"},
        {MIX "\"mixlora-switch\"}", ST_UNSUPPORTED, "the other tokens of its batch"},
        {MIX "\"mix\"}", ST_UNSUPPORTED, "'mix'"},
        {MIX "\"mixlora\"}", ST_REJECTED, "'top_k' is missing"},
        {MIX "\"mixlora\",\"top_k\":3}", ST_REJECTED, "'top_k' is 3, but layers.0.mlp has 2 experts"},
        {MIX "\"mixlora-dynamic\"}", ST_REJECTED, "'top_p' is missing"},
        {MIX "\"mixlora-dynamic\",\"top_p\":0.5,\"temperature\":-1}", ST_REJECTED, "temperature"},
        {MIX "\"mixlora\",\"top_k\":1,\"act_fn\":\"gelu_new\"}", ST_UNSUPPORTED, "must be 'silu'"},
        {MIX "\"mixlora\",\"top_k\":1,\"use_dora\":true}", ST_UNSUPPORTED, "DoRA"},
        {MIX "\"mixlora\",\"top_k\":1,\"expert_lora\":[]}", ST_REJECTED, "'expert_lora' must be an object"},
        {MIX "\"mixlora\",\"top_k\":1,\"expert_lora\":{\"r\":1}}", ST_REJECTED, "has rank 2, but"},
        {MIX "\"mixlora\",\"top_k\":1,\"expert_lora\":{\"x\":1}}", ST_REJECTED,
         "adapter_config.json: 'x' is set"},
        {MIX "\"mixlora\",\"top_k\":1,\"expert_lora\":{\"use_dora\":true}}", ST_UNSUPPORTED, "DoRA"},
        {"{\"peft_type\":\"MOLA\",\"routing_strategy\":\"x\"}", ST_UNSUPPORTED, "must be 'mola'"},
        {"{\"peft_type\":\"LORAMOE\",\"routing_strategy\":7}", ST_REJECTED, "routing_strategy"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct adapter_maker m = {0};
        mixlora(&m);
        expect_refusal(&m, cases[i].config, cases[i].st, cases[i].text);
    }
}

static void mixlora_tensors_are_refused(void **state)
{
    (void)state;
    static const char config[] = MIX "\"mixlora\",\"top_k\":1}";
    struct adapter_maker m = {0};
    mixlora(&m);
    maker_remove(&m, MLP_0 "moe_gate.weight");
    expect_refusal(&m, config, ST_REJECTED, "up_proj.experts.0.lora_A.weight' has no router");
    maker_add(&m, DTYPE_F32, 2, 16, 1, MLP_0 "moe_gate.weight");
    expect_refusal(&m, config, ST_REJECTED, "routes to experts that are not there");
    mixlora(&m);
    maker_remove(&m, MLP_0 "moe_gate.weight");
    maker_add(&m, DTYPE_F32, 2, 24, 1, MLP_0 "moe_gate.weight");
    expect_refusal(&m, config, ST_REJECTED, "is 2 x 24; it should be 2 x 16");
    mixlora(&m);
    maker_remove(&m, MLP_0 "up_proj.experts.1.lora_A.weight");
    maker_remove(&m, MLP_0 "up_proj.experts.1.lora_B.weight");
    expect_refusal(&m, config, ST_REJECTED, "routes to 2 experts, but layer 0's up_proj has 1");
    mixlora(&m);
    maker_add(&m, DTYPE_F32, 2, 16, 1, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
    expect_refusal(&m, config, ST_REJECTED, "cannot be used");
    mixlora(&m);
    maker_add(&m, DTYPE_F32, 2, 16, 1, "mixlora.layers.0.self_attn.q_proj.moe_gate.weight");
    expect_refusal(&m, config, ST_REJECTED, "cannot be used");
}

/* --- DoRA --- */

/* W of small_base: the row's number, and one more in the column of that number. */
static void numbered_row(const void *model, int layer, enum projection p, size_t row, float *out)
{
    (void)layer;
    (void)p;
    const struct adapter_base *base = model;
    for (size_t j = 0; j < base->d_in[p]; j++) out[j] = (float)row + (float)(j == row);
}

/* Both names, all three shapes; rows of q in the base model's order. */
static void magnitudes_come_by_two_names(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        uint64_t rows, cols;
    } kinds[] = {{P0 "lora_magnitude_vector", 16, 1}, {P0 "lora_magnitude_vector.weight", 1, 16}};
    for (size_t i = 0; i < 2; i++) {
        struct adapter_maker m = {0};
        maker_add(&m, DTYPE_F32, 2, 16, 1, P0 "lora_A.weight");
        maker_add(&m, DTYPE_F32, 16, 2, 2, P0 "lora_B.weight");
        struct safetensor *t = maker_add(&m, DTYPE_F32, kinds[i].rows, kinds[i].cols, 3, "%s", kinds[i].name);
        float *values = (float *)(uintptr_t)t->data;
        for (int k = 0; k < 16; k++) values[k] = (float)(1 + k);
        struct adapter_base base = small_base();
        base.qk_permuted = true;
        base.row = numbered_row;
        base.model = &base;
        struct strbuf bytes = {0};
        struct adapter_bundle *b;
        struct error err;
        static const char config[] = "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":3,\"use_dora\":true}";
        maker_write(&m, &bytes);
        assert_ok(adapter_read(config, strlen(config), bytes.data, bytes.size, &base, &b, &err), err);
        const struct lr_site_source *s = b->sites[PROJ_Q];
        for (int row = 0; row < 16; row++) {
            int from = row / 4 * 4 + row % 2 * 2 + row % 4 / 2; /* in heads of 4, halves to pairs */
            double sum = 0;
            float before[2], a[32];
            memcpy(before, (const char *)maker_find(&m, P0 "lora_B.weight")->data + 8 * from, 8);
            memcpy(a, maker_find(&m, P0 "lora_A.weight")->data, sizeof a);
            for (int j = 0; j < 16; j++) {
                double w =
                    row + (j == row) + 1.5 * ((double)before[0] * a[j] + (double)before[1] * a[16 + j]);
                sum += w * w;
            }
            double g = (1 + from) / sqrt(sum);
            assert_true(fabs((double)s->base_gain[row] - (g - 1)) < 1e-5 * g);
            float after[2];
            memcpy(after, (const char *)s->b[0] + 8 * row, 8);
            assert_true(fabs((double)after[1] - g * (double)before[1]) <= 1e-5 * g * fabs((double)before[1]));
        }
        adapter_bundle_free(b);
        strbuf_release(&bytes);
        maker_release(&m);
    }
}

static void zero_row(const void *model, int layer, enum projection p, size_t row, float *out)
{
    (void)layer;
    (void)row;
    memset(out, 0, ((const struct adapter_base *)model)->d_in[p] * sizeof *out);
}

static void a_norm_of_zero_is_refused(void **state)
{
    (void)state;
    struct adapter_maker m = {0};
    maker_add(&m, DTYPE_F32, 1, 16, 1, P0 "lora_A.weight");
    struct safetensor *half = maker_add(&m, DTYPE_F32, 16, 1, 2, P0 "lora_B.weight");
    memset((void *)(uintptr_t)half->data, 0, half->bytes);
    maker_add(&m, DTYPE_F32, 16, 1, 3, P0 "lora_magnitude_vector");
    struct adapter_base base = small_base();
    base.row = zero_row;
    base.model = &base;
    static const char config[] = "{\"peft_type\":\"LORA\",\"lora_alpha\":3,\"use_dora\":true}";
    struct strbuf bytes = {0};
    struct adapter_bundle *b = NULL;
    struct error err = {0};
    maker_write(&m, &bytes);
    enum status st = adapter_read(config, strlen(config), bytes.data, bytes.size, &base, &b, &err);
    assert_refused(st, ST_REJECTED, err, "another base model");
    strbuf_release(&bytes);
    maker_release(&m);
}

/* --- GGUF --- */

#define ATTN_Q "blk.0.attn_q.weight."

/* What differs from a good file. */
struct gguf_recipe {
    const char *type, *adapter, *architecture;
    float alpha; /* negative: none */
    bool activated;
    const char *half_b; /* the second tensor's name */
    uint32_t tensor_type;
    float value;
};

static void gguf_make(const struct gguf_recipe *r, struct strbuf *out)
{
    struct gguf_writer w = {.version = 3};
    float values[32];
    for (int i = 0; i < 32; i++) values[i] = r->value;
    if (r->type) gguf_put_string(&w, "general.type", r->type);
    gguf_put_string(&w, "general.architecture", r->architecture);
    gguf_put_string(&w, "adapter.type", r->adapter);
    if (r->alpha >= 0) gguf_put_f32(&w, "adapter.lora.alpha", r->alpha);
    if (r->activated) gguf_put_array(&w, "adapter.alora.invocation_tokens", GGUF_I32, 1, values, 4);
    gguf_put_tensor(&w, ATTN_Q "lora_a", r->tensor_type, 2, (uint64_t[]){16, 2}, values, sizeof values);
    gguf_put_tensor(&w, r->half_b, r->tensor_type, 2, (uint64_t[]){2, 16}, values, sizeof values);
    *out = (struct strbuf){0};
    gguf_finish(&w, out);
}

static void gguf_files_are_refused(void **state)
{
    (void)state;
    static const struct {
        struct gguf_recipe r;
        enum status st;
        const char *text;
    } cases[] = {
        {{NULL, "lora", "llama", 8, false, ATTN_Q "lora_b", DTYPE_F32, 1}, ST_REJECTED, "no 'general.type'"},
        {{"model", "lora", "llama", 8, false, ATTN_Q "lora_b", DTYPE_F32, 1}, ST_UNSUPPORTED, "is 'model'"},
        {{"adapter", "ia3", "llama", 8, false, ATTN_Q "lora_b", DTYPE_F32, 1},
         ST_UNSUPPORTED,
         "'adapter.type'"},
        {{"adapter", "lora", "qwen2", 8, false, ATTN_Q "lora_b", DTYPE_F32, 1}, ST_UNSUPPORTED, "'qwen2'"},
        {{"adapter", "lora", "llama", -1, false, ATTN_Q "lora_b", DTYPE_F32, 1},
         ST_REJECTED,
         "adapter.lora.alpha"},
        {{"adapter", "lora", "llama", 8, true, ATTN_Q "lora_b", DTYPE_F32, 1},
         ST_UNSUPPORTED,
         "activated LoRA"},
        {{"adapter", "lora", "llama", 8, false, ATTN_Q "lora_c", DTYPE_F32, 1},
         ST_REJECTED,
         "lora_c' cannot be"},
        {{"adapter", "lora", "llama", 8, false, "output.weight.lora_b", DTYPE_F32, 1},
         ST_REJECTED,
         "cannot be used"},
        {{"adapter", "lora", "llama", 8, false, "blk.9.attn_q.weight.lora_b", DTYPE_F32, 1},
         ST_REJECTED,
         "no matching B"},
        {{"adapter", "lora", "llama", 8, false, "blk.+0.attn_q.weight.lora_b", DTYPE_F32, 1},
         ST_REJECTED,
         "cannot be used"},
        {{"adapter", "lora", "llama", 8, false, ATTN_Q "lora_b", DTYPE_F32, NAN},
         ST_REJECTED,
         "NaN or infinity"},
    };
    struct adapter_base base = small_base();
    base.qk_permuted = true;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct strbuf bytes;
        struct adapter_bundle *b = NULL;
        struct error err = {0};
        gguf_make(&cases[i].r, &bytes);
        enum status st = adapter_read("", 0, bytes.data, bytes.size, &base, &b, &err);
        assert_refused(st, cases[i].st, err, cases[i].text);
        strbuf_release(&bytes);
    }
}

/* llama.cpp takes an alpha of 0 for a scale of 1. */
static void gguf_scales(void **state)
{
    (void)state;
    for (int alpha = 0; alpha <= 8; alpha += 8) {
        struct gguf_recipe r = {"adapter", "lora",          "llama",   (float)alpha,
                                false,     ATTN_Q "lora_b", DTYPE_F32, 1};
        struct strbuf bytes;
        struct adapter_bundle *b = NULL;
        struct error err;
        gguf_make(&r, &bytes);
        assert_ok(adapter_read("", 0, bytes.data, bytes.size, NULL, &b, &err), err);
        assert_string_equal(b->format, "gguf-lora");
        assert_true(b->sites[PROJ_Q]->scale[0] == (alpha ? 4.0f : 1.0f));
        adapter_bundle_free(b);
        strbuf_release(&bytes);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_format_at_every_level),
        cmocka_unit_test(inspect_knows_every_format),
        cmocka_unit_test(hydralora_is_refused),
        cmocka_unit_test(adamole_is_refused),
        cmocka_unit_test(copies_are_left_out),
        cmocka_unit_test(mola_is_refused),
        cmocka_unit_test(layers_need_ranks_and_top_k),
        cmocka_unit_test(coin_is_refused),
        cmocka_unit_test(mixlora_configurations_are_refused),
        cmocka_unit_test(mixlora_tensors_are_refused),
        cmocka_unit_test(magnitudes_come_by_two_names),
        cmocka_unit_test(a_norm_of_zero_is_refused),
        cmocka_unit_test(gguf_files_are_refused),
        cmocka_unit_test(gguf_scales),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

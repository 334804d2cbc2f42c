/* Binding a model file: what is served, and what is refused with which words. */
#include "engine/model.h"

#include "tests/support/check.h"
#include "tests/support/fixture.h"
#include "tests/support/gguf_writer.h"
#include "tests/support/temp_folder.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define LAYERS 2
#define EMBED 8
#define HEADS 4
#define KV_HEADS 2
#define FFN 12
#define VOCAB 5

/* What differs from a good file. */
struct change {
    const char *architecture; /* NULL: llama */
    const char *skip;         /* a key or tensor left out */
    const char *tensor;       /* a tensor of another shape */
    uint64_t tensor_cols, tensor_rows;
    const char *extra_tensor;
    const char *u64_key; /* an integer of another value, or one more */
    uint64_t u64;
    const char *f32_key;
    float f32;
    const char *string_key, *string;
};

struct stage {
    struct device *device;
    struct temp_folder folder;
    struct test_path file;
};

static bool same(const char *a, const char *b) { return a && b && strcmp(a, b) == 0; }

static void put_number(struct gguf_writer *w, const struct change *c, const char *key, uint64_t v)
{
    if (!same(c->skip, key) && !same(c->u64_key, key)) gguf_put_u64(w, key, GGUF_U32, v);
}

static void put_tensor(struct gguf_writer *w, const struct change *c, const char *name,
                       uint64_t cols, uint64_t rows)
{
    static const float ones[256] = {[0 ... 255] = 1};
    if (same(c->skip, name)) return;
    if (same(c->tensor, name)) {
        cols = c->tensor_cols;
        rows = c->tensor_rows;
    }
    gguf_put_tensor(w, name, DTYPE_F32, rows > 1 ? 2 : 1, (uint64_t[]){cols, rows}, ones,
                    cols * rows * sizeof *ones);
}

static void put_values(struct gguf_writer *w, const struct change *c)
{
    if (!same(c->skip, "general.architecture"))
        gguf_put_string(w, "general.architecture", c->architecture ? c->architecture : "llama");
    put_number(w, c, "llama.block_count", LAYERS);
    put_number(w, c, "llama.embedding_length", EMBED);
    put_number(w, c, "llama.feed_forward_length", FFN);
    put_number(w, c, "llama.attention.head_count", HEADS);
    put_number(w, c, "llama.attention.head_count_kv", KV_HEADS);
    put_number(w, c, "llama.context_length", 64);
    if (c->u64_key) gguf_put_u64(w, c->u64_key, GGUF_U64, c->u64);
    if (c->f32_key) gguf_put_f32(w, c->f32_key, c->f32);
    if (c->string_key) gguf_put_string(w, c->string_key, c->string);
}

static void put_tensors(struct gguf_writer *w, const struct change *c)
{
    static const struct { const char *name; uint64_t cols, rows; } layer[] = {
        {"attn_norm", EMBED, 1},    {"attn_q", EMBED, 8},       {"attn_k", EMBED, 4},
        {"attn_v", EMBED, 4},       {"attn_output", 8, EMBED},  {"ffn_norm", EMBED, 1},
        {"ffn_gate", EMBED, FFN},   {"ffn_up", EMBED, FFN},     {"ffn_down", FFN, EMBED},
    };
    put_tensor(w, c, "token_embd.weight", EMBED, VOCAB);
    put_tensor(w, c, "output_norm.weight", EMBED, 1);
    if (c->extra_tensor) put_tensor(w, c, c->extra_tensor, EMBED, 1);
    for (int l = 0; l < LAYERS; l++) {
        for (size_t i = 0; i < sizeof layer / sizeof *layer; i++) {
            char name[64];
            snprintf(name, sizeof name, "blk.%d.%s.weight", l, layer[i].name);
            put_tensor(w, c, name, layer[i].cols, layer[i].rows);
        }
    }
}

static enum status open_changed(struct stage *s, const struct change *c, struct model **out,
                                struct error *err)
{
    struct gguf_writer w = {.version = 3};
    struct strbuf bytes = {0};
    put_values(&w, c);
    put_tensors(&w, c);
    gguf_finish(&w, &bytes);
    assert_int_equal(file_replace(s->file.text, bytes.data, bytes.size, NULL), ST_OK);
    strbuf_release(&bytes);
    return model_open(&(struct model_config){.path = s->file.text, .device = s->device}, out, err);
}

static void refuse(struct stage *s, struct change c, enum status st, const char *word)
{
    struct model *m;
    struct error err = {0};
    assert_refused(open_changed(s, &c, &m, &err), st, err, word);
}

static void test_good_file(void **state)
{
    struct model *m;
    struct error err;
    assert_ok(open_changed(*state, &(struct change){.string_key = "general.name",
                                                    .string = "a \xE2\x82\xAC"}, &m, &err), err);
    assert_string_equal(m->shape.name, "a \xE2\x82\xAC");
    assert_int_equal(m->shape.layers, LAYERS);
    assert_int_equal(m->shape.head_dim, 2);
    assert_int_equal(m->shape.vocab, VOCAB);
    assert_ptr_equal(m->head, m->embed);
    assert_int_equal(strlen(m->shape.fingerprint), 16);
    for (int p = 0; p < PROJ_COUNT; p++) {
        size_t d_in, d_out;
        model_shape_projection(&m->shape, (enum projection)p, &d_in, &d_out);
        assert_int_equal(m->layers[1].projection[p]->cols, d_in);
        assert_int_equal(m->layers[1].projection[p]->rows, d_out);
    }
    model_close(m);
}

static void test_fingerprints(void **state)
{
    struct model *a, *b;
    assert_int_equal(open_changed(*state, &(struct change){0}, &a, NULL), ST_OK);
    assert_int_equal(open_changed(*state, &(struct change){.f32_key = "llama.rope.freq_base",
                                                           .f32 = 20000}, &b, NULL), ST_OK);
    assert_string_not_equal(a->shape.fingerprint, b->shape.fingerprint);
    model_close(a);
    model_close(b);
}

static void test_refused_metadata(void **state)
{
    struct stage *s = *state;
    refuse(s, (struct change){.architecture = "qwen2"}, ST_UNSUPPORTED, "'qwen2'");
    refuse(s, (struct change){.skip = "general.architecture"}, ST_BAD_FORMAT, "general.architecture");
    refuse(s, (struct change){.skip = "llama.block_count"}, ST_BAD_FORMAT, "llama.block_count");
    refuse(s, (struct change){.skip = "llama.context_length"}, ST_BAD_FORMAT, "context_length");
    static const struct { const char *key; uint64_t value; } bad[] = {
        {"llama.block_count", 0},
        {"llama.block_count", 1u << 30},
        {"llama.embedding_length", 0},
        {"llama.embedding_length", UINT64_MAX},
        {"llama.feed_forward_length", 1ull << 40},
        {"llama.attention.head_count", 0},
        {"llama.attention.head_count_kv", 5},
        {"llama.context_length", 0},
        {"llama.vocab_size", 0},
        {"llama.expert_count", 8},
        {"llama.attention.key_length", 1},
        {"llama.rope.dimension_count", 4},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refuse(s, (struct change){.u64_key = bad[i].key, .u64 = bad[i].value}, ST_UNSUPPORTED,
               bad[i].key);
    refuse(s, (struct change){.u64_key = "llama.attention.head_count_kv", .u64 = 3}, ST_BAD_FORMAT,
           "4 heads");
    refuse(s, (struct change){.u64_key = "llama.attention.value_length", .u64 = 4}, ST_UNSUPPORTED,
           "values of 4");
    refuse(s, (struct change){.f32_key = "llama.rope.freq_base", .f32 = NAN}, ST_UNSUPPORTED,
           "freq_base");
    refuse(s, (struct change){.f32_key = "llama.rope.scaling.yarn_ext_factor", .f32 = 0.5f},
           ST_UNSUPPORTED, "yarn_ext_factor");
    refuse(s, (struct change){.string_key = "llama.rope.scaling.type", .string = "longrope"},
           ST_UNSUPPORTED, "'longrope'");
    refuse(s, (struct change){.string_key = "llama.rope.freq_base", .string = "high"},
           ST_BAD_FORMAT, "freq_base");
}

static void test_refused_tensors(void **state)
{
    struct stage *s = *state;
    static const char *const needed[] = {"token_embd.weight", "output_norm.weight",
                                         "blk.1.ffn_down.weight", "blk.0.attn_norm.weight"};
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
        refuse(s, (struct change){.skip = needed[i]}, ST_BAD_FORMAT, needed[i]);

    static const struct { const char *name; uint64_t cols, rows; } odd[] = {
        {"blk.0.attn_q.weight", 8, 4}, {"blk.0.attn_k.weight", 4, 8}, {"blk.1.ffn_up.weight", 8, 13},
        {"blk.1.attn_norm.weight", 4, 2}, {"output_norm.weight", 9, 1}, {"token_embd.weight", 7, 5},
    };
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++)
        refuse(s, (struct change){.tensor = odd[i].name, .tensor_cols = odd[i].cols,
                                  .tensor_rows = odd[i].rows}, ST_BAD_FORMAT, odd[i].name);
    refuse(s, (struct change){.u64_key = "llama.vocab_size", .u64 = 6}, ST_BAD_FORMAT,
           "token_embd.weight");

    /* Left aside they would give wrong answers in silence. */
    static const char *const unused[] = {"blk.0.attn_q.bias", "blk.2.attn_q.weight", "blk..x.weight",
                                         "blk.0.ffn_gate_exps.weight", "blk.0.attn_q_norm.weight",
                                         "mystery", "blk.99999999999.attn_q.weight"};
    for (size_t i = 0; i < sizeof unused / sizeof *unused; i++)
        refuse(s, (struct change){.extra_tensor = unused[i]}, ST_UNSUPPORTED, unused[i]);
    refuse(s, (struct change){.extra_tensor = "output.weight"}, ST_BAD_FORMAT, "output.weight");
}

static void test_missing_file(void **state)
{
    struct stage *s = *state;
    struct model *m;
    struct error err = {0};
    assert_refused(model_open(&(struct model_config){.path = "/no/such/model.gguf", .device = s->device}, &m, &err), ST_NOT_FOUND,
                   err, "/no/such/model.gguf");
}

/* --- rotary embedding --- */

static void rope_check(struct change c, size_t head_dim, const float *expect, float magnitude)
{
    struct gguf_writer w = {.version = 3};
    struct strbuf bytes = {0};
    gguf_put_f32(&w, "llama.rope.freq_base", 10000);
    gguf_put_u64(&w, "llama.context_length", GGUF_U32, 256);
    if (c.string) gguf_put_string(&w, "llama.rope.scaling.type", c.string);
    if (c.f32_key) gguf_put_f32(&w, c.f32_key, c.f32);
    if (c.u64_key) gguf_put_u64(&w, c.u64_key, GGUF_U32, c.u64);
    gguf_finish(&w, &bytes);
    struct gguf *g;
    struct rope r;
    assert_int_equal(gguf_parse(bytes.data, bytes.size, &g, NULL), ST_OK);
    assert_int_equal(rope_read(g, head_dim, &r, NULL), ST_OK);
    assert_int_equal(r.dims, head_dim);
    /* Both sides round to fp32 a few times. */
    for (size_t i = 0; i < head_dim / 2; i++)
        assert_true(fabsf(r.inv_freq[i] - expect[i]) <= 1e-6f * expect[i]);
    assert_true(fabsf(r.magnitude - magnitude) <= 1e-6f);
    rope_release(&r);
    gguf_free(g);
    strbuf_release(&bytes);
}

/* Frequencies as transformers 5 computes them for a head of 32 and base 10000. */
static void test_rope_scaling(void **state)
{
    (void)state;
    static const float linear[16] = {
        0.25f, 0.14058533f, 0.079056941f, 0.044456985f, 0.025f, 0.014058532f, 0.0079056947f,
        0.0044456986f, 0.0025f, 0.0014058533f, 0.00079056947f, 0.00044456986f, 0.00025000001f,
        0.00014058533f, 7.9056947e-05f, 4.4456985e-05f};
    static const float yarn[16] = {
        1.0f, 0.47799012f, 0.22135943f, 0.097805366f, 0.039999999f, 0.014058532f, 0.0079056947f,
        0.0044456986f, 0.0025f, 0.0014058533f, 0.00079056947f, 0.00044456986f, 0.00025000001f,
        0.00014058533f, 7.9056947e-05f, 4.4456985e-05f};
    float plain[16];
    for (int i = 0; i < 16; i++) plain[i] = 4 * linear[i];
    rope_check((struct change){0}, 32, plain, 1);
    rope_check((struct change){.string = "none", .f32_key = "llama.rope.scaling.factor", .f32 = 4},
               32, plain, 1);
    rope_check((struct change){.string = "linear", .f32_key = "llama.rope.scaling.factor", .f32 = 4},
               32, linear, 1);
    rope_check((struct change){.f32_key = "llama.rope.scale_linear", .f32 = 4}, 32, linear, 1);
    rope_check((struct change){.string = "yarn", .f32_key = "llama.rope.scaling.factor", .f32 = 4,
                               .u64_key = "llama.rope.scaling.original_context_length", .u64 = 64},
               32, yarn, 1.138629436111989f);
}

/* --- progress --- */

struct progress {
    int calls;
    double last;
    bool backwards;
};

static void on_progress(void *ctx, double done)
{
    struct progress *p = ctx;
    p->calls++;
    p->backwards |= done < p->last;
    p->last = done;
}

static void test_progress(void **state)
{
    struct stage *s = *state;
    struct model *m;
    struct progress p = {0};
    struct model_config config = {
        .path = s->file.text, .device = s->device, .on_progress = on_progress, .progress_ctx = &p};
    assert_int_equal(open_changed(s, &(struct change){0}, &m, NULL), ST_OK);
    model_close(m);
    assert_int_equal(model_open(&config, &m, NULL), ST_OK);
    assert_true(p.calls > LAYERS && !p.backwards && p.last == 1);
    model_close(m);
}

static int setup(void **state)
{
    static struct stage s;
    struct cpu_device_config c = {.level = CPU_REFERENCE, .threads = 1};
    if (cpu_device_open(&c, &s.device, NULL) != ST_OK) return -1;
    temp_folder_make(&s.folder);
    s.file = test_path("%s/model.gguf", s.folder.path);
    *state = &s;
    return 0;
}

static int teardown(void **state)
{
    struct stage *s = *state;
    s->device->ops->close(s->device);
    temp_folder_remove(&s->folder);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good_file),
        cmocka_unit_test(test_fingerprints),
        cmocka_unit_test(test_refused_metadata),
        cmocka_unit_test(test_refused_tensors),
        cmocka_unit_test(test_missing_file),
        cmocka_unit_test(test_rope_scaling),
        cmocka_unit_test(test_progress),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}

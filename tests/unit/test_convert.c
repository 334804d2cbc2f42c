/* Adapters converted and read again: the same sites, or a refusal. */
#include "adapters/convert.h"
#include "adapters/package.h"
#include "adapters/reader.h"
#include "base/strbuf.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"

static const struct convert_heads no_heads = {0};

struct converted {
    struct strbuf config, tensors;
    struct adapter_bundle *bundle;
};

static void converted_release(struct converted *c)
{
    adapter_bundle_free(c->bundle);
    strbuf_release(&c->config);
    strbuf_release(&c->tensors);
}

static enum status convert(const char *fixture, enum convert_format format, const struct convert_heads *heads,
                           struct converted *out, struct error *err)
{
    *out = (struct converted){0};
    enum status st =
        adapter_convert(fixture_path(fixture).text, format, heads, &out->config, &out->tensors, err);
    if (st) return st;
    return adapter_read(out->config.data, out->config.size, out->tensors.data, out->tensors.size, NULL,
                        &out->bundle, err);
}

static void check_bytes(const void *a, const void *b, enum dtype type, size_t rows, size_t cols)
{
    assert_int_equal(a != NULL, b != NULL);
    if (a) assert_memory_equal(a, b, rows * dtype_row_bytes(type, cols));
}

static void check_site(const struct lr_site_source *a, const struct lr_site_source *b)
{
    assert_int_equal(a->experts, b->experts);
    assert_int_equal(a->rank, b->rank);
    assert_int_equal(a->rule, b->rule);
    if (a->rule == GATE_TOPK || a->rule == GATE_TOPK_RAW) assert_int_equal(a->top_k, b->top_k);
    assert_true(a->d_in == b->d_in && a->d_out == b->d_out && a->type == b->type);
    assert_true(a->temperature == b->temperature && a->threshold == b->threshold);
    assert_true(a->threshold_bias == b->threshold_bias);
    size_t rank = (size_t)a->rank;
    for (int e = 0; e < a->experts; e++) {
        assert_true(a->scale[e] == b->scale[e]);
        check_bytes(a->a[e], b->a[e], a->type, rank, a->d_in);
        check_bytes(a->b[e], b->b[e], a->type, a->d_out, rank);
    }
    if (a->router) assert_int_equal(a->router_type, b->router_type);
    check_bytes(a->router, b->router, a->router_type, (size_t)a->experts, a->d_in);
    check_bytes(a->threshold_row, b->threshold_row, a->router_type, 1, a->d_in);
}

static void check_same(const struct adapter_bundle *a, const struct adapter_bundle *b)
{
    assert_int_equal(a->layers, b->layers);
    for (int i = 0; i < a->layers * PROJ_COUNT; i++) {
        assert_int_equal(a->sites[i] != NULL, b->sites[i] != NULL);
        if (a->sites[i]) check_site(a->sites[i], b->sites[i]);
    }
}

static void check_fixture(const char *fixture, enum convert_format format, const char *written)
{
    struct package p = {0};
    struct adapter_bundle *before = NULL;
    struct converted c;
    struct error err = {0};
    assert_ok(package_map_path(fixture_path(fixture).text, &p, &err), err);
    assert_ok(adapter_read(p.config.data, p.config.size, p.tensors.data, p.tensors.size, NULL, &before, &err),
              err);
    assert_ok(convert(fixture, format, &no_heads, &c, &err), err);
    assert_string_equal(c.bundle->format, written);
    check_same(before, c.bundle);
    converted_release(&c);
    adapter_bundle_free(before);
    package_close(&p);
}

static void sites_stay_as_they_are(void **state)
{
    (void)state;
    static const char *const plain[] = {
        "adapter_files/all_linear", "adapter_files/bf16",  "adapter_files/excluded", "adapter_files/layers",
        "adapter_files/patterns",   "adapter_files/regex", "adapter_files/rslora",   "adapters/lora_patterns",
    };
    static const char *const mixtures[] = {
        "adapters/moe_topk", "adapters/moe_raw",       "adapters/moe_dense", "adapters/moe_scaled",
        "formats/adamole",   "formats/adamole_high",   "formats/coin",       "formats/hydralora",
        "formats/mole_topk", "formats/mole_threshold", "formats/mole_empty", "formats/moe_peft_mola",
    };
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) {
        check_fixture(plain[i], CONVERT_ANY, "peft-lora");
        check_fixture(plain[i], CONVERT_MOELORA, "moelora");
    }
    for (size_t i = 0; i < sizeof mixtures / sizeof *mixtures; i++)
        check_fixture(mixtures[i], CONVERT_ANY, "moelora");
}

static void what_cannot_be_said_is_refused(void **state)
{
    (void)state;
    static const struct {
        const char *fixture;
        enum convert_format format;
        const char *why;
    } cases[] = {
        {"formats/dora", CONVERT_ANY, "it is DoRA"},
        {"formats/lora_bias", CONVERT_ANY, "bias on B"},
        {"formats/mixlora", CONVERT_ANY, "whole FFN"},
        {"formats/moe_peft_loramoe", CONVERT_MOELORA, "another gate than the first site"},
        {"adapters/moe_topk", CONVERT_PEFT, "is a mixture of experts"},
        {"formats/hydralora", CONVERT_PEFT, "is a mixture of experts"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct converted c;
        struct error err = {0};
        assert_refused(convert(cases[i].fixture, cases[i].format, &no_heads, &c, &err), ST_UNSUPPORTED, err,
                       cases[i].why);
        converted_release(&c);
    }
}

/* The model of the GGUF fixture, gqa_tied, whose shapes are those of the adapter's sites. */
static struct adapter_base gguf_base(const struct adapter_bundle *b)
{
    struct adapter_base base = {
        .layers = b->layers, .heads = 6, .kv_heads = 2, .head_dim = 16, .qk_permuted = true};
    for (int p = 0; p < PROJ_COUNT; p++) {
        base.d_in[p] = b->sites[p]->d_in;
        base.d_out[p] = b->sites[p]->d_out;
    }
    return base;
}

/* With the model's heads the rows come back in Hugging Face's order, which a reader that knows the same model
 * permutes to what the GGUF file has. */
static void rows_of_gguf_files_go_back(void **state)
{
    (void)state;
    const char *fixture = "formats/gguf_lora/adapter.gguf";
    struct package p = {0};
    struct adapter_bundle *gguf = NULL, *base_order = NULL;
    struct converted c;
    struct error err = {0};
    assert_ok(package_map_path(fixture_path(fixture).text, &p, &err), err);
    assert_ok(adapter_read(p.config.data, p.config.size, p.tensors.data, p.tensors.size, NULL, &gguf, &err),
              err);
    assert_refused(convert(fixture, CONVERT_ANY, &no_heads, &c, &err), ST_INVALID, err, "--model");
    converted_release(&c);
    struct convert_heads wrong = {3, 3, 5};
    assert_refused(convert(fixture, CONVERT_ANY, &wrong, &c, &err), ST_INVALID, err, "3 heads of 5");
    converted_release(&c);

    struct adapter_base base = gguf_base(gguf);
    struct convert_heads heads = {base.heads, base.kv_heads, base.head_dim};
    assert_ok(convert(fixture, CONVERT_ANY, &heads, &c, &err), err);
    assert_string_equal(c.bundle->format, "peft-lora");
    assert_ok(
        adapter_read(c.config.data, c.config.size, c.tensors.data, c.tensors.size, &base, &base_order, &err),
        err);
    check_same(gguf, base_order);
    adapter_bundle_free(base_order);
    converted_release(&c);
    adapter_bundle_free(gguf);
    package_close(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sites_stay_as_they_are),
        cmocka_unit_test(what_cannot_be_said_is_refused),
        cmocka_unit_test(rows_of_gguf_files_go_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

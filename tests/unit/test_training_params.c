/* An adapter's parameters: from files to vectors and back without a change, and new ones that do nothing yet. */
#include "training/params.h"

#include "adapters/convert.h"
#include "adapters/package.h"
#include "base/strbuf.h"
#include "tests/support/check.h"
#include "tests/support/rig.h"
#include "tests/support/teacher.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A fixture's model, for its shapes, and one of its adapters. */
struct opened {
    struct device *device;
    struct model *model;
    struct adapter_base base;
    struct package package;
    struct adapter_bundle *bundle;
};

static struct opened opened_at(const char *model, const char *adapter)
{
    struct opened o = {.device = rig_device(CPU_LEVEL_BEST, 1)};
    struct test_path path = fixture_path(model);
    struct model_config config = {.path = path.text, .device = o.device};
    assert_int_equal(model_open(&config, &o.model, NULL), ST_OK);
    o.base = adapter_base_of(o.model);
    assert_int_equal(package_map_path(fixture_path(adapter).text, &o.package, NULL), ST_OK);
    assert_int_equal(adapter_read(o.package.config.data, o.package.config.size, o.package.tensors.data,
                                  o.package.tensors.size, &o.base, &o.bundle, NULL),
                     ST_OK);
    return o;
}

static void opened_close(struct opened *o)
{
    adapter_bundle_free(o->bundle);
    package_close(&o->package);
    model_close(o->model);
    o->device->ops->close(o->device);
}

static void check_matrix(enum dtype type, const void *a, enum dtype type_b, const void *b, size_t n)
{
    float *x = malloc(n * sizeof *x), *y = malloc(n * sizeof *y);
    dtype_decode(type, a, x, n);
    dtype_decode(type_b, b, y, n);
    assert_memory_equal(x, y, n * sizeof *x);
    free(x);
    free(y);
}

static void check_site(const struct lr_site_source *a, const struct lr_site_source *b)
{
    assert_true(a->experts == b->experts && a->rank == b->rank && a->top_k == b->top_k && a->rule == b->rule);
    assert_true(a->d_in == b->d_in && a->d_out == b->d_out);
    if (a->router) {
        assert_true(a->temperature == b->temperature);
        check_matrix(a->router_type, a->router, b->router_type, b->router, (size_t)a->experts * a->d_in);
    }
    for (int e = 0; e < a->experts; e++) {
        assert_true(a->scale[e] == b->scale[e]);
        check_matrix(a->type, a->a[e], b->type, b->a[e], (size_t)a->rank * a->d_in);
        check_matrix(a->type, a->b[e], b->type, b->b[e], (size_t)a->rank * a->d_out);
    }
}

static void check_same(const struct adapter_bundle *a, const struct adapter_bundle *b)
{
    assert_int_equal(a->site_count, b->site_count);
    assert_int_equal(a->parameters, b->parameters);
    for (int i = 0; i < a->layers * PROJ_COUNT; i++) {
        assert_int_equal(a->sites[i] != NULL, b->sites[i] != NULL);
        if (a->sites[i]) check_site(a->sites[i], b->sites[i]);
    }
}

static void test_there_and_back(void **state)
{
    (void)state;
    static const struct { const char *model, *adapter; enum dtype type; } cases[] = {
        {"models/gqa_tied.gguf", "adapters/moe_topk", DTYPE_F32},
        {"models/gqa_tied.gguf", "adapters/moe_raw", DTYPE_F16},
        {"models/mha_untied.gguf", "adapters/moe_mha", DTYPE_BF16},
        {"models/mha_untied.gguf", "adapters/lora_patterns", DTYPE_F32},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct opened o = opened_at(cases[i].model, cases[i].adapter);
        struct params *p;
        struct adapter_bundle *again;
        assert_int_equal(params_open(o.device, o.bundle, &p, NULL), ST_OK);
        assert_int_equal(p->count, o.bundle->parameters);
        assert_int_equal(params_bundle(p, &o.base, cases[i].type, &again, NULL), ST_OK);
        check_same(o.bundle, again);
        adapter_bundle_free(again);
        params_close(p);
        opened_close(&o);
    }
}

static void test_refusals(void **state)
{
    (void)state;
    static const struct { const char *adapter, *why; } cases[] = {
        {"formats/dora", "is DoRA"},
        {"formats/lora_bias", "has a bias on B"},
        {"formats/hydralora", "has one A for all experts"},
        {"formats/mixlora", "is routed with its whole FFN"},
        {"formats/mole_threshold", "chooses experts by a threshold"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct opened o = opened_at("models/gqa_tied.gguf", cases[i].adapter);
        struct params *p;
        struct error err;
        assert_int_equal(params_open(o.device, o.bundle, &p, &err), ST_UNSUPPORTED);
        assert_non_null(strstr(err.message, cases[i].why));
        opened_close(&o);
    }
}

/* A new adapter survives its files, and B is zero, A within its bound, the router of its deviation. */
static void test_fresh(void **state)
{
    (void)state;
    struct opened o = opened_at("models/gqa_tied.gguf", "adapters/moe_topk");
    struct fresh_adapter f = {.rank = 4, .experts = 8, .top_k = 2, .rule = GATE_TOPK, .alpha = 8, .seed = 7,
                              .target = {[PROJ_Q] = true, [PROJ_DOWN] = true}};
    struct adapter_bundle *b, *same, *read;
    assert_int_equal(bundle_fresh(&f, &o.base, &b, NULL), ST_OK);
    assert_int_equal(bundle_fresh(&f, &o.base, &same, NULL), ST_OK);
    const struct lr_site_source *q = b->sites[PROJ_Q];
    assert_null(b->sites[PROJ_K]);
    double sum = 0, bound = 1 / sqrt((double)q->d_in);
    size_t routers = (size_t)q->experts * q->d_in;
    for (size_t i = 0; i < routers; i++) sum += pow((double)((const float *)q->router)[i], 2);
    /* 8 x 64 draws: the deviation's own is 0.02 / sqrt(1024), of which this allows five */
    assert_true(fabs(sqrt(sum / (double)routers) - 0.02) < 5 * 0.02 / 32);
    for (int e = 0; e < 8; e++)
        for (size_t i = 0; i < 4 * q->d_in; i++) {
            assert_true(fabs((double)((const float *)q->a[e])[i]) <= bound);
            if (i < 4 * q->d_out) assert_true(((const float *)q->b[e])[i] == 0);
        }
    check_site(q, same->sites[PROJ_Q]);
    assert_true(memcmp(q->a[0], q->a[1], 4 * q->d_in * sizeof(float)) != 0);

    struct strbuf config = {0}, tensors = {0};
    struct convert_heads heads = {o.base.heads, o.base.kv_heads, o.base.head_dim};
    assert_int_equal(bundle_convert(b, CONVERT_ANY, &heads, &config, &tensors, NULL), ST_OK);
    assert_int_equal(adapter_read(config.data, config.size, tensors.data, tensors.size, &o.base, &read, NULL),
                     ST_OK);
    check_site(q, read->sites[PROJ_Q]);
    adapter_bundle_free(read);
    strbuf_release(&config);
    strbuf_release(&tensors);
    adapter_bundle_free(same);
    adapter_bundle_free(b);
    opened_close(&o);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_there_and_back),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_fresh),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Readers, conversion, inspection and export of adapters, with each of their allocations failing in turn. */
#include "adapters/convert.h"
#include "adapters/export.h"
#include "adapters/inspect.h"
#include "adapters/package.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"
#include "tests/support/shelf.h"
#include "tests/support/teacher.h"
#include "tests/support/temp_folder.h"

#include <stdlib.h>
#include <unistd.h>

/* Of every format, and the model that each was made for. */
static const struct {
    const char *path, *model;
} adapters[] = {
    {"adapters/moe_topk", "gqa_tied"},
    {"adapters/lora_patterns", "mha_untied"},
    {"formats/dora", "gqa_tied"},
    {"formats/lora_bias", "gqa_tied"},
    {"formats/gguf_lora/adapter.gguf", "gqa_tied"},
    {"formats/gguf_lora_q8/adapter.gguf", "gqa_scaled"},
    {"formats/hydralora", "gqa_tied"},
    {"formats/adamole", "gqa_tied"},
    {"formats/mole_threshold", "gqa_tied"},
    {"formats/mola", "mha_untied"},
    {"formats/coin", "mha_tied"},
    {"formats/moe_peft_mola", "gqa_tied"},
    {"formats/moe_peft_loramoe", "gqa_tied"},
    {"formats/mixlora", "gqa_tied"},
    {"formats/mixlora_legacy", "gqa_tied"},
};
#define ADAPTER_COUNT (sizeof adapters / sizeof *adapters)

static void skip_without_own_heap(void)
{
    if (!alloc_fail_available()) skip();
}

/* --- readers --- */

struct reading {
    struct package files;
    const struct adapter_base *base; /* NULL: none */
};

static enum status read_and_free(void *ctx)
{
    const struct reading *r = ctx;
    struct adapter_bundle *b = NULL;
    struct error err = {0};
    enum status st = adapter_read(r->files.config.data, r->files.config.size, r->files.tensors.data,
                                  r->files.tensors.size, r->base, &b, &err);
    adapter_bundle_free(b);
    return st;
}

static void every_reader(void **state)
{
    (void)state;
    skip_without_own_heap();
    struct cpu_device_config config = {.level = CPU_REFERENCE, .threads = 1};
    struct device *device = NULL;
    struct error err = {0};
    assert_ok(cpu_device_open(&config, &device, &err), err);
    for (size_t i = 0; i < ADAPTER_COUNT; i++) {
        struct test_path part = test_path("models/%s.gguf", adapters[i].model),
                         path = fixture_path(part.text);
        struct model *model = NULL;
        struct reading r = {0};
        assert_ok(model_open(&(struct model_config){.path = path.text, .device = device}, &model, &err), err);
        assert_ok(package_map_path(fixture_path(adapters[i].path).text, &r.files, &err), err);
        struct adapter_base base = adapter_base_of(model);
        for (int with_base = 0; with_base < 2; with_base++) {
            r.base = with_base ? &base : NULL;
            int failures = alloc_fail_sweep_lenient(read_and_free, &r);
            if (failures < 10) fail_msg("%s: %d allocations failed", adapters[i].path, failures);
        }
        package_close(&r.files);
        model_close(model);
    }
    device->ops->close(device);
}

/* --- from a path --- */

static enum status inspect_path(void *ctx)
{
    struct strbuf text = {0};
    struct error err = {0};
    enum status st = adapter_inspect(ctx, &text, &err);
    strbuf_release(&text);
    return st;
}

static enum status convert_path(void *ctx)
{
    struct convert_heads heads = {6, 2, 16}; /* of gqa_tied, for the GGUF file */
    struct strbuf config = {0}, tensors = {0};
    struct error err = {0};
    enum status st = adapter_convert(ctx, CONVERT_ANY, &heads, &config, &tensors, &err);
    strbuf_release(&config);
    strbuf_release(&tensors);
    return st;
}

static void inspection_and_conversion(void **state)
{
    (void)state;
    skip_without_own_heap();
    static const char *const paths[] = {"adapters/moe_topk", "adapters/lora_patterns",
                                        "formats/gguf_lora/adapter.gguf", "formats/adamole"};
    struct temp_folder temporary;
    temp_folder_make(&temporary);
    setenv("TMPDIR", temporary.path, 1);
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        struct test_path path = fixture_path(paths[i]);
        assert_true(alloc_fail_sweep_lenient(inspect_path, path.text) > 10);
        assert_true(alloc_fail_sweep_lenient(convert_path, path.text) > 20);
    }
    assert_int_equal(rmdir(temporary.path), 0); /* nothing was left in it */
    unsetenv("TMPDIR");
}

/* --- export --- */

static enum status export_all(void *ctx)
{
    struct shelf *f = ctx;
    struct export *e = NULL;
    struct strbuf out = {0};
    struct error err = {0};
    size_t before;
    enum status st = export_open(f->registry, "t", "a", NULL, &e, &err);
    do {
        before = out.size;
        if (!st) st = export_read(e, 1024, &out, &err);
    } while (!st && out.size > before);
    export_close(e);
    strbuf_release(&out);
    return st;
}

/* Of a GGUF file: libarchive, which writes the others, ends the program where its strings find no memory. */
static void an_export(void **state)
{
    struct shelf *f = *state;
    skip_without_own_heap();
    struct test_path path = fixture_path("models/gqa_tied.gguf");
    struct cpu_device_config config = {.level = CPU_REFERENCE, .threads = 1};
    struct device *device = NULL;
    struct model *model = NULL;
    struct upload *u = NULL;
    struct put_result result;
    struct error err = {0};
    size_t size;
    void *bytes = fixture_read("formats/gguf_lora/adapter.gguf", &size);
    assert_ok(cpu_device_open(&config, &device, &err), err);
    assert_ok(model_open(&(struct model_config){.path = path.text, .device = device}, &model, &err), err);
    shelf_close(f);
    f->config.base = adapter_base_of(model);
    shelf_open(f);
    assert_ok(upload_open(f->registry, &u, &err), err);
    file_write(upload_path(u), PACKAGE_BODY, bytes, size);
    assert_ok(registry_put(f->registry, "t", "a", u, NULL, &result, &err), err);
    upload_close(u);
    assert_true(alloc_fail_sweep(export_all, f) > 2);
    shelf_close(f);
    model_close(model);
    device->ops->close(device);
    free(bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_reader),
        cmocka_unit_test(inspection_and_conversion),
        cmocka_unit_test_setup_teardown(an_export, shelf_set_up, shelf_tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

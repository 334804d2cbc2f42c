/* Damaged adapters, native MoELoRA and PEFT LoRA: each time either the configuration or the tensors.
 * What is accepted must survive being packed. */
#include "adapters/reader.h"
#include "adapters/version.h"
#include "kernels/device.h"
#include "tests/support/fixture.h"
#include "tests/support/fuzz.h"
#include "tests/support/teacher.h"

#include <stdio.h>
#include <stdlib.h>

/* Both files of an adapter, whole, and what it is for. */
struct adapter_files {
    void *config, *tensors;
    size_t config_size, tensors_size;
    struct adapter_base base;
};

static struct device *device;

static enum status read_pair(const struct adapter_files *files, const void *config, size_t config_size,
                             const void *tensors, size_t tensors_size, struct error *err)
{
    struct adapter_bundle *bundle;
    struct packed_adapter *packed;
    enum status st = adapter_read(config, config_size, tensors, tensors_size, &files->base, &bundle, err);
    if (st) return st;
    st = adapter_pack(bundle, device, &packed, err);
    if (!st) packed_adapter_free(packed);
    adapter_bundle_free(bundle);
    return st;
}

static enum status read_adapter(const struct mutate_source *source, const uint8_t *data, size_t size,
                                struct error *err)
{
    const struct adapter_files *files = source->context;
    if (source->data == files->config)
        return read_pair(files, data, size, files->tensors, files->tensors_size, err);
    return read_pair(files, files->config, files->config_size, data, size, err);
}

static struct adapter_files files_read(const char *name, const char *model)
{
    struct adapter_files f;
    struct test_path config = test_path("adapters/%s/adapter_config.json", name);
    struct test_path tensors = test_path("adapters/%s/adapter_model.safetensors", name);
    struct test_path model_file = test_path("models/%s.gguf", model);
    struct test_path model_path = fixture_path(model_file.text);
    struct model *m;
    struct error err;
    f.config = fixture_read(config.text, &f.config_size);
    f.tensors = fixture_read(tensors.text, &f.tensors_size);
    if (model_open(model_path.text, device, NULL, NULL, &m, &err)) {
        fprintf(stderr, "%s\n", err.message);
        exit(2);
    }
    f.base = adapter_base_of(m);
    model_close(m);
    return f;
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name, *model;
    } adapters[] = {{"moe_dense", "gqa_tied"}, {"lora_patterns", "mha_untied"}, {"moe_scaled", "gqa_scaled"}};
    enum { COUNT = sizeof adapters / sizeof *adapters };
    static const char *const words[] = {
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "\"",
        "null",
        "true",
        "false",
        "0",
        "-1",
        "1e9",
        "1e-9",
        "2147483648",
        "0.5",
        "1",
        "8",
        "\"x\"",
        "[]",
        "{}",
        "layers.0.",
        "layers.99.",
        "lora_A",
        "lora_B",
        ".weight",
        "q_proj",
        "experts.7",
        "F16",
        "BF16",
        "\"peft_type\":\"MOLA\",",
        "\"use_dora\":true,",
        "\"bias\":\"all\",",
        "\"top_k\":9,",
        "\"r\":0,",
    };
    struct cpu_device_config config = {.level = CPU_REFERENCE, .threads = 1};
    struct error err;
    if (cpu_device_open(&config, &device, &err)) return 2;

    struct adapter_files files[COUNT];
    struct mutate_source sources[2 * COUNT];
    for (int i = 0; i < COUNT; i++) {
        struct adapter_files *f = &files[i];
        *f = files_read(adapters[i].name, adapters[i].model);
        struct mutate_source common = {.name = adapters[i].name,
                                       .words = words,
                                       .word_count = sizeof words / sizeof *words,
                                       .context = f};
        struct mutate_source *of_config = &sources[2 * i], *of_tensors = &sources[2 * i + 1];
        *of_config = *of_tensors = common;
        of_config->data = f->config;
        of_config->size = f->config_size;
        of_tensors->data = f->tensors;
        of_tensors->size = f->tensors_size;
        of_tensors->head = 4096;
    }
    int failed = fuzz_main(argc, argv, sources, 2 * COUNT, read_adapter);
    for (int i = 0; i < COUNT; i++) {
        free(files[i].config);
        free(files[i].tensors);
    }
    device->ops->close(device);
    return failed;
}

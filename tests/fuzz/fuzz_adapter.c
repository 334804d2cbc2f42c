/* Damaged adapters of every format: each time either the configuration or the tensors. What is accepted must
 * survive being packed. */
#include "adapters/reader.h"
#include "adapters/version.h"
#include "kernels/device.h"
#include "tests/support/fixture.h"
#include "tests/support/fuzz.h"
#include "tests/support/teacher.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Both files of an adapter, whole, and what it is for. */
struct adapter_files {
    void *config, *tensors;
    size_t config_size, tensors_size;
    struct model *model; /* base reads rows of it */
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

/* An adapter's folder among the fixtures, or its one file, and the model it is for. */
struct origin {
    const char *path, *model;
};

static struct adapter_files files_read(const struct origin *o)
{
    struct adapter_files f;
    bool one_file = strstr(o->path, ".gguf") != NULL;
    struct test_path config = test_path("%s/adapter_config.json", o->path);
    struct test_path tensors = test_path("%s%s", o->path, one_file ? "" : "/adapter_model.safetensors");
    struct test_path model_file = test_path("models/%s.gguf", o->model);
    struct test_path model_path = fixture_path(model_file.text);
    struct error err;
    f.config = one_file ? calloc(1, 1) : fixture_read(config.text, &f.config_size);
    if (one_file) f.config_size = 0;
    f.tensors = fixture_read(tensors.text, &f.tensors_size);
    if (model_open(&(struct model_config){.path = model_path.text, .device = device}, &f.model, &err)) {
        fprintf(stderr, "%s\n", err.message);
        exit(2);
    }
    f.base = adapter_base_of(f.model);
    return f;
}

int main(int argc, char **argv)
{
    static const struct origin adapters[] = {
        {"adapters/moe_dense", "gqa_tied"},
        {"adapters/lora_patterns", "mha_untied"},
        {"adapters/moe_scaled", "gqa_scaled"},
        {"formats/dora_rslora", "mha_tied"},
        {"formats/lora_bias", "gqa_tied"},
        {"formats/gguf_lora/adapter.gguf", "gqa_tied"},
        {"formats/gguf_lora_q8/adapter.gguf", "gqa_scaled"},
        {"formats/hydralora", "gqa_tied"},
        {"formats/adamole_high", "gqa_tied"},
        {"formats/mole_threshold", "gqa_tied"},
        {"formats/mola", "mha_untied"},
        {"formats/coin", "mha_tied"},
        {"formats/moe_peft_mola", "gqa_tied"},
        {"formats/moe_peft_loramoe", "gqa_tied"},
        {"formats/mixlora", "gqa_tied"},
        {"formats/mixlora_warm", "gqa_tied"},
        {"formats/mixlora_legacy", "gqa_tied"},
    };
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
        "\"r\":[1,2],",
        "\"lora_nums\":3,",
        "mixlora-dynamic",
        "\"expert_lora\":{},",
        "max_threshold",
        ".lora_a",
    };
    struct cpu_device_config config = {.level = CPU_REFERENCE, .threads = 1};
    struct error err;
    if (cpu_device_open(&config, &device, &err)) return 2;

    struct adapter_files files[COUNT];
    struct mutate_source sources[2 * COUNT];
    size_t count = 0;
    for (int i = 0; i < COUNT; i++) {
        struct adapter_files *f = &files[i];
        *f = files_read(&adapters[i]);
        struct mutate_source common = {.name = adapters[i].path,
                                       .words = words,
                                       .word_count = sizeof words / sizeof *words,
                                       .context = f};
        if (f->config_size) {
            common.data = f->config;
            common.size = f->config_size;
            sources[count++] = common;
        }
        common.data = f->tensors;
        common.size = f->tensors_size;
        common.head = 4096;
        sources[count++] = common;
    }
    int failed = fuzz_main(argc, argv, sources, count, read_adapter);
    for (int i = 0; i < COUNT; i++) {
        free(files[i].config);
        free(files[i].tensors);
        model_close(files[i].model);
    }
    device->ops->close(device);
    return failed;
}

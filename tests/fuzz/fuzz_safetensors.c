/* Damaged safetensors files: one made here, and an adapter of the fixtures. */
#include "base/safetensors.h"
#include "base/strbuf.h"
#include "tests/support/fixture.h"
#include "tests/support/fuzz.h"

#include <stdlib.h>

static volatile uint64_t sink; /* keeps the reads below */

static enum status read_safetensors(const struct mutate_source *source, const uint8_t *data, size_t size,
                                    struct error *err)
{
    (void)source;
    struct safetensors *s;
    enum status st = safetensors_parse(data, size, &s, err);
    if (st) return st;
    for (size_t i = 0; i < safetensors_count(s); i++) {
        const struct safetensor *t = safetensors_at(s, i);
        CHECK(safetensors_find(s, t->name) == t);
        for (size_t j = 0; j < t->bytes; j++) sink = sink + ((const uint8_t *)t->data)[j];
    }
    safetensors_free(s);
    return ST_OK;
}

int main(int argc, char **argv)
{
    static const char *const words[] = {
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "\"",
        "\\u0000",
        "\\ud800",
        "\\\"",
        "\xFF",
        "0",
        "9",
        "18446744073709551615",
        "18446744073709551616",
        "-1",
        "1.5",
        "\"dtype\":\"F32\",",
        "\"shape\":[0],",
        "\"data_offsets\":[0,0]",
        "\"__metadata__\":{\"format\":\"pt\"},",
        "F16",
        "I64",
        "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
        "\"x\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},",
    };
    static const float values[12] = {1, 2, 3};
    const struct safetensor tensors[] = {
        {"first", DTYPE_F32, 2, {2, 3, 1, 1}, values, 24},
        {"second \"one\"", DTYPE_BF16, 1, {4, 1, 1, 1}, values, 8},
        {"scalar", DTYPE_F16, 0, {1, 1, 1, 1}, values, 2},
        {"empty", DTYPE_F32, 2, {0, 3, 1, 1}, values, 0},
    };
    struct strbuf small = {0};
    safetensors_write(tensors, 4, &small);
    size_t adapter_size;
    void *adapter = fixture_read("adapters/moe_dense/adapter_model.safetensors", &adapter_size);
    const struct mutate_source sources[] = {
        {.name = "small",
         .data = small.data,
         .size = small.size,
         .head = small.size - 34,
         .words = words,
         .word_count = sizeof words / sizeof *words},
        {.name = "moe_dense",
         .data = adapter,
         .size = adapter_size,
         .head = 2048,
         .words = words,
         .word_count = sizeof words / sizeof *words},
    };
    int failed = fuzz_main(argc, argv, sources, 2, read_safetensors);
    free(adapter);
    strbuf_release(&small);
    return failed;
}

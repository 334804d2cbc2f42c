/* Damaged GGUF files: one made here with every kind of value, and the start of a fixture model. */
#include "base/gguf.h"
#include "tests/support/fixture.h"
#include "tests/support/fuzz.h"
#include "tests/support/gguf_writer.h"

#include <stdlib.h>
#include <string.h>

static volatile uint64_t sink; /* keeps the reads below */

static void touch(const void *data, size_t size)
{
    const uint8_t *bytes = data;
    for (size_t i = 0; i < size; i++) sink = sink + bytes[i];
}

/* Asks for the value under every kind of look-up; what it answers must be readable. */
static void read_key(const struct gguf *g, const char *key)
{
    uint64_t u;
    double f;
    bool b;
    struct gguf_string s, *strings;
    struct gguf_array a;
    size_t count;
    if (!gguf_get_u64(g, key, &u, NULL)) sink = sink + u;
    if (!gguf_get_f64(g, key, &f, NULL)) sink = sink + (f > 0);
    if (!gguf_get_bool(g, key, &b, NULL)) sink = sink + b;
    if (!gguf_get_string(g, key, &s, NULL)) touch(s.data, s.size);
    if (!gguf_get_array(g, key, &a, NULL) && a.type == GGUF_U32) touch(a.data, (size_t)a.count * 4);
    if (!gguf_get_strings(g, key, &strings, &count, NULL)) {
        for (size_t i = 0; i < count; i++) touch(strings[i].data, strings[i].size);
        free(strings);
    }
}

static enum status read_gguf(const struct mutate_source *source, const uint8_t *data, size_t size,
                             struct error *err)
{
    (void)source;
    static const char *const keys[] = {"general.architecture",
                                       "a.u8",
                                       "a.f64",
                                       "a.bool",
                                       "a.strings",
                                       "a.numbers",
                                       "a.nested",
                                       "tokenizer.ggml.tokens",
                                       "llama.block_count"};
    struct gguf *g;
    enum status st = gguf_parse(data, size, &g, err);
    if (st) return st;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) read_key(g, keys[i]);
    for (size_t i = 0; i < gguf_tensor_count(g); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(g, i);
        touch(t->name.data, t->name.size);
        touch(t->data, t->bytes);
    }
    gguf_free(g);
    return ST_OK;
}

static void make_small(struct strbuf *out)
{
    static const char *const words[] = {"one", "", "three"};
    static const uint32_t numbers[] = {1, 2, 3};
    static const uint64_t dims[] = {32, 2};
    /* one element that is an array of two bytes */
    static const uint8_t nested[] = {GGUF_U8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 8};
    static const float values[64] = {1};
    struct gguf_writer w = {.version = 3};
    gguf_put_string(&w, "general.architecture", "llama");
    gguf_put_u64(&w, "general.alignment", GGUF_U32, 32);
    gguf_put_u64(&w, "a.u8", GGUF_U8, 200);
    gguf_put_f64(&w, "a.f64", 0.5);
    gguf_put_u64(&w, "a.bool", GGUF_BOOL, 1);
    gguf_put_strings(&w, "a.strings", words, 3);
    gguf_put_array(&w, "a.numbers", GGUF_U32, 3, numbers, sizeof numbers);
    gguf_put_array(&w, "a.nested", GGUF_ARRAY, 1, nested, sizeof nested);
    gguf_put_tensor(&w, "first.weight", DTYPE_F32, 2, dims, values, sizeof values);
    gguf_put_tensor(&w, "second.weight", DTYPE_Q4_1, 1, dims, values, 20);
    gguf_finish(&w, out);
}

int main(int argc, char **argv)
{
    struct strbuf small = {0};
    make_small(&small);
    size_t model_size;
    void *model = fixture_read("models/mha_tied.gguf", &model_size);
    const struct mutate_source sources[] = {
        {.name = "small", .data = small.data, .size = small.size},
        {.name = "mha_tied.gguf", .data = model, .size = model_size, .head = 16384},
        {.name = "small's head", .data = small.data, .size = small.size, .head = 128},
    };
    int failed = fuzz_main(argc, argv, sources, 3, read_gguf);
    free(model);
    strbuf_release(&small);
    return failed;
}

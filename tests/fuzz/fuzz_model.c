/* Damaged models: opened with their tokenizer, and if accepted, used: a text is
 * tokenized and run through the forward pass. */
#include "base/log.h"
#include "engine/tokenizer.h"
#include "kernels/device.h"
#include "tests/support/fixture.h"
#include "tests/support/fuzz.h"
#include "tests/support/teacher.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define TOKENS_MAX 16

static struct device *device;

static enum status use_model(struct teacher *t, struct error *err)
{
    static const char text[] = "Hello <s>\xF0\x9F\x98\x80 42\xFF";
    struct tokenizer *tokenizer;
    enum status st = tokenizer_open(t->model->gguf, &tokenizer, err);
    if (st) return st;
    struct token_list tokens = {0};
    struct strbuf back = {0};
    CHECK(!tokenizer_encode(tokenizer, text, sizeof text - 1, TOKENIZE_ADD_SPECIAL | TOKENIZE_PARSE_SPECIAL,
                            &tokens));
    CHECK(!tokenizer_decode(tokenizer, tokens.ids, tokens.count, 0, &back));

    /* The vocabulary may be smaller than the tokenizer's; the engine refuses such a model. */
    size_t vocab = t->model->shape.vocab;
    int count = (int)(tokens.count < TOKENS_MAX ? tokens.count : TOKENS_MAX);
    for (int i = 0; i < count; i++) tokens.ids[i] = (int32_t)((size_t)tokens.ids[i] % vocab);
    float *logits = malloc((size_t)TOKENS_MAX * vocab * sizeof *logits);
    CHECK(logits);
    if (count) st = teacher_run(t, tokens.ids, count, count, NULL, 0, logits);
    if (st) error_set(err, st, "the forward pass failed: %s", status_text(st));

    free(logits);
    strbuf_release(&back);
    token_list_release(&tokens);
    tokenizer_close(tokenizer);
    return st;
}

static enum status read_model(const struct mutate_source *source, const uint8_t *data, size_t size,
                              struct error *err)
{
    (void)source;
    int fd = memfd_create("model", MFD_CLOEXEC);
    CHECK(fd >= 0 && write(fd, data, size) == (ssize_t)size);
    struct test_path path = test_path("/proc/self/fd/%d", fd);
    struct teacher t;
    enum status st = teacher_open(path.text, device, TOKENS_MAX, DTYPE_F32, &t, err);
    close(fd);
    if (st) return st;
    st = use_model(&t, err);
    teacher_close(&t);
    return st;
}

int main(int argc, char **argv)
{
    static const char *const models[] = {"mha_tied", "gqa_scaled"};
    enum { COUNT = sizeof models / sizeof *models };
    log_set_level(LOG_ERROR);
    struct cpu_device_config config = {.level = CPU_REFERENCE, .threads = 1};
    struct error err;
    if (cpu_device_open(&config, &device, &err)) return 2;
    struct mutate_source sources[COUNT];
    for (int i = 0; i < COUNT; i++) {
        struct test_path file = test_path("models/%s.gguf", models[i]);
        sources[i] = (struct mutate_source){.name = models[i], .head = 16384};
        sources[i].data = fixture_read(file.text, &sources[i].size);
    }
    int failed = fuzz_main(argc, argv, sources, COUNT, read_model);
    for (int i = 0; i < COUNT; i++) free((void *)sources[i].data);
    device->ops->close(device);
    return failed;
}

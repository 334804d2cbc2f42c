/* Damaged chat templates. Few are still a known family, which is the point: the rest must be refused.
 * What is recognised must render. */
#include "engine/chat.h"
#include "tests/support/fixture.h"
#include "tests/support/fuzz.h"

#include <stdlib.h>

static enum status read_template(const struct mutate_source *source, const uint8_t *data, size_t size,
                                 struct error *err)
{
    (void)source;
    static const struct chat_message messages[] = {
        {"user", "Hi \xF0\x9F\x98\x80"}, {"assistant", ""}, {"user", "x"}};
    struct chat_options options = {.add_generation_prompt = true, .bos = "<s>", .eos = "</s>"};
    struct chat_template t;
    struct strbuf out = {0};
    enum status st = chat_template_recognise((const char *)data, size, &t, err);
    if (st) return st;
    st = chat_render(&t, messages, 3, &options, &out, err);
    CHECK(st || out.size);
    strbuf_release(&out);
    chat_template_release(&t);
    return st;
}

int main(int argc, char **argv)
{
    static const char *const names[] = {"chatml-qwen2.5", "llama-2-chat", "llama-3.2", "mistral-v0.3",
                                        "gemma",          "phi-3-mini",   "zephyr",    "chatml-smollm2"};
    enum { COUNT = sizeof names / sizeof *names };
    static const char *const words[] = {
        " ",
        "\n",
        "{{",
        "}}",
        "{%",
        "%}",
        "{%-",
        "-%}",
        "{#",
        "#}",
        "'",
        "\"",
        "\\",
        "\\n",
        "\\x",
        "\xFF",
        "(",
        ")",
        "{{ 'x' }}",
        "{% if x %}",
        "{% endif %}",
        "{% for m in messages %}",
        "<|im_start|>system\n",
        "<|im_end|>\n",
    };
    struct mutate_source sources[COUNT];
    for (int i = 0; i < COUNT; i++) {
        struct test_path file = test_path("chat/%s.jinja", names[i]);
        sources[i] = (struct mutate_source){
            .name = names[i], .words = words, .word_count = sizeof words / sizeof *words};
        sources[i].data = fixture_read(file.text, &sources[i].size);
    }
    int failed = fuzz_main(argc, argv, sources, COUNT, read_template);
    for (int i = 0; i < COUNT; i++) free((void *)sources[i].data);
    return failed;
}

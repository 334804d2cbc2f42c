/* Damaged vocabularies: one that is accepted must still tokenize, and give back ids it knows. */
#include "base/log.h"
#include "engine/tokenizer.h"
#include "tests/support/fixture.h"
#include "tests/support/fuzz.h"

#include <stdlib.h>

static enum status use(const struct tokenizer *t)
{
    static const char text[] = "Hello <|im_end|> <tool> w\xC3\xB6rld, it's 12345 \xF0\x9F\x98\x80 \n\n \xFF";
    struct token_list ids = {0};
    struct strbuf back = {0};
    enum status st =
        tokenizer_encode(t, text, sizeof text - 1, TOKENIZE_PARSE_SPECIAL | TOKENIZE_ADD_SPECIAL, &ids);
    if (!st) st = tokenizer_decode(t, ids.ids, ids.count, DETOKENIZE_SKIP_SPECIAL, &back);
    strbuf_release(&back);
    token_list_release(&ids);
    return st;
}

static enum status read_tokenizer(const struct mutate_source *source, const uint8_t *data, size_t size,
                                  struct error *err)
{
    (void)source;
    struct gguf *g = NULL;
    struct tokenizer *t = NULL;
    enum status st = gguf_parse(data, size, &g, err);
    if (!st) st = tokenizer_open(g, &t, err);
    if (!st) CHECK(use(t) == ST_OK);
    tokenizer_close(t);
    gguf_free(g);
    return st;
}

int main(int argc, char **argv)
{
    enum { SOURCES = 4 };
    static const char *const names[SOURCES] = {"tokenizer/bpe-smollm.gguf", "tokenizer/bpe-llama-bpe.gguf",
                                               "tokenizer/bpe-default.gguf", "tokenizer/spm.gguf"};
    struct mutate_source sources[SOURCES] = {0};
    void *bytes[SOURCES];
    for (int i = 0; i < SOURCES; i++) {
        sources[i].name = names[i];
        bytes[i] = fixture_read(names[i], &sources[i].size);
        sources[i].data = bytes[i];
    }
    log_set_level(LOG_OFF); /* vocabularies that lost a byte are warned about */
    int failed = fuzz_main(argc, argv, sources, SOURCES, read_tokenizer);
    for (int i = 0; i < SOURCES; i++) free(bytes[i]);
    return failed;
}

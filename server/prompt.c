#include "server/prompt.h"

#include <stdlib.h>
#include <string.h>

/* The text of a special token, NUL-terminated, to be freed; "" where the model has none. */
static char *token_text_of(const struct tokenizer *t, int32_t id)
{
    struct strbuf text = {0};
    strbuf_puts(&text, "");
    if (id >= 0 && tokenizer_decode(t, &id, 1, 0, &text)) strbuf_clear(&text);
    return strbuf_take(&text);
}

static enum status render(const struct engine *e, const struct chat_template *template,
                          const struct chat_prompt *c, struct strbuf *text, struct error *err)
{
    const struct tokenizer *t = engine_tokenizer(e);
    struct chat_message *messages = calloc(c->count, sizeof *messages);
    char *bos = token_text_of(t, tokenizer_bos(t)), *eos = token_text_of(t, tokenizer_eos(t));
    enum status st = error_set(err, ST_NOMEM, "out of memory");
    if (!messages || !bos || !eos) goto done;
    for (size_t i = 0; i < c->count; i++)
        messages[i] = (struct chat_message){c->messages[i].role, c->messages[i].content};
    struct chat_options options = {c->add_generation_prompt, c->continue_final_message, bos, eos};
    st = chat_render(template, messages, c->count, &options, text, err);
    if (!st && text->failed) st = error_set(err, ST_NOMEM, "out of memory");
done:
    free(messages);
    free(bos);
    free(eos);
    return st;
}

enum status prompt_render(const struct engine *e, const struct chat_prompt *c, unsigned flags,
                          struct token_list *out, struct error *err)
{
    struct chat_template given = {0};
    const struct chat_template *template = &given;
    struct strbuf text = {0};
    enum status st = ST_OK;
    if (c->chat_template)
        st = chat_template_recognise(c->chat_template, strlen(c->chat_template), &given, err);
    else if (!(template = engine_chat(e, err)))
        st = ST_UNSUPPORTED;
    if (!st) st = render(e, template, c, &text, err);
    if (!st)
        st = tokenizer_encode(engine_tokenizer(e), text.data ? text.data : "", text.size,
                              flags | TOKENIZE_PARSE_SPECIAL, out);
    strbuf_release(&text);
    chat_template_release(&given);
    return st;
}

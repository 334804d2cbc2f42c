/* /tokenize and /detokenize. */
#include "api/tokenize.h"
#include "server/handlers.h"
#include "server/prompt.h"
#include "server/service.h"

#include <stdlib.h>
#include <string.h>

struct tokenize_call {
    struct call call;
    struct tokenize_request request;
};

static void write_tokens(struct call *c, const struct tokenize_request *r, const struct token_list *tokens)
{
    const struct tokenizer *t = engine_tokenizer(c->service->engine);
    struct token_piece *pieces = calloc(tokens->count ? tokens->count : 1, sizeof *pieces);
    if (!pieces) {
        api_error_from(&c->error, ST_NOMEM, NULL, NULL);
        return;
    }
    for (size_t i = 0; i < tokens->count; i++) {
        pieces[i].id = tokens->ids[i];
        pieces[i].piece = tokenizer_piece(t, tokens->ids[i], 0, i == 0, &pieces[i].size);
    }
    tokenize_write(&c->body, r, pieces, tokens->count, engine_shape(c->service->engine)->context_length);
    free(pieces);
}

static void work_tokenize(struct call *c)
{
    const struct tokenize_request *r = &((struct tokenize_call *)c)->request;
    const struct engine *e = c->service->engine;
    struct token_list tokens = {0};
    struct error cause = {0};
    unsigned flags =
        (r->add_special ? TOKENIZE_ADD_SPECIAL : 0) | (r->parse_special ? TOKENIZE_PARSE_SPECIAL : 0);
    struct chat_prompt chat = {r->messages, r->message_count, NULL, r->add_generation_prompt, false};
    enum status st = r->text ? tokenizer_encode(engine_tokenizer(e), r->text, strlen(r->text), flags, &tokens)
                             : prompt_render(e, &chat, flags, &tokens, &cause);
    if (st)
        api_error_from(&c->error, st, &cause, r->text ? NULL : "messages");
    else
        write_tokens(c, r, &tokens);
    token_list_release(&tokens);
}

static void release_tokenize(struct call *c)
{
    tokenize_request_release(&((struct tokenize_call *)c)->request);
}

void tokenize_post(struct exchange *x)
{
    struct api_error err = {0};
    struct tokenize_call *c = calloc(1, sizeof *c);
    size_t size;
    char *body = exchange_body(x, &size);
    if (!c) api_error_from(&err, ST_NOMEM, NULL, NULL);
    if (!c || !tokenize_request_parse(body, size, &c->request, &err)) {
        free(c);
        exchange_reply_error(x, &err);
        return;
    }
    c->call.work = work_tokenize;
    c->call.release = release_tokenize;
    call_start(x, &c->call);
}

struct detokenize_call {
    struct call call;
    struct token_rows tokens;
};

static void work_detokenize(struct call *c)
{
    const struct token_rows *rows = &((struct detokenize_call *)c)->tokens;
    struct strbuf text = {0};
    size_t count = rows->rows ? rows->end[0] : 0;
    enum status st = tokenizer_decode(engine_tokenizer(c->service->engine), rows->ids, count, 0, &text);
    if (st == ST_INVALID)
        api_error_set(&c->error, 400, "invalid_value", "tokens", "'tokens' must be ids below %zu",
                      tokenizer_vocab_size(engine_tokenizer(c->service->engine)));
    else if (st || text.failed)
        api_error_from(&c->error, st ? st : ST_NOMEM, NULL, NULL);
    else
        detokenize_write(&c->body, text.data ? text.data : "", text.size);
    strbuf_release(&text);
}

static void release_detokenize(struct call *c) { token_rows_release(&((struct detokenize_call *)c)->tokens); }

void detokenize_post(struct exchange *x)
{
    struct api_error err = {0};
    struct detokenize_call *c = calloc(1, sizeof *c);
    size_t size;
    char *body = exchange_body(x, &size);
    if (!c) api_error_from(&err, ST_NOMEM, NULL, NULL);
    if (!c || !detokenize_request_parse(body, size, &c->tokens, &err)) {
        free(c);
        exchange_reply_error(x, &err);
        return;
    }
    c->call.work = work_detokenize;
    c->call.release = release_detokenize;
    call_start(x, &c->call);
}

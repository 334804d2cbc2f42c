#include "api/tokenize.h"

#include "api/parse.h"
#include "base/utf8.h"

#include <string.h>

static void parse_source(struct parse *p, struct tokenize_request *r)
{
    static const struct {
        const char *key;
        enum tokenize_dialect dialect;
    } sources[] = {
        {"content", TOKENIZE_LLAMA_CPP},
        {"prompt", TOKENIZE_VLLM},
        {"messages", TOKENIZE_VLLM},
        {"inputs", TOKENIZE_TGI},
    };
    const char *found = NULL;
    for (size_t i = 0; i < sizeof sources / sizeof *sources; i++) {
        if (!json_get(p->body, sources[i].key)) continue;
        if (found)
            parse_fail(p, ST_INVALID, sources[i].key, "'%s' and '%s' exclude each other", found,
                       sources[i].key);
        found = sources[i].key;
        r->dialect = sources[i].dialect;
    }
    if (!found)
        parse_fail(p, ST_INVALID, "prompt", "give the text as 'content', 'prompt', 'inputs' or 'messages'");
    else if (!strcmp(found, "messages"))
        parse_messages(p, &r->messages, &r->message_count);
    else
        parse_string(p, found, &r->text);
}

bool tokenize_request_parse(const char *text, size_t size, struct tokenize_request *out,
                            struct api_error *err)
{
    struct tokenize_request r = {.parse_special = true, .add_generation_prompt = true};
    struct parse p = {.err = err};
    p.failed = !parse_body(text, size, &r.body, err);
    p.body = r.body;
    if (!p.failed) {
        parse_source(&p, &r);
        /* llama.cpp's default is to add none; a chat template writes its own. */
        r.add_special = r.dialect != TOKENIZE_LLAMA_CPP && r.text;
        parse_bool(&p, r.dialect == TOKENIZE_LLAMA_CPP ? "add_special" : "add_special_tokens",
                   &r.add_special);
        parse_bool(&p, "parse_special", &r.parse_special);
        parse_bool(&p, "add_generation_prompt", &r.add_generation_prompt);
        parse_bool(&p, r.dialect == TOKENIZE_LLAMA_CPP ? "with_pieces" : "return_token_strs", &r.with_pieces);
    }
    if (p.failed) {
        tokenize_request_release(&r);
        return false;
    }
    *out = r;
    return true;
}

void tokenize_request_release(struct tokenize_request *r)
{
    messages_free(r->messages, r->message_count);
    cJSON_Delete(r->body);
    *r = (struct tokenize_request){0};
}

/* llama.cpp's form of a piece: a string, or its bytes where it is not UTF-8 by itself. */
static void write_piece_or_bytes(struct strbuf *out, const struct token_piece *t)
{
    if (utf8_valid(t->piece, t->size)) {
        json_write_string(out, t->piece, t->size);
        return;
    }
    strbuf_putc(out, '[');
    for (size_t i = 0; i < t->size; i++)
        strbuf_printf(out, "%s%u", i ? ", " : "", (unsigned)(unsigned char)t->piece[i]);
    strbuf_putc(out, ']');
}

static void write_llama_cpp(struct strbuf *out, const struct token_piece *tokens, size_t count, bool pieces)
{
    strbuf_puts(out, "{\"tokens\": [");
    for (size_t i = 0; i < count; i++) {
        if (i) strbuf_puts(out, ", ");
        if (!pieces) {
            strbuf_printf(out, "%d", tokens[i].id);
            continue;
        }
        strbuf_printf(out, "{\"id\": %d, \"piece\": ", tokens[i].id);
        write_piece_or_bytes(out, &tokens[i]);
        strbuf_putc(out, '}');
    }
    strbuf_puts(out, "]}");
}

static void write_vllm(struct strbuf *out, const struct token_piece *tokens, size_t count, bool pieces,
                       int context_length)
{
    strbuf_printf(out, "{\"count\": %zu, \"max_model_len\": %d, \"tokens\": [", count, context_length);
    for (size_t i = 0; i < count; i++) strbuf_printf(out, "%s%d", i ? ", " : "", tokens[i].id);
    strbuf_puts(out, "], \"token_strs\": ");
    strbuf_puts(out, pieces ? "[" : "null");
    for (size_t i = 0; pieces && i < count; i++) {
        if (i) strbuf_puts(out, ", ");
        json_write_string(out, tokens[i].piece, tokens[i].size);
    }
    strbuf_puts(out, pieces ? "]}" : "}");
}

static size_t characters(const char *s, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += ((unsigned char)s[i] & 0xC0) != 0x80;
    return count;
}

/* Offsets count characters. */
static void write_tgi(struct strbuf *out, const struct token_piece *tokens, size_t count)
{
    size_t offset = 0;
    strbuf_putc(out, '[');
    for (size_t i = 0; i < count; i++) {
        size_t n = characters(tokens[i].piece, tokens[i].size);
        strbuf_printf(out, "%s{\"id\": %d, \"text\": ", i ? ", " : "", tokens[i].id);
        json_write_string(out, tokens[i].piece, tokens[i].size);
        strbuf_printf(out, ", \"start\": %zu, \"stop\": %zu}", offset, offset + n);
        offset += n;
    }
    strbuf_putc(out, ']');
}

void tokenize_write(struct strbuf *out, const struct tokenize_request *r, const struct token_piece *tokens,
                    size_t count, int context_length)
{
    switch (r->dialect) {
    case TOKENIZE_LLAMA_CPP: write_llama_cpp(out, tokens, count, r->with_pieces); break;
    case TOKENIZE_VLLM: write_vllm(out, tokens, count, r->with_pieces, context_length); break;
    case TOKENIZE_TGI: write_tgi(out, tokens, count); break;
    }
}

bool detokenize_request_parse(char *text, size_t size, struct token_rows *out, struct api_error *err)
{
    struct token_rows rows = {0};
    cJSON *body = NULL;
    struct parse p = {.err = err};
    enum status st = scan_take_tokens(text, size, "tokens", &rows);
    if (st == ST_NOMEM) parse_fail(&p, st, "tokens", "out of memory");
    p.failed = p.failed || !parse_body(text, size, &body, err);
    if (!p.failed && (st || rows.nested)) {
        /* An empty list is no text; the scanner leaves it to us. */
        const cJSON *v = json_get(body, "tokens");
        if (!cJSON_IsArray(v) || v->child)
            parse_fail(&p, ST_INVALID, "tokens",
                       "'tokens' must be an array of token ids, whole numbers from 0");
    }
    cJSON_Delete(body);
    if (p.failed) {
        token_rows_release(&rows);
        return false;
    }
    *out = rows;
    return true;
}

void detokenize_write(struct strbuf *out, const char *text, size_t size)
{
    strbuf_puts(out, "{\"prompt\": ");
    json_write_string(out, text, size);
    strbuf_puts(out, ", \"content\": ");
    json_write_string(out, text, size);
    strbuf_putc(out, '}');
}

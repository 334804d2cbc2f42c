#include "api/logprobs.h"

#include "base/json.h"
#include "base/memory.h"
#include "base/utf8.h"

#include <math.h>
#include <stdlib.h>

void logprob_list_release(struct logprob_list *l)
{
    free(l->entries);
    free(l->tops);
    *l = (struct logprob_list){0};
}

/* Room for `more` elements after count; false when memory is out. */
static bool grow(void **data, size_t *capacity, size_t count, size_t more, size_t element)
{
    if (count + more <= *capacity) return true;
    size_t wanted = (count + more) * 2;
    size_t bytes = size_mul(wanted, element);
    void *bigger = bytes == SIZE_MAX ? NULL : realloc(*data, bytes);
    if (!bigger) return false;
    *data = bigger;
    *capacity = wanted;
    return true;
}

struct logprob_alternative *logprob_list_push(struct logprob_list *l, int32_t token, float logprob, int rank,
                                              int top_count)
{
    void *entries = l->entries, *tops = l->tops;
    bool ok = grow(&entries, &l->capacity, l->count, 1, sizeof *l->entries) &&
              grow(&tops, &l->top_capacity, l->top_count, (size_t)top_count, sizeof *l->tops);
    l->entries = entries;
    l->tops = tops;
    if (!ok) {
        l->failed = true;
        return NULL;
    }
    l->entries[l->count++] = (struct logprob_entry){token, logprob, rank, top_count, l->top_count};
    l->top_count += (size_t)top_count;
    return top_count ? l->tops + l->top_count - top_count : NULL;
}

static const struct logprob_alternative *tops_of(const struct logprob_list *l, const struct logprob_entry *e)
{
    return e->top_count ? l->tops + e->top_first : NULL;
}

/* OpenAI's stand-in for minus infinity, which JSON cannot write. */
#define LOGPROB_LEAST (-9999.0)

static void write_logprob(struct strbuf *out, float logprob)
{
    json_write_f64(out, logprob < LOGPROB_LEAST ? LOGPROB_LEAST : logprob);
}

/* A token's text as a JSON string. Half a character is written as its bytes, as OpenAI does, so that
 * distinct tokens stay distinct keys. */
static void write_token(struct strbuf *out, const struct token_text *t, int32_t id)
{
    if (t->as_ids) {
        strbuf_printf(out, "\"token_id:%d\"", id);
        return;
    }
    size_t size;
    const char *piece = t->piece(t->ctx, id, &size);
    if (utf8_valid(piece, size)) {
        json_write_string(out, piece, size);
        return;
    }
    strbuf_puts(out, "\"bytes:");
    for (size_t i = 0; i < size; i++) strbuf_printf(out, "\\\\x%02x", (unsigned)(unsigned char)piece[i]);
    strbuf_putc(out, '"');
}

static void write_bytes(struct strbuf *out, const struct token_text *t, int32_t id)
{
    size_t size;
    const char *piece = t->piece(t->ctx, id, &size);
    strbuf_putc(out, '[');
    for (size_t i = 0; i < size; i++)
        strbuf_printf(out, "%s%u", i ? ", " : "", (unsigned)(unsigned char)piece[i]);
    strbuf_putc(out, ']');
}

size_t token_text_characters(const struct token_text *t, int32_t id)
{
    size_t size, count = 0;
    const char *piece = t->piece(t->ctx, id, &size);
    for (size_t i = 0; i < size; i++) count += ((unsigned char)piece[i] & 0xC0) != 0x80;
    return count;
}

/* {"token": logprob, ...}: the alternatives, and the chosen token where it is not among them. */
static void write_top_map(struct strbuf *out, const struct logprob_list *l, const struct logprob_entry *e,
                          const struct token_text *t)
{
    const struct logprob_alternative *top = tops_of(l, e);
    bool chosen = false;
    strbuf_putc(out, '{');
    for (int i = 0; i < e->top_count; i++) {
        if (i) strbuf_puts(out, ", ");
        write_token(out, t, top[i].token);
        strbuf_puts(out, ": ");
        write_logprob(out, top[i].logprob);
        chosen |= top[i].token == e->token;
    }
    if (!chosen && e->top_count) {
        strbuf_puts(out, ", ");
        write_token(out, t, e->token);
        strbuf_puts(out, ": ");
        write_logprob(out, e->logprob);
    }
    strbuf_putc(out, '}');
}

void logprobs_write_completion(struct strbuf *out, struct logprob_range r, const struct token_text *t,
                               size_t text_offset)
{
    const struct logprob_entry *e = r.list->entries + r.first;
    strbuf_puts(out, "{\"tokens\": [");
    for (size_t i = 0; i < r.count; i++) {
        if (i) strbuf_puts(out, ", ");
        write_token(out, t, e[i].token);
    }
    strbuf_puts(out, "], \"token_logprobs\": [");
    for (size_t i = 0; i < r.count; i++) {
        if (i) strbuf_puts(out, ", ");
        write_logprob(out, e[i].logprob);
    }
    strbuf_puts(out, "], \"top_logprobs\": [");
    for (size_t i = 0; i < r.count; i++) {
        if (i) strbuf_puts(out, ", ");
        if (isnan(e[i].logprob))
            strbuf_puts(out, "null");
        else
            write_top_map(out, r.list, &e[i], t);
    }
    strbuf_puts(out, "], \"text_offset\": [");
    for (size_t i = 0; i < r.count; i++) {
        strbuf_printf(out, "%s%zu", i ? ", " : "", text_offset);
        text_offset += token_text_characters(t, e[i].token);
    }
    strbuf_puts(out, "]}");
}

/* The three members that a token and an alternative share, without braces. */
static void write_chat_token(struct strbuf *out, const struct token_text *t, int32_t id, float logprob)
{
    strbuf_puts(out, "\"token\": ");
    write_token(out, t, id);
    strbuf_puts(out, ", \"logprob\": ");
    write_logprob(out, logprob);
    strbuf_puts(out, ", \"bytes\": ");
    write_bytes(out, t, id);
}

void logprobs_write_chat(struct strbuf *out, struct logprob_range r, const struct token_text *t)
{
    strbuf_puts(out, "{\"content\": [");
    for (size_t i = 0; i < r.count; i++) {
        const struct logprob_entry *e = &r.list->entries[r.first + i];
        const struct logprob_alternative *top = tops_of(r.list, e);
        strbuf_puts(out, i ? ", {" : "{");
        write_chat_token(out, t, e->token, e->logprob);
        strbuf_puts(out, ", \"top_logprobs\": [");
        for (int k = 0; k < e->top_count; k++) {
            strbuf_puts(out, k ? ", {" : "{");
            write_chat_token(out, t, top[k].token, top[k].logprob);
            strbuf_putc(out, '}');
        }
        strbuf_puts(out, "]}");
    }
    strbuf_puts(out, "], \"refusal\": null}");
}

static void write_prompt_token(struct strbuf *out, const struct token_text *t, int32_t id, float logprob,
                               int rank)
{
    strbuf_printf(out, "\"%d\": {\"logprob\": ", id);
    write_logprob(out, logprob);
    strbuf_printf(out, ", \"rank\": %d, \"decoded_token\": ", rank + 1); /* vLLM counts from 1 */
    write_token(out, t, id);
    strbuf_putc(out, '}');
}

void logprobs_write_prompt(struct strbuf *out, const struct logprob_list *l, const struct token_text *t)
{
    strbuf_puts(out, "[null");
    for (size_t i = 0; i < l->count; i++) {
        const struct logprob_entry *e = &l->entries[i];
        const struct logprob_alternative *top = tops_of(l, e);
        strbuf_puts(out, ", {");
        write_prompt_token(out, t, e->token, e->logprob, e->rank);
        for (int k = 0; k < e->top_count; k++) {
            if (top[k].token == e->token) continue;
            strbuf_puts(out, ", ");
            write_prompt_token(out, t, top[k].token, top[k].logprob, k);
        }
        strbuf_putc(out, '}');
    }
    strbuf_putc(out, ']');
}

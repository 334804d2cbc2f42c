#include "api/response.h"

#include "base/json.h"

#include <inttypes.h>
#include <string.h>

static void write_text_member(struct strbuf *out, const char *key, const char *value)
{
    strbuf_printf(out, "\"%s\": ", key);
    if (value)
        json_write_string(out, value, strlen(value));
    else
        strbuf_puts(out, "null");
}

static void write_ids(struct strbuf *out, const char *key, const int32_t *ids, size_t count)
{
    strbuf_printf(out, ", \"%s\": [", key);
    for (size_t i = 0; i < count; i++) strbuf_printf(out, "%s%d", i ? ", " : "", ids[i]);
    strbuf_putc(out, ']');
}

static void write_head(struct strbuf *out, const struct response_head *h, const char *object)
{
    strbuf_putc(out, '{');
    write_text_member(out, "id", h->id);
    strbuf_printf(out, ", \"object\": \"%s\", \"created\": %" PRId64 ", ", object, h->created);
    write_text_member(out, "model", h->model);
    strbuf_puts(out, ", ");
    write_text_member(out, "system_fingerprint", h->fingerprint);
}

static void write_usage(struct strbuf *out, struct response_usage u)
{
    strbuf_printf(out,
                  ", \"usage\": {\"prompt_tokens\": %d, \"completion_tokens\": %d, \"total_tokens\": %d, "
                  "\"prompt_tokens_details\": {\"cached_tokens\": %d}}",
                  u.prompt_tokens, u.output_tokens, u.prompt_tokens + u.output_tokens, u.cached_tokens);
}

static void write_logprobs(struct strbuf *out, const struct response_head *h, const struct response_choice *c)
{
    strbuf_puts(out, ", \"logprobs\": ");
    if (!c->logprobs.list)
        strbuf_puts(out, "null");
    else if (h->chat)
        logprobs_write_chat(out, c->logprobs, &h->text);
    else
        logprobs_write_completion(out, c->logprobs, &h->text, c->text_offset);
}

/* What follows the text: the same in all four shapes. */
static void write_choice_rest(struct strbuf *out, const struct response_head *h,
                              const struct response_choice *c)
{
    write_logprobs(out, h, c);
    strbuf_puts(out, ", ");
    write_text_member(out, "finish_reason", c->finish);
    if (c->with_ids) write_ids(out, "token_ids", c->token_ids, c->token_count);
    if (c->prompt_ids) write_ids(out, "prompt_token_ids", c->prompt_ids, c->prompt_count);
    if (c->prompt_logprobs) {
        strbuf_puts(out, ", \"prompt_logprobs\": ");
        logprobs_write_prompt(out, c->prompt_logprobs, &h->text);
    }
    strbuf_putc(out, '}');
}

static void write_choice(struct strbuf *out, const struct response_head *h, const struct response_choice *c)
{
    strbuf_printf(out, "{\"index\": %d, ", c->index);
    strbuf_puts(out, h->chat ? "\"message\": {\"role\": \"assistant\", \"content\": " : "\"text\": ");
    json_write_string(out, c->text, c->text_size);
    if (h->chat) strbuf_puts(out, ", \"refusal\": null}");
    write_choice_rest(out, h, c);
}

void response_write(struct strbuf *out, const struct response_head *h, const struct response_choice *choices,
                    size_t count, struct response_usage usage)
{
    write_head(out, h, h->chat ? "chat.completion" : "text_completion");
    strbuf_puts(out, ", \"choices\": [");
    for (size_t i = 0; i < count; i++) {
        if (i) strbuf_puts(out, ", ");
        write_choice(out, h, &choices[i]);
    }
    strbuf_putc(out, ']');
    write_usage(out, usage);
    strbuf_putc(out, '}');
}

/* {"role": "assistant", "content": ...} at first, then the text alone, at last nothing. */
static void write_delta(struct strbuf *out, const struct response_choice *c)
{
    strbuf_puts(out, "\"delta\": {");
    if (c->first) strbuf_puts(out, "\"role\": \"assistant\"");
    if (c->first || c->text_size) {
        strbuf_puts(out, c->first ? ", \"content\": " : "\"content\": ");
        json_write_string(out, c->text, c->text_size);
    }
    strbuf_putc(out, '}');
}

static void chunk_head(struct strbuf *out, const struct response_head *h)
{
    strbuf_puts(out, "data: ");
    write_head(out, h, h->chat ? "chat.completion.chunk" : "text_completion");
}

void sse_write_chunk(struct strbuf *out, const struct response_head *h, const struct response_choice *c,
                     bool with_usage)
{
    chunk_head(out, h);
    strbuf_printf(out, ", \"choices\": [{\"index\": %d, ", c->index);
    if (h->chat) {
        write_delta(out, c);
    } else {
        strbuf_puts(out, "\"text\": ");
        json_write_string(out, c->text, c->text_size);
    }
    write_choice_rest(out, h, c);
    strbuf_putc(out, ']');
    if (with_usage) strbuf_puts(out, ", \"usage\": null");
    strbuf_puts(out, "}\n\n");
}

void sse_write_usage(struct strbuf *out, const struct response_head *h, struct response_usage usage)
{
    chunk_head(out, h);
    strbuf_puts(out, ", \"choices\": []");
    write_usage(out, usage);
    strbuf_puts(out, "}\n\n");
}

void sse_write_error(struct strbuf *out, const struct api_error *err)
{
    strbuf_puts(out, "data: ");
    api_error_write(err, out);
    strbuf_puts(out, "\n\n");
}

void sse_write_done(struct strbuf *out) { strbuf_puts(out, "data: [DONE]\n\n"); }

void sse_write_ping(struct strbuf *out) { strbuf_puts(out, ": ping\n\n"); }

void list_begin(struct strbuf *out) { strbuf_puts(out, "{\"object\": \"list\", \"data\": ["); }

void list_separate(struct strbuf *out, bool first)
{
    if (!first) strbuf_puts(out, ", ");
}

void list_end(struct strbuf *out) { strbuf_puts(out, "]}"); }

void model_write(struct strbuf *out, const struct model_entry *m)
{
    strbuf_putc(out, '{');
    write_text_member(out, "id", m->id);
    strbuf_printf(out, ", \"object\": \"model\", \"created\": %" PRId64 ", \"owned_by\": \"medley\", ",
                  m->created);
    write_text_member(out, "root", m->id);
    strbuf_puts(out, ", ");
    write_text_member(out, "parent", m->parent);
    strbuf_printf(out, ", \"max_model_len\": %d}", m->context_length);
}

void models_write(struct strbuf *out, const struct model_entry *models, size_t count)
{
    list_begin(out);
    for (size_t i = 0; i < count; i++) {
        list_separate(out, i == 0);
        model_write(out, &models[i]);
    }
    list_end(out);
}

static void write_version(struct strbuf *out, const struct adapter_version_entry *v)
{
    strbuf_putc(out, '{');
    write_text_member(out, "version", v->version);
    strbuf_puts(out, ", ");
    write_text_member(out, "hash", v->hash);
    strbuf_puts(out, ", ");
    write_text_member(out, "source", v->source);
    strbuf_printf(out,
                  ", \"created\": %" PRId64 ", \"published\": %" PRId64
                  ", \"bytes\": %zu, \"current\": %s, \"resident\": %s, \"leases\": %d}",
                  v->created, v->published, v->bytes, v->current ? "true" : "false",
                  v->resident ? "true" : "false", v->leases);
}

void adapter_write(struct strbuf *out, const struct adapter_entry *a)
{
    strbuf_putc(out, '{');
    write_text_member(out, "name", a->name);
    strbuf_printf(out, ", \"object\": \"adapter\", \"id\": %" PRId64 ", ", a->number);
    write_text_member(out, "version", a->version_count ? a->versions[0].version : NULL);
    strbuf_puts(out, ", ");
    write_text_member(out, "description", a->description);
    strbuf_printf(out, ", \"pinned\": %s, \"keep_versions\": ", a->pinned ? "true" : "false");
    if (a->keep_versions)
        strbuf_printf(out, "%d, ", a->keep_versions);
    else
        strbuf_puts(out, "null, ");
    write_text_member(out, "format", a->format);
    strbuf_puts(out, ", ");
    write_text_member(out, "targets", a->targets);
    strbuf_printf(
        out,
        ", \"rank\": %d, \"experts\": %d, \"top_k\": %d, \"sites\": %d, \"parameters\": %zu, \"versions\": [",
        a->rank, a->experts, a->top_k, a->sites, a->parameters);
    for (size_t i = 0; i < a->version_count; i++) {
        if (i) strbuf_puts(out, ", ");
        write_version(out, &a->versions[i]);
    }
    strbuf_puts(out, "]}");
}

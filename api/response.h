/* The bodies that answer: completions and chats whole or in SSE chunks, lists of models and adapters. */
#ifndef API_RESPONSE_H
#define API_RESPONSE_H

#include "api/error.h"
#include "api/logprobs.h"
#include "base/strbuf.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What all bodies of one request share. */
struct response_head {
    const char *id;          /* "cmpl-..." or "chatcmpl-..." */
    int64_t created;         /* unix seconds */
    const char *model;       /* as the client may name it again */
    const char *fingerprint; /* of base and set */
    bool chat;
    struct token_text text; /* how logprobs name tokens */
};

struct response_usage {
    int prompt_tokens, output_tokens;
    int cached_tokens; /* of the prompt */
};

/* One choice, whole or the news of one chunk. */
struct response_choice {
    int index;
    const char *text; /* text_size bytes of UTF-8 */
    size_t text_size;
    const char *finish;            /* "stop", "length", ...; NULL while it runs */
    struct logprob_range logprobs; /* list NULL: none */
    size_t text_offset;       /* completions: where the first of logprobs stands in the text, in characters */
    const int32_t *token_ids; /* [token_count], written where with_ids */
    size_t token_count;
    const int32_t *prompt_ids; /* [prompt_count]; NULL: not written */
    size_t prompt_count;
    const struct logprob_list *prompt_logprobs; /* NULL: not written */
    bool with_ids;
    bool first; /* chat chunks: says the role */
};

/* A whole body. */
void response_write(struct strbuf *out, const struct response_head *h, const struct response_choice *choices,
                    size_t count, struct response_usage usage);

/* SSE events, each "data: {...}\n\n". with_usage: write "usage": null, since a usage chunk will follow. */
void sse_write_chunk(struct strbuf *out, const struct response_head *h, const struct response_choice *choice,
                     bool with_usage);
void sse_write_usage(struct strbuf *out, const struct response_head *h, struct response_usage usage);
void sse_write_error(struct strbuf *out, const struct api_error *err);
void sse_write_done(struct strbuf *out);
void sse_write_ping(struct strbuf *out);

/* One entry of GET /v1/models. */
struct model_entry {
    const char *id, *parent; /* parent NULL for the base */
    int64_t created;
    int context_length;
};
void model_write(struct strbuf *out, const struct model_entry *m);
void models_write(struct strbuf *out, const struct model_entry *models, size_t count);

struct adapter_version_entry {
    const char *version, *hash, *source;
    int64_t created, published;
    size_t bytes;
    bool current, resident;
    int leases;
};
struct adapter_entry {
    const char *name, *format, *targets, *description;
    int64_t number;
    bool pinned;
    int keep_versions; /* 0: no number of its own, written as null */
    int rank, experts, top_k, sites;
    size_t parameters;
    const struct adapter_version_entry *versions; /* the current one first */
    size_t version_count;
};
void adapter_write(struct strbuf *out, const struct adapter_entry *a);
/* {"object": "list", "data": [..]}: begin, then for each a separator and adapter_write, then end. */
void list_begin(struct strbuf *out);
void list_separate(struct strbuf *out, bool first);
void list_end(struct strbuf *out);

#endif

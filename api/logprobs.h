/* Log-probabilities of tokens, kept compactly and written in the shapes of three dialects. */
#ifndef API_LOGPROBS_H
#define API_LOGPROBS_H

#include "base/status.h"
#include "base/strbuf.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct logprob_alternative {
    int32_t token;
    float logprob;
};

/* One token that was chosen (or read), and what might have stood in its place. */
struct logprob_entry {
    int32_t token;
    float logprob;
    int rank; /* 0: the most likely */
    int top_count;
    size_t top_first; /* index into the list's alternatives */
};

struct logprob_list {
    struct logprob_entry *entries; /* owned */
    size_t count, capacity;
    struct logprob_alternative *tops; /* owned; most likely first within an entry */
    size_t top_count, top_capacity;
    bool failed; /* out of memory: sticky */
};
void logprob_list_release(struct logprob_list *l);
/* Adds an entry with room for top_count alternatives, which the caller fills: NULL if top_count is 0 or
 * memory is out. */
struct logprob_alternative *logprob_list_push(struct logprob_list *l, int32_t token, float logprob, int rank,
                                              int top_count);

/* How token ids become text: the bytes of one token, borrowed for long. */
struct token_text {
    const char *(*piece)(const void *ctx, int32_t id, size_t *size_out);
    const void *ctx;
    bool as_ids; /* write "token_id:N" instead */
};

/* The part [first, first + count) of a list. */
struct logprob_range {
    const struct logprob_list *list;
    size_t first, count;
};

/* OpenAI's two shapes. A NaN logprob stands for "none": the first token of a text. text_offset, in
 * characters, is where the first token stands in the whole text. */
void logprobs_write_completion(struct strbuf *out, struct logprob_range r, const struct token_text *t,
                               size_t text_offset);
void logprobs_write_chat(struct strbuf *out, struct logprob_range r, const struct token_text *t);
/* vLLM's prompt_logprobs: null for the first token, then {"id": {logprob, rank, decoded_token}} for each. */
void logprobs_write_prompt(struct strbuf *out, const struct logprob_list *l, const struct token_text *t);

/* Characters of a token's text, counted so that the parts of a split character add up to one. */
size_t token_text_characters(const struct token_text *t, int32_t id);

#endif

/* The bodies of /v1/completions and /v1/chat/completions as plain structs.
 *
 * Every parameter is checked for kind and range here, with a message that names it. A parameter that is
 * unknown and would change the answer's meaning is refused; an unknown harmless one is ignored. Names of
 * models and adapters are read, not resolved. */
#ifndef API_COMPLETION_H
#define API_COMPLETION_H

#include "api/error.h"
#include "api/scan.h"
#include "base/json.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define COMPLETION_ADAPTERS_MAX 8
#define COMPLETION_PROMPTS_MAX  1024
#define COMPLETION_CHOICES_MAX  128 /* n and best_of */
#define COMPLETION_STOPS_MAX    64
#define COMPLETION_MESSAGES_MAX 4096
#define COMPLETION_BIAS_MAX     4096
#define COMPLETION_LOGPROBS_MAX 20

struct message {
    const char *role; /* system, user or assistant */
    char *content;    /* owned */
};

struct adapter_choice {
    char *name;    /* owned; NULL: by its number */
    int64_t number;
    char *version; /* owned; NULL: the current one */
    float weight;
};

struct token_bias {
    int32_t token;
    float bias;
};

struct completion_request {
    bool chat;
    cJSON *body; /* owned; strings below that are not marked owned live in it */

    /* Completions: texts or rows of tokens, exactly one of the two. */
    const char **texts; /* [text_count], owned array */
    size_t text_count;
    struct token_rows tokens;
    /* Chat. */
    struct message *messages; /* owned */
    size_t message_count;
    const char *chat_template; /* NULL: the model's own */
    bool add_generation_prompt, continue_final_message;

    const char *cache_salt; /* NULL: none */
    const char *model; /* as written; NULL if absent */
    struct adapter_choice adapters[COMPLETION_ADAPTERS_MAX];
    size_t adapter_count;
    const char *adapter_param; /* the parameter that named them, for errors */

    int max_tokens; /* -1: as many as the context holds */
    int min_tokens, n, best_of, top_k, priority;
    int logprobs, prompt_logprobs; /* alternatives, or -1: none at all */
    double temperature, top_p, min_p;
    double presence_penalty, frequency_penalty, repetition_penalty;
    bool has_seed;
    uint64_t seed;
    const char **stop; /* owned array */
    size_t stop_count;
    int32_t *stop_token_ids; /* owned */
    size_t stop_token_count;
    struct token_bias *bias; /* owned */
    size_t bias_count;
    bool include_stop, ignore_eos, echo, stream, include_usage;
    bool add_special_tokens, skip_special_tokens;
    bool return_token_ids, tokens_as_ids;
};

/* Reads a body. `text` is the caller's and is written to (see scan.h); base_name is the base model's name,
 * so that `model` may name it, or an adapter after "base:". On success the caller owes
 * completion_request_release. On failure err is filled and *out untouched. */
NODISCARD bool completion_request_parse(char *text, size_t size, bool chat, const char *base_name,
                                        struct completion_request *out, struct api_error *err);
void completion_request_release(struct completion_request *r);

#endif

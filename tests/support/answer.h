/* One request to an engine and all that came back, checked for the order events must come in. */
#ifndef TESTS_SUPPORT_ANSWER_H
#define TESTS_SUPPORT_ANSWER_H

#include "base/strbuf.h"
#include "engine/engine.h"

#include <pthread.h>
#include <stdbool.h>

#define ANSWER_TOKENS_MAX 512

struct answer {
    struct engine *engine;
    uint64_t id;
    int cancel_after; /* cancels from the callback after that many tokens; 0: never */

    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool admitted, prompt_scored, done;
    int token_count;
    int32_t token[ANSWER_TOKENS_MAX];
    bool scored;
    struct token_logprob logprob[ANSWER_TOKENS_MAX];
    size_t prompt_logprob_count;
    struct token_logprob prompt_logprob[ANSWER_TOKENS_MAX];
    struct strbuf text;
    enum finish_reason finish;
    char stop_string[64];
    int32_t stop_token;
    struct error error;
    int prompt_tokens, cached_tokens, output_tokens;
};

/* Temperature 0, no limits but max_tokens, nothing reported. */
struct sampling sampling_greedy(int max_tokens);

/* A new answer, waiting for a request; answer_free after it is done, or was refused. */
struct answer *answer_new(struct engine *e);
void answer_free(struct answer *a);

/* Submits r, whose callback it sets. */
NODISCARD enum status answer_ask(struct answer *a, struct engine_request *r, struct error *err);
void answer_wait_admitted(struct answer *a);
void answer_wait(struct answer *a);
/* Both: a request that must be accepted, run to its end. */
struct answer *answer_of(struct engine *e, struct engine_request *r);

/* Whether tokens, scores, text and ending are the same, bit for bit. */
bool answer_equal(const struct answer *a, const struct answer *b);

#endif

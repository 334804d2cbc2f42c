/* One request on its way through the engine: a checked copy of it, and what becomes of it.
 *
 * Made by engine_submit on the caller's thread, then owned by the engine thread. */
#ifndef ENGINE_SEQUENCE_H
#define ENGINE_SEQUENCE_H

#include "base/status.h"
#include "engine/engine.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "engine/stream.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* What requests are checked against. */
struct sequence_rules {
    const struct tokenizer *tokenizer;
    const struct model_shape *shape;
    int lr_width;
    const int32_t *end_tokens; /* [end_count] */
    size_t end_count;
};

struct sequence {
    struct sched_seq sched; /* first, so that one is the other */
    uint64_t id;
    struct sequence *prev, *next; /* the engine's list of live sequences */
    struct sequence *next_incoming;
    atomic_bool cancelled;

    int32_t *prompt;          /* [sched.prompt_count], owned */
    struct sampling sampling; /* its pointers are not used */
    int32_t *ending;          /* [ending_count], owned: tokens that end the text */
    size_t ending_count;
    struct lr_member members[ENGINE_SET_MAX];
    int member_count;
    void (*on_event)(void *ctx, const struct engine_event *event);
    void *ctx;

    struct sampler *sampler;
    struct stream *stream;
    struct token_logprob *prompt_logprobs; /* [prompt_count - 1], owned; NULL unless asked for */
    int output_count;
    /* Output tokens by position, as far as their pages are not published: the page being filled, and
     * the newest token, which is not in the cache yet. */
    int32_t output[2 * KV_PAGE_TOKENS];

    bool ended; /* the fields below are set */
    enum finish_reason finish;
    int32_t stop_token;
    struct error error;
};

/* ST_INVALID, ST_REJECTED (see engine_submit), ST_NOMEM. */
NODISCARD enum status sequence_new(const struct sequence_rules *rules,
                                   const struct engine_request *r, struct sequence **out,
                                   struct error *err);
void sequence_free(struct sequence *q);

/* The token at a position of the prompt, of a page that is not published, or the next one. */
int32_t sequence_token(const struct sequence *q, int position);
/* Whether the logits of the row at a position are needed. */
bool sequence_wants_logits(const struct sequence *q, int position);

/* What the logits of a position say: the next token, or that a prompt token was scored. */
struct verdict {
    enum status status; /* why not, in error */
    struct error error;
    int32_t token;
    struct token_logprob logprob; /* where asked for */
};

/* Scores a prompt token, or chooses the next token. Different positions, of one sequence too, may be
 * judged by several threads at once, each with a scratch of its own. */
void sequence_judge(struct sequence *q, struct sampler_scratch *scratch, int position,
                    const float *logits, struct verdict *out);
/* Takes the verdicts in order of positions: sends what they mean. Sets `ended` where a token was the
 * last one. Ignored once ended. */
void sequence_take(struct sequence *q, int position, const struct verdict *v);

void sequence_admitted(struct sequence *q);
/* Ends it before its time. error NULL but for FINISH_ERROR. */
void sequence_end(struct sequence *q, enum finish_reason finish, const struct error *error);
/* Sends EVENT_DONE of an ended sequence. */
void sequence_done(struct sequence *q);

#endif

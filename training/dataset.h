/* Examples to train on: JSON lines to token sequences with a weight for each token.
 *
 * Each line is one JSON object of one of these forms ("id" and "metadata" may stand in any, and mean
 * nothing):
 *
 *   {"prompt", "completion"}   the completion and an end token weigh 1; the prompt, encoded as
 * /v1/completions does, 0
 *   {"messages": [...]}        through the model's chat template; what the assistant writes weighs 1, its end
 * token included. "weight": 0 in an assistant's message takes it out
 *   {"text"}                   all of it and an end token weigh 1
 *   {"tokens", "weights"?}     as they are; weights 1 by default. Nothing is added. With the losses
 *                              importance_sampling and ppo also "logprobs" and "advantages", a number per
 * token
 *   {"prompt" | "messages", "chosen", "rejected"}   for the loss dpo: two completions of a prompt
 *   {"input": {"messages"}, "preferred_output": [message], "non_preferred_output": [message]}   the same, as OpenAI
 *                              writes it
 *
 * What is trained and what is served are tokenized alike: a prompt is encoded alone, what follows it alone.
 * The first token of a sequence has nothing before it, so its weight counts for nothing.
 *
 * A file is read line by line. Every refusal names the source and the line, and says what to do. Nothing is
 * ever cut, dropped or guessed. */
#ifndef TRAINING_DATASET_H
#define TRAINING_DATASET_H

#include "base/status.h"
#include "engine/chat.h"
#include "engine/tokenizer.h"
#include "training/settings.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DATASET_LINE_BYTES_MAX (16 << 20)        /* of one line */
#define DATASET_TOKENS_MAX     ((size_t)1 << 28) /* of all examples together */
#define DATASET_EXAMPLES_MAX   ((size_t)1 << 24)
#define DATASET_WEIGHT_MAX     1e4

struct dataset_rules {
    const struct tokenizer *tokenizer;
    const struct chat_template
        *chat; /* NULL: messages are refused, with chat_problem (may be NULL) as the reason */
    const char *chat_problem;
    int context_length;
    int64_t batch_tokens; /* a step must hold every example whole */
    size_t tokens_max, examples_max; /* of all together; 0: the ceilings above, which they may only lower */
    enum train_loss loss;
    const char *name; /* of the source, in messages: "examples" */
    /* done in 0..1; answering false ends the reading with ST_CANCELLED. May be NULL. */
    bool (*on_progress)(void *ctx, double done);
    void *progress_ctx;
};

/* Equal weights of consecutive tokens. */
struct weight_run {
    int count;
    float weight;
};

struct dataset_sequence {
    size_t first; /* of dataset.token */
    int count;    /* of tokens, at least 2 */
    size_t first_run;
    int run_count;
    size_t first_old; /* of dataset.old; with importance_sampling and ppo only */
};

struct dataset_example {
    size_t line;           /* 1-based */
    size_t first_sequence; /* one, or with dpo two: chosen, rejected */
    int rows;              /* tokens of all its sequences */
};

/* What each token was sampled with. */
struct old_token {
    float logprob, advantage;
};

/* Immutable once read. */
struct dataset {
    int sequences_each; /* of an example: 1, or 2 with dpo */
    size_t token_count, token_capacity;
    int32_t *token;
    size_t run_count, run_capacity;
    struct weight_run *run;
    size_t old_count, old_capacity;
    struct old_token *old;
    size_t sequence_count, sequence_capacity;
    struct dataset_sequence *sequence;
    size_t example_count, example_capacity;
    struct dataset_example *example;
    int rows_max, seq_rows_max; /* of any example, of any sequence */
};

/* Of an open file, from its beginning, or of bytes. Blank lines may stand at the end. ST_INVALID,
 * ST_TOO_LARGE, ST_CANCELLED, ST_IO, ST_NOMEM. */
NODISCARD enum status dataset_read_file(const struct dataset_rules *r, int fd, struct dataset **out,
                                        struct error *err);
NODISCARD enum status dataset_read_bytes(const struct dataset_rules *r, const char *bytes, size_t size,
                                         struct dataset **out, struct error *err);
void dataset_free(struct dataset *d);

/* A sequence's weights: out [count], of each token. */
void dataset_weights(const struct dataset *d, const struct dataset_sequence *s, float *out);

#endif

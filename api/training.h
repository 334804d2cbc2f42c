/* The JSON bodies of calls about training as plain structs.
 *
 * What a setting of a training run is (its name, kind, range) is the trainer's to know: parsers are told by
 * `is_setting` which members are, leave those in `settings`, and refuse whatever nobody knows. */
#ifndef API_TRAINING_H
#define API_TRAINING_H

#include "api/error.h"
#include "base/json.h"
#include "base/strbuf.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* POST /v1/adapters: a new adapter that nothing has trained. */
#define FRESH_TARGETS_MAX 16
struct fresh_request {
    cJSON *body;                    /* owned; strings live in it */
    const char *name, *description; /* description NULL: none */
    int rank, experts, top_k;
    double alpha;
    const char *gate; /* "topk", "topk_raw" or "dense" */
    bool rslora;
    const char **targets; /* owned; count 0: all */
    size_t target_count;
    uint64_t seed;
};
struct fresh_limits {
    int rank_max, experts_max;
};
/* On success the caller owes fresh_request_release; likewise below. On failure err is filled and *out
 * untouched. */
NODISCARD bool fresh_request_parse(const char *text, size_t size, const struct fresh_limits *limits,
                                   struct fresh_request *out, struct api_error *err);
void fresh_request_release(struct fresh_request *r);

enum train_body_kind {
    TRAIN_BODY_JOB,     /* POST /v1/adapters/{name}/train */
    TRAIN_BODY_FORWARD, /* .../forward_backward */
    TRAIN_BODY_OPTIM,   /* .../optim_step */
    TRAIN_BODY_PUBLISH, /* .../publish */
};

#define TRAIN_BODY_TEXT_MAX 256 /* bytes of an id, a version or a key */

struct train_body {
    cJSON *body;            /* owned; settings are its members, and strings below live in it */
    struct strbuf examples; /* owned: JSON lines; as written, for the trainer to read */
    bool has_examples;
    const char *training_file, *validation_file; /* NULL where not given, likewise below */
    const char *version, *expected_version, *idempotency_key, *job;
    bool wait, stream, forward_only;
};
/* text is the caller's and is written to, as scan.h says. */
NODISCARD bool train_body_parse(enum train_body_kind kind, char *text, size_t size,
                                bool (*is_setting)(const char *name), struct train_body *out,
                                struct api_error *err);
void train_body_release(struct train_body *b);

/* OpenAI's POST /v1/fine_tuning/jobs. */
struct fine_tuning_limits {
    bool (*is_setting)(const char *name);
    double learning_rate;      /* what a multiplier multiplies */
    double tokens_per_example; /* what a batch_size counts for in batch_tokens */
};
struct fine_tuning_request {
    cJSON *body;     /* owned; strings live in it */
    cJSON *settings; /* owned: an object of settings */
    const char *model, *training_file, *validation_file, *suffix;
    struct strbuf kept; /* owned: what the client will want to read again, a JSON object: hyperparameters as
                           written, metadata */
};
NODISCARD bool fine_tuning_parse(const char *text, size_t size, const struct fine_tuning_limits *limits,
                                 struct fine_tuning_request *out, struct api_error *err);
void fine_tuning_release(struct fine_tuning_request *r);

#endif

/* Teacher forcing: prompts through the model's forward pass, all logits seen.
 *
 * For tests and measurements of the numbers themselves, below the engine and its sampling. */
#ifndef TESTS_SUPPORT_TEACHER_H
#define TESTS_SUPPORT_TEACHER_H

#include "adapters/reader.h"
#include "base/status.h"
#include "engine/forward.h"
#include "engine/model.h"

struct teacher {
    struct model *model;
    struct forward *forward;
    int tokens_max;
    int32_t *pages, *rows, *tokens; /* [of tokens_max] */
};

/* tokens_max: of all prompts of a run together, each rounded up to whole KV pages. kv_type:
 * DTYPE_F32 for comparisons with fp32 implementations. */
NODISCARD enum status teacher_open(const char *model_path, struct device *device, int tokens_max,
                                   enum dtype kv_type, struct teacher *out, struct error *err);
/* The same of a model opened in another way. */
NODISCARD enum status teacher_open_as(const struct model_config *model, int tokens_max, enum dtype kv_type,
                                      struct teacher *out, struct error *err);
void teacher_close(struct teacher *t);

/* What adapters of a model must fit. */
struct adapter_base adapter_base_of(const struct model *m);

/* Runs tokens [count] from position 0 in chunks of at most `chunk` rows, all of them with the given
 * set (member_count 0: the bare base), and fills logits (count, vocab). */
NODISCARD enum status teacher_run(struct teacher *t, const int32_t *tokens, int count, int chunk,
                                  const struct lr_member *members, int member_count, float *logits);

#define LESSONS_MAX 64

struct lesson {
    const int32_t *tokens;
    int count;
    int first; /* logits before this position are not asked for */
    const struct lr_member *members;
    int member_count; /* 0: the bare base */
};

/* Called for each lesson's position from `first` on, in order, with logits [vocab]. */
typedef void (*teacher_sink)(void *ctx, int lesson, int position, const float *logits);

/* As teacher_run for many prompts at once: each step is a batch of up to `chunk` rows of each. */
NODISCARD enum status teacher_run_all(struct teacher *t, const struct lesson *lessons, int count, int chunk,
                                      teacher_sink sink, void *ctx);

#endif

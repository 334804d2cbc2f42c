/* What a training run can be told, from one table: names, ranges and defaults of requests, the command line
 * and what is kept on disk. */
#ifndef TRAINING_SETTINGS_H
#define TRAINING_SETTINGS_H

#include "base/json.h"
#include "base/status.h"
#include "base/strbuf.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum train_schedule { SCHEDULE_CONSTANT, SCHEDULE_COSINE, SCHEDULE_LINEAR };
enum train_publish { PUBLISH_ON_SUCCESS, PUBLISH_MANUAL, PUBLISH_ON_IMPROVEMENT };
/* What an example's tokens are trained by; the last two need old log-probabilities and advantages of each
 * token, which only step-wise calls have. */
enum train_loss { LOSS_CROSS_ENTROPY, LOSS_DPO, LOSS_IMPORTANCE_SAMPLING, LOSS_PPO };
/* Of step-wise losses: over the weights of a call, or as they stand. */
enum train_reduction { REDUCTION_MEAN, REDUCTION_SUM };

struct train_settings {
    int64_t steps;        /* 0: as many as `epochs` take */
    double epochs;        /* passes over the examples, where steps is 0 */
    int64_t batch_tokens; /* rows of a step at most: whole sequences */
    double learning_rate;
    int schedule; /* enum train_schedule: after the warm-up; towards 0, which would be reached a step after
                     the last */
    int64_t warmup_steps;
    double balance, contrast, contrast_temperature;
    int64_t contrast_pairs;
    double weight_decay, beta1, beta2, eps;
    double clip;     /* largest norm of the gradient; 0: any */
    uint64_t seed;   /* at most TRAIN_SEED_MAX, which JSON's numbers hold exactly */
    double held_out; /* share of the examples that is not trained on, but judges */
    int publish;     /* enum train_publish */
    int loss;        /* enum train_loss */
    double dpo_beta;
    double clip_low, clip_high; /* of PPO's ratio: 1 - clip_low .. 1 + clip_high */
    int reduction;              /* enum train_reduction */
    int64_t evaluate_steps;   /* held-out examples are looked at after so many steps, and at the end; 0: there
                                 only */
    int64_t checkpoint_steps; /* 0: by time alone */
    double checkpoint_seconds; /* 0: by steps alone */
};

#define TRAIN_SEED_MAX ((int64_t)1 << 53)

enum train_setting_kind { SETTING_INT, SETTING_SEED, SETTING_REAL, SETTING_CHOICE };

struct train_setting {
    const char *name, *help;
#define TRAIN_SEED_MAX ((int64_t)1 << 53)

    enum train_setting_kind kind;
    size_t offset; /* into struct train_settings: int64_t, uint64_t, double or int */
    double min, max, otherwise;
    const char *choices; /* "constant|cosine|linear": an enum's names in order */
};
extern const struct train_setting train_setting_table[];
extern const size_t train_setting_count; /* at most TRAIN_SETTINGS_MAX */
#define TRAIN_SETTINGS_MAX 48

void train_settings_default(struct train_settings *out);
/* NULL: no setting has that name. */
const struct train_setting *train_setting_find(const char *name);
/* Sets those members of object (NULL: none) that are settings; others are not looked at (train_setting_find
 * tells which). ST_INVALID names the setting and its range. */
NODISCARD enum status train_settings_read(const cJSON *object, struct train_settings *s, struct error *err);
/* One setting from text, as on a command line. */
NODISCARD enum status train_settings_set(struct train_settings *s, const char *name, const char *text,
                                         struct error *err);
/* Appends all of them as a JSON object, which reads back equal. */
void train_settings_write(const struct train_settings *s, struct strbuf *out);
/* Appends one of them: "name":value. */
void train_setting_write(const struct train_settings *s, const struct train_setting *t, struct strbuf *out);
/* Appends the name of an enum's value. */
void train_choice_write(const struct train_setting *t, int value, struct strbuf *out);

/* The learning rate of step 1.. of `steps`. */
double train_rate(const struct train_settings *s, int64_t step, int64_t steps);

#endif

/* A training run on the terminal. */
#ifndef SERVER_TRAIN_SHOW_H
#define SERVER_TRAIN_SHOW_H

#include "server/config.h"

#include <stdint.h>

struct train_point {
    int64_t step, steps;
    double loss, balance, contrast; /* NAN: not known */
    double tokens, seconds;         /* of the step */
};

struct train_show {
    double shown;                     /* the clock when a line was written */
    double step_seconds, step_tokens; /* of late */
};

/* A bar with the parts of the loss, tokens a second and the time that is left; where there is no terminal, a
 * line every ten seconds. The last step is always shown. */
void train_show(struct train_show *s, const struct train_point *p);

/* The same of a step's JSON object (trainer.h: trainer_step_write). */
void train_show_json(struct train_show *s, const cJSON *step);

/* The settings on the command line over the defaults. given (may be NULL): appends those alone, as members of
 * a JSON object each after a comma. */
NODISCARD enum status train_settings_given(const struct config *c, struct train_settings *out,
                                           struct strbuf *given, struct error *err);

#endif

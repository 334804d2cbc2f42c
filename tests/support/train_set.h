/* A small model, a fresh adapter and examples to train it on. */
#ifndef TESTS_SUPPORT_TRAIN_SET_H
#define TESTS_SUPPORT_TRAIN_SET_H

#include "tests/support/rig.h"
#include "training/trainer.h"

/* 24 examples of 6 tokens, each a number and what follows from it. */
#define TRAIN_SET_EXAMPLES 24
void train_set_text(struct strbuf *out);
/* The same as pairs for dpo. */
void train_set_pairs(struct strbuf *out);

struct train_set {
    struct rig rig;
    struct adapter_base base;
    struct transposed *transposed;
    struct adapter_bundle *bundle;
    struct dataset *examples, *pairs;
};
/* models/<model>; experts 1: plain LoRA. */
void train_set_open(struct train_set *s, const char *model, int experts, float alpha);
void train_set_close(struct train_set *s);

/* What adapters of an engine's model must fit. */
void train_set_base(const struct engine *e, struct adapter_base *out);

/* Settings for runs of seconds: 8 steps of 64 tokens, no checkpoints of their own. */
struct train_settings train_set_settings(void);
struct trainer_config train_set_config(const struct train_set *s, const struct train_settings *settings);
/* The values of a trainer; malloc'd, the caller frees. */
float *train_set_values(struct trainer *t, const struct train_set *s, size_t *count_out);

#endif

/* The cases and curves of tests/fixtures/training: what training must compute, by PyTorch. */
#ifndef TESTS_SUPPORT_TRAIN_CASE_H
#define TESTS_SUPPORT_TRAIN_CASE_H

#include "base/file.h"
#include "base/safetensors.h"
#include "tests/support/rig.h"
#include "training/pass.h"

#define TRAIN_ROWS_MAX    64
/* For the insides of some layers of these models, not of all: both ways are taken. */
#define TRAIN_KEEP_BYTES  400000
#define TRAIN_SEQS_MAX    8
#define TRAIN_BATCHES_MAX 4
#define TRAIN_STEPS_MAX   64
#define TRAIN_CASES_MAX   16

struct case_batch {
    int rows, seq_count;
    int first_row[TRAIN_SEQS_MAX + 1];
    int32_t token[TRAIN_ROWS_MAX], target[TRAIN_ROWS_MAX];
    float weight[TRAIN_ROWS_MAX];
};
struct pass_batch pass_batch_of(const struct case_batch *b);

/* A case has one batch and one step of losses, a curve several. */
struct train_case {
    char name[32], model[64], adapter[32];
    struct case_batch batch[TRAIN_BATCHES_MAX];
    int batch_count;
    struct pass_loss loss;
    bool auxiliary; /* whether it has balance and contrast at all */
    double rate, clip;
    int warmup;
    int step_count;
    double ce[TRAIN_STEPS_MAX], balance[TRAIN_STEPS_MAX], contrast[TRAIN_STEPS_MAX], norm[TRAIN_STEPS_MAX];
    double similarity, cohesion; /* of a case */
};

/* Reads training/<file>: "cases" or "curves". Fails the running test where it cannot. */
int train_cases_read(const char *file, struct train_case out[TRAIN_CASES_MAX]);

/* A case's model and adapter, ready for passes. */
struct train_rig {
    struct rig rig;
    struct file_map config, tensors;
    struct adapter_bundle *bundle;
    struct transposed *transposed;
    struct params *params;
    struct pass *pass;
};
struct train_rig train_rig_open(const struct train_case *c, enum cpu_level level, int threads);
void train_rig_close(struct train_rig *r);
/* A vector of the parameters' size from the device; malloc'd, the caller frees. */
float *train_rig_read(const struct train_rig *r, const float *vector);
void train_rig_write(const struct train_rig *r, float *vector, const float *from);

#endif

/* The whole loss of training in double precision, forward only, written from its definition.
 *
 * One row, one head, one expert at a time, with nothing in common with the pass it judges but the names of
 * struct params: its differences are what gradients are compared with. For models of a few thousand weights
 * in F32. */
#ifndef TESTS_SUPPORT_TRAIN_ORACLE_H
#define TESTS_SUPPORT_TRAIN_ORACLE_H

#include "training/pass.h"

struct oracle;

/* A GGUF file whose tensors are F32. params gives the adapter's shape, not its values. Fails the running test
 * where anything is missing. */
struct oracle *oracle_open(const char *model_path, const struct params *params);
void oracle_close(struct oracle *o);

/* L of a batch with these values of the parameters (params.count), by the coefficients of `loss` (NULL: L_ce
 * alone). */
double oracle_loss(struct oracle *o, const double *value, const struct pass_batch *batch,
                   const struct pass_loss *loss);

#endif

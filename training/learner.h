/* One adapter in training on the engine's device: parameters, passes, optimiser. What trainer.h (runs over a
 * set of examples) and step-wise sessions are made of.
 *
 * Everything that touches the device takes its turn (engine.h), so several learners and the serving engine
 * share it. One thread at a time uses a learner. */
#ifndef TRAINING_LEARNER_H
#define TRAINING_LEARNER_H

#include "training/batch.h"
#include "training/pass.h"
#include "training/settings.h"

#include <stdatomic.h>

/* Memory of all learners together for activations that would otherwise be computed twice. The result is the same. */
#define LEARNER_KEEP_BYTES ((size_t)1 << 30)

struct learner {
    struct engine *engine; /* these three are not owned */
    struct device *device;
    struct transposed *transposed;
    struct engine_turn *turn;
    struct params *params;
    struct pass *pass; /* NULL until the first learner_reserve */
    int rows_max, seq_rows_max;
    float *norm;              /* (1), device memory */
    int64_t optim_steps;      /* done */
    struct train_batch batch; /* scratch of whoever runs passes */
};

/* The values as the bundle has them. ST_UNSUPPORTED: an adapter that cannot be trained; ST_NOMEM,
 * ST_DRAINING, ST_DEVICE. */
NODISCARD enum status learner_open(struct engine *e, struct device *d, struct transposed *t,
                                   const struct adapter_bundle *b, struct learner **out, struct error *err);
void learner_close(struct learner *l);
size_t learner_bytes(const struct learner *l);

/* Before any pass: the largest batch. May be called again; only grows. */
NODISCARD enum status learner_reserve(struct learner *l, int rows, int seq_rows);

/* Gives the memory of passes back until the next learner_reserve. Parameters, gradients and moments stay. */
void learner_rest(struct learner *l);

/* One update with the gradients as they stand, clipped to settings.clip, at this rate; they are zero
 * afterwards. ST_REJECTED: the gradient is not finite; nothing has changed but the gradients, which are zero.
 */
NODISCARD enum status learner_update(struct learner *l, const struct train_settings *s, double rate,
                                     double *norm_out);
/* Drops the gradients. */
NODISCARD enum status learner_forget(struct learner *l);

/* The vectors that a checkpoint holds, by number: values, m, v, each (params.count). In pieces, so that the
 * device is lent for moments only. */
enum learner_vector { LEARNER_VALUE, LEARNER_M, LEARNER_V, LEARNER_VECTORS };
NODISCARD enum status learner_read(struct learner *l, enum learner_vector which, size_t first, size_t count,
                                   float *out);
NODISCARD enum status learner_write(struct learner *l, enum learner_vector which, size_t first, size_t count,
                                    const float *in);

/* The values as a bundle of F32 matrices: training in small portions would be lost in anything shorter. The
 * caller owes adapter_bundle_free. */
NODISCARD enum status learner_bundle(struct learner *l, const struct adapter_base *base,
                                     struct adapter_bundle **out, struct error *err);

#endif

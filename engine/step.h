/* A step's batch, laid out from what the scheduler composed.
 *
 * Rows follow the entries' order, so that sequences of one adapter set are neighbours and make one
 * segment. All arrays are reserved when the step is made. */
#ifndef ENGINE_STEP_H
#define ENGINE_STEP_H

#include "engine/forward.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"

struct step {
    struct batch batch;
    int wanted_count;
    int32_t *wanted_row; /* rows whose logits are needed */
    struct wanted {
        struct sequence *seq;
        int position;
    } *wanted; /* [wanted_count]: whose they are */

    int32_t *tokens;
    struct seq_rows *seqs;
    struct lr_segment *segments;
};

/* For batches of at most that many rows and sequences. NULL when there is no memory. */
struct step *step_new(int rows, int sequences);
void step_free(struct step *s);

void step_build(struct step *s, const struct step_entry *entries, int count);

#endif

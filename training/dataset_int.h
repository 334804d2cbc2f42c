/* What the dataset's files share: one line's example on its way into the set. */
#ifndef TRAINING_DATASET_INT_H
#define TRAINING_DATASET_INT_H

#include "training/dataset.h"

/* One sequence in the making. */
struct draft {
    struct token_list tokens;
    size_t weight_count, weight_capacity; /* as many as tokens once it is complete */
    float *weight;
    size_t old_count, old_capacity; /* 0, or as many as tokens */
    struct old_token *old;
};

/* Memory of the reader, used again for each line. */
struct example_space {
    struct draft draft[2];
    struct strbuf text;
};
void example_space_release(struct example_space *s);

/* Room for one more element of an array that grows by doubling. ST_NOMEM. */
NODISCARD enum status array_grow(void **array, size_t *capacity, size_t count, size_t size);

/* Reads one line's object into space->draft[0 .. sequences_each). The message says nothing of source and
 * line. */
NODISCARD enum status example_read(const struct dataset_rules *r, const cJSON *object,
                                   struct example_space *space, struct error *err);

#endif

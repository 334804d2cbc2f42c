/* An adapter's files, read: what training begins with. */
#ifndef TRAINING_START_H
#define TRAINING_START_H

#include "adapters/package.h"
#include "adapters/reader.h"

struct train_start {
    struct package files;
    struct adapter_bundle *bundle; /* points into the files */
};

/* path as package_map_path's. Statuses of that and of adapter_read. The caller owes train_start_close. */
NODISCARD enum status train_start_open(const char *path, const struct adapter_base *base,
                                       struct train_start *out, struct error *err);
void train_start_close(struct train_start *s); /* a zeroed one is fine */

#endif

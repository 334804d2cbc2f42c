/* The forward pass: a ragged batch of rows through all layers, written once over device ops.
 *
 * Owns the activations, the KV cache's memory and the arguments of every op, all reserved when it
 * opens: a run allocates nothing. What a row gets depends on its sequence and its adapters only
 * (rule 4 of kernels/device.h carries over to the whole pass). One thread at a time. */
#ifndef ENGINE_FORWARD_H
#define ENGINE_FORWARD_H

#include "base/status.h"
#include "engine/model.h"
#include "kernels/device.h"

#include <stdint.h>

struct forward_config {
    int rows;       /* of a batch, at most */
    int logit_rows; /* of one forward_logits, at most */
    int lr_width;   /* as in struct device_limits */
    enum dtype kv_type;
    int kv_pages;
};

/* Rows in order: row r is tokens[r], of the sequence whose seq_rows covers it. */
struct batch {
    int rows;
    const int32_t *tokens;
    int seq_count;
    const struct seq_rows *seqs; /* sorted by first_row, cover all rows */
    int segment_count;
    const struct lr_segment *segments; /* sorted by first_row, disjoint */
};

struct forward;

/* m and its device outlive it. ST_NOMEM. */
NODISCARD enum status forward_open(const struct model *m, const struct forward_config *config,
                                   struct forward **out, struct error *err);
void forward_close(struct forward *f);

/* Computes the last hidden state of every row and stores keys and values. The batch stays as it is
 * until forward_logits or forward_sync. */
void forward_run(struct forward *f, const struct batch *b);

/* Waits for the run and gives the logits of `count` of its rows, (count, vocab), in host memory that
 * stays valid until the next call. May be called several times for one run. ST_DEVICE as below. */
NODISCARD enum status forward_logits(struct forward *f, int count, const int32_t *rows,
                                     const float **out);

/* Waits for the run. ST_DEVICE if anything since the last wait went wrong. */
NODISCARD enum status forward_sync(struct forward *f);

#endif

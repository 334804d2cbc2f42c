/* Forward and backward of the frozen base model with one adapter in training, over one batch of sequences.
 *
 * The whole batch goes through one layer after the other. Each layer's input is kept, and of as many layers as memory is
 * granted for also what is inside; the backward pass computes the inside of the others again, with the same bits. Logits exist for a tile of rows at a time, and only for rows whose weight is not 0. The base's
 * forward products are those of serving; its backward products run on transposed copies of the weights, made when the first
 * pass opens (struct transposed).
 *
 * The engine owns the device between turns (engine.h: engine_turn): a pass takes its turn op by op, so that
 * serving waits for one op at most. */
#ifndef TRAINING_PASS_H
#define TRAINING_PASS_H

#include "engine/engine.h"
#include "training/params.h"

#include <stdatomic.h>

struct pass;

/* Transposed weights of a model, shared by all passes over it. */
struct transposed;
NODISCARD enum status transposed_open(struct engine *e, struct transposed **out, struct error *err);
void transposed_close(struct transposed *t);
size_t transposed_bytes(const struct transposed *t);

/* Rows of a batch: each sequence's tokens from its first, one sequence after the other. */
struct pass_batch {
    int rows, seq_count;
    const int *first_row;  /* [seq_count + 1] */
    const int32_t *token;  /* [rows] */
    const int32_t *target; /* [rows]: the next token; -1: none, and no weight */
    const float *weight;   /* [rows] of -log p(target) in L_ce, any sign; 0: no logits are made */
};

struct pass_loss {
    double balance, contrast; /* coefficients: lambda_b, lambda_c; 0: the loss is not part of L */
    double temperature;       /* of the contrastive loss */
    int pairs;                /* of it, a site: tokens are sampled so that about so many are made */
    uint64_t seed;            /* of that sample */
};

/* One site's routing over the batch, as struct route_args. */
struct pass_routing {
    const struct train_site *site;
    const float *chosen, *gate, *probability; /* (experts): rows that chose it; sums over rows */
};

struct pass_result {
    double ce;                /* sum of weight * -log p */
    double balance, contrast; /* means over routed sites, without their coefficients */
    double similarity;        /* mean cosine of outputs of different experts, over routed sites */
    double cohesion;          /* the same of one expert's for different tokens */
    float *logprob;           /* [rows] of target; 0 where weight is 0. Owned by the pass, until the next call */
    struct pass_routing *routing; /* [params.routed_count], likewise */
};

/* rows_max, seq_rows_max: of any batch, and of any sequence in it. keep_bytes: for the insides of layers of all passes over
 * these transposed weights together, beyond what a pass cannot do without; all of a model's layers take about
 * 4 * layers * rows_max * (2 ffn + 4 embed) bytes. A pass takes what others have left. ST_NOMEM. */
NODISCARD enum status pass_open(struct engine *e, struct transposed *t, struct params *p, int rows_max,
                                int seq_rows_max, size_t keep_bytes, struct pass **out);
void pass_close(struct pass *p);
size_t pass_bytes(const struct pass *p);

/* Forward only: result as of L, no gradients. loss NULL: no auxiliary losses. Rows with weight != 0 get their
 * logprob. ST_CANCELLED where *cancel became true, ST_DEVICE. */
NODISCARD enum status pass_forward(struct pass *p, const struct pass_batch *b, const struct pass_loss *loss,
                                   const atomic_bool *cancel, struct pass_result *out);
/* Adds dL/dparams to params.grad. After any failure the gradients are partial: zero them. */
NODISCARD enum status pass_backward(struct pass *p, const struct pass_batch *b, const struct pass_loss *loss,
                                    const atomic_bool *cancel, struct pass_result *out);

#endif

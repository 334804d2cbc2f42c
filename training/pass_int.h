/* One pass at work: what its files share. All pointers are device memory unless said otherwise; T = rows of the batch. */
#ifndef TRAINING_PASS_INT_H
#define TRAINING_PASS_INT_H

#include "training/transposed.h"

/* Rows whose logits exist at a time: an op on them takes some milliseconds, which serving may have to wait for. */
#define HEAD_ROWS 32

/* A routed or plain site between its forward and its backward. */
struct site_state {
    float *z;     /* (T, experts * rank) = A x */
    float *p, *g; /* (T, experts), of routed sites */
};

/* What a layer's backward pass needs of its forward and cannot make anew at little cost. */
struct activations {
    float *q, *k, *v; /* (T, q_cols), (T, kv_cols) twice; q and k rotated */
    float *attended;  /* (T, q_cols) */
    float *middle;    /* (T, embed): the residual stream between attention and FFN */
    float *gate, *up; /* (T, ffn) */
    struct site_state site[PROJ_COUNT];
    float *block;     /* all of it; owned, device memory */
};

struct sample_key {
    uint64_t key;
    int32_t row;
};

struct pass {
    struct engine *engine;
    struct engine_turn *turn;
    const struct model *model;
    struct transposed *transposed;
    struct params *params;
    struct device *device;
    const struct device_ops *ops;
    const struct grad_ops *grad;
    int rows_max, tile_rows; /* of a batch; of a forward op */
    int first_layer;         /* the lowest with a site: no gradient is needed below it */
    size_t q_cols, kv_cols;

    /* Of the call under way. */
    enum status status; /* the first failure: every later op is left out */
    const atomic_bool *cancel;
    const struct pass_batch *batch;
    const struct pass_loss *loss; /* NULL: no auxiliary losses */
    bool backward;

    float *inputs;                        /* (layers + 1, T, embed): see layer_input */
    struct activations scratch;           /* of layers that keep none */
    struct activations *kept;             /* [kept_count], of the last layers; host memory */
    int kept_count;
    size_t kept_layer;                    /* bytes of one of them */
    const struct activations *act;        /* of the layer at hand */
    float *attn_normed, *ffn_normed;      /* (T, embed), of the layer at hand */
    float *activated;                     /* (T, ffn), likewise */
    float *d_x, *d_normed;                /* (T, embed) */
    float *d_q, *d_k, *d_v, *d_attended;  /* as q, k, v, attended */
    float *d_activated;                   /* (T, ffn) */
    float *zg, *d_zg, *u;                   /* (T, experts * rank) twice, (T, experts): of the site at hand */
    float *logits, *logprob, *head_normed;  /* (HEAD_ROWS, vocab), (HEAD_ROWS), (HEAD_ROWS, embed) */
    float *stats;                           /* (routed_count, 3, experts_max) */
    float *contrast;                        /* (routed_count, 2) */
    int experts_max;
    size_t bytes;
    struct kv_cache cache; /* of one layer, fp32 */
    int32_t *pages;        /* [cache.pages] 0, 1, ...: host memory */

    /* Host memory. */
    struct seq_rows *seqs;  /* [seq_count]: whole sequences */
    struct seq_rows *tiles; /* pieces of sequences by tile of rows */
    int *first_tile;        /* [tile_count + 1]: of the pieces */
    int tile_count, seqs_max, tiles_max;
    int32_t *position;          /* [rows_max] */
    struct sample_key *keys;    /* [rows_max] */
    int32_t *sample;            /* [rows_max] */
    int32_t *scored;            /* [rows_max]: rows with a weight */
    int scored_count;
    float *logprob_host;        /* [rows_max] */
    float *stats_host, *contrast_host;
    struct pass_routing *routing; /* [routed_count] */
    double ce;
};

/* Whether the next op may run: looks for cancellation, gives way to serving. */
bool pass_ready(struct pass *p);

/* pass_site.c. x (T, d_in) and y (T, d_out) contiguous. */
void site_forward(struct pass *p, const struct train_site *s, const float *x, float *y); /* y += delta(x) */
/* The part of it that site_backward needs: z and the gates. */
void site_prepare(struct pass *p, const struct train_site *s, const float *x);
/* Adds the site's gradients to params.grad; d_x += delta's share, unless d_x is NULL. */
void site_backward(struct pass *p, const struct train_site *s, const float *x, const float *d_y, float *d_x);

/* pass_layer.c */
void layer_forward(struct pass *p, int layer); /* makes the next layer's input */
/* d_x, of the layer's output, becomes that of its input. Makes the layer's inside anew unless it is kept. */
void layer_backward(struct pass *p, int layer);
/* A layer's input, (T, embed); of layer `layers`, the last one's output. All are kept if gradients are wanted. */
float *layer_input(const struct pass *p, int layer);

/* pass_head.c: losses of the scored rows; with p->backward, d_x "=" their gradient. */
void head_run(struct pass *p);

static inline struct train_site *pass_site(const struct pass *p, int layer, enum projection projection)
{
    return p->params->place[layer * PROJ_COUNT + (int)projection];
}

#endif

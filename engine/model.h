/* A GGUF file of the llama architecture, bound to a device.
 *
 * The file stays mapped: packed weights may use its bytes in place. Every tensor the architecture
 * needs must be there with the right shape, and every tensor in the file must be one that is used:
 * a model is served whole or refused. Immutable after opening. */
#ifndef ENGINE_MODEL_H
#define ENGINE_MODEL_H

#include "base/file.h"
#include "base/gguf.h"
#include "base/status.h"
#include "engine/engine.h"
#include "engine/rope.h"
#include "kernels/device.h"

struct model_layer {
    float *attn_norm, *ffn_norm; /* (embed), device memory */
    struct weight *projection[PROJ_COUNT];
};

struct model {
    struct file_map file;
    struct gguf *gguf;
    struct device *device; /* not owned */
    struct model_shape shape;
    float rms_eps;
    struct rope rope;
    struct weight *embed; /* (vocab, embed) */
    struct weight *head;  /* (vocab, embed); the same as embed where the file ties them */
    struct pack *pack;    /* owns all weights */
    float *output_norm;   /* (embed), device memory */
    struct model_layer *layers; /* [shape.layers] */
};

struct model_config {
    const char *path;
    struct device *device; /* not owned; outlives the model */
    /* as in struct engine_config */
    const char *pack_path[PACK_PATHS];
    void (*on_progress)(void *ctx, double done);
    void *progress_ctx;
};

/* ST_NOT_FOUND, ST_IO, ST_BAD_FORMAT, ST_UNSUPPORTED (an
 * architecture or feature we do not serve), ST_NOMEM. */
NODISCARD enum status model_open(const struct model_config *config, struct model **out,
                                 struct error *err);
void model_close(struct model *m);

/* A row of a projection's weights as the file has it, decoded: out (d_in). Any thread may call it. */
void model_weight_row(const struct model *m, int layer, enum projection p, size_t row, float *out);
/* A row of the head's, (embed), likewise. */
void model_head_row(const struct model *m, size_t row, float *out);

#endif

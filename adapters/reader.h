/* Adapter files of every known format to one form: a bundle of sites over mapped bytes.
 *
 * A reader checks everything against the base model's shape: names, pairs, shapes, dtypes, ranks
 * and expert counts against the configured maxima, finite values. A file that does not fit is
 * refused with a message that names the tensor and says why; nothing is ever dropped in silence. */
#ifndef ADAPTERS_READER_H
#define ADAPTERS_READER_H

#include "base/status.h"
#include "kernels/lowrank.h"

#include <stdbool.h>
#include <stddef.h>

/* The base model's side of the contract; the same numbers as engine's struct model_shape. */
struct adapter_base {
    int layers;
    size_t d_in[PROJ_COUNT], d_out[PROJ_COUNT];
    int heads, kv_heads, head_dim;
    bool qk_permuted;          /* rows of q and k: B rows of Hugging Face adapters are permuted to match */
    int rank_max, experts_max; /* 0: what kernels can do at most */
    /* A row of a projection's weights as floats (d_in), for DoRA; any thread may call it. */
    void (*row)(const void *model, int layer, enum projection p, size_t row, float *out);
    const void *model; /* outlives whatever holds this struct */
};

struct adapter_bundle {
    char format[32]; /* "moelora", "peft-lora" */
    int layers;
    struct lr_site_source **sites;    /* [layers * PROJ_COUNT], NULL where none */
    struct lr_site_source **ffn;      /* [layers], or NULL: routers of whole FFNs, sites of rank 0 */
    int rank_max, experts_max, top_k; /* the largest over its sites */
    int site_count;
    bool dora;        /* some site has DoRA's magnitude, though without a base no gain */
    bool qk_permuted; /* B rows of q and k are in the order of a GGUF file, not Hugging Face's */
    size_t parameters;
    size_t lr_width;              /* as lr_adapter.width */
    char targets[256];            /* "q_proj, v_proj", for people */
    struct adapter_block *memory; /* owned: what the sites point to beyond the tensors' bytes */
};

/* config: the bytes of adapter_config.json; tensors: of adapter_model.safetensors or of a GGUF adapter, which
 * must outlive the bundle. base NULL: checks everything but the fit to a model. ST_BAD_FORMAT: bytes that
 * cannot be read; ST_UNSUPPORTED, ST_REJECTED: an adapter that cannot be used; ST_TOO_LARGE. */
NODISCARD enum status adapter_read(const void *config, size_t config_size, const void *tensors,
                                   size_t tensors_size, const struct adapter_base *base,
                                   struct adapter_bundle **out, struct error *err);
void adapter_bundle_free(struct adapter_bundle *b);

/* To make one without a file: no sites yet, in the order of the base's rows; NULL when out of memory. What
 * its sites point to is allocated in it (zeroed, freed with it; NULL when out of memory). */
struct adapter_bundle *bundle_new(const struct adapter_base *base);
void *bundle_alloc(struct adapter_bundle *b, size_t count, size_t size);

/* A short name for a projection as it stands in files: "q_proj" ... "down_proj". */
const char *projection_name(enum projection p);

#endif

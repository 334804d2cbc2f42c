/* Adapters of every format that is read, written as Medley's own or as PEFT's plain LoRA. */
#ifndef ADAPTERS_CONVERT_H
#define ADAPTERS_CONVERT_H

#include "base/status.h"

struct adapter_bundle;
struct strbuf;

enum convert_format {
    CONVERT_ANY, /* PEFT's where it can say what the adapter computes, else Medley's */
    CONVERT_PEFT,
    CONVERT_MOELORA
};

/* The base model's heads, which tell how rows of q and k in a GGUF file's order go back into Hugging Face's.
 * 0: not known. */
struct convert_heads {
    int heads, kv_heads, head_dim;
};

/* Appends the bytes of adapter_config.json and adapter_model.safetensors, which have been read again once.
 * Matrices keep their type and values; sites get the scale they have, to the last bit.
 * ST_UNSUPPORTED: the format cannot say what the adapter computes. ST_INVALID: the heads are needed and not
 * known, or are not those of the adapter. ST_NOMEM. */
NODISCARD enum status bundle_convert(const struct adapter_bundle *b, enum convert_format format,
                                     const struct convert_heads *heads, struct strbuf *config,
                                     struct strbuf *tensors, struct error *err);

/* The same of an adapter's files; path as package_map_path's. */
NODISCARD enum status adapter_convert(const char *path, enum convert_format format,
                                      const struct convert_heads *heads, struct strbuf *config,
                                      struct strbuf *tensors, struct error *err);

#endif

/* Rotary position embedding as a model file asks for it: frequencies and scaling.
 *
 * Pair i of a head turns by position * inv_freq[i] radians, inv_freq[i] = base^(-2i / dims), changed by
 * one of: nothing; linear scaling (position interpolation, arXiv 2306.15595); YaRN
 * (arXiv 2309.00071); and by Llama 3's per-pair factors where the file has `rope_freqs.weight`. */
#ifndef ENGINE_ROPE_H
#define ENGINE_ROPE_H

#include "base/gguf.h"
#include "base/status.h"

#include <stddef.h>

struct rope {
    size_t dims;     /* rotated elements of a head, even */
    float *inv_freq; /* (dims / 2), owned: radians per position */
    float magnitude; /* multiplies cos and sin */
};

/* Reads the llama.rope.* keys. ST_BAD_FORMAT or ST_UNSUPPORTED name the key. */
NODISCARD enum status rope_read(const struct gguf *g, size_t head_dim, struct rope *out,
                                struct error *err);
void rope_release(struct rope *r);

#endif

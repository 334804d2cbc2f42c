/* Logits to a token.
 *
 * The order of what changes the choice (vLLM's):
 *   1. before min_tokens, end tokens and stop tokens cannot be chosen
 *   2. logit_bias is added
 *   3. repetition penalty, over prompt and generated tokens: l > 0 ? l / p : l * p
 *   4. frequency and presence penalty, over generated tokens: l - count * f - (count > 0) * p
 *   5. temperature; 0 takes the largest logit
 *   6. min_p: drops tokens less likely than min_p times the likeliest
 *   7. top_k: keeps the k likeliest
 *   8. top_p: keeps the smallest set of likeliest tokens, among those left, whose share reaches top_p
 *   9. one draw among what is left
 * Of equal logits the lower id comes first, everywhere. Log-probabilities are those of the raw
 * logits, before step 1.
 *
 * The draw for output token i is a hash of (seed, i): the same request gives the same text whatever
 * runs beside it. */
#ifndef ENGINE_SAMPLER_H
#define ENGINE_SAMPLER_H

#include "base/status.h"
#include "engine/engine.h"

#include <stddef.h>
#include <stdint.h>

/* Buffers for one call at a time, shared by all samplers of a thread. */
struct sampler_scratch;
/* NULL when there is no memory. */
struct sampler_scratch *sampler_scratch_new(size_t vocab);
void sampler_scratch_free(struct sampler_scratch *s);

/* One sequence's rules and what it has seen. */
struct sampler;

/* Copies what it needs. banned [banned_count]: the tokens that min_tokens forbids; not copied, they
 * outlive the sampler. NULL when there is no memory. */
struct sampler *sampler_new(const struct sampling *s, size_t vocab, const int32_t *prompt,
                            size_t prompt_count, const int32_t *banned, size_t banned_count);
void sampler_free(struct sampler *s);

/* Chooses output token `index` (0, 1, ...) from logits [vocab], and counts it for the penalties.
 * logprob: filled if not NULL. ST_REJECTED: the logits are not numbers (err); nothing is chosen. */
NODISCARD enum status sampler_choose(struct sampler *s, struct sampler_scratch *scratch,
                                     const float *logits, int index, int32_t *token_out,
                                     struct token_logprob *logprob, struct error *err);

/* The log-probability of one token with its rank and the top_count likeliest, from raw logits.
 * ST_REJECTED as above. */
NODISCARD enum status logprob_compute(struct sampler_scratch *scratch, const float *logits,
                                      int32_t token, int top_count, struct token_logprob *out,
                                      struct error *err);

#endif

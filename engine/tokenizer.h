/* Text to token ids and back, as the model's own GGUF metadata defines it.
 *
 * Two families: byte-level BPE (tokenizer.ggml.model = gpt2) with the pre-tokenizer named by
 * tokenizer.ggml.pre (smollm, llama-bpe, qwen2, gpt-2, default), and SentencePiece-style llama with
 * scores and byte fallback. An unknown model or pre-tokenizer is ST_UNSUPPORTED, never a guess.
 * Immutable after opening; any thread may use one.
 *
 * Ids equal those of HF tokenizers and sentencepiece (tests/fixtures/make_tokenizer.py), with these limits:
 * texts are not normalised (Qwen2's tokenizer.json asks for NFC, which would lose bytes); characters newer
 * than PCRE2's Unicode are no letters; where the vocabulary has no token for a byte (SmolLM2's lacks
 * 21, mostly bytes that UTF-8 never has) that byte is left out, as HF does, and a warning says so at opening;
 * SentencePiece reads U+2581 as a space; its unused tokens are never made. */
#ifndef ENGINE_TOKENIZER_H
#define ENGINE_TOKENIZER_H

#include "base/gguf.h"
#include "base/status.h"
#include "base/strbuf.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tokenizer;

/* g (and its bytes) must outlive the tokenizer. */
NODISCARD enum status tokenizer_open(const struct gguf *g, struct tokenizer **out, struct error *err);
void tokenizer_close(struct tokenizer *t);

struct token_list {
    int32_t *ids; /* owned: token_list_release */
    size_t count, capacity;
};
void token_list_release(struct token_list *l);
NODISCARD enum status token_list_push(struct token_list *l, int32_t id);

enum tokenizer_flags {
    TOKENIZE_ADD_SPECIAL = 1,   /* bos/eos where the model asks for them */
    /* "<|im_end|>" in the text becomes that token, not its letters. User-defined tokens always do. */
    TOKENIZE_PARSE_SPECIAL = 2,
    DETOKENIZE_SKIP_SPECIAL = 4, /* control tokens give no text */
    TOKENIZE_CONTINUES = 8       /* the text follows another: SentencePiece puts no space before it */
};

/* Appends the ids of text (any bytes; invalid UTF-8 is tokenized as bytes). Linear time for
 * hostile input too (n log n at worst). ST_TOO_LARGE beyond 1 GiB. */
NODISCARD enum status tokenizer_encode(const struct tokenizer *t, const char *text, size_t n,
                                       unsigned flags, struct token_list *out);
/* Appends the bytes of ids. Exact inverse of encode without special tokens. ST_INVALID for an id out of
 * range. */
NODISCARD enum status tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n,
                                       unsigned flags, struct strbuf *out);
/* The bytes one token stands for; NULL and 0 for an id out of range, and for a control token under
 * DETOKENIZE_SKIP_SPECIAL. SentencePiece's leading-space rule is tokenizer_decode's:
 * a stream passes at_start for its first token only. Owned by t. */
const char *tokenizer_piece(const struct tokenizer *t, int32_t id, unsigned flags, bool at_start,
                            size_t *size_out);

size_t tokenizer_vocab_size(const struct tokenizer *t);
bool tokenizer_is_control(const struct tokenizer *t, int32_t id);
/* End of generation: eos, eot and the like. */
bool tokenizer_is_end(const struct tokenizer *t, int32_t id);
int32_t tokenizer_bos(const struct tokenizer *t); /* -1 where there is none */
int32_t tokenizer_eos(const struct tokenizer *t);

#endif

/* What the tokenizer's files share. Nothing outside engine/tokenizer*.c includes this.
 *
 * A text passes through these stages, one file each:
 *   tokenizer.c         cuts it at special tokens;
 *   tokenizer_split.c   cuts what is between them into words (byte-level BPE only);
 *   tokenizer_bpe.c     makes the symbols of a word, and says which two of them merge, and when;
 *   tokenizer_spm.c     the same for SentencePiece;
 *   tokenizer_merge.c   merges.
 * tokenizer_vocab.c reads the vocabulary that they all look into. */
#ifndef ENGINE_TOKENIZER_INT_H
#define ENGINE_TOKENIZER_INT_H

#include "engine/tokenizer.h"

#define TOKENIZER_VOCAB_MAX       (1 << 22)
#define TOKENIZER_MERGES_MAX      (1 << 23)
#define TOKENIZER_TOKEN_BYTES_MAX 4096
/* Positions and lengths inside a text are 32 bits wide. */
#define TOKENIZER_TEXT_BYTES_MAX (1u << 30)

enum tokenizer_family { TOKENIZER_BPE, TOKENIZER_SPM };

/* tokenizer.ggml.token_type; 0 (undefined) is read as normal. */
enum token_type {
    TOKEN_NORMAL = 1,
    TOKEN_UNKNOWN,
    TOKEN_CONTROL,
    TOKEN_USER_DEFINED,
    TOKEN_UNUSED,
    TOKEN_BYTE
};

/* Bytes to id, by open addressing; at most half full. */
struct token_slot {
    uint32_t hash;
    int32_t id; /* -1: empty */
};
struct token_index {
    struct token_slot *slots; /* [mask + 1] */
    size_t mask;
    size_t size_max; /* of the longest token inside */
};

/* A pair of ids to the id it becomes; at most half full. */
struct pair_slot {
    uint64_t pair;  /* left id in the high half */
    uint32_t rank;  /* lower merges first */
    int32_t merged; /* -1: empty */
};
struct pair_table {
    struct pair_slot *slots; /* [mask + 1] */
    size_t mask;
};

struct splitter;

struct tokenizer {
    enum tokenizer_family family;
    size_t count;
    struct gguf_string *pieces; /* [count] the bytes each id stands for: in `arena` or in the file */
    uint8_t *types;             /* [count] enum token_type */
    bool *is_end;               /* [count] */
    char *arena;
    struct token_index index; /* of the tokens plain text can become */
    int32_t byte_ids[256];    /* -1: no token for this byte */

    int32_t *specials; /* [special_count] tokens matched in a text as wholes, sorted by bytes */
    size_t special_count;
    bool special_first[256]; /* can a special token begin with this byte? */

    int32_t bos, eos;
    bool add_bos, add_eos;

    /* TOKENIZER_BPE */
    struct splitter *splitter;
    struct pair_table pairs;
    bool whole_words_first; /* a word that is a token needs no merges */

    /* TOKENIZER_SPM */
    float *scores; /* [count] */
    bool add_space_prefix;
};

/* --- tokenizer_vocab.c --- */

/* Fills everything above but splitter and pairs. */
NODISCARD enum status vocab_read(struct tokenizer *t, const struct gguf *g, struct error *err);
/* The token that stands for exactly these bytes of plain text, or -1. */
int32_t vocab_find(const struct tokenizer *t, const char *bytes, size_t n);
/* As vocab_find, among the tokens that texts contain as wholes ("<|im_end|>"): the longest one at
 * the start of text, or -1. control: also those that only a trusted text may contain. */
int32_t vocab_match_special(const struct tokenizer *t, const char *text, size_t n, bool control);
static inline bool token_is_control(const struct tokenizer *t, int32_t id)
{
    return t->types[id] == TOKEN_CONTROL || t->types[id] == TOKEN_UNKNOWN;
}
/* Byte-level BPE writes each byte as one printable character. Turns such a text (n bytes) back into
 * bytes; out has room for n. False if it holds a character outside that alphabet. */
bool byte_alphabet_decode(const char *text, size_t n, char *out, size_t *size_out);
/* SentencePiece writes a space as U+2581. Turns those of text into spaces; out has room for n.
 * Returns the size. */
size_t spaces_decode(const char *text, size_t n, char *out);

/* --- tokenizer_split.c --- */

/* ST_UNSUPPORTED for an unknown name. */
NODISCARD enum status splitter_open(struct gguf_string name, struct splitter **out, struct error *err);
void splitter_close(struct splitter *s);

struct word_sink {
    enum status (*word)(void *ctx, const char *text, size_t n);
    void *ctx;
};
/* Gives the words of text (valid UTF-8) in order; together they are the text. */
NODISCARD enum status splitter_run(const struct splitter *s, const char *text, size_t n,
                                   const struct word_sink *sink);

/* --- tokenizer_merge.c --- */

struct merge_symbol {
    uint32_t start, size; /* its bytes in the text; size 0: merged into the symbol on its left */
    int32_t id;           /* -1: no token stands for it alone */
    int32_t next, prev;   /* -1: none */
};
struct merge_candidate;

/* Working memory, reused from word to word. Zeroed is valid and empty. */
struct merge_space {
    struct merge_symbol *symbols; /* [count] */
    size_t count, capacity;
    struct merge_candidate *heap; /* room for 2 * capacity */
    size_t heap_count;
};
void merge_space_release(struct merge_space *s);
/* Empties s and makes room for n symbols. */
NODISCARD enum status merge_space_reserve(struct merge_space *s, size_t n);
void merge_add(struct merge_space *s, uint32_t start, uint32_t size, int32_t id);

/* The id that two neighbours become, or -1 if they do not merge. Candidates of lower priority
 * merge first; of equal ones the leftmost. */
typedef int32_t merge_rule(const struct tokenizer *t, const char *text, const struct merge_symbol *left,
                           const struct merge_symbol *right, uint32_t *priority);
/* Merges until no pair can. O(n log n). What remains is the chain of `next` from symbol 0. */
void merge_run(struct merge_space *s, const struct tokenizer *t, const char *text, merge_rule *rule);

/* --- tokenizer_bpe.c, tokenizer_spm.c: a text without special tokens to ids --- */

NODISCARD enum status bpe_open(struct tokenizer *t, const struct gguf *g, struct error *err);
void bpe_close(struct tokenizer *t);
NODISCARD enum status bpe_encode(const struct tokenizer *t, const char *text, size_t n,
                                 struct merge_space *space, struct token_list *out);
NODISCARD enum status spm_encode(const struct tokenizer *t, const char *text, size_t n, bool space_before,
                                 struct merge_space *space, struct token_list *out);

#endif

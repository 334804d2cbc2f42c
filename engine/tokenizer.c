#include "engine/tokenizer_int.h"

#include "base/memory.h"

#include <string.h>

/* --- lists of ids --- */

void token_list_release(struct token_list *l)
{
    free(l->ids);
    *l = (struct token_list){0};
}

enum status token_list_push(struct token_list *l, int32_t id)
{
    if (l->count == l->capacity) {
        size_t capacity = l->capacity ? size_mul(l->capacity, 2) : 64;
        int32_t *ids = realloc(l->ids, size_mul(capacity, sizeof *ids));
        if (!ids) return ST_NOMEM;
        l->ids = ids;
        l->capacity = capacity;
    }
    l->ids[l->count++] = id;
    return ST_OK;
}

/* --- opening --- */

static bool string_is(struct gguf_string s, const char *text)
{
    return s.size == strlen(text) && memcmp(s.data, text, s.size) == 0;
}

enum status tokenizer_open(const struct gguf *g, struct tokenizer **out, struct error *err)
{
    struct gguf_string model = {0};
    enum status st = gguf_get_string(g, "tokenizer.ggml.model", &model, err);
    if (st) return st;
    bool bpe = string_is(model, "gpt2");
    if (!bpe && !string_is(model, "llama"))
        return error_set(
            err, ST_UNSUPPORTED,
            "tokenizer.ggml.model: '%.*s' is not known; known are gpt2 (byte-level BPE) and llama "
            "(SentencePiece)",
            (int)(model.size < 64 ? model.size : 64), model.data);

    struct tokenizer *t = calloc(1, sizeof *t);
    st = t ? ST_OK : ST_NOMEM;
    if (st) goto done;
    t->family = bpe ? TOKENIZER_BPE : TOKENIZER_SPM;
    st = vocab_read(t, g, err);
    if (!st && bpe) st = bpe_open(t, g, err);
    if (st) goto done;
    *out = t;
    t = NULL;
done:
    tokenizer_close(t);
    return st == ST_NOMEM ? error_set(err, st, "tokenizer: out of memory") : st;
}

void tokenizer_close(struct tokenizer *t)
{
    if (!t) return;
    bpe_close(t);
    free(t->pieces);
    free(t->types);
    free(t->is_end);
    free(t->arena);
    free(t->index.slots);
    free(t->specials);
    free(t->scores);
    free(t);
}

/* --- text to ids --- */

/* The next special token in text from `from` on: its id and place, or -1 and n. */
static int32_t next_special(const struct tokenizer *t, const char *text, size_t n, size_t from, bool control,
                            size_t *at)
{
    for (*at = from; *at < n; ++*at) {
        int32_t id = vocab_match_special(t, text + *at, n - *at, control);
        if (id >= 0) return id;
    }
    return -1;
}

static enum status encode_parts(const struct tokenizer *t, const char *text, size_t n, unsigned flags,
                                struct merge_space *space, struct token_list *out)
{
    enum status st = ST_OK;
    for (size_t i = 0; !st && i < n;) {
        size_t at;
        int32_t special = next_special(t, text, n, i, flags & TOKENIZE_PARSE_SPECIAL, &at);
        bool spaced = t->add_space_prefix && !(i == 0 && (flags & TOKENIZE_CONTINUES));
        if (at > i)
            st = t->family == TOKENIZER_BPE ? bpe_encode(t, text + i, at - i, space, out)
                                            : spm_encode(t, text + i, at - i, spaced, space, out);
        if (!st && special >= 0) {
            st = token_list_push(out, special);
            at += t->pieces[special].size;
        }
        i = at;
    }
    return st;
}

enum status tokenizer_encode(const struct tokenizer *t, const char *text, size_t n, unsigned flags,
                             struct token_list *out)
{
    if (n > TOKENIZER_TEXT_BYTES_MAX) return ST_TOO_LARGE;
    size_t count = out->count;
    struct merge_space space = {0};
    enum status st = ST_OK;
    if ((flags & TOKENIZE_ADD_SPECIAL) && t->add_bos) st = token_list_push(out, t->bos);
    if (!st) st = encode_parts(t, text, n, flags, &space, out);
    if (!st && (flags & TOKENIZE_ADD_SPECIAL) && t->add_eos) st = token_list_push(out, t->eos);
    merge_space_release(&space);
    if (st) out->count = count;
    return st;
}

/* --- ids to text --- */

const char *tokenizer_piece(const struct tokenizer *t, int32_t id, unsigned flags, bool at_start,
                            size_t *size_out)
{
    *size_out = 0;
    if (id < 0 || (size_t)id >= t->count) return NULL;
    if ((flags & DETOKENIZE_SKIP_SPECIAL) && token_is_control(t, id)) return NULL;
    struct gguf_string p = t->pieces[id];
    /* The space that encoding put before the text. */
    size_t skip =
        at_start && t->add_space_prefix && t->types[id] == TOKEN_NORMAL && p.size > 0 && p.data[0] == ' ';
    *size_out = p.size - skip;
    return p.data + skip;
}

enum status tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n, unsigned flags,
                             struct strbuf *out)
{
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || (size_t)ids[i] >= t->count) return ST_INVALID;

    bool at_start = true;
    for (size_t i = 0; i < n; i++) {
        size_t size;
        const char *piece = tokenizer_piece(t, ids[i], flags, at_start, &size);
        strbuf_append(out, piece, size);
        /* Encoding puts a space before each part between special tokens. */
        at_start = t->types[ids[i]] == TOKEN_USER_DEFINED || token_is_control(t, ids[i]);
    }
    return out->failed ? ST_NOMEM : ST_OK;
}

/* --- what the vocabulary says --- */

size_t tokenizer_vocab_size(const struct tokenizer *t) { return t->count; }

bool tokenizer_is_control(const struct tokenizer *t, int32_t id)
{
    return id >= 0 && (size_t)id < t->count && token_is_control(t, id);
}

bool tokenizer_is_end(const struct tokenizer *t, int32_t id)
{
    return id >= 0 && (size_t)id < t->count && t->is_end[id];
}

int32_t tokenizer_bos(const struct tokenizer *t) { return t->bos; }
int32_t tokenizer_eos(const struct tokenizer *t) { return t->eos; }

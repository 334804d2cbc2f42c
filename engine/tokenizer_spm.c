#include "engine/tokenizer_int.h"

#include "base/utf8.h"

#include <stdlib.h>
#include <string.h>

/* A number that orders as -score does, so that the best score merges first. */
static uint32_t score_priority(float score)
{
    union {
        float f;
        uint32_t u;
    } v = {.f = score + 0.0f}; /* -0 and 0 are one score */
    uint32_t ascending = v.u >> 31 ? ~v.u : v.u | 0x80000000u;
    return ~ascending;
}

/* Any two neighbours whose text is a token merge, whether or not they are tokens themselves. */
static int32_t spm_rule(const struct tokenizer *t, const char *text, const struct merge_symbol *left,
                        const struct merge_symbol *right, uint32_t *priority)
{
    int32_t id = vocab_find(t, text + left->start, left->size + right->size);
    if (id >= 0) *priority = score_priority(t->scores[id]);
    return id;
}

static enum status push_symbol(const struct tokenizer *t, const char *text, const struct merge_symbol *s,
                               struct token_list *out)
{
    if (s->id >= 0) return token_list_push(out, s->id);
    enum status st = ST_OK;
    for (uint32_t i = 0; !st && i < s->size; i++)
        st = token_list_push(out, t->byte_ids[(uint8_t)text[s->start + i]]);
    return st;
}

static enum status encode_spaced(const struct tokenizer *t, const char *text, size_t n,
                                 struct merge_space *space, struct token_list *out)
{
    enum status st = merge_space_reserve(space, n);
    if (st) return st;
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        size_t size = utf8_decode(text + i, n - i, &cp);
        merge_add(space, (uint32_t)i, (uint32_t)size, vocab_find(t, text + i, size));
        i += size;
    }
    merge_run(space, t, text, spm_rule);
    for (int32_t i = space->count ? 0 : -1; !st && i >= 0; i = space->symbols[i].next)
        st = push_symbol(t, text, &space->symbols[i], out);
    return st;
}

enum status spm_encode(const struct tokenizer *t, const char *text, size_t n, bool space_before,
                       struct merge_space *space, struct token_list *out)
{
    char *spaced = malloc(n + 1);
    if (!spaced) return ST_NOMEM;
    size_t size = 0;
    if (space_before) spaced[size++] = ' ';
    /* U+2581 is how SentencePiece writes a space: in a text it means one, too. */
    size += spaces_decode(text, n, spaced + size);
    enum status st = encode_spaced(t, spaced, size, space, out);
    free(spaced);
    return st;
}

#include "engine/tokenizer_int.h"

#include "base/log.h"
#include "base/memory.h"
#include "base/utf8.h"

#include <string.h>

#define KEY "tokenizer.ggml."

/* --- merges --- */

static struct pair_slot *pair_slot(const struct pair_table *table, uint64_t pair)
{
    uint64_t hash = (pair ^ pair >> 29) * 0x9E3779B97F4A7C15u;
    size_t i = (hash ^ hash >> 32) & table->mask;
    while (table->slots[i].merged >= 0 && table->slots[i].pair != pair) i = (i + 1) & table->mask;
    return &table->slots[i];
}

static uint64_t pair_of(int32_t left, int32_t right)
{
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

static int32_t bpe_rule(const struct tokenizer *t, const char *text, const struct merge_symbol *left,
                        const struct merge_symbol *right, uint32_t *priority)
{
    (void)text;
    const struct pair_slot *slot = pair_slot(&t->pairs, pair_of(left->id, right->id));
    *priority = slot->rank;
    return slot->merged;
}

/* "left right", both in the byte alphabet, to the three ids; false if one is no token. */
static bool merge_parse(const struct tokenizer *t, const struct gguf_string *merge, int32_t *left,
                        int32_t *right, int32_t *merged)
{
    char bytes[2 * TOKENIZER_TOKEN_BYTES_MAX];
    const char *space = merge->size <= sizeof bytes ? memchr(merge->data, ' ', merge->size) : NULL;
    if (!space) return false;
    size_t left_text = (size_t)(space - merge->data), left_size, right_size;
    if (!byte_alphabet_decode(merge->data, left_text, bytes, &left_size) ||
        !byte_alphabet_decode(space + 1, merge->size - left_text - 1, bytes + left_size, &right_size))
        return false;
    *left = vocab_find(t, bytes, left_size);
    *right = vocab_find(t, bytes + left_size, right_size);
    *merged = vocab_find(t, bytes, left_size + right_size);
    return *left >= 0 && *right >= 0 && *merged >= 0;
}

static enum status pairs_fill(struct tokenizer *t, const struct gguf_string *merges, size_t count,
                              struct error *err)
{
    size_t slots = 16;
    while (slots < 2 * count) slots *= 2;
    t->pairs.slots = malloc(size_mul(slots, sizeof *t->pairs.slots));
    if (!t->pairs.slots) return ST_NOMEM;
    t->pairs.mask = slots - 1;
    for (size_t i = 0; i < slots; i++) t->pairs.slots[i] = (struct pair_slot){.merged = -1};

    for (size_t i = 0; i < count; i++) {
        int32_t left, right, merged;
        int shown = (int)(merges[i].size < 64 ? merges[i].size : 64);
        if (!merge_parse(t, &merges[i], &left, &right, &merged))
            return error_set(err, ST_BAD_FORMAT,
                             KEY "merges: merge %zu, '%.*s', is not of two tokens that make a third", i,
                             shown, merges[i].data);
        struct pair_slot *slot = pair_slot(&t->pairs, pair_of(left, right));
        if (slot->merged >= 0)
            return error_set(err, ST_BAD_FORMAT, KEY "merges: merge %zu, '%.*s', is there twice", i, shown,
                             merges[i].data);
        *slot = (struct pair_slot){.pair = pair_of(left, right), .rank = (uint32_t)i, .merged = merged};
    }
    return ST_OK;
}

static enum status pairs_read(struct tokenizer *t, const struct gguf *g, struct error *err)
{
    struct gguf_string *merges = NULL;
    size_t count = 0;
    enum status st = gguf_get_strings(g, KEY "merges", &merges, &count, err);
    if (st == ST_NOT_FOUND)
        return error_set(err, ST_BAD_FORMAT, KEY "merges: missing; a gpt2 tokenizer needs them");
    if (st) return st;
    if (count > TOKENIZER_MERGES_MAX)
        st = error_set(err, ST_BAD_FORMAT, KEY "merges: %zu merges; at most %d can be read", count,
                       TOKENIZER_MERGES_MAX);
    else
        st = pairs_fill(t, merges, count, err);
    free(merges);
    return st;
}

static void warn_of_missing_bytes(const struct tokenizer *t)
{
    int missing = 0;
    for (int b = 0; b < 256; b++) missing += t->byte_ids[b] < 0;
    if (missing > 0)
        log_debug("tokenizer: the vocabulary has no token for %d of the 256 bytes; they are left out of "
                 "texts, as the "
                 "model's own tokenizer does",
                 missing);
}

enum status bpe_open(struct tokenizer *t, const struct gguf *g, struct error *err)
{
    struct gguf_string pre = {.data = "default", .size = 7};
    enum status st = gguf_get_string(g, KEY "pre", &pre, err);
    if (st == ST_NOT_FOUND) {
        log_warn("tokenizer: the file names no pre-tokenizer (" KEY "pre); 'default' is used");
        st = ST_OK;
    }
    if (!st) st = splitter_open(pre, &t->splitter, err);
    if (!st) st = pairs_read(t, g, err);
    if (st) return st;
    /* As Llama 3's tokenizer.json says by ignore_merges: its vocabulary has words that no merges reach. */
    t->whole_words_first = pre.size == 9 && memcmp(pre.data, "llama-bpe", 9) == 0;
    warn_of_missing_bytes(t);
    return ST_OK;
}

void bpe_close(struct tokenizer *t)
{
    splitter_close(t->splitter);
    free(t->pairs.slots);
}

/* --- encoding --- */

struct bpe_run {
    const struct tokenizer *t;
    struct merge_space *space;
    struct token_list *out;
};

static enum status encode_word(void *ctx, const char *text, size_t n)
{
    struct bpe_run *run = ctx;
    const struct tokenizer *t = run->t;
    int32_t whole = t->whole_words_first ? vocab_find(t, text, n) : -1;
    if (whole >= 0) return token_list_push(run->out, whole);

    enum status st = merge_space_reserve(run->space, n);
    if (st) return st;
    /* A byte without a token vanishes before merging: its neighbours become each other's. */
    for (size_t i = 0; i < n; i++) {
        int32_t id = t->byte_ids[(uint8_t)text[i]];
        if (id >= 0) merge_add(run->space, (uint32_t)i, 1, id);
    }
    merge_run(run->space, t, text, bpe_rule);
    for (int32_t i = run->space->count ? 0 : -1; !st && i >= 0; i = run->space->symbols[i].next)
        st = token_list_push(run->out, run->space->symbols[i].id);
    return st;
}

/* The length of the run at the start of text whose characters are all valid UTF-8, or all not. */
static size_t run_length(const char *text, size_t n, bool *valid)
{
    uint32_t cp;
    size_t size = utf8_decode(text, n, &cp);
    *valid = cp != UINT32_MAX;
    while (size < n) {
        size_t next = utf8_decode(text + size, n - size, &cp);
        if ((cp != UINT32_MAX) != *valid) break;
        size += next;
    }
    return size;
}

enum status bpe_encode(const struct tokenizer *t, const char *text, size_t n, struct merge_space *space,
                       struct token_list *out)
{
    struct bpe_run run = {.t = t, .space = space, .out = out};
    const struct word_sink sink = {.word = encode_word, .ctx = &run};
    enum status st = ST_OK;
    for (size_t i = 0; !st && i < n;) {
        bool valid;
        size_t size = run_length(text + i, n - i, &valid);
        /* The patterns speak of characters. Bytes that are none make a word by themselves. */
        st = valid ? splitter_run(t->splitter, text + i, size, &sink) : encode_word(&run, text + i, size);
        i += size;
    }
    return st;
}

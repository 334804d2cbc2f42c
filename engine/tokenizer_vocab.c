#include "engine/tokenizer_int.h"

#include "base/memory.h"
#include "base/reader.h"
#include "base/utf8.h"

#include <math.h>
#include <string.h>

#define KEY "tokenizer.ggml."

/* --- bytes to id --- */

static uint32_t bytes_hash(const char *bytes, size_t n)
{
    uint32_t h = 2166136261u; /* FNV-1a, then murmur3's finaliser: the table is cut from the low bits */
    for (size_t i = 0; i < n; i++) h = (h ^ (uint8_t)bytes[i]) * 16777619u;
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return h ^ h >> 16;
}

/* The slot that holds these bytes, or the empty one where they belong. */
static struct token_slot *index_slot(const struct tokenizer *t, const char *bytes, size_t n, uint32_t hash)
{
    size_t i = hash & t->index.mask;
    for (;; i = (i + 1) & t->index.mask) {
        struct token_slot *slot = &t->index.slots[i];
        if (slot->id < 0) return slot;
        const struct gguf_string *p = &t->pieces[slot->id];
        if (slot->hash == hash && p->size == n && memcmp(p->data, bytes, n) == 0) return slot;
    }
}

int32_t vocab_find(const struct tokenizer *t, const char *bytes, size_t n)
{
    if (n == 0 || n > t->index.size_max) return -1;
    return index_slot(t, bytes, n, bytes_hash(bytes, n))->id;
}

static bool is_plain(const struct tokenizer *t, size_t id)
{
    return t->types[id] == TOKEN_NORMAL && t->pieces[id].size > 0;
}

static bool is_special(const struct tokenizer *t, size_t id)
{
    return (t->types[id] == TOKEN_USER_DEFINED || token_is_control(t, (int32_t)id)) && t->pieces[id].size > 0;
}

static void index_add(struct tokenizer *t, int32_t id, int32_t *present)
{
    const struct gguf_string *p = &t->pieces[id];
    uint32_t hash = bytes_hash(p->data, p->size);
    struct token_slot *slot = index_slot(t, p->data, p->size, hash);
    *present = slot->id;
    if (slot->id >= 0) return;
    *slot = (struct token_slot){.hash = hash, .id = id};
    if (p->size > t->index.size_max) t->index.size_max = p->size;
}

static enum status index_build(struct tokenizer *t, struct error *err)
{
    size_t slots = 16;
    while (slots < 2 * t->count) slots *= 2;
    t->index.slots = malloc(size_mul(slots, sizeof *t->index.slots));
    if (!t->index.slots) return ST_NOMEM;
    t->index.mask = slots - 1;
    for (size_t i = 0; i < slots; i++) t->index.slots[i] = (struct token_slot){.id = -1};

    int32_t present;
    for (size_t i = 0; i < t->count; i++) {
        if (!is_plain(t, i)) continue;
        index_add(t, (int32_t)i, &present);
        if (present >= 0)
            return error_set(err, ST_BAD_FORMAT, KEY "tokens: tokens %d and %zu are the same", (int)present,
                             i);
    }
    /* Merges may pass through, and end at, a token that is also matched as a whole. */
    for (size_t i = 0; i < t->count; i++)
        if (t->types[i] == TOKEN_USER_DEFINED && t->pieces[i].size > 0) index_add(t, (int32_t)i, &present);
    return ST_OK;
}

/* --- tokens matched as wholes --- */

static int compare_bytes(const struct gguf_string *a, const struct gguf_string *b)
{
    int order = memcmp(a->data, b->data, a->size < b->size ? a->size : b->size);
    return order ? order : (a->size > b->size) - (a->size < b->size);
}

static int compare_specials(const void *a, const void *b, void *ctx)
{
    const struct tokenizer *t = ctx;
    return compare_bytes(&t->pieces[*(const int32_t *)a], &t->pieces[*(const int32_t *)b]);
}

static enum status specials_build(struct tokenizer *t, struct error *err)
{
    for (size_t i = 0; i < t->count; i++) t->special_count += is_special(t, i);
    t->specials = calloc(t->special_count + 1, sizeof *t->specials);
    if (!t->specials) return ST_NOMEM;

    size_t n = 0;
    for (size_t i = 0; i < t->count; i++) {
        if (!is_special(t, i)) continue;
        t->specials[n++] = (int32_t)i;
        t->special_first[(uint8_t)t->pieces[i].data[0]] = true;
    }
    qsort_r(t->specials, n, sizeof *t->specials, compare_specials, t);
    for (size_t i = 1; i < n; i++) {
        int32_t a = t->specials[i - 1], b = t->specials[i];
        if (compare_bytes(&t->pieces[a], &t->pieces[b]) == 0)
            return error_set(err, ST_BAD_FORMAT, KEY "tokens: special tokens %d and %d are the same", (int)a,
                             (int)b);
    }
    return ST_OK;
}

/* Within specials[lo..hi), which agree in their first `depth` bytes: the first whose next byte is at
 * least c. One that ends at depth sorts before all others. */
static size_t specials_bound(const struct tokenizer *t, size_t lo, size_t hi, size_t depth, int c)
{
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        const struct gguf_string *p = &t->pieces[t->specials[mid]];
        int next = p->size > depth ? (uint8_t)p->data[depth] : -1;
        if (next < c)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

int32_t vocab_match_special(const struct tokenizer *t, const char *text, size_t n, bool control)
{
    if (n == 0 || !t->special_first[(uint8_t)text[0]]) return -1;
    int32_t best = -1;
    size_t lo = 0, hi = t->special_count;
    for (size_t depth = 0; depth < n && lo < hi; depth++) {
        int c = (uint8_t)text[depth];
        lo = specials_bound(t, lo, hi, depth, c);
        hi = specials_bound(t, lo, hi, depth, c + 1);
        if (lo == hi) break;
        int32_t id = t->specials[lo];
        if (t->pieces[id].size == depth + 1 && (control || !token_is_control(t, id))) best = id;
    }
    return best;
}

/* --- the bytes of each token --- */

/* Printable Latin-1 stands for itself; the 68 other bytes, in order, are U+0100 and up. */
static bool byte_is_printable(unsigned b)
{
    return (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
}

static int byte_of_character(uint32_t cp)
{
    if (cp < 0x100) return byte_is_printable(cp) ? (int)cp : -1;
    uint32_t k = cp - 0x100; /* the k-th of the others: 0..0x20, 0x7F..0xA0, 0xAD */
    if (k <= 0x20) return (int)k;
    if (k <= 0x42) return (int)(k - 0x21 + 0x7F);
    return k == 0x43 ? 0xAD : -1;
}

bool byte_alphabet_decode(const char *text, size_t n, char *out, size_t *size_out)
{
    size_t size = 0;
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        i += utf8_decode(text + i, n - i, &cp);
        int byte = byte_of_character(cp);
        if (byte < 0) return false;
        out[size++] = (char)byte;
    }
    *size_out = size;
    return true;
}

size_t spaces_decode(const char *text, size_t n, char *out)
{
    size_t size = 0;
    for (size_t i = 0; i < n;) {
        bool space = n - i >= 3 && memcmp(text + i, "\xE2\x96\x81", 3) == 0;
        out[size++] = space ? ' ' : text[i];
        i += space ? 3 : 1;
    }
    return size;
}

/* "<0x0A>" */
static int byte_of_name(const struct gguf_string *s)
{
    static const char digits[] = "0123456789ABCDEF";
    if (s->size != 6 || memcmp(s->data, "<0x", 3) || s->data[5] != '>') return -1;
    const char *high = memchr(digits, s->data[3], 16), *low = memchr(digits, s->data[4], 16);
    return high && low ? (int)((high - digits) * 16 + (low - digits)) : -1;
}

/* Replaces the file's text of token i by the bytes it stands for, written at `room`. What is in the
 * text's own bytes already stays where it is. */
static enum status piece_decode(struct tokenizer *t, size_t i, char **room, struct error *err)
{
    struct gguf_string *p = &t->pieces[i];
    size_t size = 0;
    if (t->types[i] == TOKEN_BYTE) {
        int byte = t->family == TOKENIZER_SPM ? byte_of_name(p) : -1;
        if (byte < 0 || t->byte_ids[byte] >= 0)
            return error_set(err, ST_BAD_FORMAT,
                             KEY "tokens: '%.*s' (token %zu) is no byte token, or a second one",
                             (int)(p->size < 64 ? p->size : 64), p->data, i);
        t->byte_ids[byte] = (int32_t)i;
        (*room)[size++] = (char)byte;
    } else if (t->family == TOKENIZER_SPM) {
        if (t->types[i] != TOKEN_NORMAL && t->types[i] != TOKEN_USER_DEFINED) return ST_OK;
        size = spaces_decode(p->data, p->size, *room);
    } else if (t->types[i] != TOKEN_NORMAL || !byte_alphabet_decode(p->data, p->size, *room, &size)) {
        return ST_OK;
    }
    *p = (struct gguf_string){.data = *room, .size = size};
    *room += size;
    return ST_OK;
}

static enum status pieces_read(struct tokenizer *t, const struct gguf *g, struct error *err)
{
    enum status st = gguf_get_strings(g, KEY "tokens", &t->pieces, &t->count, err);
    if (st) return st;
    if (t->count == 0 || t->count > TOKENIZER_VOCAB_MAX)
        return error_set(err, ST_BAD_FORMAT, KEY "tokens: %zu tokens; from 1 to %d can be read", t->count,
                         TOKENIZER_VOCAB_MAX);
    size_t bytes = 1;
    for (size_t i = 0; i < t->count; i++) {
        if (t->pieces[i].size > TOKENIZER_TOKEN_BYTES_MAX)
            return error_set(err, ST_BAD_FORMAT,
                             KEY "tokens: token %zu has %zu bytes; at most %d can be read", i,
                             t->pieces[i].size, TOKENIZER_TOKEN_BYTES_MAX);
        bytes = size_add(bytes, t->pieces[i].size);
    }
    t->arena = malloc(bytes);
    return t->arena ? ST_OK : ST_NOMEM;
}

/* An optional array of one scalar for each token: NULL data where it is missing. */
static enum status per_token_array(const struct tokenizer *t, const struct gguf *g, const char *key,
                                   enum gguf_type type, struct gguf_array *out, struct error *err)
{
    *out = (struct gguf_array){0};
    enum status st = gguf_get_array(g, key, out, err);
    if (st == ST_NOT_FOUND) return ST_OK;
    if (st) return st;
    if (out->type != type || out->count != t->count)
        return error_set(err, ST_BAD_FORMAT, "%s: element type %d, count %llu; needed are type %d, count %zu",
                         key, (int)out->type, (unsigned long long)out->count, (int)type, t->count);
    return ST_OK;
}

static enum status types_read(struct tokenizer *t, const struct gguf *g, struct error *err)
{
    struct gguf_array array;
    enum status st = per_token_array(t, g, KEY "token_type", GGUF_I32, &array, err);
    if (st) return st;
    t->types = malloc(t->count);
    if (!t->types) return ST_NOMEM;
    memset(t->types, TOKEN_NORMAL, t->count);
    struct reader r = reader_of(array.data, array.data ? 4 * t->count : 0);
    for (size_t i = 0; array.data && i < t->count; i++) {
        uint32_t type = reader_u32(&r);
        if (type > TOKEN_BYTE)
            return error_set(err, ST_BAD_FORMAT, KEY "token_type: token %zu has type %u; known are 0 to %d",
                             i, type, TOKEN_BYTE);
        if (type != 0) t->types[i] = (uint8_t)type;
    }
    return ST_OK;
}

static enum status scores_read(struct tokenizer *t, const struct gguf *g, struct error *err)
{
    struct gguf_array array;
    enum status st = per_token_array(t, g, KEY "scores", GGUF_F32, &array, err);
    if (st) return st;
    if (!array.data)
        return error_set(err, ST_BAD_FORMAT,
                         KEY "scores: missing; a llama tokenizer needs them to order its merges");
    t->scores = calloc(t->count, sizeof *t->scores);
    if (!t->scores) return ST_NOMEM;
    struct reader r = reader_of(array.data, 4 * t->count);
    for (size_t i = 0; i < t->count; i++) {
        t->scores[i] = reader_f32(&r);
        if (isnan(t->scores[i]))
            return error_set(err, ST_BAD_FORMAT, KEY "scores: that of token %zu is NaN", i);
    }
    return ST_OK;
}

/* --- bytes without a token --- */

static enum status bytes_check(struct tokenizer *t, struct error *err)
{
    for (int b = 0; b < 256 && t->family == TOKENIZER_BPE; b++) {
        char byte = (char)b;
        t->byte_ids[b] = vocab_find(t, &byte, 1);
    }
    int missing = 0;
    for (int b = 0; b < 256; b++) missing += t->byte_ids[b] < 0;
    if (missing > 0 && t->family == TOKENIZER_SPM)
        return error_set(
            err, ST_UNSUPPORTED,
            KEY "tokens: %d of the 256 byte tokens <0x00> to <0xFF> are missing; vocabularies without "
                "byte fallback are not supported",
            missing);
    return missing < 256
               ? ST_OK
               : error_set(err, ST_BAD_FORMAT, KEY "tokens: no token of a single byte: not byte-level BPE");
}

/* --- special ids and flags --- */

static enum status id_read(const struct tokenizer *t, const struct gguf *g, const char *key, int32_t *out,
                           struct error *err)
{
    *out = -1;
    uint64_t id = 0;
    enum status st = gguf_get_u64(g, key, &id, err);
    if (st == ST_NOT_FOUND) return ST_OK;
    if (st) return st;
    if (id >= t->count)
        return error_set(err, ST_BAD_FORMAT, "%s: id %llu is not among the %zu tokens", key,
                         (unsigned long long)id, t->count);
    *out = (int32_t)id;
    return ST_OK;
}

static enum status flag_read(const struct gguf *g, const char *key, bool otherwise, bool *out,
                             struct error *err)
{
    *out = otherwise;
    enum status st = gguf_get_bool(g, key, out, err);
    return st == ST_NOT_FOUND ? ST_OK : st;
}

/* Ends of a turn that models write but files often do not name: only eos has a key everywhere. */
static const char *const end_texts[] = {"<|im_end|>",      "<|eot_id|>",     "<|eom_id|>",
                                        "<|end|>",         "<end_of_turn>",  "<|endoftext|>",
                                        "<|end_of_text|>", "<|end_of_turn|>"};

static enum status ends_read(struct tokenizer *t, const struct gguf *g, struct error *err)
{
    t->is_end = calloc(t->count, sizeof *t->is_end);
    if (!t->is_end) return ST_NOMEM;
    static const char *const keys[] = {KEY "eot_token_id", KEY "eom_token_id"};
    for (size_t k = 0; k < sizeof keys / sizeof *keys; k++) {
        int32_t id;
        enum status st = id_read(t, g, keys[k], &id, err);
        if (st) return st;
        if (id >= 0) t->is_end[id] = true;
    }
    if (t->eos >= 0) t->is_end[t->eos] = true;
    for (size_t k = 0; k < sizeof end_texts / sizeof *end_texts; k++) {
        size_t n = strlen(end_texts[k]);
        int32_t id = vocab_match_special(t, end_texts[k], n, true);
        if (id >= 0 && t->pieces[id].size == n && token_is_control(t, id)) t->is_end[id] = true;
    }
    return ST_OK;
}

static enum status flags_read(struct tokenizer *t, const struct gguf *g, struct error *err)
{
    enum status st = id_read(t, g, KEY "bos_token_id", &t->bos, err);
    if (!st) st = id_read(t, g, KEY "eos_token_id", &t->eos, err);
    /* Files older than the flag: Llama models, of both families, begin with bos. */
    struct gguf_string pre = {0};
    if (!st && t->family == TOKENIZER_BPE && gguf_get_string(g, KEY "pre", &pre, NULL)) pre.size = 0;
    bool llama = t->family == TOKENIZER_SPM || (pre.size == 9 && memcmp(pre.data, "llama-bpe", 9) == 0);
    if (!st) st = flag_read(g, KEY "add_bos_token", llama && t->bos >= 0, &t->add_bos, err);
    if (!st) st = flag_read(g, KEY "add_eos_token", false, &t->add_eos, err);
    bool spm = t->family == TOKENIZER_SPM, squeeze = false;
    if (!st && spm) st = flag_read(g, KEY "add_space_prefix", true, &t->add_space_prefix, err);
    if (!st && spm) st = flag_read(g, KEY "remove_extra_whitespaces", false, &squeeze, err);
    if (st) return st;
    if ((t->add_bos && t->bos < 0) || (t->add_eos && t->eos < 0))
        return error_set(err, ST_BAD_FORMAT, KEY "add_%s_token is true, but " KEY "%s_token_id is missing",
                         t->add_bos && t->bos < 0 ? "bos" : "eos", t->add_bos && t->bos < 0 ? "bos" : "eos");
    if (squeeze)
        return error_set(err, ST_UNSUPPORTED,
                         KEY "remove_extra_whitespaces: text normalisation is not supported");
    return ST_OK;
}

enum status vocab_read(struct tokenizer *t, const struct gguf *g, struct error *err)
{
    memset(t->byte_ids, 0xFF, sizeof t->byte_ids); /* -1 */
    enum status st = pieces_read(t, g, err);
    if (!st) st = types_read(t, g, err);
    if (!st && t->family == TOKENIZER_SPM) st = scores_read(t, g, err);
    char *room = t->arena;
    for (size_t i = 0; !st && i < t->count; i++) st = piece_decode(t, i, &room, err);
    if (!st) st = index_build(t, err);
    if (!st) st = specials_build(t, err);
    if (!st) st = bytes_check(t, err);
    if (!st) st = flags_read(t, g, err);
    if (!st) st = ends_read(t, g, err);
    return st;
}

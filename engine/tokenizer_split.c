/* Pre-tokenizers: the regular expressions that cut a text into words, which merges never cross.
 *
 * Each is a list of patterns applied one after the other, every one to the pieces that the one
 * before left: a match is a piece of its own, and so is what lies between two matches. The patterns
 * are those of the models' tokenizer.json; `default` is what llama.cpp calls by that name. What a
 * pattern looks ahead at ends with its piece.
 *
 * Letters and digits are those of the Unicode version that PCRE2 was built with: a character that
 * was assigned later counts as neither, and may be cut otherwise than by a newer library. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "engine/tokenizer_int.h"

#include "base/memory.h"

#include <pcre2.h>
#include <string.h>

#define PATTERNS_MAX 4

/* Unicode's White_Space. PCRE2's \s has U+180E too, which stopped being white space in 2013. */
#define SPACES \
    "\\t-\\r\\x{20}\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}"
#define SPACE     "[" SPACES "]"
#define NOT_SPACE "[^" SPACES "]"

/* A run of spaces leaves its last one to the word behind it. */
#define SPACE_RUNS SPACE "+(?!" NOT_SPACE ")|" SPACE "+"
#define GPT2_WORDS "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" SPACES "\\p{L}\\p{N}]+|" SPACE_RUNS
#define LLAMA3_WORDS(digits)                                                            \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits "| ?[^" SPACES \
    "\\p{L}\\p{N}]+[\\r\\n]*|" SPACE "*[\\r\\n]+|" SPACE_RUNS

static const struct {
    const char *name;
    const char *patterns[PATTERNS_MAX];
} known[] = {
    {"gpt-2", {GPT2_WORDS}},
    {"smollm", {"\\p{N}", GPT2_WORDS}},
    {"llama-bpe", {LLAMA3_WORDS("\\p{N}{1,3}")}},
    {"qwen2", {LLAMA3_WORDS("\\p{N}")}},
    {"default", {"[\\p{P}$+<=>^~|]+", GPT2_WORDS, "\\p{N}+", "[0-9][0-9][0-9]"}},
};

struct splitter {
    pcre2_code *patterns[PATTERNS_MAX];
    int count;
    pcre2_match_context *context;
};

static enum status pattern_compile(const char *pattern, pcre2_code **out, struct error *err)
{
    int code;
    PCRE2_SIZE offset;
    pcre2_code *re = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &code,
                                   &offset, NULL);
    if (!re) {
        PCRE2_UCHAR why[128] = "";
        pcre2_get_error_message(code, why, sizeof why);
        return error_set(err, code == PCRE2_ERROR_HEAP_FAILED ? ST_NOMEM : ST_UNSUPPORTED,
                         "tokenizer: PCRE2 cannot compile a pre-tokenizer: %s (at %zu of '%s')", (char *)why,
                         (size_t)offset, pattern);
    }
    /* Where there is no JIT (or no memory for it) pcre2_match interprets: slower, same words. */
    (void)pcre2_jit_compile(re, PCRE2_JIT_COMPLETE);
    *out = re;
    return ST_OK;
}

enum status splitter_open(struct gguf_string name, struct splitter **out, struct error *err)
{
    size_t k = 0, known_count = sizeof known / sizeof *known;
    while (k < known_count &&
           (strlen(known[k].name) != name.size || memcmp(known[k].name, name.data, name.size)))
        k++;
    if (k == known_count)
        return error_set(err, ST_UNSUPPORTED,
                         "tokenizer.ggml.pre: pre-tokenizer '%.*s' is not known; known are gpt-2, smollm, "
                         "llama-bpe, qwen2 and default",
                         (int)(name.size < 64 ? name.size : 64), name.data);

    struct splitter *s = calloc(1, sizeof *s);
    if (!s) return ST_NOMEM;
    enum status st = ST_NOMEM;
    s->context = pcre2_match_context_create(NULL);
    if (!s->context) goto done;
    /* The limit guards against exponential patterns; these take linear time, over texts of any length. */
    pcre2_set_match_limit(s->context, UINT32_MAX);
    for (; s->count < PATTERNS_MAX && known[k].patterns[s->count]; s->count++) {
        st = pattern_compile(known[k].patterns[s->count], &s->patterns[s->count], err);
        if (st) goto done;
    }
    *out = s;
    s = NULL;
done:
    splitter_close(s);
    return st;
}

void splitter_close(struct splitter *s)
{
    if (!s) return;
    for (int i = 0; i < s->count; i++) pcre2_code_free(s->patterns[i]);
    pcre2_match_context_free(s->context);
    free(s);
}

struct split {
    const struct splitter *splitter;
    pcre2_match_data *match;
    const struct word_sink *sink;
};

/* Cuts one piece by the patterns from `level` on. */
static enum status split_piece(const struct split *run, int level, const char *text, size_t n)
{
    if (n == 0) return ST_OK;
    /* count is at most PATTERNS_MAX; said again here for compilers that unroll the recursion */
    if (level == run->splitter->count || level == PATTERNS_MAX) return run->sink->word(run->sink->ctx, text, n);

    size_t done = 0;
    while (done < n) {
        int rc = pcre2_match(run->splitter->patterns[level], (PCRE2_SPTR)text, n, done, PCRE2_NO_UTF_CHECK,
                             run->match, run->splitter->context);
        if (rc == PCRE2_ERROR_NOMATCH) break;
        if (rc < 0) return rc == PCRE2_ERROR_NOMEMORY ? ST_NOMEM : ST_TOO_LARGE;
        /* Copied: the levels below use the same match data. */
        size_t begin = pcre2_get_ovector_pointer(run->match)[0],
               end = pcre2_get_ovector_pointer(run->match)[1];
        CHECK(end > begin);
        enum status st = split_piece(run, level + 1, text + done, begin - done);
        if (!st) st = split_piece(run, level + 1, text + begin, end - begin);
        if (st) return st;
        done = end;
    }
    return split_piece(run, level + 1, text + done, n - done);
}

enum status splitter_run(const struct splitter *s, const char *text, size_t n, const struct word_sink *sink)
{
    struct split run = {.splitter = s, .match = pcre2_match_data_create(1, NULL), .sink = sink};
    if (!run.match) return ST_NOMEM;
    enum status st = split_piece(&run, 0, text, n);
    pcre2_match_data_free(run.match);
    return st;
}

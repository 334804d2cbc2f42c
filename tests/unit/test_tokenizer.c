/* The tokenizer against the ids that HF tokenizers and sentencepiece give (tests/fixtures/tokenizer,
 * written by make_tokenizer.py), and against damaged files and hostile texts. */
#include "engine/tokenizer.h"

#include "base/log.h"
#include "base/reader.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"
#include "tests/support/gguf_writer.h"
#include "tests/support/random.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const char *const vocabularies[] = {"bpe-gpt-2", "bpe-smollm",  "bpe-llama-bpe",
                                           "bpe-qwen2", "bpe-default", "spm"};
#define VOCABULARY_COUNT (sizeof vocabularies / sizeof *vocabularies)

/* --- opening fixtures --- */

static void *read_file(const char *name, const char *suffix, size_t *n)
{
    return fixture_read(test_path("tokenizer/%s%s", name, suffix).text, n);
}

struct opened {
    void *bytes;
    struct gguf *gguf;
    struct tokenizer *tokenizer;
};

static struct opened open_bytes(void *bytes, size_t n)
{
    struct opened o = {.bytes = bytes};
    struct error err;
    assert_ok(gguf_parse(bytes, n, &o.gguf, &err), err);
    assert_ok(tokenizer_open(o.gguf, &o.tokenizer, &err), err);
    return o;
}

static struct opened open_vocabulary(const char *name)
{
    size_t n;
    void *bytes = read_file(name, ".gguf", &n);
    return open_bytes(bytes, n);
}

static void close_opened(struct opened *o)
{
    tokenizer_close(o->tokenizer);
    gguf_free(o->gguf);
    free(o->bytes);
}

/* The real model, or a skipped test. */
static struct opened open_model(void)
{
    if (!test_model_present()) skip();
    size_t n;
    void *bytes = test_read_file(test_model_path().text, &n);
    return open_bytes(bytes, n);
}

/* --- helpers --- */

static struct token_list encode(const struct tokenizer *t, const char *text, size_t n, unsigned flags)
{
    struct token_list l = {0};
    assert_int_equal(tokenizer_encode(t, text, n, flags, &l), ST_OK);
    return l;
}

static void assert_ids(const struct tokenizer *t, const char *text, unsigned flags, const int32_t *ids,
                       size_t n)
{
    struct token_list l = encode(t, text, strlen(text), flags);
    assert_int_equal(l.count, n);
    if (n) assert_memory_equal(l.ids, ids, n * sizeof *ids);
    token_list_release(&l);
}
#define ASSERT_IDS(t, text, flags, ...)                        \
    assert_ids(t, text, flags, (const int32_t[]){__VA_ARGS__}, \
               sizeof(int32_t[]){__VA_ARGS__} / sizeof(int32_t))

static void assert_text(const struct tokenizer *t, const struct token_list *l, unsigned flags,
                        const char *text, size_t n)
{
    struct strbuf b = {0};
    assert_int_equal(tokenizer_decode(t, l->ids, l->count, flags, &b), ST_OK);
    assert_int_equal(b.size, n);
    if (n) assert_memory_equal(b.data, text, n);
    strbuf_release(&b);
}

/* The id of the token whose whole text is given. */
static int32_t token_of(const struct tokenizer *t, const char *text)
{
    struct token_list l = encode(t, text, strlen(text), TOKENIZE_PARSE_SPECIAL);
    assert_true(l.count == 1);
    int32_t id = l.ids[0];
    token_list_release(&l);
    return id;
}

static bool has_all_bytes(const struct tokenizer *t, const char *text, size_t n)
{
    bool all = true;
    for (size_t i = 0; all && i < n; i++) {
        struct token_list l = encode(t, text + i, 1, 0);
        all = l.count > 0;
        token_list_release(&l);
    }
    return all;
}

static void assert_round_trip(const struct tokenizer *t, const char *text, size_t n)
{
    struct token_list l = encode(t, text, n, 0);
    assert_text(t, &l, 0, text, n);
    token_list_release(&l);
}

/* --- the corpus --- */

static uint64_t ids_hash(const struct token_list *l)
{
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < 4 * l->count; i++)
        h = (h ^ ((uint32_t)l->ids[i / 4] >> 8 * (i % 4) & 0xFF)) * 0x100000001B3u;
    return h;
}

static struct reader open_corpus(void **bytes, uint32_t *count)
{
    size_t n;
    *bytes = read_file("corpus", ".bin", &n);
    struct reader r = reader_of(*bytes, n);
    *count = reader_u32(&r);
    assert_true(*count >= 10000);
    return r;
}

static const char *next_line(struct reader *corpus, uint32_t *size)
{
    *size = reader_u32(corpus);
    const char *line = reader_take(corpus, *size);
    assert_false(corpus->bad);
    return line;
}

static void check_hashes(const struct tokenizer *t, const char *name, const char *suffix, unsigned flags)
{
    void *corpus;
    uint32_t count, size, wrong = 0;
    size_t hash_bytes;
    void *hashes = read_file(name, suffix, &hash_bytes);
    struct reader lines = open_corpus(&corpus, &count), expected = reader_of(hashes, hash_bytes);
    assert_int_equal(hash_bytes, 8 * (size_t)count);
    for (uint32_t i = 0; i < count; i++) {
        const char *line = next_line(&lines, &size);
        struct token_list l = encode(t, line, size, flags);
        bool equal = ids_hash(&l) == reader_u64(&expected);
        if (!equal && wrong++ < 5)
            print_message("%s%s: line %u has other ids: '%.*s'\n", name, suffix, i, (int)size, line);
        token_list_release(&l);
    }
    assert_int_equal(wrong, 0);
    free(corpus);
    free(hashes);
}

static void test_ids_equal_the_reference(void **state)
{
    (void)state;
    for (size_t v = 0; v < VOCABULARY_COUNT; v++) {
        struct opened o = open_vocabulary(vocabularies[v]);
        check_hashes(o.tokenizer, vocabularies[v], ".hashes", 0);
        if (strcmp(vocabularies[v], "spm") != 0)
            check_hashes(o.tokenizer, vocabularies[v], "-special.hashes", TOKENIZE_PARSE_SPECIAL);
        close_opened(&o);
    }
}

static void test_ids_of_the_real_model_equal_the_reference(void **state)
{
    (void)state;
    struct opened o = open_model();
    check_hashes(o.tokenizer, "smollm2", ".hashes", 0);
    check_hashes(o.tokenizer, "smollm2", "-special.hashes", TOKENIZE_PARSE_SPECIAL);
    close_opened(&o);
}

/* U+2581 in a text is a space to SentencePiece, which only writes spaces back. */
static bool has_space_sign(const char *text, size_t n) { return memmem(text, n, "\xE2\x96\x81", 3) != NULL; }

/* Every line, and a copy of it with a few bytes overwritten, usually no valid UTF-8 any more. */
static void check_round_trips(const struct tokenizer *t, bool spm)
{
    void *corpus;
    uint32_t count, size;
    struct reader lines = open_corpus(&corpus, &count);
    struct test_random random = {7};
    uint32_t checked = 0;
    for (uint32_t i = 0; i < count; i++) {
        char broken[2048];
        const char *line = next_line(&lines, &size);
        assert_true(size <= sizeof broken);
        if (size) memcpy(broken, line, size);
        for (uint32_t k = 0; size && k < 1 + size / 8; k++)
            broken[random_u64(&random) % size] = (char)random_u64(&random);
        for (int k = 0; k < 2; k++) {
            const char *text = k ? broken : line;
            if ((spm && has_space_sign(text, size)) || !has_all_bytes(t, text, size)) continue;
            assert_round_trip(t, text, size);
            checked++;
        }
    }
    assert_true(checked > count);
    free(corpus);
}

static void test_every_text_comes_back(void **state)
{
    (void)state;
    for (size_t v = 0; v < VOCABULARY_COUNT; v++) {
        struct opened o = open_vocabulary(vocabularies[v]);
        check_round_trips(o.tokenizer, strcmp(vocabularies[v], "spm") == 0);
        close_opened(&o);
    }
}

static void test_every_text_comes_back_from_the_real_model(void **state)
{
    (void)state;
    struct opened o = open_model();
    check_round_trips(o.tokenizer, false);
    close_opened(&o);
}

/* --- special tokens, flags, pieces --- */

static void test_special_tokens(void **state)
{
    (void)state;
    struct opened o = open_vocabulary("bpe-qwen2");
    const struct tokenizer *t = o.tokenizer;
    int32_t start = token_of(t, "<|im_start|>"), end = token_of(t, "<|im_end|>"),
            endx = token_of(t, "<|im_end|>x");
    int32_t tool = token_of(t, "<tool>"), tool_open = token_of(t, "<tool"),
            eot = token_of(t, "<|endoftext|>");
    int32_t a = token_of(t, "a");

    ASSERT_IDS(t, "<|im_start|>a<|im_end|>", TOKENIZE_PARSE_SPECIAL, start, a, end);
    ASSERT_IDS(t, "<|im_end|>x<|im_end|>a", TOKENIZE_PARSE_SPECIAL, endx, end, a); /* the longest wins */
    ASSERT_IDS(t, "<tool>a<toola", 0, tool, a, tool_open, a); /* user-defined: matched in any text */
    struct token_list l = encode(t, "<|im_end|>", 10, 0);
    assert_true(l.count > 1);
    assert_text(t, &l, DETOKENIZE_SKIP_SPECIAL, "<|im_end|>", 10); /* its letters are no special token */
    token_list_release(&l);
    l = encode(t, "[UNUSED]", 8, TOKENIZE_PARSE_SPECIAL);
    assert_true(l.count > 1);
    token_list_release(&l);

    assert_true(tokenizer_is_control(t, start) && !tokenizer_is_control(t, tool) &&
                !tokenizer_is_control(t, a));
    assert_false(tokenizer_is_control(t, -1) || tokenizer_is_control(t, INT32_MAX) ||
                 tokenizer_is_end(t, -1));
    assert_int_equal(tokenizer_bos(t), start);
    assert_int_equal(tokenizer_eos(t), end);
    assert_true(tokenizer_is_end(t, end) && tokenizer_is_end(t, eot)); /* eos, and one known by its text */
    assert_false(tokenizer_is_end(t, start) || tokenizer_is_end(t, endx) || tokenizer_is_end(t, tool));

    struct strbuf b = {0};
    const int32_t ids[] = {start, a, tool, end};
    assert_int_equal(tokenizer_decode(t, ids, 4, 0, &b), ST_OK);
    assert_string_equal(b.data, "<|im_start|>a<tool><|im_end|>");
    strbuf_clear(&b);
    assert_int_equal(tokenizer_decode(t, ids, 4, DETOKENIZE_SKIP_SPECIAL, &b), ST_OK);
    assert_string_equal(b.data, "a<tool>");
    const int32_t wrong[] = {a, (int32_t)tokenizer_vocab_size(t)};
    assert_int_equal(tokenizer_decode(t, wrong, 2, 0, &b), ST_INVALID);
    assert_int_equal(tokenizer_decode(t, (const int32_t[]){-1}, 1, 0, &b), ST_INVALID);
    assert_string_equal(b.data, "a<tool>"); /* untouched */
    strbuf_release(&b);
    close_opened(&o);
}

static void test_bos_where_the_model_asks_for_it(void **state)
{
    (void)state;
    struct opened qwen = open_vocabulary("bpe-qwen2"), llama = open_vocabulary("bpe-llama-bpe"),
                  spm = open_vocabulary("spm");
    ASSERT_IDS(qwen.tokenizer, "a", TOKENIZE_ADD_SPECIAL, token_of(qwen.tokenizer, "a"));
    ASSERT_IDS(llama.tokenizer, "a", TOKENIZE_ADD_SPECIAL, tokenizer_bos(llama.tokenizer),
               token_of(llama.tokenizer, "a"));
    struct token_list l = encode(spm.tokenizer, "a", 1, TOKENIZE_ADD_SPECIAL);
    assert_int_equal(l.ids[0], tokenizer_bos(spm.tokenizer));
    token_list_release(&l);
    ASSERT_IDS(spm.tokenizer, "", TOKENIZE_ADD_SPECIAL, tokenizer_bos(spm.tokenizer));
    close_opened(&qwen);
    close_opened(&llama);
    close_opened(&spm);
}

static void test_a_whole_word_needs_no_merges(void **state)
{
    (void)state;
    struct opened o = open_vocabulary("bpe-llama-bpe");
    struct token_list l = encode(o.tokenizer, " na\xC3\xAFve", 7, 0);
    assert_int_equal(l.count, 1);
    token_list_release(&l);
    close_opened(&o);
}

static void test_pieces(void **state)
{
    (void)state;
    struct opened o = open_vocabulary("bpe-gpt-2");
    const struct tokenizer *t = o.tokenizer;
    size_t size;
    int32_t end = token_of(t, "<|im_end|>"), the = token_of(t, " the");
    assert_memory_equal(tokenizer_piece(t, the, 0, true, &size), " the", 4);
    assert_int_equal(size, 4);
    assert_memory_equal(tokenizer_piece(t, end, 0, false, &size), "<|im_end|>", 10);
    assert_int_equal(size, 10);
    assert_null(tokenizer_piece(t, end, DETOKENIZE_SKIP_SPECIAL, false, &size));
    assert_int_equal(size, 0);
    assert_null(tokenizer_piece(t, -1, 0, false, &size));
    assert_null(tokenizer_piece(t, (int32_t)tokenizer_vocab_size(t), 0, false, &size));
    close_opened(&o);
}

static void test_sentencepiece_spaces_and_bytes(void **state)
{
    (void)state;
    struct opened o = open_vocabulary("spm");
    const struct tokenizer *t = o.tokenizer;
    size_t size;
    struct token_list l = encode(t, "the", 3, 0);
    assert_int_equal(l.count, 1);
    assert_memory_equal(tokenizer_piece(t, l.ids[0], 0, false, &size), " the", 4);
    assert_int_equal(size, 4);
    assert_memory_equal(tokenizer_piece(t, l.ids[0], 0, true, &size), "the", 3);
    assert_int_equal(size, 3);
    token_list_release(&l);

    /* A part behind a special token begins with a space again, and loses it again. */
    l = encode(t, "<s>the</s> the", 14, TOKENIZE_PARSE_SPECIAL);
    assert_int_equal(l.ids[0], tokenizer_bos(t));
    assert_int_equal(l.ids[2], tokenizer_eos(t));
    assert_text(t, &l, 0, "<s>the</s> the", 14);
    assert_text(t, &l, DETOKENIZE_SKIP_SPECIAL, "the the", 7);
    token_list_release(&l);

    l = encode(t, "\xF0\x9F\xFF", 3, 0); /* a space, and three byte tokens */
    assert_int_equal(l.count, 4);
    assert_memory_equal(tokenizer_piece(t, l.ids[3], 0, false, &size), "\xFF", 1);
    assert_int_equal(size, 1);
    token_list_release(&l);
    close_opened(&o);
}

static void test_the_real_model(void **state)
{
    (void)state;
    struct opened o = open_model();
    const struct tokenizer *t = o.tokenizer;
    assert_int_equal(tokenizer_vocab_size(t), 49152);
    ASSERT_IDS(t, "<|im_start|>user\n", TOKENIZE_PARSE_SPECIAL | TOKENIZE_ADD_SPECIAL, 1, 4093, 198);
    assert_true(tokenizer_is_end(t, 0) && tokenizer_is_end(t, 2) && !tokenizer_is_end(t, 1));
    close_opened(&o);
}

/* --- hostile input --- */

/* Of a length at which anything quadratic would not end. */
static void test_long_texts(void **state)
{
    (void)state;
    enum { N = 1 << 18 };
    static const char *const units[] = {
        "a",    " ",  "\n", "1",         ".",        " \n", "\xF0\x9F\x98\x80",
        "\xFF", "ab", "<",  "<|im_end|", "\xCC\x81", "a "};
    char *text = malloc(N);
    assert_non_null(text);
    for (size_t v = 0; v < VOCABULARY_COUNT; v++) {
        struct opened o = open_vocabulary(vocabularies[v]);
        for (size_t u = 0; u < sizeof units / sizeof *units; u++) {
            size_t unit = strlen(units[u]), n = N - N % unit;
            for (size_t i = 0; i < n; i++) text[i] = units[u][i % unit];
            struct token_list l = encode(o.tokenizer, text, n, TOKENIZE_PARSE_SPECIAL);
            assert_text(o.tokenizer, &l, 0, text, n);
            token_list_release(&l);
        }
        close_opened(&o);
    }
    free(text);
}

static void test_random_bytes(void **state)
{
    (void)state;
    struct test_random random = {11};
    for (size_t v = 0; v < VOCABULARY_COUNT; v++) {
        struct opened o = open_vocabulary(vocabularies[v]);
        for (int i = 0; i < 2000; i++) {
            char text[64];
            size_t n = random_u64(&random) % sizeof text;
            for (size_t k = 0; k < n; k++) text[k] = (char)random_u64(&random);
            assert_round_trip(o.tokenizer, text, n);
        }
        close_opened(&o);
    }
}

/* Files in which one thing is wrong: `to` is written where `from` begins. */
#define BYTES(literal)              \
    {                               \
        literal, sizeof literal - 1 \
    }
static const struct damage {
    const char *vocabulary;
    struct gguf_string from, to;
    enum status status;
    const char *message; /* a part of it */
} damages[] = {
    {"bpe-gpt-2", BYTES("gpt2"), BYTES("gpt3"), ST_UNSUPPORTED, "'gpt3' is not known"},
    {"bpe-gpt-2", BYTES("gpt-2"), BYTES("gpt-9"), ST_UNSUPPORTED, "'gpt-9' is not known"},
    {"bpe-gpt-2", BYTES("ggml.merges"), BYTES("ggml.mergex"), ST_BAD_FORMAT, "merges: missing"},
    {"bpe-gpt-2", BYTES("ggml.tokens"), BYTES("ggml.tokenx"), ST_NOT_FOUND, "tokenizer.ggml.tokens"},
    {"bpe-gpt-2", BYTES("ggml.model"), BYTES("ggml.mode1"), ST_NOT_FOUND, "tokenizer.ggml.model"},
    {"bpe-gpt-2", BYTES("\1\0\0\0\0\0\0\0!"), BYTES("\1\0\0\0\0\0\0\0\""), ST_BAD_FORMAT, "are the same"},
    {"bpe-gpt-2", BYTES("<|im_sep|>"), BYTES("<|im_end|>"), ST_BAD_FORMAT, "special tokens"},
    {"bpe-gpt-2", BYTES("bos_token_id\4\0\0\0"), BYTES("bos_token_id\4\0\0\0\0\0\1\0"), ST_BAD_FORMAT,
     "id 65536 is not among"},
    {"bpe-gpt-2", BYTES("bos_token_id\4\0\0\0"), BYTES("bos_token_id\6\0\0\0"), ST_BAD_FORMAT,
     "tokenizer.ggml.bos_token_id"},
    {"bpe-llama-bpe", BYTES("bos_token_id\4\0\0\0"), BYTES("xos_token_id"), ST_OK,
     ""},                                                                     /* no bos: none is added */
    {"spm", BYTES("add_space_prefix"), BYTES("xdd_space_prefix"), ST_OK, ""}, /* there by default */
    {"spm", BYTES("ggml.scores"), BYTES("ggml.scorex"), ST_BAD_FORMAT, "scores: missing"},
    {"spm", BYTES("<0xA0>"), BYTES("<0xZ0>"), ST_BAD_FORMAT, "is no byte token"},
    {"spm", BYTES("<0xA0>"), BYTES("<0xA1>"), ST_BAD_FORMAT, "a second one"},
};

static void test_what_is_wrong_is_said(void **state)
{
    (void)state;
    for (size_t d = 0; d < sizeof damages / sizeof *damages; d++) {
        const struct damage *k = &damages[d];
        size_t n;
        char *bytes = read_file(k->vocabulary, ".gguf", &n);
        char *at = memmem(bytes, n, k->from.data, k->from.size);
        assert_non_null(at);
        memcpy(at, k->to.data, k->to.size);

        struct gguf *g = NULL;
        struct tokenizer *t = NULL;
        struct error err = {0};
        assert_ok(gguf_parse(bytes, n, &g, &err), err);
        enum status st = tokenizer_open(g, &t, &err);
        if (k->status)
            assert_refused(st, k->status, err, k->message);
        else
            assert_ok(st, err);
        tokenizer_close(t);
        gguf_free(g);
        free(bytes);
    }
}

/* A vocabulary of a few tokens, of which one thing may be wrong. */
struct small {
    const char *model, *merges[3]; /* merges end at NULL */
    size_t type_count;
    uint32_t types[5];
    size_t score_count;
    float scores[5];
    const char *flag; /* set to true */
};
static const char *const small_tokens[] = {"a", "b", "ab", "c", "<s>"};
#define SMALL_TYPES  .type_count = 5, .types = {1, 1, 1, 1, 3}
#define SMALL_SCORES .score_count = 5, .scores = {0}

static enum status open_small(const struct small *v, struct strbuf *bytes, struct gguf **g,
                              struct tokenizer **t, struct error *err)
{
    struct gguf_writer w = {.version = 3};
    size_t merge_count = 0;
    while (merge_count < 3 && v->merges[merge_count]) merge_count++;
    gguf_put_string(&w, "tokenizer.ggml.model", v->model);
    gguf_put_strings(&w, "tokenizer.ggml.tokens", small_tokens, 5);
    gguf_put_strings(&w, "tokenizer.ggml.merges", v->merges, merge_count);
    gguf_put_array(&w, "tokenizer.ggml.token_type", GGUF_I32, v->type_count, v->types, 4 * v->type_count);
    if (v->score_count)
        gguf_put_array(&w, "tokenizer.ggml.scores", GGUF_F32, v->score_count, v->scores, 4 * v->score_count);
    if (v->flag) gguf_put_u64(&w, v->flag, GGUF_BOOL, 1);
    gguf_finish(&w, bytes);
    assert_false(bytes->failed);
    assert_int_equal(gguf_parse(bytes->data, bytes->size, g, NULL), ST_OK);
    return tokenizer_open(*g, t, err);
}

static void test_small_vocabularies(void **state)
{
    (void)state;
    static const struct {
        struct small vocabulary;
        enum status status;
        const char *message;
    } cases[] = {
        {{"gpt2", {"a b"}, SMALL_TYPES}, ST_OK, ""},
        {{"gpt2", {"a b", "a b"}, SMALL_TYPES}, ST_BAD_FORMAT, "merge 1, 'a b', is there twice"},
        {{"gpt2", {"a b", "a c"}, SMALL_TYPES}, ST_BAD_FORMAT, "merge 1, 'a c', is not of two tokens"},
        {{"gpt2", {"a b", "ab"}, SMALL_TYPES}, ST_BAD_FORMAT, "merge 1"},
        {{"gpt2", {"< s>"}, SMALL_TYPES},
         ST_BAD_FORMAT,
         "merge 0"}, /* a control token is none of plain text */
        {{"gpt2", {"a b"}, .type_count = 4, .types = {1, 1, 1, 1}},
         ST_BAD_FORMAT,
         "count 4; needed are type 5, count 5"},
        {{"gpt2", {"a b"}, .type_count = 5, .types = {1, 1, 1, 7, 3}}, ST_BAD_FORMAT, "token 3 has type 7"},
        {{"gpt2", {"a b"}, .type_count = 5, .types = {3, 3, 3, 3, 3}},
         ST_BAD_FORMAT,
         "no token of a single byte"},
        {{"gpt2", {"a b"}, .type_count = 5, .types = {6, 1, 1, 1, 3}},
         ST_BAD_FORMAT,
         "'a' (token 0) is no byte token"},
        {{"gpt2", {"a b"}, SMALL_TYPES, .flag = "tokenizer.ggml.add_bos_token"},
         ST_BAD_FORMAT,
         "bos_token_id is missing"},
        {{"gpt2", {"a b"}, SMALL_TYPES, .flag = "tokenizer.ggml.add_eos_token"},
         ST_BAD_FORMAT,
         "eos_token_id is missing"},
        {{"llama", {0}, SMALL_TYPES, SMALL_SCORES}, ST_UNSUPPORTED, "256 of the 256 byte tokens"},
        {{"llama", {0}, SMALL_TYPES, .score_count = 3}, ST_BAD_FORMAT, "count 3"},
        {{"llama", {0}, SMALL_TYPES, .score_count = 5, .scores = {[2] = NAN}},
         ST_BAD_FORMAT,
         "token 2 is NaN"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct strbuf bytes = {0};
        struct gguf *g;
        struct tokenizer *t = NULL;
        struct error err = {0};
        enum status st = open_small(&cases[i].vocabulary, &bytes, &g, &t, &err);
        if (cases[i].status)
            assert_refused(st, cases[i].status, err, cases[i].message);
        else
            assert_ok(st, err);
        if (t) ASSERT_IDS(t, "abcab?", 0, 2, 3, 2); /* no pre-tokenizer named, no token for '?' */
        tokenizer_close(t);
        gguf_free(g);
        strbuf_release(&bytes);
    }
}

/* Each allocation in turn fails. Without memory for its machine code PCRE2 interprets, so not
 * every failure is one of ours. */
static void test_out_of_memory(void **state)
{
    (void)state;
    if (!alloc_fail_available()) skip();
    static const char text[] = "Hello <|im_end|> w\xC3\xB6rld 123 \xFF";
    for (size_t v = 0; v < VOCABULARY_COUNT; v++) {
        size_t n;
        void *bytes = read_file(vocabularies[v], ".gguf", &n);
        struct gguf *g;
        assert_int_equal(gguf_parse(bytes, n, &g, NULL), ST_OK);
        bool failed = true;
        for (long k = 0; failed; k++) {
            struct tokenizer *t = NULL;
            struct token_list l = {0};
            struct strbuf b = {0};
            struct error err = {0};
            long live = alloc_live();
            alloc_fail_after(k);
            enum status st = tokenizer_open(g, &t, &err);
            if (!st) st = tokenizer_encode(t, text, sizeof text - 1, TOKENIZE_PARSE_SPECIAL, &l);
            if (!st) st = tokenizer_decode(t, l.ids, l.count, 0, &b);
            failed = alloc_fail_stop();
            assert_true(st == ST_OK || (failed && st == ST_NOMEM));
            strbuf_release(&b);
            token_list_release(&l);
            tokenizer_close(t);
            assert_int_equal(alloc_live(), live);
        }
        gguf_free(g);
        free(bytes);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ids_equal_the_reference),
        cmocka_unit_test(test_ids_of_the_real_model_equal_the_reference),
        cmocka_unit_test(test_every_text_comes_back),
        cmocka_unit_test(test_every_text_comes_back_from_the_real_model),
        cmocka_unit_test(test_special_tokens),
        cmocka_unit_test(test_bos_where_the_model_asks_for_it),
        cmocka_unit_test(test_a_whole_word_needs_no_merges),
        cmocka_unit_test(test_pieces),
        cmocka_unit_test(test_sentencepiece_spaces_and_bytes),
        cmocka_unit_test(test_the_real_model),
        cmocka_unit_test(test_long_texts),
        cmocka_unit_test(test_random_bytes),
        cmocka_unit_test(test_what_is_wrong_is_said),
        cmocka_unit_test(test_small_vocabularies),
        cmocka_unit_test(test_out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

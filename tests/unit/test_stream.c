#include "engine/stream.h"

#include "base/gguf.h"
#include "base/strbuf.h"
#include "base/utf8.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"
#include "tests/support/random.h"

#include <stdlib.h>
#include <string.h>

struct vocabulary {
    void *bytes;
    struct gguf *gguf;
    struct tokenizer *tokenizer;
};

static int setup(void **state)
{
    static struct vocabulary v;
    size_t size;
    v.bytes = fixture_read("models/gqa_tied.gguf", &size);
    if (gguf_parse(v.bytes, size, &v.gguf, NULL) != ST_OK) return -1;
    if (tokenizer_open(v.gguf, &v.tokenizer, NULL) != ST_OK) return -1;
    *state = &v;
    return 0;
}

static int teardown(void **state)
{
    struct vocabulary *v = *state;
    tokenizer_close(v->tokenizer);
    gguf_free(v->gguf);
    free(v->bytes);
    return 0;
}

static struct stream *stream_make(struct vocabulary *v, const char *const *stop, size_t count,
                                  bool include_stop)
{
    struct sampling s = {.stop = stop, .stop_count = count, .include_stop = include_stop,
                         .skip_special = true};
    struct stream *stream = stream_new(v->tokenizer, &s);
    assert_non_null(stream);
    return stream;
}

/* Pushes bytes as tokens, and adds what became certain to out. False once a stop string matched. */
static bool push(struct vocabulary *v, struct stream *s, const char *bytes, size_t n, bool can_stop,
                 struct strbuf *out)
{
    struct token_list tokens = {0};
    assert_int_equal(tokenizer_encode(v->tokenizer, bytes, n, 0, &tokens), ST_OK);
    for (size_t i = 0; i < tokens.count && !stream_stopped_by(s); i++) {
        assert_int_equal(stream_push(s, tokens.ids[i], can_stop), ST_OK);
        size_t size;
        const char *text = stream_take(s, &size);
        strbuf_append(out, text, size);
    }
    token_list_release(&tokens);
    return !stream_stopped_by(s);
}

static void finish(struct stream *s, struct strbuf *out)
{
    size_t size;
    assert_int_equal(stream_finish(s), ST_OK);
    const char *text = stream_take(s, &size);
    strbuf_append(out, text, size);
    strbuf_putc(out, '\0');
    stream_free(s);
}

static void test_characters_stay_whole(void **state)
{
    struct vocabulary *v = *state;
    struct stream *s = stream_make(v, NULL, 0, false);
    struct strbuf out = {0};
    const char text[] = "a\xE2\x82\xAC\xF0\x9F\x99\x82z"; /* a euro smile z, byte by byte */
    for (size_t i = 0; i < sizeof text - 1; i++) {
        push(v, s, text + i, 1, true, &out);
        assert_int_equal(out.size, utf8_complete_prefix(text, i + 1));
        assert_memory_equal(out.data, text, out.size);
    }
    finish(s, &out);
    assert_string_equal(out.data, text);
    strbuf_release(&out);
}

static void test_broken_bytes_become_replacements(void **state)
{
    struct vocabulary *v = *state;
    struct stream *s = stream_make(v, NULL, 0, false);
    struct strbuf out = {0};
    push(v, s, "a\xFF" "b\xC3" "c\xF0\x9F", 7, true, &out); /* the last may still become a character */
    assert_string_equal(out.data, "a\xEF\xBF\xBD" "b\xEF\xBF\xBD" "c");
    finish(s, &out);
    assert_true(utf8_valid(out.data, out.size));
    assert_string_equal(out.data, "a\xEF\xBF\xBD" "b\xEF\xBF\xBD" "c\xEF\xBF\xBD\xEF\xBF\xBD");
    strbuf_release(&out);
}

static void test_special_tokens(void **state)
{
    struct vocabulary *v = *state;
    for (int skip = 0; skip < 2; skip++) {
        struct sampling rules = {.skip_special = skip};
        struct stream *s = stream_new(v->tokenizer, &rules);
        struct strbuf out = {0};
        assert_int_equal(stream_push(s, 1, true), ST_OK); /* <|im_start|> */
        push(v, s, "hi", 2, true, &out);
        finish(s, &out);
        assert_string_equal(out.data, skip ? "hi" : "<|im_start|>hi");
        strbuf_release(&out);
    }
}

static void stop_case(struct vocabulary *v, const char *text, const char *const *stop, size_t count,
                      bool include, const char *expect, const char *by)
{
    struct stream *s = stream_make(v, stop, count, include);
    struct strbuf out = {0};
    for (size_t i = 0; text[i] && push(v, s, text + i, 1, true, &out); i++) {}
    const char *stopped_by = stream_stopped_by(s);
    if (by) assert_string_equal(stopped_by, by);
    else assert_null(stopped_by);
    finish(s, &out);
    assert_string_equal(out.data, expect);
    strbuf_release(&out);
}

static void test_stop_strings(void **state)
{
    struct vocabulary *v = *state;
    const char *const stop[] = {"END", "ENDING", "\n\n", "\xE2\x82\xAC", "aab"};
    stop_case(v, "The END of it", stop, 5, false, "The ", "END");
    stop_case(v, "The END of it", stop, 5, true, "The END", "END");
    stop_case(v, "The EN", stop, 5, false, "The EN", NULL);
    stop_case(v, "EEND", stop, 5, false, "E", "END");
    stop_case(v, "x\n \n\ny", stop, 5, false, "x\n ", "\n\n");
    stop_case(v, "cost 5\xE2\x82\xAC!", stop, 5, false, "cost 5", "\xE2\x82\xAC");
    stop_case(v, "aaaab", stop, 5, false, "aa", "aab");
    stop_case(v, "abc", (const char *const[]){"bc", "abc"}, 2, false, "", "abc");
    stop_case(v, "abcd", (const char *const[]){"abcd", "bc"}, 2, false, "a", "bc");
}

/* Text of the first min_tokens can neither be a stop string nor begin one. */
static void test_not_before_min_tokens(void **state)
{
    struct vocabulary *v = *state;
    struct stream *s = stream_make(v, (const char *const[]){"ab"}, 1, false);
    struct strbuf out = {0};
    assert_true(push(v, s, "ab a", 4, false, &out));
    assert_string_equal(out.data, "ab a");
    assert_true(push(v, s, "b", 1, true, &out));
    assert_string_equal(out.data, "ab ab");
    assert_false(push(v, s, "xab", 3, true, &out));
    finish(s, &out);
    assert_string_equal(out.data, "ab abx");
    strbuf_release(&out);
}

/* --- random texts against the definition --- */

/* The first place where a stop string ends, and which (the longest); n where there is none. */
static size_t first_stop(const char *text, size_t n, const char *const *stop, size_t count,
                         size_t *which)
{
    for (size_t end = 1; end <= n; end++) {
        size_t best = 0;
        for (size_t i = 0; i < count; i++) {
            size_t size = strlen(stop[i]);
            if (size > best && size <= end && memcmp(text + end - size, stop[i], size) == 0) {
                best = size;
                *which = i;
            }
        }
        if (best > 0) return end;
    }
    *which = count;
    return n;
}

/* Length of the longest end of text that some stop string begins with. */
static size_t claimed(const char *text, size_t n, const char *const *stop, size_t count)
{
    size_t longest = 0;
    for (size_t i = 0; i < count; i++)
        for (size_t k = strlen(stop[i]) - 1; k > longest; k--)
            if (k <= n && memcmp(text + n - k, stop[i], k) == 0) longest = k;
    return longest;
}

static size_t random_text(struct test_random *r, char *out, size_t count)
{
    static const char *const letter[] = {"a", "b", "a", "b", "\xC3\xA9", " "};
    size_t n = 0;
    for (size_t i = 0; i < count; i++) {
        const char *c = letter[random_below(r, 6)];
        memcpy(out + n, c, strlen(c));
        n += strlen(c);
    }
    out[n] = '\0';
    return n;
}

static void random_case(struct vocabulary *v, uint64_t seed)
{
    struct test_random r = {seed};
    char text[256], stops[4][32];
    const char *stop[4];
    size_t n = random_text(&r, text, 5 + random_below(&r, 60)), count = 1 + random_below(&r, 4);
    for (size_t i = 0; i < count; i++) {
        random_text(&r, stops[i], 1 + random_below(&r, 6));
        stop[i] = stops[i];
    }
    bool include = random_below(&r, 2);
    size_t which, end = first_stop(text, n, stop, count, &which);
    size_t expect = which < count && !include ? end - strlen(stop[which]) : end;

    struct stream *s = stream_make(v, stop, count, include);
    struct strbuf out = {0};
    for (size_t at = 0; at < n;) {
        size_t piece = 1 + random_below(&r, 5);
        if (piece > n - at) piece = n - at;
        at += piece;
        if (!push(v, s, text + at - piece, piece, true, &out)) break;
        size_t whole = utf8_complete_prefix(text, at);
        assert_int_equal(out.size, whole - claimed(text, whole, stop, count));
    }
    if (which < count) assert_string_equal(stream_stopped_by(s), stop[which]);
    else assert_null(stream_stopped_by(s));
    finish(s, &out);
    assert_int_equal(out.size - 1, expect);
    assert_memory_equal(out.data, text, expect);
    strbuf_release(&out);
}

static void test_random_texts(void **state)
{
    for (uint64_t seed = 1; seed <= 3000; seed++) random_case(*state, seed);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_characters_stay_whole),
        cmocka_unit_test(test_broken_bytes_become_replacements),
        cmocka_unit_test(test_special_tokens),
        cmocka_unit_test(test_stop_strings),
        cmocka_unit_test(test_not_before_min_tokens),
        cmocka_unit_test(test_random_texts),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}

#include "base/gguf.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"
#include "tests/support/gguf_writer.h"
#include "tests/support/mutate.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

static const uint64_t DIMS_64X2[] = {64, 2};
static const float VALUES[128] = {1, 2, 3};

/* Finishes w, parses the bytes, and expects ST_OK; *file must outlive the table. */
static struct gguf *parsed(struct gguf_writer *w, struct strbuf *file)
{
    struct gguf *g = NULL;
    struct error err;
    gguf_finish(w, file);
    assert_false(file->failed);
    assert_ok(gguf_parse(file->data, file->size, &g, &err), err);
    return g;
}

/* Finishes w and expects a refusal that says `text`. */
static void refused(struct gguf_writer *w, enum status wanted, const char *text)
{
    struct strbuf file = {0};
    struct error err = {0};
    struct gguf *g = (struct gguf *)&err; /* anything: it must stay */
    gguf_finish(w, &file);
    assert_refused(gguf_parse(file.data, file.size, &g, &err), wanted, err, text);
    assert_ptr_equal(g, &err);
    strbuf_release(&file);
}

static void reads_every_kind_of_value(void **state)
{
    (void)state;
    static const char *const words[] = {"one", "", "drei \xC3\xA9"};
    static const int32_t numbers[] = {-1, 0, INT32_MAX};
    struct strbuf file = {0};
    struct gguf_writer w = {.version = 3};
    gguf_put_u64(&w, "u8", GGUF_U8, 255);
    gguf_put_u64(&w, "i8", GGUF_I8, 0xFF);
    gguf_put_u64(&w, "u16", GGUF_U16, 65535);
    gguf_put_u64(&w, "i16", GGUF_I16, 32767);
    gguf_put_u64(&w, "u32", GGUF_U32, UINT32_MAX);
    gguf_put_u64(&w, "i32", GGUF_I32, 0x80000000);
    gguf_put_u64(&w, "u64", GGUF_U64, UINT64_MAX);
    gguf_put_u64(&w, "i64", GGUF_I64, (uint64_t)INT64_MIN);
    gguf_put_u64(&w, "yes", GGUF_BOOL, 1);
    gguf_put_u64(&w, "no", GGUF_BOOL, 0);
    gguf_put_f32(&w, "f32", 0.5f);
    gguf_put_f64(&w, "f64", -1e300);
    gguf_put_string(&w, "string", "llama");
    gguf_put_strings(&w, "strings", words, 3);
    gguf_put_array(&w, "numbers", GGUF_I32, 3, numbers, sizeof numbers);
    gguf_put_array(&w, "empty", GGUF_F64, 0, NULL, 0);
    struct gguf *g = parsed(&w, &file);

    static const struct {
        const char *key;
        uint64_t value;
    } unsigneds[] = {{"u8", 255}, {"u16", 65535}, {"i16", 32767}, {"u32", UINT32_MAX}, {"u64", UINT64_MAX}};
    struct error err;
    for (size_t i = 0; i < 5; i++) {
        uint64_t u = 0;
        assert_ok(gguf_get_u64(g, unsigneds[i].key, &u, &err), err);
        assert_true(u == unsigneds[i].value);
    }
    static const struct {
        const char *key;
        double value;
    } floats[] = {{"f32", 0.5},           {"f64", -1e300},  {"i8", -1},
                  {"i32", -2147483648.0}, {"i64", -0x1p63}, {"u8", 255}};
    for (size_t i = 0; i < 6; i++) {
        double f = 0;
        assert_ok(gguf_get_f64(g, floats[i].key, &f, &err), err);
        assert_true(f == floats[i].value);
    }
    bool yes = false, no = true;
    assert_ok(gguf_get_bool(g, "yes", &yes, &err), err);
    assert_ok(gguf_get_bool(g, "no", &no, &err), err);
    assert_true(yes && !no);
    struct gguf_string s, *strings;
    size_t count;
    assert_ok(gguf_get_string(g, "string", &s, &err), err);
    assert_true(s.size == 5 && !memcmp(s.data, "llama", 5));
    assert_ok(gguf_get_strings(g, "strings", &strings, &count, &err), err);
    assert_int_equal(count, 3);
    for (size_t i = 0; i < 3; i++)
        assert_true(strings[i].size == strlen(words[i]) &&
                    !memcmp(strings[i].data, words[i], strings[i].size));
    free(strings);
    struct gguf_array a;
    assert_ok(gguf_get_array(g, "numbers", &a, &err), err);
    assert_true(a.type == GGUF_I32 && a.count == 3 && !memcmp(a.data, numbers, sizeof numbers));
    assert_ok(gguf_get_array(g, "empty", &a, &err), err);
    assert_true(a.type == GGUF_F64 && a.count == 0);

    gguf_free(g);
    strbuf_release(&file);
}

static void says_what_a_key_lacks(void **state)
{
    (void)state;
    /* one element that is an array of two bytes */
    static const uint8_t nested[] = {GGUF_U8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 8};
    struct strbuf file = {0};
    struct gguf_writer w = {.version = 3};
    gguf_put_u64(&w, "minus", GGUF_I16, 0xFFFB);
    gguf_put_u64(&w, "odd", GGUF_BOOL, 2);
    gguf_put_string(&w, "string", "x");
    gguf_put_array(&w, "bytes", GGUF_U8, 2, "ab", 2);
    gguf_put_array(&w, "nested", GGUF_ARRAY, 1, nested, sizeof nested);
    struct gguf *g = parsed(&w, &file);

    uint64_t u = 1;
    double f = 1;
    bool b;
    struct gguf_string s, *strings;
    struct gguf_array a;
    size_t count;
    struct error err;
    assert_refused(gguf_get_u64(g, "absent", &u, &err), ST_NOT_FOUND, err, "'absent' is missing");
    assert_refused(gguf_get_u64(g, "minus", &u, &err), ST_BAD_FORMAT, err, "-5, not 0 or more");
    assert_refused(gguf_get_u64(g, "string", &u, &err), ST_BAD_FORMAT, err,
                   "'string' is of type string, not an integer");
    assert_refused(gguf_get_f64(g, "bytes", &f, &err), ST_BAD_FORMAT, err, "array of uint8, not a number");
    assert_refused(gguf_get_bool(g, "odd", &b, &err), ST_BAD_FORMAT, err, "value 2, not 0 or 1");
    assert_refused(gguf_get_bool(g, "minus", &b, &err), ST_BAD_FORMAT, err, "int16, not bool");
    assert_refused(gguf_get_string(g, "bytes", &s, &err), ST_BAD_FORMAT, err, "not string");
    assert_refused(gguf_get_array(g, "string", &a, &err), ST_BAD_FORMAT, err, "not an array");
    assert_refused(gguf_get_array(g, "nested", &a, &err), ST_BAD_FORMAT, err, "array of array");
    assert_refused(gguf_get_strings(g, "bytes", &strings, &count, &err), ST_BAD_FORMAT, err,
                   "not an array of strings");
    assert_true(u == 1 && f == 1);
    gguf_free(g);
    strbuf_release(&file);
}

static void reads_tensors(void **state)
{
    (void)state;
    static const uint64_t cube[] = {2, 3, 4, 5};
    static const float many[120] = {7};
    for (uint32_t version = 2; version <= 3; version++) {
        for (uint64_t alignment = 8; alignment <= 4096; alignment *= 8) {
            struct strbuf file = {0};
            struct gguf_writer w = {.version = version, .alignment = alignment};
            gguf_put_u64(&w, "general.alignment", GGUF_U32, alignment);
            gguf_put_tensor(&w, "norm", DTYPE_F32, 1, DIMS_64X2, VALUES, 256);
            gguf_put_tensor(&w, "w", DTYPE_Q4_1, 2, DIMS_64X2, VALUES, 80);
            gguf_put_tensor(&w, "cube", DTYPE_F32, 4, cube, many, sizeof many);
            struct gguf *g = parsed(&w, &file);
            assert_int_equal(gguf_tensor_count(g), 3);
            const struct gguf_tensor *t = gguf_tensor_find(g, "w");
            assert_ptr_equal(t, gguf_tensor_at(g, 1));
            assert_int_equal(t->type, DTYPE_Q4_1);
            assert_int_equal(t->dim_count, 2);
            assert_true(t->dim[0] == 64 && t->dim[1] == 2 && t->dim[2] == 1 && t->dim[3] == 1);
            assert_int_equal(t->bytes, 80);
            assert_memory_equal(t->data, VALUES, 80);
            assert_int_equal(((const char *)t->data - file.data) % (ptrdiff_t)alignment, 0);
            assert_int_equal(gguf_tensor_find(g, "cube")->bytes, sizeof many);
            assert_null(gguf_tensor_find(g, "nor"));
            gguf_free(g);
            strbuf_release(&file);
        }
    }
}

static void a_file_without_tensors_may_end_at_its_keys(void **state)
{
    (void)state;
    struct strbuf file = {0};
    struct gguf_writer w = {.version = 3};
    gguf_put_u64(&w, "a", GGUF_U8, 1);
    struct gguf *g = parsed(&w, &file);
    assert_int_equal(gguf_tensor_count(g), 0);
    gguf_free(g);
    strbuf_release(&file);
    gguf_free(NULL);
}

static void refuses_bad_headers(void **state)
{
    (void)state;
    static const uint32_t versions[] = {0, 1, 4, 0x03000000};
    static const char *const says[] = {"version 0 ", "version 1 ", "version 4 ", "big-endian"};
    for (int i = 0; i < 4; i++)
        refused(&(struct gguf_writer){.version = versions[i]}, ST_UNSUPPORTED, says[i]);

    refused(&(struct gguf_writer){.version = 3, .tensor_count = 1}, ST_BAD_FORMAT, "1 tensors cannot fit");
    refused(&(struct gguf_writer){.version = 3, .tensor_count = UINT64_MAX}, ST_BAD_FORMAT,
            "tensors cannot fit");
    refused(&(struct gguf_writer){.version = 3, .value_count = UINT64_MAX}, ST_BAD_FORMAT, "keys cannot fit");

    struct error err;
    struct gguf *g;
    assert_refused(gguf_parse("GGML\3\0\0\0aaaaaaaaaaaaaaaa", 24, &g, &err), ST_BAD_FORMAT, err,
                   "not a GGUF file");
    assert_refused(gguf_parse("GGUF", 4, &g, &err), ST_BAD_FORMAT, err, "not a GGUF file");
    assert_refused(gguf_parse(NULL, 0, &g, &err), ST_BAD_FORMAT, err, "not a GGUF file");
}

static void refuses_bad_values(void **state)
{
    (void)state;
    static const uint8_t long_array[12] = {GGUF_U64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20}; /* 2^61 elements */
    static const uint8_t long_strings[12] = {GGUF_STRING, 0,    0,    0,    0xFF, 0xFF,
                                             0xFF,        0xFF, 0xFF, 0xFF, 0xFF, 0xFF};
    static const uint8_t odd_array[12] = {13};
    uint8_t deep[12 * 9]; /* arrays of one array each */
    memset(deep, 0, sizeof deep);
    for (size_t i = 0; i < sizeof deep; i += 12) {
        deep[i] = GGUF_ARRAY;
        deep[i + 4] = 1;
    }
    static const struct {
        const char *key;
        uint32_t type;
        const void *value;
        size_t bytes;
        const char *says;
    } cases[] = {
        {"k", 13, "a", 1, "unknown type 13"},
        {"k", UINT32_MAX, "abcd", 4, "'k' has the unknown type"},
        {"", GGUF_U8, "ab", 2, "has 0 bytes"},
        {"\xFF", GGUF_U8, "a", 1, "not valid UTF-8"},
        {"cut", GGUF_U32, "ab", 2, "ends inside metadata key 0"},
        {"cut", GGUF_STRING, "\5\0\0\0\0\0\0\0abc", 11, "ends inside metadata key 0"},
        {"cut", GGUF_ARRAY, long_array, 12, "ends inside metadata key 0"},
        {"cut", GGUF_ARRAY, long_strings, 12, "ends inside metadata key 0"},
        {"odd", GGUF_ARRAY, odd_array, 12, "'odd' has elements of an unknown type"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct gguf_writer w = {.version = 3};
        gguf_put_raw(&w, cases[i].key, cases[i].type, cases[i].value, cases[i].bytes);
        refused(&w, ST_BAD_FORMAT, cases[i].says);
    }
    struct gguf_writer w = {.version = 3};
    gguf_put_raw(&w, "deep", GGUF_ARRAY, deep, sizeof deep);
    refused(&w, ST_BAD_FORMAT, "nests deeper than 4");
    gguf_put_u64(&w, "twice", GGUF_U8, 1);
    gguf_put_u64(&w, "twice", GGUF_U8, 1);
    w.version = 3;
    w.value_count = 2;
    refused(&w, ST_BAD_FORMAT, "'twice' appears twice");
}

static void refuses_bad_alignments(void **state)
{
    (void)state;
    static const uint64_t alignments[] = {0, 33, 1u << 21};
    for (int i = 0; i < 3; i++) {
        struct gguf_writer w = {.version = 3};
        gguf_put_u64(&w, "general.alignment", GGUF_U32, alignments[i]);
        refused(&w, ST_BAD_FORMAT, "general.alignment is");
    }
    struct gguf_writer w = {.version = 3};
    gguf_put_string(&w, "general.alignment", "32");
    refused(&w, ST_BAD_FORMAT, "'general.alignment' is of type string");
    w = (struct gguf_writer){.version = 3, .alignment = 8}; /* laid out by 8, read by 32 */
    gguf_put_tensor(&w, "a", DTYPE_F32, 1, (uint64_t[]){2}, VALUES, 8);
    gguf_put_tensor(&w, "b", DTYPE_F32, 1, (uint64_t[]){2}, VALUES, 8);
    refused(&w, ST_BAD_FORMAT, "'b' starts at 8, which is not a multiple of 32");
}

static void refuses_bad_tensors(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        uint32_t type;
        int dim_count;
        uint64_t dim[5];
        enum status status;
        const char *says;
    } cases[] = {
        {"t", 4, 1, {32}, ST_UNSUPPORTED, "'t' has element type number 4"},
        {"t", UINT32_MAX, 1, {32}, ST_UNSUPPORTED, "F32 F16 Q4_0"},
        {"t", DTYPE_F32, 0, {0}, ST_BAD_FORMAT, "has 0 dimensions"},
        {"t", DTYPE_F32, 5, {1, 1, 1, 1, 1}, ST_BAD_FORMAT, "has 5 dimensions"},
        {"t", DTYPE_F32, 2, {4, 0}, ST_BAD_FORMAT, "dimension 1 of tensor 't' is 0"},
        {"t", DTYPE_Q4_1, 2, {33, 2}, ST_BAD_FORMAT, "whole blocks of 32 elements of Q4_1"},
        {"t", DTYPE_F32, 1, {UINT64_MAX}, ST_BAD_FORMAT, "too large"},
        {"t", DTYPE_F32, 2, {1ull << 32, 1ull << 32}, ST_BAD_FORMAT, "too large"},
        {"t", DTYPE_F32, 4, {1 << 16, 1 << 16, 1 << 16, 1 << 16}, ST_BAD_FORMAT, "too large"},
        {"t", DTYPE_F32, 1, {129}, ST_BAD_FORMAT, "reaches beyond the file"},
        {"t", DTYPE_F32, 1, {1ull << 61}, ST_BAD_FORMAT, "'t'"},
        {"", DTYPE_F32, 1, {4}, ST_BAD_FORMAT, "name of tensor 0 has 0 bytes"},
        {"a\x80", DTYPE_F32, 1, {4}, ST_BAD_FORMAT, "not valid UTF-8"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct gguf_writer w = {.version = 3};
        gguf_put_tensor(&w, cases[i].name, cases[i].type, cases[i].dim_count, cases[i].dim, VALUES,
                        sizeof VALUES);
        refused(&w, cases[i].status, cases[i].says);
    }
    struct gguf_writer w = {.version = 3};
    gguf_put_tensor(&w, "twice", DTYPE_F32, 1, DIMS_64X2, VALUES, 256);
    gguf_put_tensor(&w, "twice", DTYPE_F32, 1, DIMS_64X2, VALUES, 256);
    refused(&w, ST_BAD_FORMAT, "'twice' appears twice");
}

static void make_whole(struct strbuf *file)
{
    static const char *const words[] = {"one", "two"};
    struct gguf_writer w = {.version = 3};
    gguf_put_string(&w, "general.architecture", "llama");
    gguf_put_strings(&w, "words", words, 2);
    gguf_put_tensor(&w, "a", DTYPE_F32, 2, DIMS_64X2, VALUES, sizeof VALUES);
    gguf_put_tensor(&w, "b", DTYPE_Q8_0, 1, DIMS_64X2, VALUES, 68);
    gguf_finish(&w, file);
}

static void every_truncation_is_refused(void **state)
{
    (void)state;
    struct strbuf file = {0};
    make_whole(&file);
    const struct mutate_source whole = {.data = file.data, .size = file.size};
    for (size_t n = 0; n < file.size; n++) {
        uint8_t *cut = mutate_truncate(&whole, n);
        struct error err = {0};
        struct gguf *g;
        if (gguf_parse(cut, n, &g, &err) != ST_BAD_FORMAT || !err.message[0]) fail_msg("cut at %zu", n);
        free(cut);
    }
    strbuf_release(&file);
}

static enum status parse_and_look_up(void *file)
{
    const struct strbuf *bytes = file;
    struct gguf *g;
    struct gguf_string *words;
    size_t count;
    enum status st = gguf_parse(bytes->data, bytes->size, &g, NULL);
    if (st) return st;
    st = gguf_get_strings(g, "words", &words, &count, NULL);
    if (!st) free(words);
    gguf_free(g);
    return st;
}

static void survives_every_failed_allocation(void **state)
{
    (void)state;
    if (!alloc_fail_available()) skip();
    struct strbuf file = {0};
    make_whole(&file);
    assert_true(alloc_fail_sweep(parse_and_look_up, &file) >= 7);
    strbuf_release(&file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_every_kind_of_value),
        cmocka_unit_test(says_what_a_key_lacks),
        cmocka_unit_test(reads_tensors),
        cmocka_unit_test(a_file_without_tensors_may_end_at_its_keys),
        cmocka_unit_test(refuses_bad_headers),
        cmocka_unit_test(refuses_bad_values),
        cmocka_unit_test(refuses_bad_alignments),
        cmocka_unit_test(refuses_bad_tensors),
        cmocka_unit_test(every_truncation_is_refused),
        cmocka_unit_test(survives_every_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#include "base/safetensors.h"
#include "base/strbuf.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"
#include "tests/support/mutate.h"

#include <stdlib.h>

/* A file of this header text and `data_size` zero bytes. */
static void make_file(struct strbuf *out, const char *header, size_t data_size)
{
    for (int i = 0; i < 8; i++) strbuf_putc(out, (char)((uint64_t)strlen(header) >> (8 * i)));
    strbuf_puts(out, header);
    for (size_t i = 0; i < data_size; i++) strbuf_putc(out, '\0');
}

static void refused(const char *header, size_t data_size, enum status wanted, const char *text)
{
    struct strbuf file = {0};
    struct error err = {0};
    struct safetensors *s = (struct safetensors *)&err; /* anything: it must stay */
    make_file(&file, header, data_size);
    assert_refused(safetensors_parse(file.data, file.size, &s, &err), wanted, err, text);
    assert_ptr_equal(s, &err);
    strbuf_release(&file);
}

static struct safetensors *accepted(struct strbuf *file, const char *header, size_t data_size)
{
    struct error err = {0};
    struct safetensors *s = NULL;
    make_file(file, header, data_size);
    assert_ok(safetensors_parse(file->data, file->size, &s, &err), err);
    return s;
}

static void reads_what_it_writes(void **state)
{
    (void)state;
    static const float values[6] = {1, 2, 3, 4, 5, 6};
    static const struct safetensor tensors[] = {
        {"first", DTYPE_F32, 2, {2, 3, 1, 1}, values, 24},
        {"q \"\\\n\xC3\xA9", DTYPE_BF16, 1, {3, 1, 1, 1}, values, 6},
        {"scalar", DTYPE_F16, 0, {1, 1, 1, 1}, values, 2},
        {"empty", DTYPE_F32, 2, {0, 3, 1, 1}, values, 0},
        {"four", DTYPE_F16, 4, {1, 2, 1, 2}, values, 8},
    };
    struct strbuf file = {0};
    struct error err = {0};
    struct safetensors *s;
    safetensors_write(tensors, 5, &file);
    assert_ok(safetensors_parse(file.data, file.size, &s, &err), err);
    assert_int_equal(safetensors_count(s), 5);
    for (size_t i = 0; i < 5; i++) {
        const struct safetensor *t = safetensors_at(s, i), *wanted = &tensors[i];
        assert_string_equal(t->name, wanted->name);
        assert_int_equal(t->type, wanted->type);
        assert_int_equal(t->dim_count, wanted->dim_count);
        assert_memory_equal(t->dim, wanted->dim, sizeof t->dim);
        assert_int_equal(t->bytes, wanted->bytes);
        assert_memory_equal(t->data, wanted->data, t->bytes);
        assert_ptr_equal(safetensors_find(s, wanted->name), t);
    }
    assert_null(safetensors_find(s, "absent"));
    safetensors_free(s);
    strbuf_release(&file);
    safetensors_free(NULL);
}

static void reads_a_file_of_the_safetensors_library(void **state)
{
    (void)state;
    size_t size;
    void *file = fixture_read("adapters/lora_gqa_tied/adapter_model.safetensors", &size);
    struct safetensors *s;
    struct error err;
    assert_ok(safetensors_parse(file, size, &s, &err), err);
    const struct safetensor *t =
        safetensors_find(s, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
    assert_non_null(t);
    assert_int_equal(t->dim_count, 2);
    assert_int_equal(t->dim[0], 4); /* the adapter's rank */
    safetensors_free(s);
    free(file);
}

#define RECORD(shape, offsets) "{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static void accepts_any_order_and_metadata(void **state)
{
    (void)state;
    struct strbuf file = {0};
    struct safetensors *s =
        accepted(&file,
                 "{\"__metadata__\":{\"format\":\"pt\",\"e\":\"\"}, \"b\" : "
                 "{\"data_offsets\":[4,12],\"shape\":[2],\"dtype\":\"F32\"},"
                 "\"a\":" RECORD("[]", "[0,4]") ",\"\\u007a\":" RECORD("[0]", "[4,4]") "}   ",
                 12);
    assert_int_equal(safetensors_count(s), 3);
    assert_string_equal(safetensors_at(s, 0)->name, "b"); /* file order */
    assert_int_equal(
        (const char *)safetensors_find(s, "b")->data - (const char *)safetensors_find(s, "a")->data, 4);
    assert_non_null(safetensors_find(s, "z"));
    safetensors_free(s);
    strbuf_release(&file);

    file = (struct strbuf){0};
    s = accepted(&file, "{}", 0);
    assert_int_equal(safetensors_count(s), 0);
    safetensors_free(s);
    strbuf_release(&file);
}

static void refuses_wrong_headers(void **state)
{
    (void)state;
    refused("", 0, ST_BAD_FORMAT, "column 1: the header must be a JSON object");
    refused("[]", 0, ST_BAD_FORMAT, "must be a JSON object");
    refused("{} x", 0, ST_BAD_FORMAT, "column 4: there is more");
    refused("{\"a\":1}", 0, ST_BAD_FORMAT, "a tensor's record is expected");
    refused("{\"a\":{}}", 0, ST_BAD_FORMAT, "a string is expected");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[]}}", 0, ST_BAD_FORMAT,
            "lacks dtype, shape or data_offsets");
    refused("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 0, ST_BAD_FORMAT, "each once");
    refused("{\"a\":{\"extra\":1}}", 0, ST_BAD_FORMAT, "and no more");
    refused("{\"a\":{\"dtype\":{}}}", 0, ST_BAD_FORMAT, "a string is expected");
    refused("{\"a\":" RECORD("[1,[2]]", "[0,4]") "}", 4, ST_BAD_FORMAT, "an integer of 0 or more");
    refused("{\"a\":" RECORD("[-1]", "[0,4]") "}", 4, ST_BAD_FORMAT, "an integer of 0 or more");
    refused("{\"a\":" RECORD("[1.5]", "[0,4]") "}", 4, ST_BAD_FORMAT, "',' or ']'");
    refused("{\"a\":" RECORD("[18446744073709551616]", "[0,4]") "}", 4, ST_BAD_FORMAT, "too large");
    refused("{\"a\":" RECORD("[1,1,1,1,1]", "[0,4]") "}", 4, ST_BAD_FORMAT, "too many numbers");
    refused("{\"a\":" RECORD("[1]", "[0]") "}", 4, ST_BAD_FORMAT, "[begin, end]");
    refused("{\"a\":" RECORD("[1]", "[4,0]") "}", 4, ST_BAD_FORMAT, "[begin, end]");
    refused("{\"a\\u0000b\":" RECORD("[1]", "[0,4]") "}", 4, ST_BAD_FORMAT, "NUL");
    refused("{\"__metadata__\":{\"a\":1}}", 0, ST_BAD_FORMAT, "a string is expected");
    refused("{\"__metadata__\":{},\"__metadata__\":{}}", 0, ST_BAD_FORMAT, "__metadata__ appears twice");
    refused("{\"a\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]}}", 8, ST_UNSUPPORTED,
            "tensor 'a' is of type I64, not F32, F16 or BF16");
    refused("{\"a\":{\"dtype\":\"F32\\u0001 and much more text than any type has\"}}", 0, ST_UNSUPPORTED,
            "'a'");
}

static void refuses_ranges_that_do_not_tile(void **state)
{
    (void)state;
    refused("{\"a\":" RECORD("[1]", "[0,4]") ",\"a\":" RECORD("[1]", "[4,8]") "}", 8, ST_BAD_FORMAT,
            "'a' appears twice");
    refused("{\"a\":" RECORD("[2]", "[0,8]") ",\"b\":" RECORD("[1]", "[4,8]") "}", 8, ST_BAD_FORMAT,
            "overlap");
    refused("{\"a\":" RECORD("[1]", "[0,4]") ",\"b\":" RECORD("[1]", "[8,12]") "}", 12, ST_BAD_FORMAT,
            "leave a hole");
    refused("{\"a\":" RECORD("[1]", "[4,8]") "}", 8, ST_BAD_FORMAT, "'a' begins at 4");
    refused("{\"a\":" RECORD("[1]", "[0,4]") "}", 5, ST_BAD_FORMAT, "take 4 bytes, but 5 follow");
    refused("{\"a\":" RECORD("[1]", "[0,4]") "}", 3, ST_BAD_FORMAT, "truncated");
    refused("{}", 1, ST_BAD_FORMAT, "damaged");
    refused("{\"a\":" RECORD("[3]", "[0,8]") "}", 8, ST_BAD_FORMAT,
            "'a' has 8 bytes, which is not its shape");
    refused("{\"a\":" RECORD("[4294967296,4294967296]", "[0,0]") "}", 0, ST_BAD_FORMAT, "not its shape");
    refused("{\"a\":" RECORD("[4611686018427387904]", "[0,0]") "}", 0, ST_BAD_FORMAT,
            "not its shape"); /* times 4: 2^64 */
    refused("{\"a\":" RECORD("[1]", "[0,18446744073709551615]") "}", 4, ST_BAD_FORMAT, "'a'");
}

static void refuses_wrong_lengths(void **state)
{
    (void)state;
    static const uint64_t lengths[] = {3, 1ull << 32, UINT64_MAX, UINT64_MAX - 7, 1ull << 63};
    struct error err;
    struct safetensors *s;
    assert_refused(safetensors_parse("abc", 3, &s, &err), ST_BAD_FORMAT, err, "not a safetensors file");
    assert_refused(safetensors_parse(NULL, 0, &s, &err), ST_BAD_FORMAT, err, "not a safetensors file");
    for (int i = 0; i < 5; i++) {
        struct strbuf file = {0};
        make_file(&file, "{}", 0);
        memcpy(file.data, &lengths[i], 8);
        assert_refused(safetensors_parse(file.data, file.size, &s, &err), ST_BAD_FORMAT, err,
                       "not a safetensors file");
        strbuf_release(&file);
    }
}

static void the_number_of_tensors_has_a_limit(void **state)
{
    (void)state;
    for (int extra = 0; extra < 2; extra++) {
        struct strbuf header = {0}, file = {0};
        for (int i = 0; i < SAFETENSORS_TENSORS_MAX + extra; i++)
            strbuf_printf(&header, "%s\"%d\":" RECORD("[0]", "[0,0]"), i ? "," : "{", i);
        strbuf_putc(&header, '}');
        make_file(&file, header.data, 0);
        struct safetensors *s;
        struct error err;
        if (extra) {
            assert_refused(safetensors_parse(file.data, file.size, &s, &err), ST_BAD_FORMAT, err,
                           "too many tensors");
        } else {
            assert_ok(safetensors_parse(file.data, file.size, &s, &err), err);
            assert_string_equal(safetensors_find(s, "65535")->name, "65535");
            safetensors_free(s);
        }
        strbuf_release(&header);
        strbuf_release(&file);
    }
}

static void make_two(struct strbuf *file)
{
    static const float values[6] = {1, 2, 3, 4, 5, 6};
    static const struct safetensor tensors[] = {
        {"first", DTYPE_F32, 2, {2, 3, 1, 1}, values, 24},
        {"second", DTYPE_BF16, 1, {4, 1, 1, 1}, values, 8},
    };
    safetensors_write(tensors, 2, file);
}

static void every_truncation_is_refused(void **state)
{
    (void)state;
    struct strbuf file = {0};
    make_two(&file);
    const struct mutate_source whole = {.data = file.data, .size = file.size};
    for (size_t n = 0; n < file.size; n++) {
        uint8_t *cut = mutate_truncate(&whole, n);
        struct error err = {0};
        struct safetensors *s;
        if (safetensors_parse(cut, n, &s, &err) != ST_BAD_FORMAT || !err.message[0])
            fail_msg("cut at %zu", n);
        free(cut);
    }
    strbuf_release(&file);
}

static enum status write_and_read(void *ctx)
{
    (void)ctx;
    struct strbuf file = {0};
    struct safetensors *s;
    make_two(&file);
    enum status st = file.failed ? ST_NOMEM : safetensors_parse(file.data, file.size, &s, NULL);
    if (!st) safetensors_free(s);
    strbuf_release(&file);
    return st;
}

static void survives_every_failed_allocation(void **state)
{
    (void)state;
    if (!alloc_fail_available()) skip();
    assert_true(alloc_fail_sweep(write_and_read, NULL) > 8);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_what_it_writes),
        cmocka_unit_test(reads_a_file_of_the_safetensors_library),
        cmocka_unit_test(accepts_any_order_and_metadata),
        cmocka_unit_test(refuses_wrong_headers),
        cmocka_unit_test(refuses_ranges_that_do_not_tile),
        cmocka_unit_test(refuses_wrong_lengths),
        cmocka_unit_test(the_number_of_tensors_has_a_limit),
        cmocka_unit_test(every_truncation_is_refused),
        cmocka_unit_test(survives_every_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

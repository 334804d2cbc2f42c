#include "base/strbuf.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"

#include <stdlib.h>

static void appends_grow(void **state)
{
    (void)state;
    struct strbuf b = {0};
    strbuf_puts(&b, "ab");
    strbuf_putc(&b, 'c');
    strbuf_append(&b, "d\0e", 3);
    strbuf_printf(&b, "%s%d", "f", 12);
    assert_int_equal(b.size, 9);
    assert_memory_equal(b.data, "abcd\0ef12", 10); /* with the NUL */
    for (int i = 0; i < 10000; i++) strbuf_printf(&b, "%d,", i);
    assert_int_equal(b.size, 9 + 10000 + 10 + 90 * 2 + 900 * 3 + 9000 * 4);
    assert_int_equal(b.data[b.size], 0);
    assert_false(b.failed);
    strbuf_release(&b);
    assert_null(b.data);
}

static void truncates_and_clears(void **state)
{
    (void)state;
    struct strbuf b = {0};
    strbuf_truncate(&b, 0); /* of nothing */
    strbuf_puts(&b, "abcdef");
    strbuf_truncate(&b, 2);
    assert_string_equal(b.data, "ab");
    strbuf_clear(&b);
    assert_string_equal(b.data, "");
    assert_int_equal(b.size, 0);
    strbuf_release(&b);
}

static void takes_a_string(void **state)
{
    (void)state;
    struct strbuf b = {0};
    char *empty = strbuf_take(&b);
    assert_string_equal(empty, "");
    strbuf_puts(&b, "text");
    char *text = strbuf_take(&b);
    assert_string_equal(text, "text");
    assert_null(b.data);
    assert_int_equal(b.size, 0);
    free(empty);
    free(text);
}

static void failure_sticks(void **state)
{
    (void)state;
    if (!alloc_fail_available()) skip();
    struct strbuf b = {0};
    strbuf_puts(&b, "before");
    alloc_fail_after(0);
    for (int i = 0; i < 100; i++) strbuf_putc(&b, 'x');
    assert_true(alloc_fail_stop());
    assert_true(b.failed);
    size_t size = b.size;
    strbuf_puts(&b, "after"); /* would fit in nothing: the buffer stays as it was */
    assert_int_equal(b.size, size);
    assert_null(strbuf_take(&b));
    assert_false(b.failed); /* taken: empty, and usable again */
}

static enum status build(void *ctx)
{
    (void)ctx;
    struct strbuf b = {0};
    for (int i = 0; i < 200; i++) strbuf_printf(&b, "%d", i);
    char *text = strbuf_take(&b);
    free(text);
    return text ? ST_OK : ST_NOMEM;
}

static void survives_every_failed_allocation(void **state)
{
    (void)state;
    if (!alloc_fail_available()) skip();
    assert_true(alloc_fail_sweep(build, NULL) > 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(appends_grow),
        cmocka_unit_test(truncates_and_clears),
        cmocka_unit_test(takes_a_string),
        cmocka_unit_test(failure_sticks),
        cmocka_unit_test(survives_every_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

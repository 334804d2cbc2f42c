#include "base/status.h"
#include "base/utf8.h"
#include "tests/support/check.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void every_status_has_a_text(void **state)
{
    (void)state;
    for (int i = 0; i < ST_COUNT; i++) assert_true(strlen(status_text((enum status)i)) > 0);
    assert_string_equal(status_text(ST_OK), "success");
    assert_string_equal(status_text(ST_DEVICE), "compute device failed");
    assert_string_equal(status_text((enum status)ST_COUNT), "unknown status");
    assert_string_equal(status_text((enum status) - 1), "unknown status");
}

static void error_set_fills_and_returns(void **state)
{
    (void)state;
    struct error err = {0};
    assert_int_equal(error_set(&err, ST_INVALID, "n is %d, not %s", 3, "4"), ST_INVALID);
    assert_int_equal(err.status, ST_INVALID);
    assert_string_equal(err.message, "n is 3, not 4");
    assert_int_equal(error_set(NULL, ST_IO, "nobody reads this"), ST_IO);
}

static void error_set_may_quote_itself(void **state)
{
    (void)state;
    struct error err = {0};
    error_set(&err, ST_IO, "disk");
    error_set(&err, ST_IO, "cannot load 'x': %s", err.message);
    assert_string_equal(err.message, "cannot load 'x': disk");
}

static void long_messages_end_at_a_character(void **state)
{
    (void)state;
    struct error err = {0};
    char text[1024];
    for (int shift = 0; shift < 4; shift++) { /* every position of the cut in a four-byte character */
        memset(text, 'x', (size_t)shift);
        for (size_t i = (size_t)shift; i + 4 < sizeof text; i += 4) memcpy(text + i, "\xF0\x9F\x98\x80", 5);
        error_set(&err, ST_IO, "%s", text);
        size_t n = strlen(err.message);
        assert_in_range(n, sizeof err.message - 4, sizeof err.message - 1);
        assert_true(utf8_valid(err.message, n));
    }
}

static void check_aborts(void **state)
{
    (void)state;
    CHECK(1 + 1 == 2);
    pid_t child = fork();
    if (child == 0) {
        signal(SIGABRT, SIG_DFL); /* not cmocka's */
        close(STDERR_FILENO);
        CHECK(1 + 1 == 3);
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status));
    assert_int_equal(WTERMSIG(status), SIGABRT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_status_has_a_text),
        cmocka_unit_test(error_set_fills_and_returns),
        cmocka_unit_test(error_set_may_quote_itself),
        cmocka_unit_test(long_messages_end_at_a_character),
        cmocka_unit_test(check_aborts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* cmocka with its prerequisites, and what the project's tests add to it. */
#ifndef TESTS_SUPPORT_CHECK_H
#define TESTS_SUPPORT_CHECK_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

/* A status with the wanted code, and a message that contains `text`. */
#define assert_refused(st, wanted, err, text)                                                   \
    do {                                                                                        \
        assert_int_equal(st, wanted);                                                           \
        assert_int_equal((err).status, wanted);                                                 \
        if (!strstr((err).message, text)) fail_msg("'%s' is not in '%s'", text, (err).message); \
    } while (0)

/* ST_OK, or the message. */
#define assert_ok(st, err)                     \
    do {                                       \
        if (st) fail_msg("%s", (err).message); \
    } while (0)

#endif

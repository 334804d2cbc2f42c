#include "base/status.h"

#include "base/log.h"
#include "base/utf8.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *status_text(enum status st)
{
    static const char *const texts[ST_COUNT] = {
#define X(name, text) [name] = text,
        STATUS_TABLE(X)
#undef X
    };
    return (unsigned)st < ST_COUNT ? texts[st] : "unknown status";
}

enum status error_set(struct error *err, enum status st, const char *fmt, ...)
{
    if (!err) return st;

    /* A buffer of its own, because the arguments may point into *err. */
    char text[sizeof err->message];
    va_list args;
    va_start(args, fmt);
    int length = vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    if (length < 0) {
        snprintf(text, sizeof text, "%s", status_text(st));
    } else if ((size_t)length >= sizeof text) {
        text[utf8_complete_prefix(text, sizeof text - 1)] = '\0';
    }
    err->status = st;
    memcpy(err->message, text, sizeof text);
    return st;
}

void check_failed(const char *cond, const char *file, int line)
{
    log_error("%s:%d: check failed: %s", file, line, cond);
    abort();
}

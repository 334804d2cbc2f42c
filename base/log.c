#include "base/log.h"

#include "base/utf8.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define LINE_BYTES_MAX 2048

static _Atomic enum log_level level_now = LOG_INFO;

void log_set_level(enum log_level level) { atomic_store(&level_now, level); }

/* "2026-01-31T12:00:00.123Z level ", and its length. */
static size_t write_prefix(char *out, size_t size, enum log_level level)
{
    static const char *const names[LOG_OFF] = {"debug", "info", "warn", "error"};
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    size_t n = strftime(out, size, "%Y-%m-%dT%H:%M:%S", &utc);
    return n + (size_t)snprintf(out + n, size - n, ".%03dZ %s ", (int)(now.tv_nsec / 1000000), names[level]);
}

void log_write(enum log_level level, const char *fmt, ...)
{
    if (level < atomic_load(&level_now) || level >= LOG_OFF) return;

    char line[LINE_BYTES_MAX];
    size_t start = write_prefix(line, sizeof line, level);
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(line + start, sizeof line - start, fmt, args);
    va_end(args);
    if (n < 0) return;

    size_t end = start + (size_t)n;
    if (end >= sizeof line) end = utf8_complete_prefix(line, sizeof line - 1);
    /* An event is one line, whatever names from files and requests it quotes. */
    for (size_t i = start; i < end; i++)
        if ((uint8_t)line[i] < 0x20 || line[i] == 0x7F) line[i] = '?';
    line[end++] = '\n';

    /* One write, so that lines of several threads do not mix. Nobody is left to tell if it fails. */
    ssize_t written = write(STDERR_FILENO, line, end);
    (void)written;
}

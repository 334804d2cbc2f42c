#include "tests/support/fixture.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MODEL_FILE "medley/models/SmolLM2-135M-Instruct.Q4_1.gguf"

static _Noreturn void stop(const char *what, const char *path)
{
    fprintf(stderr, "tests: cannot %s '%s': %s\n", what, path, strerror(errno));
    exit(2);
}

struct test_path test_path(const char *fmt, ...)
{
    struct test_path path;
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(path.text, sizeof path.text, fmt, args);
    va_end(args);
    if (n < 0 || (size_t)n >= sizeof path.text) {
        errno = ENAMETOOLONG;
        stop("use the path", path.text);
    }
    return path;
}

/* The program lies somewhere under build/ of its source tree: the nearest folder above it that holds
 * tests/fixtures is the one. */
static struct test_path find_fixtures(void)
{
    char here[TEST_PATH_MAX - 64];
    ssize_t n = readlink("/proc/self/exe", here, sizeof here - 1);
    if (n < 0) stop("find this program", "/proc/self/exe");
    here[n] = '\0';
    for (char *slash; (slash = strrchr(here, '/'));) {
        *slash = '\0';
        struct test_path fixtures = test_path("%s/tests/fixtures", here);
        if (!access(fixtures.text, R_OK)) return fixtures;
    }
    errno = ENOENT;
    stop("find", "tests/fixtures");
}

struct test_path fixture_path(const char *name)
{
    const char *given = getenv("MEDLEY_TEST_FIXTURES");
    struct test_path folder = given ? test_path("%s", given) : find_fixtures();
    return test_path("%s/%s", folder.text, name);
}

void *test_read_file(const char *path, size_t *size_out)
{
    FILE *f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END)) stop("open", path);
    long size = ftell(f);
    rewind(f);
    void *data = size < 0 ? NULL : malloc((size_t)size + 1);
    if (!data || fread(data, 1, (size_t)size, f) != (size_t)size) stop("read", path);
    fclose(f);
    *size_out = (size_t)size;
    return data;
}

void *fixture_read(const char *name, size_t *size_out)
{
    struct test_path path = fixture_path(name);
    return test_read_file(path.text, size_out);
}

struct test_path test_model_path(void)
{
    const char *given = getenv("MEDLEY_TEST_MODEL"), *cache = getenv("XDG_CACHE_HOME"),
               *home = getenv("HOME");
    if (given && *given) return test_path("%s", given);
    if (cache && *cache) return test_path("%s/" MODEL_FILE, cache);
    return test_path("%s/.cache/" MODEL_FILE, home ? home : "");
}

bool test_model_present(void)
{
    struct test_path path = test_model_path();
    return !access(path.text, R_OK);
}

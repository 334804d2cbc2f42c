/* Where tests find their files.
 *
 * Everything here ends the program with a message when it fails: a test without its files has
 * nothing to say. */
#ifndef TESTS_SUPPORT_FIXTURE_H
#define TESTS_SUPPORT_FIXTURE_H

#include <stdbool.h>
#include <stddef.h>

#define TEST_PATH_MAX 4096

struct test_path {
    char text[TEST_PATH_MAX];
};

/* printf into a path; for files inside a folder: test_path("%s/%s", folder.text, name). */
struct test_path test_path(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* tests/fixtures/<name>: under $MEDLEY_TEST_FIXTURES, or in the source tree that this program was
 * built in, whatever the current folder is. */
struct test_path fixture_path(const char *name);

/* A whole file or fixture; malloc'd, the caller frees. */
void *test_read_file(const char *path, size_t *size_out);
void *fixture_read(const char *name, size_t *size_out);

/* The real model: $MEDLEY_TEST_MODEL, or where `make model` puts it. */
struct test_path test_model_path(void);
/* Whether it is there; a test that needs it skips itself where it is not. */
bool test_model_present(void);

#endif

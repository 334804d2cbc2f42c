#include "base/log.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"
#include "tests/support/temp_folder.h"

#include <fcntl.h>
#include <pthread.h>
#include <regex.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* stderr goes to a file while `body` runs; its text, which the caller frees. */
static char *captured(void (*body)(void))
{
    struct temp_folder folder;
    temp_folder_make(&folder);
    const char *file = path_in(folder.path, "log");
    int saved = dup(STDERR_FILENO), fd = open(file, O_CREAT | O_WRONLY | O_APPEND, 0600);
    assert_true(saved >= 0 && fd >= 0);
    dup2(fd, STDERR_FILENO);
    body();
    dup2(saved, STDERR_FILENO);
    close(saved);
    close(fd);
    size_t size;
    char *text = test_read_file(file, &size);
    text[size] = '\0'; /* test_read_file leaves room for it */
    temp_folder_remove(&folder);
    return text;
}

static void log_some(void)
{
    log_debug("unseen");
    log_info("model %s", "x\ny\x1B[31m");
    log_set_level(LOG_ERROR);
    log_warn("unseen");
    log_error("seen");
    log_set_level(LOG_OFF);
    log_error("unseen");
    log_set_level(LOG_INFO);
}

static void lines_have_the_stated_form(void **state)
{
    (void)state;
    char *text = captured(log_some);
    regex_t form;
    assert_int_equal(
        regcomp(
            &form,
            "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\\.[0-9]{3}Z info model x\\?y\\?\\[31m\n"
            "[^\n]{24} error seen\n$",
            REG_EXTENDED | REG_NOSUB),
        0);
    assert_int_equal(regexec(&form, text, 0, NULL, 0), 0);
    regfree(&form);
    free(text);
}

static void log_long(void)
{
    char text[5000];
    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    log_info("%s", text);
}

static void long_events_are_one_line(void **state)
{
    (void)state;
    char *text = captured(log_long);
    assert_ptr_equal(strchr(text, '\n'), text + strlen(text) - 1);
    assert_true(strlen(text) > 1000);
    free(text);
}

#define THREADS 4
#define LINES   500

static void *log_many(void *name)
{
    for (int i = 0; i < LINES; i++)
        log_info("%s%s%s%s", (char *)name, (char *)name, (char *)name, (char *)name);
    return NULL;
}

static void log_from_threads(void)
{
    static char names[THREADS][16] = {"aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc", "dddddddddddd"};
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, log_many, names[i]), 0);
    log_set_level(LOG_INFO);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
}

static void lines_of_threads_do_not_mix(void **state)
{
    (void)state;
    char *text = captured(log_from_threads), *save;
    int lines = 0;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save), lines++) {
        char *message = strrchr(line, ' ') + 1;
        assert_int_equal(strlen(message), 48);
        assert_int_equal(strspn(message, (char[]){message[0], 0}), 48);
    }
    assert_int_equal(lines, THREADS * LINES);
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lines_have_the_stated_form),
        cmocka_unit_test(long_events_are_one_line),
        cmocka_unit_test(lines_of_threads_do_not_mix),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

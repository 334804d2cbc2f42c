#include "base/file.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static int make_folder(void **state)
{
    static struct test_path folder;
    folder = test_folder_make();
    *state = &folder;
    return 0;
}

static int remove_folder(void **state)
{
    test_folder_remove(*state);
    return 0;
}

static int entries_in(const char *path)
{
    int n = 0;
    DIR *d = opendir(path);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

static bool holds(const char *path, const char *bytes, size_t size)
{
    struct file_map m;
    struct error err;
    assert_ok(file_map(path, &m, &err), err);
    bool same = m.size == size && (size == 0 || !memcmp(m.data, bytes, size));
    file_unmap(&m);
    return same;
}

static void replaces_and_maps(void **state)
{
    const struct test_path *folder = *state;
    struct test_path path = test_path("%s/file", folder->text);
    struct error err = {0};
    assert_ok(file_replace(path.text, "one", 3, &err), err);
    assert_true(holds(path.text, "one", 3));
    assert_ok(file_replace(path.text, "second", 6, &err), err);
    assert_true(holds(path.text, "second", 6));
    assert_ok(file_replace(path.text, NULL, 0, &err), err);
    assert_true(holds(path.text, "", 0));
    assert_int_equal(entries_in(folder->text), 1); /* no temporary file is left */
}

static void replaces_in_the_current_folder(void **state)
{
    const struct test_path *folder = *state;
    struct error err = {0};
    int before = open(".", O_RDONLY | O_DIRECTORY);
    assert_int_equal(chdir(folder->text), 0);
    enum status st = file_replace("bare", "x", 1, &err);
    assert_int_equal(fchdir(before), 0);
    close(before);
    assert_ok(st, err);
}

static void an_old_mapping_keeps_its_bytes(void **state)
{
    const struct test_path *folder = *state;
    struct test_path path = test_path("%s/file", folder->text);
    struct error err = {0};
    struct file_map old;
    assert_ok(file_replace(path.text, "old", 3, &err), err);
    assert_ok(file_map(path.text, &old, &err), err);
    assert_ok(file_replace(path.text, "new", 3, &err), err);
    assert_memory_equal(old.data, "old", 3);
    file_unmap(&old);
    file_unmap(&old); /* unmapped is empty */
}

static void says_what_is_wrong_with_a_path(void **state)
{
    const struct test_path *folder = *state;
    struct error err = {0};
    struct file_map m = {.size = 42};
    struct test_path missing = test_path("%s/no/such", folder->text);
    assert_refused(file_map(missing.text, &m, &err), ST_NOT_FOUND, err, "no/such");
    assert_refused(file_map(folder->text, &m, &err), ST_IO, err, "not a regular file");
    assert_int_equal(m.size, 42);
    assert_refused(file_replace(missing.text, "x", 1, &err), ST_NOT_FOUND, err, "no/such");
    /* a folder is in the way of the last step, the renaming */
    assert_refused(file_replace(folder->text, "x", 1, &err), ST_IO, err, folder->text);
    assert_int_equal(entries_in(folder->text), 0);
}

/* A file-size limit makes a write fail half-way. */
static void a_failed_write_leaves_the_old_file(void **state)
{
    const struct test_path *folder = *state;
    struct test_path path = test_path("%s/file", folder->text);
    struct error err = {0};
    static char big[100000];
    assert_ok(file_replace(path.text, "old", 3, &err), err);
    struct rlimit before, limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    limit = (struct rlimit){10000, before.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    enum status st = file_replace(path.text, big, sizeof big, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    assert_refused(st, ST_IO, err, "cannot write");
    assert_true(holds(path.text, "old", 3));
    assert_int_equal(entries_in(folder->text), 1);
}

static void makes_folders(void **state)
{
    const struct test_path *folder = *state;
    struct error err = {0};
    struct test_path deep = test_path("%s/a//b/c/", folder->text),
                     file = test_path("%s/a/file", folder->text);
    assert_ok(file_make_folders(deep.text, &err), err);
    assert_ok(file_make_folders(deep.text, &err), err); /* again is fine */
    struct stat info;
    assert_int_equal(stat(deep.text, &info), 0);
    assert_int_equal(info.st_mode & 07777, 0700);
    assert_ok(file_replace(file.text, "x", 1, &err), err);
    struct test_path blocked = test_path("%s/below", file.text);
    assert_refused(file_make_folders(file.text, &err), ST_IO, err, "a file is in the way");
    assert_refused(file_make_folders(blocked.text, &err), ST_IO, err, "a file is in the way");
}

static enum status write_and_map(void *folder)
{
    struct test_path path = test_path("%s/file", ((const struct test_path *)folder)->text);
    struct test_path sub = test_path("%s/a/b", ((const struct test_path *)folder)->text);
    struct error err;
    enum status st = file_make_folders(sub.text, &err);
    if (!st) st = file_replace(path.text, "x", 1, &err);
    return st;
}

static void survives_every_failed_allocation(void **state)
{
    if (!alloc_fail_available()) skip();
    assert_true(alloc_fail_sweep(write_and_map, *state) > 2);
}

int main(void)
{
#define IN_FOLDER(f) cmocka_unit_test_setup_teardown(f, make_folder, remove_folder)
    const struct CMUnitTest tests[] = {
        IN_FOLDER(replaces_and_maps),
        IN_FOLDER(replaces_in_the_current_folder),
        IN_FOLDER(an_old_mapping_keeps_its_bytes),
        IN_FOLDER(says_what_is_wrong_with_a_path),
        IN_FOLDER(a_failed_write_leaves_the_old_file),
        IN_FOLDER(makes_folders),
        IN_FOLDER(survives_every_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

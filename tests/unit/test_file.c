#include "base/file.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"
#include "tests/support/temp_folder.h"

#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static int make_folder(void **state)
{
    static struct temp_folder folder;
    temp_folder_make(&folder);
    *state = &folder;
    return 0;
}

static int remove_folder(void **state)
{
    temp_folder_remove(*state);
    return 0;
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
    const struct temp_folder *folder = *state;
    const char *path = path_in(folder->path, "file");
    struct error err = {0};
    assert_ok(file_replace(path, "one", 3, &err), err);
    assert_true(holds(path, "one", 3));
    assert_ok(file_replace(path, "second", 6, &err), err);
    assert_true(holds(path, "second", 6));
    assert_ok(file_replace(path, NULL, 0, &err), err);
    assert_true(holds(path, "", 0));
    assert_int_equal(file_count(folder->path), 1); /* no temporary file is left */
}

static void replaces_in_the_current_folder(void **state)
{
    const struct temp_folder *folder = *state;
    struct error err = {0};
    int before = open(".", O_RDONLY | O_DIRECTORY);
    assert_int_equal(chdir(folder->path), 0);
    enum status st = file_replace("bare", "x", 1, &err);
    assert_int_equal(fchdir(before), 0);
    close(before);
    assert_ok(st, err);
}

static void moves_over_what_was_there(void **state)
{
    const struct temp_folder *folder = *state;
    const char *from = path_in(folder->path, "from"), *to = path_in(folder->path, "to");
    const char *missing = path_in(folder->path, "no/such");
    struct error err = {0};
    assert_ok(file_replace(from, "new", 3, &err), err);
    assert_ok(file_replace(to, "old", 3, &err), err);
    assert_refused(file_move(missing, to, &err), ST_NOT_FOUND, err, "no/such");
    assert_refused(file_move(from, missing, &err), ST_NOT_FOUND, err, "from");
    assert_true(holds(from, "new", 3) && holds(to, "old", 3));
    assert_ok(file_move(from, to, &err), err);
    assert_true(holds(to, "new", 3));
    assert_int_equal(file_count(folder->path), 1);
}

static void an_old_mapping_keeps_its_bytes(void **state)
{
    const struct temp_folder *folder = *state;
    const char *path = path_in(folder->path, "file");
    struct error err = {0};
    struct file_map old;
    assert_ok(file_replace(path, "old", 3, &err), err);
    assert_ok(file_map(path, &old, &err), err);
    assert_ok(file_replace(path, "new", 3, &err), err);
    assert_memory_equal(old.data, "old", 3);
    file_unmap(&old);
    file_unmap(&old); /* unmapped is empty */
}

static void says_what_is_wrong_with_a_path(void **state)
{
    const struct temp_folder *folder = *state;
    struct error err = {0};
    struct file_map m = {.size = 42};
    const char *missing = path_in(folder->path, "no/such");
    assert_refused(file_map(missing, &m, &err), ST_NOT_FOUND, err, "no/such");
    assert_refused(file_map(folder->path, &m, &err), ST_IO, err, "not a regular file");
    assert_int_equal(m.size, 42);
    assert_refused(file_replace(missing, "x", 1, &err), ST_NOT_FOUND, err, "no/such");
    /* a folder is in the way of the last step, the renaming */
    assert_refused(file_replace(folder->path, "x", 1, &err), ST_IO, err, folder->path);
    assert_int_equal(file_count(folder->path), 0);
}

/* A file-size limit makes a write fail half-way. */
static void a_failed_write_leaves_the_old_file(void **state)
{
    const struct temp_folder *folder = *state;
    const char *path = path_in(folder->path, "file");
    struct error err = {0};
    static char big[100000];
    assert_ok(file_replace(path, "old", 3, &err), err);
    struct rlimit before, limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    limit = (struct rlimit){10000, before.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    enum status st = file_replace(path, big, sizeof big, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    assert_refused(st, ST_IO, err, "cannot write");
    assert_true(holds(path, "old", 3));
    assert_int_equal(file_count(folder->path), 1);
}

static void makes_folders(void **state)
{
    const struct temp_folder *folder = *state;
    struct error err = {0};
    const char *deep = path_in(folder->path, "a//b/c/"), *file = path_in(folder->path, "a/file");
    assert_ok(file_make_folders(deep, &err), err);
    assert_ok(file_make_folders(deep, &err), err); /* again is fine */
    struct stat info;
    assert_int_equal(stat(deep, &info), 0);
    assert_int_equal(info.st_mode & 07777, 0700);
    assert_ok(file_replace(file, "x", 1, &err), err);
    const char *blocked = path_in(file, "below");
    assert_refused(file_make_folders(file, &err), ST_IO, err, "a file is in the way");
    assert_refused(file_make_folders(blocked, &err), ST_IO, err, "a file is in the way");
}

static enum status write_and_map(void *folder)
{
    const char *path = path_in(((const struct temp_folder *)folder)->path, "file");
    const char *sub = path_in(((const struct temp_folder *)folder)->path, "a/b");
    struct error err;
    enum status st = file_make_folders(sub, &err);
    if (!st) st = file_replace(path, "x", 1, &err);
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
        IN_FOLDER(moves_over_what_was_there),
        IN_FOLDER(an_old_mapping_keeps_its_bytes),
        IN_FOLDER(says_what_is_wrong_with_a_path),
        IN_FOLDER(a_failed_write_leaves_the_old_file),
        IN_FOLDER(makes_folders),
        IN_FOLDER(survives_every_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

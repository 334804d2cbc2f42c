/* The registry after restarts: what lasts, what is collected, what is damaged. */
#include "adapters/package.h"
#include "base/file.h"
#include "tests/support/check.h"
#include "tests/support/shelf.h"

#include <sodium.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* --- restarts --- */

static void a_restart_changes_nothing(void **state)
{
    struct shelf *f = *state;
    shelf_put(f, "t", "a", 2, 1);
    struct put_result two = shelf_put(f, "t", "a", 3, 2);
    struct put_result one = shelf_put(f, "t", "a", 2, 1); /* current again */
    shelf_put(f, "u", "x", 1, 5);
    struct adapter_info before, after;
    assert_int_equal(registry_get(f->registry, "t", "a", &before, NULL), ST_OK);
    shelf_close(f);
    shelf_open(f);
    assert_int_equal(registry_get(f->registry, "t", "a", &after, NULL), ST_OK);
    assert_int_equal(after.version_count, 2);
    assert_int_equal(after.versions[0].record.rank, before.versions[0].record.rank);
    assert_int_equal(after.versions[0].record.parameters, before.versions[0].record.parameters);
    for (int i = 0; i < 2; i++) {
        assert_string_equal(after.versions[i].record.hash, before.versions[i].record.hash);
        assert_int_equal(after.versions[i].record.created, before.versions[i].record.created);
        assert_int_equal(after.versions[i].record.bytes, before.versions[i].record.bytes);
        assert_int_equal(after.versions[i].current, before.versions[i].current);
        assert_false(after.versions[i].resident);
    }
    adapter_info_release(&before);
    adapter_info_release(&after);

    struct lease *l;
    assert_int_equal(registry_try_lease(f->registry, "t", "a", NULL, &l), ST_BUSY);
    l = shelf_lease(f, "t", "a", NULL);
    assert_string_equal(lease_view(l)->version, one.version);
    lease_release(l);
    l = shelf_lease(f, "t", "a", two.version);
    assert_int_equal(lease_view(l)->lr.sites[PROJ_Q]->rank, 3);
    lease_release(l);
    assert_true(shelf_put(f, "t", "a", 2, 1).unchanged);
}

static void leftovers_are_collected_at_start(void **state)
{
    struct shelf *f = *state;
    shelf_put(f, "t", "a", 2, 1);
    struct upload *u = NULL;
    assert_int_equal(upload_open(f->registry, &u, NULL), ST_OK);
    shelf_close(f);
    /* what a crash could have left */
    file_write(upload_path(u), PACKAGE_TENSORS, "half", 4);
    char orphan[80];
    snprintf(orphan, sizeof orphan, "%064d", 7);
    assert_int_equal(mkdir(path_in(f->folder.path, "blobs/00"), 0700), 0);
    file_write(path_in(f->folder.path, "blobs/00"), orphan, "x", 1);
    shelf_open(f);
    assert_int_equal(shelf_files(f, "staging"), 0);
    assert_int_equal(shelf_files(f, "blobs"), 2);
    upload_close(u);
    lease_release(shelf_lease(f, "t", "a", NULL));
}

/* Gives the path of the one file of blobs/ that has these many bytes or more. */
static void find_tensors(struct shelf *f, char *out, size_t size)
{
    char command[600];
    snprintf(command, sizeof command, "find '%s/blobs' -type f -size +200c", f->folder.path);
    FILE *p = popen(command, "r");
    assert_non_null(fgets(out, (int)size, p));
    out[strcspn(out, "\n")] = '\0';
    pclose(p);
}

static void damaged_files_are_noticed(void **state)
{
    struct shelf *f = *state;
    shelf_put(f, "t", "a", 2, 1);
    shelf_put(f, "t", "b", 2, 1);
    char path[600];
    find_tensors(f, path, sizeof path);
    shelf_close(f);
    FILE *file = fopen(path, "r+b");
    fseek(file, -3, SEEK_END);
    fputc(0x55, file);
    fclose(file);
    shelf_open(f);
    struct lease *l = NULL;
    struct error err = {0};
    assert_int_equal(registry_lease(f->registry, "t", "a", NULL, &l, &err), ST_IO);
    assert_non_null(strstr(err.message, "is damaged"));
    unlink(path);
    assert_int_equal(registry_lease(f->registry, "t", "a", NULL, &l, &err), ST_IO);
    assert_non_null(strstr(err.message, "is missing"));
    assert_int_equal(shelf_stats(f).leases, 0);
    /* Another adapter's upload of the same bytes mends it. */
    shelf_put(f, "t", "c", 2, 1);
    lease_release(shelf_lease(f, "t", "a", NULL));
}

/* A stored configuration is not stored again, but only where it is whole. */
static void a_damaged_configuration_is_mended(void **state)
{
    struct shelf *f = *state;
    struct put_result one = shelf_put(f, "t", "a", 2, 1);
    struct version_files files;
    assert_int_equal(registry_open_files(f->registry, "t", "a", NULL, &files, NULL), ST_OK);
    close(files.config_fd);
    close(files.tensors_fd);
    char shard[100];
    snprintf(shard, sizeof shard, "blobs/%.2s", files.record.config_blob);
    for (int turn = 0; turn < 2; turn++) {
        if (turn == 0) file_write(path_in(f->folder.path, shard), files.record.config_blob, "{}", 2);
        shelf_put(f, "t", "a", 2, 2 + (unsigned)turn);
        assert_int_equal(shelf_files(f, "blobs"), 3 + turn);
        shelf_close(f);
        shelf_open(f);
        lease_release(shelf_lease(f, "t", "a", one.version));
        lease_release(shelf_lease(f, "t", "a", NULL));
    }
}

/* Earlier releases named files by BLAKE2b. */
static void files_named_by_the_earlier_hash_are_read(void **state)
{
    struct shelf *f = *state;
    struct put_result one = shelf_put(f, "t", "a", 2, 1);
    char path[600], earlier[65], shard[100], *sql = NULL;
    find_tensors(f, path, sizeof path);
    const char *name = strrchr(path, '/') + 1;
    shelf_close(f);

    struct file_map map;
    unsigned char digest[32];
    assert_int_equal(file_map(path, &map, NULL), ST_OK);
    crypto_generichash(digest, sizeof digest, map.data, map.size, NULL, 0);
    file_unmap(&map);
    sodium_bin2hex(earlier, sizeof earlier, digest, sizeof digest);
    snprintf(shard, sizeof shard, "blobs/%.2s", earlier);
    (void)mkdir(path_in(f->folder.path, shard), 0700);
    snprintf(shard, sizeof shard, "blobs/%.2s/%s", earlier, earlier);
    assert_int_equal(rename(path, path_in(f->folder.path, shard)), 0);
    assert_true(
        asprintf(&sql, "UPDATE version SET tensors_blob = '%s' WHERE tensors_blob = '%s'", earlier, name) > 0);
    sqlite3 *db = NULL;
    assert_int_equal(sqlite3_open(path_in(f->folder.path, "medley.db"), &db), SQLITE_OK);
    assert_int_equal(sqlite3_exec(db, sql, NULL, NULL, NULL), SQLITE_OK);
    assert_int_equal(sqlite3_changes(db), 1);
    sqlite3_close(db);
    free(sql);

    shelf_open(f);
    lease_release(shelf_lease(f, "t", "a", one.version));
    assert_int_equal(shelf_files(f, "blobs"), 2);
}

static void a_folder_is_opened_once(void **state)
{
    struct shelf *f = *state;
    struct registry *second = NULL;
    struct error err = {0};
    assert_int_equal(registry_open(&f->config, &second, &err), ST_BUSY);
    assert_non_null(strstr(err.message, "another process"));
    assert_null(second);
}

static void a_later_schema_is_refused(void **state)
{
    struct shelf *f = *state;
    shelf_close(f);
    sqlite3 *db = NULL;
    assert_int_equal(sqlite3_open(path_in(f->folder.path, "medley.db"), &db), SQLITE_OK);
    assert_int_equal(sqlite3_exec(db, "PRAGMA user_version = 99", NULL, NULL, NULL), SQLITE_OK);
    sqlite3_close(db);
    struct error err = {0};
    assert_int_equal(registry_open(&f->config, &f->registry, &err), ST_UNSUPPORTED);
    assert_non_null(strstr(err.message, "schema version 99"));
    file_write(f->folder.path, "medley.db", "this is not a database, this is not a database", 46);
    assert_int_equal(registry_open(&f->config, &f->registry, &err), ST_BAD_FORMAT);
    f->registry = NULL;
}

/* --- schemas --- */

static void an_earlier_schema_is_brought_up(void **state)
{
    struct shelf *f = *state;
    struct put_result one = shelf_put(f, "t", "a", 1, 1);
    char *sql = NULL;
    sqlite3 *db = NULL;
    shelf_put(f, "t", "a", 2, 2);
    shelf_close(f);
    assert_true(
        asprintf(&sql,
                 "DROP TRIGGER adapter_numbered; DROP TABLE adapter_number;"
                 "ALTER TABLE adapter ADD COLUMN current TEXT NOT NULL DEFAULT '%s';"
                 "ALTER TABLE adapter DROP COLUMN description; ALTER TABLE adapter DROP COLUMN pinned;"
                 "ALTER TABLE adapter DROP COLUMN keep_versions; ALTER TABLE version DROP COLUMN serial;"
                 "ALTER TABLE version DROP COLUMN published; ALTER TABLE version DROP COLUMN source;"
                 "PRAGMA user_version = 1",
                 one.version) > 0);
    assert_int_equal(sqlite3_open(path_in(f->folder.path, "medley.db"), &db), SQLITE_OK);
    assert_int_equal(sqlite3_exec(db, sql, NULL, NULL, NULL), SQLITE_OK);
    sqlite3_close(db);
    free(sql);
    shelf_open(f);
    shelf_expect_versions(f, "12");
    shelf_put(f, "t", "a", 3, 3);
    shelf_expect_versions(f, "312");
}

static int64_t number_of(struct shelf *f, const char *name)
{
    struct adapter_info info;
    assert_int_equal(registry_get(f->registry, "t", name, &info, NULL), ST_OK);
    int64_t number = info.number;
    adapter_info_release(&info);
    return number;
}

static void numbers_are_not_given_out_again(void **state)
{
    struct shelf *f = *state;
    shelf_put(f, "t", "a", 1, 1);
    int64_t first = number_of(f, "a");
    assert_int_equal(registry_delete(f->registry, "t", "a", NULL, NULL), ST_OK);
    shelf_close(f);
    shelf_open(f);
    shelf_put(f, "t", "a", 1, 1);
    assert_true(number_of(f, "a") > first);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, shelf_set_up, shelf_tear_down)
int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_restart_changes_nothing),       TEST(leftovers_are_collected_at_start),
        TEST(damaged_files_are_noticed),       TEST(a_damaged_configuration_is_mended),
        TEST(a_folder_is_opened_once),         TEST(a_later_schema_is_refused),
        TEST(an_earlier_schema_is_brought_up), TEST(numbers_are_not_given_out_again),
        TEST(files_named_by_the_earlier_hash_are_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

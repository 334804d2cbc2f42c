/* The registry: versions, leases, memory, restarts, and many threads at once. */
#include "adapters/package.h"
#include "adapters/registry.h"
#include "tests/support/adapter_maker.h"
#include "tests/support/temp_folder.h"

#include <pthread.h>
#include <sqlite3.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <setjmp.h>

#include <cmocka.h>

#define LORA_CONFIG      "{\"peft_type\":\"LORA\",\"lora_alpha\":3,\"target_modules\":[\"q_proj\",\"v_proj\"]}"
#define SITES            4                                  /* of an adapter of maker_lora */
#define LORA_BYTES(rank) ((size_t)(rank)*4 * 2 * (32 + 24)) /* as the counting device packs it */

struct fixture {
    struct temp_folder folder;
    struct counting_device device;
    struct registry_config config;
    struct registry *registry;
};

static void open_registry(struct fixture *f)
{
    struct error err = {0};
    if (registry_open(&f->config, &f->registry, &err)) fail_msg("%s", err.message);
}

static void close_registry(struct fixture *f)
{
    registry_close(f->registry);
    f->registry = NULL;
    assert_int_equal(atomic_load(&f->device.live_sites), 0); /* whatever the test did, nothing is left */
}

static int set_up(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    temp_folder_make(&f->folder);
    counting_device_init(&f->device);
    f->config = (struct registry_config){.data_dir = f->folder.path,
                                         .device = &f->device.device,
                                         .base = small_base(),
                                         .base_fingerprint = "base"};
    open_registry(f);
    *state = f;
    return 0;
}

static int tear_down(void **state)
{
    struct fixture *f = *state;
    if (f->registry) close_registry(f);
    temp_folder_remove(&f->folder);
    free(f);
    return 0;
}

static struct put_result put(struct fixture *f, const char *tenant, const char *name, int rank, unsigned seed)
{
    struct put_result result = {0};
    struct error err = {0};
    if (maker_put(f->registry, tenant, name, rank, seed, NULL, &result, &err)) fail_msg("%s", err.message);
    return result;
}

static struct lease *lease(struct fixture *f, const char *tenant, const char *name, const char *version)
{
    struct lease *l = NULL;
    struct error err = {0};
    if (registry_lease(f->registry, tenant, name, version, &l, &err)) fail_msg("%s", err.message);
    return l;
}

static int data_files(struct fixture *f, const char *below)
{
    return file_count(path_in(f->folder.path, below));
}

/* Eviction frees on a thread of its own. */
static void expect_live_sites(struct fixture *f, int count)
{
    for (int i = 0; i < 5000 && atomic_load(&f->device.live_sites) != count; i++) usleep(1000);
    assert_int_equal(atomic_load(&f->device.live_sites), count);
}

static struct registry_stats stats_of(struct fixture *f)
{
    struct registry_stats s;
    registry_stats(f->registry, &s);
    return s;
}

/* --- publishing --- */

static void put_then_lease(void **state)
{
    struct fixture *f = *state;
    struct put_result result = put(f, "t", "a", 2, 1);
    assert_true(result.created && !result.unchanged);
    assert_int_equal(strlen(result.version), ADAPTER_VERSION_HEX);

    struct lease *l = NULL;
    assert_int_equal(registry_try_lease(f->registry, "t", "a", NULL, &l), ST_OK);
    const struct adapter_view *v = lease_view(l);
    assert_string_equal(v->name, "a");
    assert_string_equal(v->version, result.version);
    assert_false(key128_equal(v->key, (struct key128){{0}}));
    assert_int_equal(v->lr.layers, 2);
    assert_int_equal(v->lr.width, 2 * 3);
    assert_non_null(v->lr.sites[PROJ_COUNT + PROJ_V]);
    assert_null(v->lr.sites[PROJ_K]);
    assert_int_equal(stats_of(f).leases, 1);
    lease_release(l);
    assert_int_equal(stats_of(f).leases, 0);

    assert_int_equal(registry_try_lease(f->registry, "t", "b", NULL, &l), ST_NOT_FOUND);
    assert_int_equal(registry_try_lease(f->registry, "u", "a", NULL, &l), ST_NOT_FOUND);
    assert_int_equal(registry_try_lease(f->registry, "t", "a", "0000000000000000", &l), ST_NOT_FOUND);
    assert_int_equal(data_files(f, "staging"), 0);
    assert_int_equal(data_files(f, "blobs"), 2);
}

static void same_bytes_change_nothing(void **state)
{
    struct fixture *f = *state;
    struct put_result first = put(f, "t", "a", 2, 1), again = put(f, "t", "a", 2, 1);
    assert_true(!again.created && again.unchanged);
    assert_string_equal(again.version, first.version);
    assert_int_equal(stats_of(f).versions, 1);
    assert_int_equal(atomic_load(&f->device.packs), SITES);
    /* even with an expectation that no longer holds, so that a repeated call answers alike */
    struct error err = {0};
    assert_int_equal(maker_put(f->registry, "t", "a", 2, 1, "", &again, &err), ST_OK);
    assert_true(again.unchanged);
}

static void compare_and_set(void **state)
{
    struct fixture *f = *state;
    struct put_result result;
    struct error err = {0};
    assert_int_equal(maker_put(f->registry, "t", "a", 2, 1, "0123456789abcdef", &result, &err), ST_CONFLICT);
    assert_int_equal(maker_put(f->registry, "t", "a", 2, 1, "", &result, &err), ST_OK);
    char first[ADAPTER_VERSION_HEX + 1];
    memcpy(first, result.version, sizeof first);
    assert_int_equal(maker_put(f->registry, "t", "a", 2, 2, "", &result, &err), ST_CONFLICT);
    assert_non_null(strstr(err.message, first));
    assert_int_equal(maker_put(f->registry, "t", "a", 2, 2, first, &result, &err), ST_OK);
    assert_int_equal(maker_put(f->registry, "t", "a", 2, 3, first, &result, &err), ST_CONFLICT);
    assert_int_equal(stats_of(f).versions, 2);
}

static void a_lease_outlives_replacement(void **state)
{
    struct fixture *f = *state;
    struct put_result one = put(f, "t", "a", 2, 1);
    struct lease *old = lease(f, "t", "a", NULL);
    struct put_result two = put(f, "t", "a", 3, 2);
    assert_true(!two.created && !two.unchanged && strcmp(one.version, two.version) != 0);
    struct lease *new = lease(f, "t", "a", ""), *named = lease(f, "t", "a", one.version);
    assert_string_equal(lease_view(old)->version, one.version);
    assert_string_equal(lease_view(new)->version, two.version);
    assert_int_equal(lease_view(old)->lr.sites[PROJ_Q]->rank, 2);
    assert_int_equal(lease_view(new)->lr.sites[PROJ_Q]->rank, 3);
    assert_ptr_equal(lease_view(named), lease_view(old));
    assert_false(key128_equal(lease_view(old)->key, lease_view(new)->key));
    lease_release(named);
    lease_release(old);
    lease_release(new);

    /* An older version's bytes again make it current, without a third one. */
    struct put_result back = put(f, "t", "a", 2, 1);
    assert_true(!back.unchanged);
    assert_string_equal(back.version, one.version);
    assert_int_equal(stats_of(f).versions, 2);
    struct lease *l = lease(f, "t", "a", NULL);
    assert_string_equal(lease_view(l)->version, one.version);
    lease_release(l);
}

static void keys_tell_tenant_name_and_version_apart(void **state)
{
    struct fixture *f = *state;
    static const char *const who[][2] = {{"t", "ab"}, {"ta", "b"}, {"t", "b"}, {"", "tab"}};
    struct key128 keys[4];
    for (int i = 0; i < 4; i++) {
        put(f, who[i][0], who[i][1], 2, 1);
        struct lease *l = lease(f, who[i][0], who[i][1], NULL);
        keys[i] = lease_view(l)->key;
        lease_release(l);
        for (int j = 0; j < i; j++) assert_false(key128_equal(keys[i], keys[j]));
    }
    close_registry(f);
    open_registry(f);
    struct lease *l = lease(f, "t", "b", NULL);
    assert_true(key128_equal(lease_view(l)->key, keys[2]));
    lease_release(l);
}

static void names_are_checked(void **state)
{
    struct fixture *f = *state;
    char longest[ADAPTER_NAME_MAX + 2];
    memset(longest, 'x', sizeof longest);
    longest[ADAPTER_NAME_MAX + 1] = '\0';
    static const char *const bad[] = {"", ".a", "-a", "_a", "a/b", "a b", "a@b", "a:b", "\xc3\xa4"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) assert_false(adapter_name_valid(bad[i]));
    assert_false(adapter_name_valid(NULL));
    assert_false(adapter_name_valid(longest));
    longest[ADAPTER_NAME_MAX] = '\0';
    assert_true(adapter_name_valid(longest));
    assert_true(adapter_name_valid("Z9._-"));
    struct put_result result;
    struct error err = {0};
    assert_int_equal(maker_put(f->registry, "t", "../a", 2, 1, NULL, &result, &err), ST_INVALID);
}

static void listing_is_by_tenant_and_name(void **state)
{
    struct fixture *f = *state;
    put(f, "t", "b", 2, 1);
    struct put_result newest = put(f, "t", "b", 3, 2);
    put(f, "t", "a", 2, 1);
    put(f, "s", "z", 2, 1);
    put(f, "tt", "c", 2, 1);
    struct adapter_info *list = NULL;
    size_t count = 0;
    assert_int_equal(registry_list(f->registry, "t", &list, &count, NULL), ST_OK);
    assert_int_equal(count, 2);
    assert_string_equal(list[0].name, "a");
    assert_string_equal(list[1].name, "b");
    assert_int_equal(list[1].version_count, 2);
    assert_string_equal(list[1].versions[0].record.version, newest.version);
    assert_true(list[1].versions[0].current && !list[1].versions[1].current);
    assert_true(list[1].versions[1].resident);
    assert_int_equal(list[1].versions[0].record.rank, 3);
    assert_int_equal(list[1].versions[0].record.sites, SITES);
    assert_string_equal(list[1].versions[0].record.format, "peft-lora");
    assert_string_equal(list[1].versions[0].record.targets, "q_proj, v_proj");
    for (size_t i = 0; i < count; i++) adapter_info_release(&list[i]);
    free(list);
    assert_int_equal(registry_list(f->registry, "nobody", &list, &count, NULL), ST_OK);
    assert_int_equal(count, 0);
    free(list);
    struct adapter_info info;
    assert_int_equal(registry_get(f->registry, "t", "z", &info, NULL), ST_NOT_FOUND);
    assert_int_equal(registry_get(f->registry, "s", "z", &info, NULL), ST_OK);
    adapter_info_release(&info);
}

/* --- going back, keeping, naming --- */

static struct put_result roll_back(struct fixture *f, const char *version)
{
    struct put_result result = {0};
    struct error err = {0};
    if (registry_rollback(f->registry, "t", "a", version, NULL, &result, &err)) fail_msg("%s", err.message);
    return result;
}

/* The ranks of all versions of "a", the current one first, as digits. */
static void expect_versions(struct fixture *f, const char *ranks)
{
    struct adapter_info info;
    char seen[16] = "";
    assert_int_equal(registry_get(f->registry, "t", "a", &info, NULL), ST_OK);
    for (int i = 0; i < info.version_count; i++)
        snprintf(seen + i, sizeof seen - (size_t)i, "%d", info.versions[i].record.rank);
    adapter_info_release(&info);
    assert_string_equal(seen, ranks);
}

static void rollback_makes_an_earlier_version_current(void **state)
{
    struct fixture *f = *state;
    struct put_result one = put(f, "t", "a", 1, 1), two = put(f, "t", "a", 2, 2), result;
    put(f, "t", "a", 3, 3);
    struct lease *l = lease(f, "t", "a", NULL);
    struct error err = {0};
    assert_string_equal(roll_back(f, one.version).version, one.version);
    expect_versions(f, "132");
    assert_true(roll_back(f, one.version).unchanged);
    assert_int_equal(lease_view(l)->lr.sites[PROJ_Q]->rank, 3); /* whoever runs is not disturbed */
    lease_release(l);

    assert_int_equal(registry_rollback(f->registry, "t", "a", two.version, two.version, &result, &err),
                     ST_CONFLICT);
    assert_non_null(strstr(err.message, one.version));
    assert_int_equal(registry_rollback(f->registry, "t", "a", two.version, one.version, &result, &err),
                     ST_OK);
    expect_versions(f, "213");
    assert_int_equal(registry_rollback(f->registry, "t", "a", "ffff", NULL, &result, &err), ST_NOT_FOUND);
    assert_int_equal(registry_rollback(f->registry, "t", "b", "ffff", NULL, &result, &err), ST_NOT_FOUND);

    struct adapter_info info;
    close_registry(f);
    open_registry(f);
    expect_versions(f, "213");
    assert_int_equal(registry_get(f->registry, "t", "a", &info, NULL), ST_OK);
    assert_int_equal(info.versions[0].record.source, VERSION_ROLLBACK);
    assert_int_equal(info.versions[2].record.source, VERSION_UPLOAD);
    adapter_info_release(&info);
}

static void change(struct fixture *f, const struct adapter_change *c)
{
    struct error err = {0};
    if (registry_change(f->registry, "t", "a", c, &err)) fail_msg("%s", err.message);
}

static void only_the_last_versions_are_kept(void **state)
{
    struct fixture *f = *state;
    int two = 2, one = 1;
    struct put_result first = put(f, "t", "a", 1, 1);
    put(f, "t", "a", 2, 2);
    struct lease *l = lease(f, "t", "a", first.version), *gone;
    change(f, &(struct adapter_change){.keep_versions = &two});
    expect_versions(f, "21");
    put(f, "t", "a", 3, 3);
    expect_versions(f, "32");
    assert_int_equal(lease_view(l)->lr.sites[PROJ_Q]->rank, 1); /* held, so it stays in memory */
    expect_live_sites(f, 3 * SITES);
    assert_int_equal(registry_try_lease(f->registry, "t", "a", first.version, &gone), ST_NOT_FOUND);
    assert_int_equal(data_files(f, "blobs"), 3); /* two of tensors and a shared configuration */
    lease_release(l);
    expect_live_sites(f, 2 * SITES);
    change(f, &(struct adapter_change){.keep_versions = &one});
    expect_versions(f, "3");
    assert_int_equal(data_files(f, "blobs"), 2);
    close_registry(f);
    open_registry(f);
    put(f, "t", "a", 2, 2);
    expect_versions(f, "2");
}

static void the_registry_may_say_how_many_versions_to_keep(void **state)
{
    struct fixture *f = *state;
    int three = 3, none = 0;
    close_registry(f);
    f->config.keep_versions = 2;
    open_registry(f);
    for (int rank = 1; rank <= 3; rank++) put(f, "t", "a", rank, 1);
    expect_versions(f, "32");
    change(f, &(struct adapter_change){.keep_versions = &three});
    put(f, "t", "a", 4, 1);
    expect_versions(f, "432");
    change(f, &(struct adapter_change){.keep_versions = &none});
    expect_versions(f, "43");
}

static void versions_go_by_any_unique_head_of_their_hash(void **state)
{
    struct fixture *f = *state;
    struct adapter_info info;
    struct lease *l;
    struct error err = {0};
    /* more versions than there are digits: some two begin alike */
    for (unsigned seed = 0; seed < 17; seed++) put(f, "t", "a", 1, seed);
    assert_int_equal(registry_get(f->registry, "t", "a", &info, NULL), ST_OK);
    int shared = 0;
    for (int i = 0; i < info.version_count; i++) {
        const char *hash = info.versions[i].record.hash;
        char head[8];
        lease_release(lease(f, "t", "a", hash));
        snprintf(head, sizeof head, "%.7s", hash);
        lease_release(lease(f, "t", "a", head));
        head[1] = 0;
        enum status st = registry_lease(f->registry, "t", "a", head, &l, &err);
        if (st == ST_OK)
            lease_release(l);
        else
            assert_int_equal(st, ST_INVALID);
        shared += st == ST_INVALID;
    }
    assert_true(shared >= 2);
    assert_non_null(strstr(err.message, "several"));
    assert_int_equal(registry_lease(f->registry, "t", "a", "0123456789", &l, &err), ST_NOT_FOUND);
    adapter_info_release(&info);
}

static void settings_last(void **state)
{
    struct fixture *f = *state;
    struct adapter_info info, other;
    char name[ADAPTER_NAME_MAX + 1], long_text[ADAPTER_DESCRIPTION_MAX + 2];
    bool pinned = true;
    put(f, "t", "a", 1, 1);
    put(f, "t", "b", 1, 1);
    change(f, &(struct adapter_change){.description = "what it is for"});
    change(f, &(struct adapter_change){.pinned = &pinned});
    memset(long_text, 'x', sizeof long_text - 1);
    long_text[sizeof long_text - 1] = 0;
    assert_int_equal(
        registry_change(f->registry, "t", "a", &(struct adapter_change){.description = long_text}, NULL),
        ST_INVALID);
    close_registry(f);
    open_registry(f);
    assert_int_equal(registry_get(f->registry, "t", "a", &info, NULL), ST_OK);
    assert_int_equal(registry_get(f->registry, "t", "b", &other, NULL), ST_OK);
    assert_string_equal(info.settings.description, "what it is for");
    assert_true(info.settings.pinned);
    assert_true(info.number != other.number);
    assert_int_equal(registry_name(f->registry, "t", info.number, name), ST_OK);
    assert_string_equal(name, "a");
    assert_int_equal(registry_name(f->registry, "s", info.number, name), ST_NOT_FOUND);
    adapter_info_release(&info);
    adapter_info_release(&other);
}

static void a_pinned_adapter_is_not_evicted(void **state)
{
    struct fixture *f = *state;
    struct lease *l;
    bool pinned = true, loose = false;
    close_registry(f);
    f->config.resident_bytes = LORA_BYTES(2) + 300; /* room for one */
    open_registry(f);
    put(f, "t", "a", 2, 1);
    change(f, &(struct adapter_change){.pinned = &pinned});
    for (unsigned seed = 2; seed < 5; seed++) put(f, "t", "b", 2, seed);
    assert_int_equal(registry_try_lease(f->registry, "t", "a", NULL, &l), ST_OK);
    lease_release(l);
    assert_int_equal(registry_try_lease(f->registry, "t", "b", NULL, &l), ST_BUSY);
    change(f, &(struct adapter_change){.pinned = &loose});
    lease_release(lease(f, "t", "b", NULL));
    assert_int_equal(registry_try_lease(f->registry, "t", "a", NULL, &l), ST_BUSY);
}

static void delete_compares_too(void **state)
{
    struct fixture *f = *state;
    struct put_result one = put(f, "t", "a", 1, 1);
    struct error err = {0};
    assert_int_equal(registry_delete(f->registry, "t", "a", "0123456789abcdef", &err), ST_CONFLICT);
    assert_int_equal(registry_delete(f->registry, "t", "a", one.version, &err), ST_OK);
}

static void files_stay_open_through_deletion(void **state)
{
    struct fixture *f = *state;
    struct version_files files;
    char config[256];
    put(f, "t", "a", 1, 1);
    assert_int_equal(registry_open_files(f->registry, "t", "a", "ffffffffff", &files, NULL), ST_NOT_FOUND);
    assert_int_equal(registry_open_files(f->registry, "t", "a", NULL, &files, NULL), ST_OK);
    assert_int_equal(registry_delete(f->registry, "t", "a", NULL, NULL), ST_OK);
    ssize_t n = read(files.config_fd, config, sizeof config);
    assert_int_equal(n, strlen(LORA_CONFIG));
    assert_memory_equal(config, LORA_CONFIG, strlen(LORA_CONFIG));
    close(files.config_fd);
    close(files.tensors_fd);
}

/* A database of the first schema, in which the current version went by its name. */
static void an_earlier_schema_is_brought_up(void **state)
{
    struct fixture *f = *state;
    struct put_result one = put(f, "t", "a", 1, 1);
    char *sql = NULL;
    sqlite3 *db = NULL;
    put(f, "t", "a", 2, 2);
    close_registry(f);
    assert_true(
        asprintf(&sql,
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
    open_registry(f);
    expect_versions(f, "12");
    put(f, "t", "a", 3, 3);
    expect_versions(f, "312");
}

/* --- deleting --- */

static void deletion_leaves_leases_alone(void **state)
{
    struct fixture *f = *state;
    put(f, "t", "a", 2, 1);
    put(f, "t", "b", 2, 1); /* the same files */
    struct lease *l = lease(f, "t", "a", NULL), *other;
    struct error err = {0};
    assert_int_equal(registry_delete(f->registry, "t", "a", NULL, &err), ST_OK);
    assert_int_equal(registry_delete(f->registry, "t", "a", NULL, &err), ST_NOT_FOUND);
    assert_int_equal(registry_try_lease(f->registry, "t", "a", NULL, &other), ST_NOT_FOUND);
    assert_int_equal(lease_view(l)->lr.sites[PROJ_Q]->rank, 2);
    assert_int_equal(data_files(f, "blobs"), 2); /* b needs them */
    lease_release(l);
    expect_live_sites(f, SITES);
    assert_int_equal(registry_delete(f->registry, "t", "b", NULL, &err), ST_OK);
    expect_live_sites(f, 0);
    assert_int_equal(data_files(f, "blobs"), 0);
    assert_int_equal(stats_of(f).resident_bytes, 0);
    put(f, "t", "a", 2, 1);
    assert_int_equal(stats_of(f).versions, 1);
}

/* --- restarts --- */

static void a_restart_changes_nothing(void **state)
{
    struct fixture *f = *state;
    put(f, "t", "a", 2, 1);
    struct put_result two = put(f, "t", "a", 3, 2);
    struct put_result one = put(f, "t", "a", 2, 1); /* current again */
    put(f, "u", "x", 1, 5);
    struct adapter_info before, after;
    assert_int_equal(registry_get(f->registry, "t", "a", &before, NULL), ST_OK);
    close_registry(f);
    open_registry(f);
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
    l = lease(f, "t", "a", NULL);
    assert_string_equal(lease_view(l)->version, one.version);
    lease_release(l);
    l = lease(f, "t", "a", two.version);
    assert_int_equal(lease_view(l)->lr.sites[PROJ_Q]->rank, 3);
    lease_release(l);
    assert_true(put(f, "t", "a", 2, 1).unchanged);
}

static void leftovers_are_collected_at_start(void **state)
{
    struct fixture *f = *state;
    put(f, "t", "a", 2, 1);
    struct upload *u = NULL;
    assert_int_equal(upload_open(f->registry, &u, NULL), ST_OK);
    close_registry(f);
    /* what a crash could have left */
    file_write(upload_path(u), PACKAGE_TENSORS, "half", 4);
    char orphan[80];
    snprintf(orphan, sizeof orphan, "%064d", 7);
    assert_int_equal(mkdir(path_in(f->folder.path, "blobs/00"), 0700), 0);
    file_write(path_in(f->folder.path, "blobs/00"), orphan, "x", 1);
    open_registry(f);
    assert_int_equal(data_files(f, "staging"), 0);
    assert_int_equal(data_files(f, "blobs"), 2);
    upload_close(u);
    lease_release(lease(f, "t", "a", NULL));
}

/* Gives the path of the one file of blobs/ that has these many bytes or more. */
static void find_tensors(struct fixture *f, char *out, size_t size)
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
    struct fixture *f = *state;
    put(f, "t", "a", 2, 1);
    put(f, "t", "b", 2, 1);
    char path[600];
    find_tensors(f, path, sizeof path);
    close_registry(f);
    FILE *file = fopen(path, "r+b");
    fseek(file, -3, SEEK_END);
    fputc(0x55, file);
    fclose(file);
    open_registry(f);
    struct lease *l = NULL;
    struct error err = {0};
    assert_int_equal(registry_lease(f->registry, "t", "a", NULL, &l, &err), ST_IO);
    assert_non_null(strstr(err.message, "is damaged"));
    unlink(path);
    assert_int_equal(registry_lease(f->registry, "t", "a", NULL, &l, &err), ST_IO);
    assert_non_null(strstr(err.message, "is missing"));
    assert_int_equal(stats_of(f).leases, 0);
    /* Another adapter's upload of the same bytes mends it. */
    put(f, "t", "c", 2, 1);
    lease_release(lease(f, "t", "a", NULL));
}

static void a_folder_is_opened_once(void **state)
{
    struct fixture *f = *state;
    struct registry *second = NULL;
    struct error err = {0};
    assert_int_equal(registry_open(&f->config, &second, &err), ST_BUSY);
    assert_non_null(strstr(err.message, "another process"));
    assert_null(second);
}

static void a_later_schema_is_refused(void **state)
{
    struct fixture *f = *state;
    close_registry(f);
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

/* --- failures leave nothing --- */

static void a_refused_upload_leaves_nothing(void **state)
{
    struct fixture *f = *state;
    struct put_result result;
    struct error err = {0};
    struct upload *u = NULL;
    assert_int_equal(upload_open(f->registry, &u, NULL), ST_OK);
    file_write(upload_path(u), PACKAGE_BODY, "neither tar nor zip", 19);
    assert_int_equal(registry_put(f->registry, "t", "a", u, NULL, &result, &err), ST_BAD_FORMAT);
    upload_close(u);

    close_registry(f);
    f->config.lr_width_max = 5;
    open_registry(f);
    assert_int_equal(maker_put(f->registry, "t", "a", 2, 1, NULL, &result, &err), ST_REJECTED);
    assert_non_null(strstr(err.message, "width of 6"));
    assert_int_equal(maker_put(f->registry, "t", "a", 1, 1, NULL, &result, &err), ST_OK);
    assert_int_equal(registry_delete(f->registry, "t", "a", NULL, NULL), ST_OK);

    for (int packs = 0; packs < SITES - 1; packs++) {
        atomic_store(&f->device.packs_left, packs);
        assert_int_equal(maker_put(f->registry, "t", "a", 1, 1, NULL, &result, &err), ST_NOMEM);
        assert_non_null(strstr(err.message, "layer"));
        expect_live_sites(f, 0);
    }
    assert_int_equal(data_files(f, "blobs"), 0);
    assert_int_equal(data_files(f, "staging"), 0);
    assert_int_equal(stats_of(f).adapters, 0);
}

/* The store's disk access fails: the old state stays, on disk and in memory. */
static void a_failing_disk_leaves_the_old_version(void **state)
{
    struct fixture *f = *state;
    struct put_result one = put(f, "t", "a", 2, 1), result;
    struct error err = {0};
    char blobs[300], aside[300];
    snprintf(blobs, sizeof blobs, "%s/blobs", f->folder.path);
    snprintf(aside, sizeof aside, "%s/aside", f->folder.path);
    assert_int_equal(rename(blobs, aside), 0);
    file_write(f->folder.path, "blobs", "", 0); /* a file where the folder was */
    assert_int_equal(maker_put(f->registry, "t", "a", 3, 2, NULL, &result, &err), ST_NOT_FOUND);
    assert_int_equal(unlink(blobs), 0);
    assert_int_equal(rename(aside, blobs), 0);
    expect_live_sites(f, SITES);
    for (int restart = 0; restart < 2; restart++) {
        struct lease *l = lease(f, "t", "a", NULL);
        assert_string_equal(lease_view(l)->version, one.version);
        lease_release(l);
        assert_int_equal(stats_of(f).versions, 1);
        close_registry(f);
        open_registry(f);
    }
}

/* --- memory --- */

static bool resident(struct fixture *f, const char *name)
{
    struct lease *l = NULL;
    enum status st = registry_try_lease(f->registry, "t", name, NULL, &l);
    lease_release(l);
    return st == ST_OK;
}

static void the_least_recently_used_go(void **state)
{
    struct fixture *f = *state;
    close_registry(f);
    /* Room for two adapters, with what packing adds to them and the header of the file that is being loaded. */
    f->config.resident_bytes = 2 * LORA_BYTES(8) + 1800;
    open_registry(f);
    put(f, "t", "a", 8, 1);
    put(f, "t", "b", 8, 2);
    assert_int_equal(stats_of(f).resident, 2);
    struct lease *a = lease(f, "t", "a", NULL); /* a is used later than b, and held */
    put(f, "t", "c", 8, 3);
    assert_int_equal(stats_of(f).evictions, 1);
    assert_false(resident(f, "b"));
    assert_true(resident(f, "c"));
    expect_live_sites(f, 2 * SITES);

    struct lease *b = lease(f, "t", "b", NULL); /* evicts c: a is pinned */
    assert_false(resident(f, "c"));
    struct lease *c = lease(f, "t", "c", NULL); /* all three are held: over the budget */
    assert_int_equal(stats_of(f).resident, 3);
    assert_true(stats_of(f).resident_bytes > f->config.resident_bytes);
    lease_release(a); /* back to it at once */
    assert_int_equal(stats_of(f).resident, 2);
    assert_int_equal(registry_try_lease(f->registry, "t", "a", NULL, &a), ST_BUSY);
    lease_release(b);
    lease_release(c);
    expect_live_sites(f, 2 * SITES);
    assert_int_equal(stats_of(f).leases, 0);
}

struct loader {
    struct fixture *f;
    pthread_t thread;
    struct lease *lease;
    enum status st;
};

static void *loader_main(void *arg)
{
    struct loader *l = arg;
    l->st = registry_lease(l->f->registry, "t", "a", NULL, &l->lease, NULL);
    return NULL;
}

static void loads_of_one_version_are_joined(void **state)
{
    struct fixture *f = *state;
    put(f, "t", "a", 2, 1);
    close_registry(f);
    open_registry(f);
    atomic_store(&f->device.packs, 0);
    f->device.pack_delay_us = 10000;
    struct loader loaders[8];
    for (int i = 0; i < 8; i++) {
        loaders[i] = (struct loader){.f = f};
        pthread_create(&loaders[i].thread, NULL, loader_main, &loaders[i]);
    }
    for (int i = 0; i < 8; i++) {
        pthread_join(loaders[i].thread, NULL);
        assert_int_equal(loaders[i].st, ST_OK);
        assert_ptr_equal(lease_view(loaders[i].lease), lease_view(loaders[0].lease));
    }
    assert_int_equal(atomic_load(&f->device.packs), SITES);
    assert_int_equal(stats_of(f).leases, 8);
    assert_int_equal(stats_of(f).loads, 1);
    for (int i = 0; i < 8; i++) lease_release(loaders[i].lease);
}

static void a_failed_load_fails_each_who_asks(void **state)
{
    struct fixture *f = *state;
    put(f, "t", "a", 2, 1);
    close_registry(f);
    open_registry(f);
    atomic_store(&f->device.packs_left, 2);
    struct loader loaders[4];
    for (int i = 0; i < 4; i++) {
        loaders[i] = (struct loader){.f = f};
        pthread_create(&loaders[i].thread, NULL, loader_main, &loaders[i]);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(loaders[i].thread, NULL);
        assert_int_equal(loaders[i].st, ST_NOMEM);
    }
    assert_int_equal(atomic_load(&f->device.live_sites), 0);
    atomic_store(&f->device.packs_left, -1);
    lease_release(lease(f, "t", "a", NULL));
}

/* --- everything at once --- */

#define HAMMER_NAMES  4
#define HAMMER_ROUNDS 150

struct hammer {
    struct fixture *f;
    pthread_t thread;
    unsigned seed;
    int leased, published, deleted;
    atomic_int *wrong;
};

static unsigned next_random(struct hammer *h)
{
    h->seed = h->seed * 1664525u + 1013904223u;
    return h->seed >> 8;
}

static void *hammer_lease(void *arg)
{
    struct hammer *h = arg;
    for (int i = 0; i < 20 * HAMMER_ROUNDS; i++) {
        char name[2] = {(char)('a' + next_random(h) % HAMMER_NAMES), '\0'};
        struct lease *l = NULL;
        enum status st = registry_try_lease(h->f->registry, "t", name, NULL, &l);
        if (st == ST_BUSY) st = registry_lease(h->f->registry, "t", name, NULL, &l, NULL);
        if (st == ST_NOT_FOUND) continue;
        if (st) {
            atomic_fetch_add(h->wrong, 1);
            continue;
        }
        /* The site's rank is that of the version's bytes, whatever is published meanwhile. */
        const struct adapter_view *v = lease_view(l);
        int rank = v->lr.sites[PROJ_Q]->rank;
        if (strcmp(v->name, name) != 0 || rank < 1 || rank > 3 || v->lr.sites[PROJ_V]->rank != rank)
            atomic_fetch_add(h->wrong, 1);
        if (i % 16 == 0) usleep(100);
        lease_release(l);
        h->leased++;
    }
    return NULL;
}

static void *hammer_publish(void *arg)
{
    struct hammer *h = arg;
    for (int i = 0; i < HAMMER_ROUNDS; i++) {
        char name[2] = {(char)('a' + next_random(h) % HAMMER_NAMES), '\0'};
        struct put_result result;
        if (next_random(h) % 5 == 0) {
            enum status st = registry_delete(h->f->registry, "t", name, NULL, NULL);
            h->deleted += st == ST_OK;
            if (st && st != ST_NOT_FOUND) atomic_fetch_add(h->wrong, 1);
        } else {
            int rank = 1 + (int)(next_random(h) % 3);
            if (maker_put(h->f->registry, "t", name, rank, next_random(h) % 3, NULL, &result, NULL))
                atomic_fetch_add(h->wrong, 1);
            h->published++;
        }
    }
    return NULL;
}

static void many_threads_at_once(void **state)
{
    struct fixture *f = *state;
    close_registry(f);
    f->config.resident_bytes = 3 * LORA_BYTES(2); /* so that there are evictions too */
    open_registry(f);
    for (int i = 0; i < HAMMER_NAMES; i++) put(f, "t", (char[2]){(char)('a' + i), '\0'}, 2, 0);
    atomic_int wrong = 0;
    struct hammer hammers[8];
    for (int i = 0; i < 8; i++) {
        hammers[i] = (struct hammer){.f = f, .seed = (unsigned)i, .wrong = &wrong};
        pthread_create(&hammers[i].thread, NULL, i < 5 ? hammer_lease : hammer_publish, &hammers[i]);
    }
    int leased = 0, published = 0, deleted = 0;
    for (int i = 0; i < 8; i++) {
        pthread_join(hammers[i].thread, NULL);
        leased += hammers[i].leased;
        published += hammers[i].published;
        deleted += hammers[i].deleted;
    }
    assert_int_equal(atomic_load(&wrong), 0);
    assert_true(leased > 0 && published > 0 && deleted > 0);
    struct registry_stats s = stats_of(f);
    assert_int_equal(s.leases, 0);
    assert_true(s.resident_bytes <= f->config.resident_bytes);
    /* The disk tells the same story. */
    size_t versions = s.versions;
    close_registry(f);
    open_registry(f);
    assert_int_equal(stats_of(f).versions, versions);
    struct adapter_info *list;
    size_t count;
    assert_int_equal(registry_list(f->registry, "t", &list, &count, NULL), ST_OK);
    for (size_t i = 0; i < count; i++) {
        for (int k = 0; k < list[i].version_count; k++)
            lease_release(lease(f, "t", list[i].name, list[i].versions[k].record.version));
        adapter_info_release(&list[i]);
    }
    free(list);
}

/* --- on the real device --- */

static void the_cpu_device_packs_them(void **state)
{
    struct fixture *f = *state;
    close_registry(f);
    struct cpu_device_config config = {.level = CPU_LEVEL_BEST, .threads = 1};
    struct device *device = NULL;
    struct error err = {0};
    if (cpu_device_open(&config, &device, &err)) fail_msg("%s", err.message);
    f->config.device = device;
    open_registry(f);
    put(f, "t", "a", 2, 1);
    struct lease *l = lease(f, "t", "a", NULL);
    assert_int_equal(lease_view(l)->lr.sites[PROJ_Q]->d_out, 16);
    assert_true(stats_of(f).resident_bytes > 0);
    lease_release(l);
    close_registry(f);
    device->ops->close(device);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(put_then_lease),
        TEST(same_bytes_change_nothing),
        TEST(compare_and_set),
        TEST(a_lease_outlives_replacement),
        TEST(keys_tell_tenant_name_and_version_apart),
        TEST(names_are_checked),
        TEST(listing_is_by_tenant_and_name),
        TEST(rollback_makes_an_earlier_version_current),
        TEST(only_the_last_versions_are_kept),
        TEST(the_registry_may_say_how_many_versions_to_keep),
        TEST(versions_go_by_any_unique_head_of_their_hash),
        TEST(settings_last),
        TEST(a_pinned_adapter_is_not_evicted),
        TEST(delete_compares_too),
        TEST(files_stay_open_through_deletion),
        TEST(an_earlier_schema_is_brought_up),
        TEST(deletion_leaves_leases_alone),
        TEST(a_restart_changes_nothing),
        TEST(leftovers_are_collected_at_start),
        TEST(damaged_files_are_noticed),
        TEST(a_folder_is_opened_once),
        TEST(a_later_schema_is_refused),
        TEST(a_refused_upload_leaves_nothing),
        TEST(a_failing_disk_leaves_the_old_version),
        TEST(the_least_recently_used_go),
        TEST(loads_of_one_version_are_joined),
        TEST(a_failed_load_fails_each_who_asks),
        TEST(many_threads_at_once),
        TEST(the_cpu_device_packs_them),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

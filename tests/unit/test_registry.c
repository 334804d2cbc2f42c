/* The registry: publishing, versions, settings, deletion. */
#include "adapters/package.h"
#include "tests/support/check.h"
#include "tests/support/shelf.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* --- publishing --- */

static void put_then_lease(void **state)
{
    struct shelf *f = *state;
    struct put_result result = shelf_put(f, "t", "a", 2, 1);
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
    assert_int_equal(shelf_stats(f).leases, 1);
    lease_release(l);
    assert_int_equal(shelf_stats(f).leases, 0);

    assert_int_equal(registry_try_lease(f->registry, "t", "b", NULL, &l), ST_NOT_FOUND);
    assert_int_equal(registry_try_lease(f->registry, "u", "a", NULL, &l), ST_NOT_FOUND);
    assert_int_equal(registry_try_lease(f->registry, "t", "a", "0000000000000000", &l), ST_NOT_FOUND);
    assert_int_equal(shelf_files(f, "staging"), 0);
    assert_int_equal(shelf_files(f, "blobs"), 2);
}

static void same_bytes_change_nothing(void **state)
{
    struct shelf *f = *state;
    struct put_result first = shelf_put(f, "t", "a", 2, 1), again = shelf_put(f, "t", "a", 2, 1);
    assert_true(!again.created && again.unchanged);
    assert_string_equal(again.version, first.version);
    assert_int_equal(shelf_stats(f).versions, 1);
    assert_int_equal(atomic_load(&f->device.packs), SITES);
    /* even with an expectation that no longer holds, so that a repeated call answers alike */
    struct error err = {0};
    assert_int_equal(maker_put(f->registry, "t", "a", 2, 1, "", &again, &err), ST_OK);
    assert_true(again.unchanged);
}

/* Known bytes, but not the current version's: back to it, without packing or writing its files. */
static void known_bytes_are_neither_packed_nor_stored(void **state)
{
    struct shelf *f = *state;
    struct put_result one = shelf_put(f, "t", "a", 2, 1);
    struct put_result two = shelf_put(f, "t", "a", 2, 2);
    char blobs[300], aside[300];
    snprintf(blobs, sizeof blobs, "%s/blobs", f->folder.path);
    snprintf(aside, sizeof aside, "%s/aside", f->folder.path);
    atomic_store(&f->device.packs, 0);
    assert_int_equal(rename(blobs, aside), 0); /* nothing can be stored */
    struct put_result again = shelf_put(f, "t", "a", 2, 1);
    assert_int_equal(rename(aside, blobs), 0);
    assert_false(again.created || again.unchanged);
    assert_string_equal(again.version, one.version);
    assert_int_equal(atomic_load(&f->device.packs), 0);

    struct error err = {0};
    assert_refused(maker_put(f->registry, "t", "a", 2, 2, two.version, &again, &err), ST_CONFLICT, err,
                   one.version);
    for (int restart = 0; restart < 2; restart++) {
        struct adapter_info info;
        assert_int_equal(registry_get(f->registry, "t", "a", &info, NULL), ST_OK);
        assert_int_equal(info.version_count, 2);
        assert_string_equal(info.versions[0].record.version, one.version);
        assert_int_equal(info.versions[0].record.source, VERSION_UPLOAD);
        assert_string_equal(info.versions[1].record.version, two.version);
        adapter_info_release(&info);
        shelf_close(f);
        shelf_open(f);
    }
    /* Known, but not in memory: packed again. */
    lease_release(shelf_lease(f, "t", "a", NULL));
    atomic_store(&f->device.packs, 0);
    shelf_put(f, "t", "a", 2, 2);
    assert_int_equal(atomic_load(&f->device.packs), SITES);
}

static void compare_and_set(void **state)
{
    struct shelf *f = *state;
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
    assert_int_equal(shelf_stats(f).versions, 2);
}

static void a_lease_outlives_replacement(void **state)
{
    struct shelf *f = *state;
    struct put_result one = shelf_put(f, "t", "a", 2, 1);
    struct lease *old = shelf_lease(f, "t", "a", NULL);
    struct put_result two = shelf_put(f, "t", "a", 3, 2);
    assert_true(!two.created && !two.unchanged && strcmp(one.version, two.version) != 0);
    struct lease *new = shelf_lease(f, "t", "a", ""), *named = shelf_lease(f, "t", "a", one.version);
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
    struct put_result back = shelf_put(f, "t", "a", 2, 1);
    assert_true(!back.unchanged);
    assert_string_equal(back.version, one.version);
    assert_int_equal(shelf_stats(f).versions, 2);
    struct lease *l = shelf_lease(f, "t", "a", NULL);
    assert_string_equal(lease_view(l)->version, one.version);
    lease_release(l);
}

static void keys_tell_tenant_name_and_version_apart(void **state)
{
    struct shelf *f = *state;
    static const char *const who[][2] = {{"t", "ab"}, {"ta", "b"}, {"t", "b"}, {"", "tab"}};
    struct key128 keys[4];
    for (int i = 0; i < 4; i++) {
        shelf_put(f, who[i][0], who[i][1], 2, 1);
        struct lease *l = shelf_lease(f, who[i][0], who[i][1], NULL);
        keys[i] = lease_view(l)->key;
        lease_release(l);
        for (int j = 0; j < i; j++) assert_false(key128_equal(keys[i], keys[j]));
    }
    shelf_close(f);
    shelf_open(f);
    struct lease *l = shelf_lease(f, "t", "b", NULL);
    assert_true(key128_equal(lease_view(l)->key, keys[2]));
    lease_release(l);
}

static void names_are_checked(void **state)
{
    struct shelf *f = *state;
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
    struct shelf *f = *state;
    shelf_put(f, "t", "b", 2, 1);
    struct put_result newest = shelf_put(f, "t", "b", 3, 2);
    shelf_put(f, "t", "a", 2, 1);
    shelf_put(f, "s", "z", 2, 1);
    shelf_put(f, "tt", "c", 2, 1);
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

static struct put_result roll_back(struct shelf *f, const char *version)
{
    struct put_result result = {0};
    struct error err = {0};
    if (registry_rollback(f->registry, "t", "a", version, NULL, &result, &err)) fail_msg("%s", err.message);
    return result;
}

static void rollback_makes_an_earlier_version_current(void **state)
{
    struct shelf *f = *state;
    struct put_result one = shelf_put(f, "t", "a", 1, 1), two = shelf_put(f, "t", "a", 2, 2), result;
    shelf_put(f, "t", "a", 3, 3);
    struct lease *l = shelf_lease(f, "t", "a", NULL);
    struct error err = {0};
    assert_string_equal(roll_back(f, one.version).version, one.version);
    shelf_expect_versions(f, "132");
    assert_true(roll_back(f, one.version).unchanged);
    assert_int_equal(lease_view(l)->lr.sites[PROJ_Q]->rank, 3); /* whoever runs is not disturbed */
    lease_release(l);

    assert_int_equal(registry_rollback(f->registry, "t", "a", two.version, two.version, &result, &err),
                     ST_CONFLICT);
    assert_non_null(strstr(err.message, one.version));
    assert_int_equal(registry_rollback(f->registry, "t", "a", two.version, one.version, &result, &err),
                     ST_OK);
    shelf_expect_versions(f, "213");
    assert_int_equal(registry_rollback(f->registry, "t", "a", "ffff", NULL, &result, &err), ST_NOT_FOUND);
    assert_int_equal(registry_rollback(f->registry, "t", "b", "ffff", NULL, &result, &err), ST_NOT_FOUND);

    struct adapter_info info;
    shelf_close(f);
    shelf_open(f);
    shelf_expect_versions(f, "213");
    assert_int_equal(registry_get(f->registry, "t", "a", &info, NULL), ST_OK);
    assert_int_equal(info.versions[0].record.source, VERSION_ROLLBACK);
    assert_int_equal(info.versions[2].record.source, VERSION_UPLOAD);
    adapter_info_release(&info);
}

static void only_the_last_versions_are_kept(void **state)
{
    struct shelf *f = *state;
    int two = 2, one = 1;
    struct put_result first = shelf_put(f, "t", "a", 1, 1);
    shelf_put(f, "t", "a", 2, 2);
    struct lease *l = shelf_lease(f, "t", "a", first.version), *gone;
    shelf_change(f, &(struct adapter_change){.keep_versions = &two});
    shelf_expect_versions(f, "21");
    shelf_put(f, "t", "a", 3, 3);
    shelf_expect_versions(f, "32");
    assert_int_equal(lease_view(l)->lr.sites[PROJ_Q]->rank, 1); /* held, so it stays in memory */
    shelf_expect_sites(f, 3 * SITES);
    assert_int_equal(registry_try_lease(f->registry, "t", "a", first.version, &gone), ST_NOT_FOUND);
    assert_int_equal(shelf_files(f, "blobs"), 3); /* two of tensors and a shared configuration */
    lease_release(l);
    shelf_expect_sites(f, 2 * SITES);
    shelf_change(f, &(struct adapter_change){.keep_versions = &one});
    shelf_expect_versions(f, "3");
    assert_int_equal(shelf_files(f, "blobs"), 2);
    shelf_close(f);
    shelf_open(f);
    shelf_put(f, "t", "a", 2, 2);
    shelf_expect_versions(f, "2");
}

static void the_registry_may_say_how_many_versions_to_keep(void **state)
{
    struct shelf *f = *state;
    int three = 3, none = 0;
    shelf_close(f);
    f->config.keep_versions = 2;
    shelf_open(f);
    for (int rank = 1; rank <= 3; rank++) shelf_put(f, "t", "a", rank, 1);
    shelf_expect_versions(f, "32");
    shelf_change(f, &(struct adapter_change){.keep_versions = &three});
    shelf_put(f, "t", "a", 4, 1);
    shelf_expect_versions(f, "432");
    shelf_change(f, &(struct adapter_change){.keep_versions = &none});
    shelf_expect_versions(f, "43");
}

static void versions_go_by_any_unique_head_of_their_hash(void **state)
{
    struct shelf *f = *state;
    struct adapter_info info;
    struct lease *l;
    struct error err = {0};
    /* more versions than there are digits: some two begin alike */
    for (unsigned seed = 0; seed < 17; seed++) shelf_put(f, "t", "a", 1, seed);
    assert_int_equal(registry_get(f->registry, "t", "a", &info, NULL), ST_OK);
    int shared = 0;
    for (int i = 0; i < info.version_count; i++) {
        const char *hash = info.versions[i].record.hash;
        char head[8];
        lease_release(shelf_lease(f, "t", "a", hash));
        snprintf(head, sizeof head, "%.7s", hash);
        lease_release(shelf_lease(f, "t", "a", head));
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
    struct shelf *f = *state;
    struct adapter_info info, other;
    char name[ADAPTER_NAME_MAX + 1], long_text[ADAPTER_DESCRIPTION_MAX + 2];
    bool pinned = true;
    shelf_put(f, "t", "a", 1, 1);
    shelf_put(f, "t", "b", 1, 1);
    shelf_change(f, &(struct adapter_change){.description = "what it is for"});
    shelf_change(f, &(struct adapter_change){.pinned = &pinned});
    memset(long_text, 'x', sizeof long_text - 1);
    long_text[sizeof long_text - 1] = 0;
    assert_int_equal(
        registry_change(f->registry, "t", "a", &(struct adapter_change){.description = long_text}, NULL),
        ST_INVALID);
    shelf_close(f);
    shelf_open(f);
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

static void delete_compares_too(void **state)
{
    struct shelf *f = *state;
    struct put_result one = shelf_put(f, "t", "a", 1, 1);
    struct error err = {0};
    assert_int_equal(registry_delete(f->registry, "t", "a", "0123456789abcdef", &err), ST_CONFLICT);
    assert_int_equal(registry_delete(f->registry, "t", "a", one.version, &err), ST_OK);
}

static void files_stay_open_through_deletion(void **state)
{
    struct shelf *f = *state;
    struct version_files files;
    char config[256];
    shelf_put(f, "t", "a", 1, 1);
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
/* --- deleting --- */

static void deletion_leaves_leases_alone(void **state)
{
    struct shelf *f = *state;
    shelf_put(f, "t", "a", 2, 1);
    shelf_put(f, "t", "b", 2, 1); /* the same files */
    struct lease *l = shelf_lease(f, "t", "a", NULL), *other;
    struct error err = {0};
    assert_int_equal(registry_delete(f->registry, "t", "a", NULL, &err), ST_OK);
    assert_int_equal(registry_delete(f->registry, "t", "a", NULL, &err), ST_NOT_FOUND);
    assert_int_equal(registry_try_lease(f->registry, "t", "a", NULL, &other), ST_NOT_FOUND);
    assert_int_equal(lease_view(l)->lr.sites[PROJ_Q]->rank, 2);
    assert_int_equal(shelf_files(f, "blobs"), 2); /* b needs them */
    lease_release(l);
    shelf_expect_sites(f, SITES);
    assert_int_equal(registry_delete(f->registry, "t", "b", NULL, &err), ST_OK);
    shelf_expect_sites(f, 0);
    assert_int_equal(shelf_files(f, "blobs"), 0);
    assert_int_equal(shelf_stats(f).resident_bytes, 0);
    shelf_put(f, "t", "a", 2, 1);
    assert_int_equal(shelf_stats(f).versions, 1);
}

/* --- failures leave nothing --- */

static void a_refused_upload_leaves_nothing(void **state)
{
    struct shelf *f = *state;
    struct put_result result;
    struct error err = {0};
    struct upload *u = NULL;
    assert_int_equal(upload_open(f->registry, &u, NULL), ST_OK);
    file_write(upload_path(u), PACKAGE_BODY, "neither tar nor zip", 19);
    assert_int_equal(registry_put(f->registry, "t", "a", u, NULL, &result, &err), ST_BAD_FORMAT);
    upload_close(u);

    shelf_close(f);
    f->config.lr_width_max = 5;
    shelf_open(f);
    assert_int_equal(maker_put(f->registry, "t", "a", 2, 1, NULL, &result, &err), ST_REJECTED);
    assert_non_null(strstr(err.message, "width of 6"));
    assert_int_equal(maker_put(f->registry, "t", "a", 1, 1, NULL, &result, &err), ST_OK);
    assert_int_equal(registry_delete(f->registry, "t", "a", NULL, NULL), ST_OK);

    for (int packs = 0; packs < SITES - 1; packs++) {
        atomic_store(&f->device.packs_left, packs);
        assert_int_equal(maker_put(f->registry, "t", "a", 1, 1, NULL, &result, &err), ST_NOMEM);
        assert_non_null(strstr(err.message, "layer"));
        shelf_expect_sites(f, 0);
    }
    assert_int_equal(shelf_files(f, "blobs"), 0);
    assert_int_equal(shelf_files(f, "staging"), 0);
    assert_int_equal(shelf_stats(f).adapters, 0);
}

/* The store's disk access fails: the old state stays, on disk and in memory. */
static void a_failing_disk_leaves_the_old_version(void **state)
{
    struct shelf *f = *state;
    struct put_result one = shelf_put(f, "t", "a", 2, 1), result;
    struct error err = {0};
    char blobs[300], aside[300];
    snprintf(blobs, sizeof blobs, "%s/blobs", f->folder.path);
    snprintf(aside, sizeof aside, "%s/aside", f->folder.path);
    assert_int_equal(rename(blobs, aside), 0);
    file_write(f->folder.path, "blobs", "", 0); /* a file where the folder was */
    assert_int_equal(maker_put(f->registry, "t", "a", 3, 2, NULL, &result, &err), ST_NOT_FOUND);
    assert_int_equal(unlink(blobs), 0);
    assert_int_equal(rename(aside, blobs), 0);
    shelf_expect_sites(f, SITES);
    for (int restart = 0; restart < 2; restart++) {
        struct lease *l = shelf_lease(f, "t", "a", NULL);
        assert_string_equal(lease_view(l)->version, one.version);
        lease_release(l);
        assert_int_equal(shelf_stats(f).versions, 1);
        shelf_close(f);
        shelf_open(f);
    }
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, shelf_set_up, shelf_tear_down)
int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(put_then_lease),
        TEST(same_bytes_change_nothing),
        TEST(known_bytes_are_neither_packed_nor_stored),
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
        TEST(delete_compares_too),
        TEST(files_stay_open_through_deletion),
        TEST(deletion_leaves_leases_alone),
        TEST(a_refused_upload_leaves_nothing),
        TEST(a_failing_disk_leaves_the_old_version),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#include "tests/support/shelf.h"

#include "tests/support/check.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

void shelf_open(struct shelf *f)
{
    struct error err = {0};
    if (registry_open(&f->config, &f->registry, &err)) fail_msg("%s", err.message);
}

void shelf_close(struct shelf *f)
{
    registry_close(f->registry);
    f->registry = NULL;
    assert_int_equal(atomic_load(&f->device.live_sites), 0); /* whatever the test did, nothing is left */
}

int shelf_set_up(void **state)
{
    struct shelf *f = calloc(1, sizeof *f);
    temp_folder_make(&f->folder);
    counting_device_init(&f->device);
    f->config = (struct registry_config){.data_dir = f->folder.path,
                                         .device = &f->device.device,
                                         .base = small_base(),
                                         .base_fingerprint = "base"};
    shelf_open(f);
    *state = f;
    return 0;
}

int shelf_tear_down(void **state)
{
    struct shelf *f = *state;
    if (f->registry) shelf_close(f);
    temp_folder_remove(&f->folder);
    free(f);
    return 0;
}

struct put_result shelf_put(struct shelf *f, const char *tenant, const char *name, int rank, unsigned seed)
{
    struct put_result result = {0};
    struct error err = {0};
    if (maker_put(f->registry, tenant, name, rank, seed, NULL, &result, &err)) fail_msg("%s", err.message);
    return result;
}

struct lease *shelf_lease(struct shelf *f, const char *tenant, const char *name, const char *version)
{
    struct lease *l = NULL;
    struct error err = {0};
    if (registry_lease(f->registry, tenant, name, version, &l, &err)) fail_msg("%s", err.message);
    return l;
}

int shelf_files(struct shelf *f, const char *below) { return file_count(path_in(f->folder.path, below)); }

/* Eviction frees on a thread of its own. */
void shelf_expect_sites(struct shelf *f, int count)
{
    for (int i = 0; i < 5000 && atomic_load(&f->device.live_sites) != count; i++) usleep(1000);
    assert_int_equal(atomic_load(&f->device.live_sites), count);
}

struct registry_stats shelf_stats(struct shelf *f)
{
    struct registry_stats s;
    registry_stats(f->registry, &s);
    return s;
}

void shelf_change(struct shelf *f, const struct adapter_change *c)
{
    struct error err = {0};
    if (registry_change(f->registry, "t", "a", c, &err)) fail_msg("%s", err.message);
}

void shelf_expect_versions(struct shelf *f, const char *ranks)
{
    struct adapter_info info;
    char seen[16] = "";
    assert_int_equal(registry_get(f->registry, "t", "a", &info, NULL), ST_OK);
    for (int i = 0; i < info.version_count; i++)
        snprintf(seen + i, sizeof seen - (size_t)i, "%d", info.versions[i].record.rank);
    adapter_info_release(&info);
    assert_string_equal(seen, ranks);
}

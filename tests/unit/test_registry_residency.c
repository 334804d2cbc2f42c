/* The registry's memory: eviction, loads, pins, and many threads at once. */
#include "tests/support/check.h"
#include "tests/support/shelf.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* --- memory --- */

static bool resident(struct shelf *f, const char *name)
{
    struct lease *l = NULL;
    enum status st = registry_try_lease(f->registry, "t", name, NULL, &l);
    lease_release(l);
    return st == ST_OK;
}

static void the_least_recently_used_go(void **state)
{
    struct shelf *f = *state;
    shelf_close(f);
    /* Room for two adapters, with what packing adds to them and the header of the file that is being loaded.
     */
    f->config.resident_bytes = 2 * LORA_BYTES(8) + 1800;
    shelf_open(f);
    shelf_put(f, "t", "a", 8, 1);
    shelf_put(f, "t", "b", 8, 2);
    assert_int_equal(shelf_stats(f).resident, 2);
    struct lease *a = shelf_lease(f, "t", "a", NULL); /* a is used later than b, and held */
    shelf_put(f, "t", "c", 8, 3);
    assert_int_equal(shelf_stats(f).evictions, 1);
    assert_false(resident(f, "b"));
    assert_true(resident(f, "c"));
    shelf_expect_sites(f, 2 * SITES);

    struct lease *b = shelf_lease(f, "t", "b", NULL); /* evicts c: a is pinned */
    assert_false(resident(f, "c"));
    struct lease *c = shelf_lease(f, "t", "c", NULL); /* all three are held: over the budget */
    assert_int_equal(shelf_stats(f).resident, 3);
    assert_true(shelf_stats(f).resident_bytes > f->config.resident_bytes);
    lease_release(a); /* back to it at once */
    assert_int_equal(shelf_stats(f).resident, 2);
    assert_int_equal(registry_try_lease(f->registry, "t", "a", NULL, &a), ST_BUSY);
    lease_release(b);
    lease_release(c);
    shelf_expect_sites(f, 2 * SITES);
    assert_int_equal(shelf_stats(f).leases, 0);
}

struct loader {
    struct shelf *f;
    char name[2];
    pthread_t thread;
    struct lease *lease; /* released by its thread if it is to */
    bool release;
    enum status st;
};

static void *loader_main(void *arg)
{
    struct loader *l = arg;
    l->st = registry_lease(l->f->registry, "t", l->name, NULL, &l->lease, NULL);
    if (!l->release || l->st) return NULL;
    lease_release(l->lease);
    return NULL;
}

static void loader_start(struct loader *l, struct shelf *f, char name, bool release)
{
    *l = (struct loader){.f = f, .name = {name}, .release = release};
    pthread_create(&l->thread, NULL, loader_main, l);
}

static void loads_of_one_version_are_joined(void **state)
{
    struct shelf *f = *state;
    shelf_put(f, "t", "a", 2, 1);
    shelf_close(f);
    shelf_open(f);
    atomic_store(&f->device.packs, 0);
    f->device.pack_delay_us = 10000;
    struct loader loaders[8];
    for (int i = 0; i < 8; i++) {
        loader_start(&loaders[i], f, 'a', false);
    }
    for (int i = 0; i < 8; i++) {
        pthread_join(loaders[i].thread, NULL);
        assert_int_equal(loaders[i].st, ST_OK);
        assert_ptr_equal(lease_view(loaders[i].lease), lease_view(loaders[0].lease));
    }
    assert_int_equal(atomic_load(&f->device.packs), SITES);
    assert_int_equal(shelf_stats(f).leases, 8);
    assert_int_equal(shelf_stats(f).loads, 1);
    for (int i = 0; i < 8; i++) lease_release(loaders[i].lease);
}

static void a_failed_load_fails_each_who_asks(void **state)
{
    struct shelf *f = *state;
    shelf_put(f, "t", "a", 2, 1);
    shelf_close(f);
    shelf_open(f);
    atomic_store(&f->device.packs_left, 2);
    struct loader loaders[4];
    for (int i = 0; i < 4; i++) {
        loader_start(&loaders[i], f, 'a', false);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(loaders[i].thread, NULL);
        assert_int_equal(loaders[i].st, ST_NOMEM);
    }
    assert_int_equal(atomic_load(&f->device.live_sites), 0);
    atomic_store(&f->device.packs_left, -1);
    lease_release(shelf_lease(f, "t", "a", NULL));
}

/* What is being packed takes memory too: loads that do not fit beside others wait for them, and uploads as
 * well. */
static void loads_wait_for_room(void **state)
{
    struct shelf *f = *state;
    enum { COUNT = 6 };
    for (int i = 0; i < COUNT; i++) shelf_put(f, "t", (char[2]){(char)('a' + i)}, 8, (unsigned)i);
    shelf_close(f);
    f->config.resident_bytes = 2 * LORA_BYTES(8) + 1800; /* two that are packed, but not two files */
    shelf_open(f);
    f->device.pack_delay_us = 1000;
    struct loader loaders[COUNT];
    for (int i = 0; i < COUNT; i++) loader_start(&loaders[i], f, (char)('a' + i), true);
    for (unsigned seed = 0; seed < 3; seed++) shelf_put(f, "t", "z", 8, 100 + seed);
    for (int i = 0; i < COUNT; i++) {
        pthread_join(loaders[i].thread, NULL);
        assert_int_equal(loaders[i].st, ST_OK);
    }
    assert_int_equal(shelf_stats(f).loads, COUNT + 3);
    assert_int_equal(atomic_load(&f->device.packing_peak), 1);
    assert_true(shelf_stats(f).resident_bytes <= f->config.resident_bytes);
}

/* Those that fit alone only are loaded too, one after the other, and a failed load gives its room back. */
static void loads_beyond_the_budget_go_one_by_one(void **state)
{
    struct shelf *f = *state;
    enum { COUNT = 4 };
    for (int i = 0; i < COUNT; i++) shelf_put(f, "t", (char[2]){(char)('a' + i)}, 8, (unsigned)i);
    shelf_close(f);
    f->config.resident_bytes = 1;
    shelf_open(f);
    atomic_store(&f->device.packs_left, 1);
    struct lease *l = NULL;
    assert_int_equal(registry_lease(f->registry, "t", "a", NULL, &l, NULL), ST_NOMEM);
    atomic_store(&f->device.packs_left, -1);
    f->device.pack_delay_us = 1000;
    struct loader loaders[COUNT];
    for (int i = 0; i < COUNT; i++) loader_start(&loaders[i], f, (char)('a' + i), false);
    for (int i = 0; i < COUNT; i++) {
        pthread_join(loaders[i].thread, NULL);
        assert_int_equal(loaders[i].st, ST_OK);
    }
    assert_int_equal(shelf_stats(f).resident, COUNT); /* all are held */
    for (int i = 0; i < COUNT; i++) lease_release(loaders[i].lease);
    assert_int_equal(shelf_stats(f).resident, 0);
}

/* --- the pinned --- */

static void pinned_adapters_are_loaded_ahead(void **state)
{
    struct shelf *f = *state;
    bool pinned = true;
    struct put_result first = shelf_put(f, "t", "a", 2, 1), result;
    shelf_put(f, "t", "a", 2, 2);
    shelf_put(f, "t", "b", 2, 1);
    shelf_change(f, &(struct adapter_change){.pinned = &pinned});
    shelf_close(f);
    shelf_open(f);
    assert_false(resident(f, "a"));
    assert_true(registry_load_pinned(f->registry));
    assert_false(registry_load_pinned(f->registry));
    assert_true(resident(f, "a"));
    assert_false(resident(f, "b"));
    assert_int_equal(shelf_stats(f).resident, 1);
    /* A pinned adapter's version is in memory when it becomes the current one. */
    assert_int_equal(registry_rollback(f->registry, "t", "a", first.version, NULL, &result, NULL), ST_OK);
    assert_true(resident(f, "a"));

    /* An adapter that is pinned while it is not in memory; one that cannot be loaded does not stop the
     * others. */
    assert_int_equal(
        registry_change(f->registry, "t", "b", &(struct adapter_change){.pinned = &pinned}, NULL), ST_OK);
    assert_true(resident(f, "b"));
    shelf_close(f);
    shelf_open(f);
    atomic_store(&f->device.packs_left, 2);
    assert_true(registry_load_pinned(f->registry));
    atomic_store(&f->device.packs_left, -1);
    assert_true(registry_load_pinned(f->registry));
    assert_false(registry_load_pinned(f->registry));
    assert_false(resident(f, "a"));
    assert_true(resident(f, "b"));
    assert_int_equal(shelf_stats(f).leases, 0);
}

static void a_pinned_adapter_is_not_evicted(void **state)
{
    struct shelf *f = *state;
    struct lease *l;
    bool pinned = true, loose = false;
    shelf_close(f);
    f->config.resident_bytes = LORA_BYTES(2) + 300; /* room for one */
    shelf_open(f);
    shelf_put(f, "t", "a", 2, 1);
    shelf_change(f, &(struct adapter_change){.pinned = &pinned});
    for (unsigned seed = 2; seed < 5; seed++) shelf_put(f, "t", "b", 2, seed);
    assert_int_equal(registry_try_lease(f->registry, "t", "a", NULL, &l), ST_OK);
    lease_release(l);
    assert_int_equal(registry_try_lease(f->registry, "t", "b", NULL, &l), ST_BUSY);
    shelf_change(f, &(struct adapter_change){.pinned = &loose});
    lease_release(shelf_lease(f, "t", "b", NULL));
    assert_int_equal(registry_try_lease(f->registry, "t", "a", NULL, &l), ST_BUSY);
}

/* --- everything at once --- */

#define HAMMER_NAMES  4
#define HAMMER_ROUNDS 150

struct hammer {
    struct shelf *f;
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
    struct shelf *f = *state;
    shelf_close(f);
    f->config.resident_bytes = 3 * LORA_BYTES(2); /* so that there are evictions too */
    shelf_open(f);
    for (int i = 0; i < HAMMER_NAMES; i++) shelf_put(f, "t", (char[2]){(char)('a' + i), '\0'}, 2, 0);
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
    struct registry_stats s = shelf_stats(f);
    assert_int_equal(s.leases, 0);
    assert_true(s.resident_bytes <= f->config.resident_bytes);
    /* The disk tells the same story. */
    size_t versions = s.versions;
    shelf_close(f);
    shelf_open(f);
    assert_int_equal(shelf_stats(f).versions, versions);
    struct adapter_info *list;
    size_t count;
    assert_int_equal(registry_list(f->registry, "t", &list, &count, NULL), ST_OK);
    for (size_t i = 0; i < count; i++) {
        for (int k = 0; k < list[i].version_count; k++)
            lease_release(shelf_lease(f, "t", list[i].name, list[i].versions[k].record.version));
        adapter_info_release(&list[i]);
    }
    free(list);
}

/* --- on the real device --- */

static void the_cpu_device_packs_them(void **state)
{
    struct shelf *f = *state;
    shelf_close(f);
    struct cpu_device_config config = {.level = CPU_LEVEL_BEST, .threads = 1};
    struct device *device = NULL;
    struct error err = {0};
    if (cpu_device_open(&config, &device, &err)) fail_msg("%s", err.message);
    f->config.device = device;
    shelf_open(f);
    shelf_put(f, "t", "a", 2, 1);
    struct lease *l = shelf_lease(f, "t", "a", NULL);
    assert_int_equal(lease_view(l)->lr.sites[PROJ_Q]->d_out, 16);
    assert_true(shelf_stats(f).resident_bytes > 0);
    lease_release(l);
    shelf_close(f);
    device->ops->close(device);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, shelf_set_up, shelf_tear_down)
int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(the_least_recently_used_go),
        TEST(loads_of_one_version_are_joined),
        TEST(a_failed_load_fails_each_who_asks),
        TEST(loads_wait_for_room),
        TEST(loads_beyond_the_budget_go_one_by_one),
        TEST(pinned_adapters_are_loaded_ahead),
        TEST(a_pinned_adapter_is_not_evicted),
        TEST(many_threads_at_once),
        TEST(the_cpu_device_packs_them),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* A registry of a test's own, over a device that only counts; its small LoRAs belong to the tenant "t" unless
 * a test says otherwise. What fails ends the test with a message. */
#ifndef TESTS_SUPPORT_SHELF_H
#define TESTS_SUPPORT_SHELF_H

#include "adapters/registry.h"
#include "tests/support/adapter_maker.h"
#include "tests/support/temp_folder.h"

#define LORA_CONFIG      "{\"peft_type\":\"LORA\",\"lora_alpha\":3,\"target_modules\":[\"q_proj\",\"v_proj\"]}"
#define SITES            4                                  /* of an adapter of maker_lora */
#define LORA_BYTES(rank) ((size_t)(rank)*4 * 2 * (32 + 24)) /* as the counting device packs it */

struct shelf {
    struct temp_folder folder;
    struct counting_device device;
    struct registry_config config;
    struct registry *registry;
};

/* Of cmocka; *state is the shelf, with an open registry. */
int shelf_set_up(void **state);
int shelf_tear_down(void **state);

/* Again, after a change of config. */
void shelf_open(struct shelf *f);
void shelf_close(struct shelf *f);

struct put_result shelf_put(struct shelf *f, const char *tenant, const char *name, int rank, unsigned seed);
struct lease *shelf_lease(struct shelf *f, const char *tenant, const char *name, const char *version);
/* Of the adapter "a" of "t". The versions are given by their ranks, as digits, the current one first. */
void shelf_change(struct shelf *f, const struct adapter_change *c);
void shelf_expect_versions(struct shelf *f, const char *ranks);

/* Files below a folder of the data folder. */
int shelf_files(struct shelf *f, const char *below);
/* Waits for so many live sites: eviction frees on a thread of its own. */
void shelf_expect_sites(struct shelf *f, int count);
struct registry_stats shelf_stats(struct shelf *f);

#endif

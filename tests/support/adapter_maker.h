/* Small adapter files made in memory, and a device that only counts what it packs. */
#ifndef TESTS_SUPPORT_ADAPTER_MAKER_H
#define TESTS_SUPPORT_ADAPTER_MAKER_H

#include "adapters/registry.h"
#include "base/safetensors.h"
#include "base/strbuf.h"
#include "kernels/device.h"

#include <stdatomic.h>

#define MAKER_TENSORS_MAX 256

/* A zeroed struct is empty. */
struct adapter_maker {
    struct safetensor tensor[MAKER_TENSORS_MAX]; /* names and data owned */
    size_t count;
};

/* Adds a tensor of small values that depend on the seed. */
struct safetensor *maker_add(struct adapter_maker *m, enum dtype type, uint64_t rows, uint64_t cols,
                             unsigned seed, const char *name_fmt, ...) PRINTF_LIKE(6, 7);
/* The tensor of that name, which must be there. */
struct safetensor *maker_find(struct adapter_maker *m, const char *name);
void maker_remove(struct adapter_maker *m, const char *name);
/* The file's bytes; *out is released by the caller. */
void maker_write(const struct adapter_maker *m, struct strbuf *out);
void maker_release(struct adapter_maker *m);

/* The shapes of a model with 2 layers: width 16, 4 heads, 2 of keys and values, inner width 24. */
struct adapter_base small_base(void);

/* q_proj and v_proj of both layers of that model. */
void maker_lora(struct adapter_maker *m, int rank, unsigned seed);
void maker_moelora(struct adapter_maker *m, int experts, int rank, unsigned seed);

/* Uploads an adapter of maker_lora. */
enum status maker_put(struct registry *r, const char *tenant, const char *name, int rank, unsigned seed,
                      const char *expected_version, struct put_result *out, struct error *err);

/* Packs a site by remembering its shape. */
struct counting_device {
    struct device device;
    atomic_int live_sites; /* packed and not yet freed */
    atomic_int packs;      /* all that were packed */
    atomic_int packs_left; /* packing fails with ST_NOMEM when it reaches 0; negative: never */
    int pack_delay_us;
    atomic_int packing, packing_peak; /* threads that pack now, and the most there were */
};
void counting_device_init(struct counting_device *d);

#endif

/* Packed low-rank sites on the CPU, and the two halves of their work for one row.
 *
 * Between the halves a row's results stand in a record, record_width floats of scratch: the chosen
 * experts' indices, then z = gate scale weight (A x) of each, (chosen, rank). */
#ifndef KERNELS_CPU_LOWRANK_H
#define KERNELS_CPU_LOWRANK_H

#include "kernels/cpu/kernels.h"
#include "kernels/device.h"

/* Outputs that lie together in a packed B: a step reads a chunk of columns of many different adapters,
 * and each should be one run of memory, not a few bytes of every row. */
#define LR_PANEL 32

/* All aligned to 64 bytes, in the dtypes they came in: conversions would not be exact. */
struct cpu_lr_site {
    struct lr_site base;
    enum dtype type, router_type;
    void *router; /* (experts, d_in), or NULL */
    void *a;      /* (experts, rank, d_in) */
    void *b; /* (experts, panels, rank, LR_PANEL): B transposed by panels, the last one padded with zeros */
    float *scale; /* [experts] */
};

enum status cpu_lr_site_pack(struct device *device, const struct lr_site_source *src, struct lr_site **out);
void cpu_lr_site_free(struct device *device, struct lr_site *s);

/* At most experts * (rank + 1). */
size_t lr_record_width(const struct lr_site *s);
/* Routes x (d_in) and fills the record. */
void lr_record_fill(const struct cpu_kernels *k, const struct lr_site *s, float weight, const float *x,
                    float *record);
/* Asks for the memory that lr_record_apply will read. */
void lr_record_prefetch(const struct lr_site *s, const float *record, size_t begin, size_t cols);
/* y[c] += the delta of outputs begin + c, for c in [0, cols). */
void lr_record_apply(const struct cpu_kernels *k, const struct lr_site *s, const float *record, size_t begin,
                     size_t cols, float *y);

#endif

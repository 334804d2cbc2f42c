/* Packed low-rank sites on the CPU, and the two halves of their work: for one row, and for several rows of
 * one site, which share what they read. A row's results are the same bits either way.
 *
 * Between the halves a row's results stand in a record, floats of scratch: room for the indices of the
 * most experts the row may choose, with -1 after the last of fewer, then z = gate scale weight (A x) of
 * each, (chosen, rank). */
#ifndef KERNELS_CPU_LOWRANK_H
#define KERNELS_CPU_LOWRANK_H

#include "kernels/cpu/kernels.h"
#include "kernels/device.h"

#include <stdatomic.h>

/* Outputs that lie together in a packed B: a step reads a chunk of columns of many different adapters,
 * and each should be one run of memory, not a few bytes of every row. */
#define LR_PANEL 32

/* Rows that go through a site's products together at most. */
#define LR_ROWS 32

/* All aligned to 64 bytes, in the dtypes they came in: conversions would not be exact. */
struct cpu_lr_site {
    struct lr_site base;
    bool shared_a;
    enum dtype type, router_type;
    void *router; /* (experts, d_in), and a row for the threshold where the rule has one; or NULL */
    void *a;      /* (experts, rank, d_in), or (rank, d_in) if shared */
    void *b; /* (experts, panels, rank, LR_PANEL): B transposed by panels, the last one padded with zeros */
    float *scale;       /* [experts] */
    float *gain, *bias; /* (d_out) or NULL */
    struct lr_count
        *count; /* [experts + 1], the last one of rows; NULL without a router. The one thing that changes */
};

/* Added to by several threads at once. Sums of gates are whole multiples of a small unit, so that they do not
 * depend on the order. */
struct lr_count {
    _Atomic uint64_t chosen, gate;
};

enum status cpu_lr_site_pack(struct device *device, const struct lr_site_source *src, struct lr_site **out);
void cpu_lr_site_free(struct device *device, struct lr_site *s);
void cpu_lr_site_usage(struct device *device, const struct lr_site *s, struct lr_usage *out);

/* The experts of one row. */
struct lr_choice {
    int count;
    int32_t expert[LR_EXPERTS_MAX]; /* ascending */
    float gate[LR_EXPERTS_MAX];
};
void lr_route(const struct cpu_kernels *k, const struct lr_site *s, const float *x, struct lr_choice *out);

struct lr_record {
    const struct lr_site *site;
    int chosen_max;
    float *data;
};
/* Floats of data. */
size_t lr_record_width(const struct lr_site *s, int chosen_max);
void lr_record_choose(const struct lr_record *r, const struct lr_choice *choice);
/* The experts of a record; their gates it does not know. */
void lr_record_chosen(const struct lr_record *r, struct lr_choice *out);
int lr_record_count(const struct lr_record *r);
/* Chooses, and multiplies: expert j of the choice reads x + j * x_step (d_in); its z is multiplied by gate
 * scale weight. */
void lr_record_fill(const struct cpu_kernels *k, const struct lr_record *r, const struct lr_choice *choice,
                    float weight, const float *x, size_t x_step);
/* y[c] += what chosen expert j adds to output begin + c, for c in [0, cols). */
void lr_record_apply(const struct cpu_kernels *k, const struct lr_record *r, int j, size_t begin, size_t cols,
                     float *y);

/* Records of up to LR_ROWS rows of one site. */
struct lr_records {
    struct lr_record first;
    size_t stride; /* floats from the data of one to the next's */
    int count;
};
/* Routes rows of x by the site's own router, chooses and multiplies. */
void lr_records_fill(const struct cpu_kernels *k, const struct lr_records *r, float weight, const float *x,
                     size_t x_stride);

/* A list of cache lines, of which it keeps those that come after the first `skip`, as long as there is room.
 */
struct lr_lines {
    const void **line;
    size_t count, room;
    size_t skip, seen; /* seen: all that were added so far, kept or not */
};
/* Adds what filling the records of so many rows of a site reads for certain, or most probably. */
void lr_lines_fill(struct lr_lines *l, const struct lr_site *s, int rows);
/* Adds what applying records reads for columns [begin, begin + cols). */
void lr_lines_apply(struct lr_lines *l, const struct lr_records *r, size_t begin, size_t cols);

/* Adds to each row of y what all its chosen experts add, in ascending order. */
void lr_records_apply(const struct cpu_kernels *k, const struct lr_records *r, size_t begin, size_t cols,
                      float *y, size_t y_stride);

/* y[c] += sum_i z[i] bt[i, c] in fp32: lr_expand for one row. */
static inline void lr_add_floats(const struct cpu_kernels *k, const float *bt, size_t bt_stride, int n,
                                 const float *z, size_t cols, float *y)
{
    k->lr_expand(bt, DTYPE_F32, bt_stride, n, 1, &z, cols, &y, 0);
}

#endif

/* One site group at work: what its parts, sites.c, sites_ahead.c and sites_ffn.c, share. */
#ifndef KERNELS_CPU_SITES_INT_H
#define KERNELS_CPU_SITES_INT_H

#include "kernels/cpu/device_int.h"
#include "kernels/cpu/lowrank.h"

/* Rows' activations in the layout of one product; sites whose products pack alike share it. */
struct packing {
    const struct cpu_product *product;
    void *act;
};

struct group {
    struct cpu_device *d;
    const struct site_group_args *a;
    size_t inputs;

    int packing_count;
    struct packing packing[SITE_GROUP_MAX];
    const struct packing *site_packing[SITE_GROUP_MAX];
    size_t row_chunk, row_chunks; /* per packing */
    size_t record_chunk;          /* units of records a chunk of phase one takes */
    size_t record_units;

    size_t column_chunk[SITE_GROUP_MAX];
    size_t first_chunk[SITE_GROUP_MAX + 1]; /* of phase two, by site */
    size_t products;                        /* of phase two: one a chunk, or two */
};

/* A member's low-rank site at a site of the group, or NULL. */
const struct lr_site *group_lr_site(const struct group *g, const struct lr_member *m, int site);
/* Its record of a row of the segment. */
struct lr_record group_record(const struct group *g, const struct lr_segment *segment, int member, int site,
                              int row);

/* The scratch of a row: the records of its set from the front, and from the end, where a member routes
 * the FFN of this layer, what the group of gate and up leaves for the group of down. */
float *group_row_scratch(const struct group *g, int row);

/* ---- sites_ahead.c ---- */

void ahead_plan(const struct group *g);
/* For one of g->products: fills the worker's list. */
struct cpu_ahead ahead_list(const struct group *g, size_t product, int site, size_t begin, size_t end,
                            int worker);

/* ---- sites_ffn.c ---- */

/* The member's FFN router, if it has one in this layer and this is a group of gate and up, or of down. */
const struct lr_site *ffn_router(const struct group *g, const struct lr_member *m);
/* Floats at the end of a row's scratch for members [0, count) of the segment. */
size_t ffn_width(const struct group *g, const struct lr_segment *segment, int count);
/* Aborts where groups do not come in the order that kernels/device.h asks for. */
void ffn_check_order(const struct group *g);

/* Phase one of gate and up: routes a row and fills its records of both. */
void ffn_route(const struct group *g, const struct lr_segment *segment, int member, int row);
/* Phase one of down: fills the row's record from the experts' activations. */
void ffn_fill_down(const struct group *g, const struct lr_segment *segment, int member, int row);
/* Phase two of gate and up, columns [begin, begin + cols) of one row: makes and keeps the experts'
 * activations from what gate and up are without them. */
void ffn_activate(const struct group *g, const struct lr_segment *segment, int row, size_t begin, size_t cols,
                  const float *gate, const float *up);
/* Then mixes them into y, the activation without experts. */
void ffn_mix(const struct group *g, const struct lr_segment *segment, int row, size_t begin, size_t cols,
             float *y);

#endif

/* FFNs that a member of a set routes as a whole: the formulas stand in kernels/lowrank.h.
 *
 * Between the group of gate and up and that of down, each such member of a row keeps at the end of the
 * row's scratch: the chosen experts, weight * gate of each, and their activations. */
#include "kernels/cpu/sites_int.h"

#include <string.h>

static bool is_down(const struct group *g) { return g->a->site[0].projection == PROJ_DOWN; }

/* Outputs of gate and up, inputs of down. */
static size_t inner_width(const struct group *g)
{
    return is_down(g) ? g->inputs : g->a->site[0].weight->rows;
}

static int chosen_max(const struct lr_site *router)
{
    return lr_chosen_max(router->rule, router->experts, router->top_k);
}

const struct lr_site *ffn_router(const struct group *g, const struct lr_member *m)
{
    if (!m->adapter->ffn || g->a->layer >= m->adapter->layers) return NULL;
    if (g->a->site[0].projection != PROJ_GATE && !is_down(g)) return NULL;
    return m->adapter->ffn[g->a->layer];
}

size_t ffn_width(const struct group *g, const struct lr_segment *segment, int count)
{
    size_t width = 0;
    for (int m = 0; m < count; m++) {
        const struct lr_site *router = ffn_router(g, &segment->members[m]);
        if (router) width += (size_t)chosen_max(router) * (inner_width(g) + 2);
    }
    return width;
}

/* What one member of a row keeps. */
struct kept {
    struct lr_record chosen; /* the experts, without z */
    float *gate;             /* (chosen): times the member's weight */
    float *active;           /* (chosen, inner_width) */
};

static struct kept kept_of(const struct group *g, const struct lr_segment *segment, int member, int row)
{
    const struct lr_site *router = ffn_router(g, &segment->members[member]);
    float *end = group_row_scratch(g, row) + g->d->limits.lr_width;
    float *data = end - ffn_width(g, segment, member + 1);
    int most = chosen_max(router);
    return (struct kept){.chosen = {router, most, data}, .gate = data + most, .active = data + 2 * most};
}

void ffn_check_order(const struct group *g)
{
    struct cpu_device *d = g->d;
    const struct site_group_args *a = g->a;
    size_t width = 0;
    for (int i = 0; i < a->segment_count; i++)
        width += ffn_width(g, &a->segments[i], a->segments[i].member_count);
    if (width > 0 && is_down(g)) {
        CHECK(d->ffn_rows == a->rows && d->ffn_layer == a->layer && d->ffn_inner == inner_width(g));
    } else if (width > 0) {
        CHECK(a->epilogue == EPILOGUE_SILU_MUL && a->site[1].projection == PROJ_UP);
        d->ffn_layer = a->layer;
        d->ffn_inner = inner_width(g);
    }
    d->ffn_rows = width > 0 && !is_down(g) ? a->rows : 0;
}

void ffn_route(const struct group *g, const struct lr_segment *segment, int member, int row)
{
    const struct lr_member *m = &segment->members[member];
    const float *x = g->a->x + (size_t)row * g->a->x_stride;
    struct kept kept = kept_of(g, segment, member, row);
    struct lr_choice choice;
    lr_route(g->d->kernels, kept.chosen.site, x, &choice);
    lr_record_choose(&kept.chosen, &choice);
    for (int j = 0; j < choice.count; j++) {
        kept.gate[j] = choice.gate[j] * m->weight;
        choice.gate[j] = 1; /* it weighs the expert's activation, not what makes it */
    }
    for (int site = 0; site < g->a->site_count; site++) {
        const struct lr_site *lr = group_lr_site(g, m, site);
        if (!lr || lr->rule != GATE_FFN) continue;
        struct lr_record record = group_record(g, segment, member, site, row);
        lr_record_fill(g->d->kernels, &record, &choice, 1, x, 0);
    }
}

void ffn_fill_down(const struct group *g, const struct lr_segment *segment, int member, int row)
{
    struct kept kept = kept_of(g, segment, member, row);
    struct lr_record record = group_record(g, segment, member, 0, row);
    struct lr_choice choice;
    lr_record_chosen(&kept.chosen, &choice);
    memcpy(choice.gate, kept.gate, (size_t)choice.count * sizeof *choice.gate);
    lr_record_fill(g->d->kernels, &record, &choice, 1, kept.active, inner_width(g));
}

/* What chosen expert j adds to columns of gate or up. */
static void add_expert(const struct group *g, const struct lr_segment *segment, int member, int site, int row,
                       int j, size_t begin, size_t cols, float *y)
{
    const struct lr_site *lr = group_lr_site(g, &segment->members[member], site);
    if (!lr || lr->rule != GATE_FFN) return;
    struct lr_record record = group_record(g, segment, member, site, row);
    lr_record_apply(g->d->kernels, &record, j, begin, cols, y);
}

void ffn_activate(const struct group *g, const struct lr_segment *segment, int row, size_t begin, size_t cols,
                  const float *gate, const float *up)
{
    float own_up[CPU_COLUMNS_MAX];
    for (int m = 0; m < segment->member_count; m++) {
        if (!ffn_router(g, &segment->members[m])) continue;
        struct kept kept = kept_of(g, segment, m, row);
        int count = lr_record_count(&kept.chosen);
        for (int j = 0; j < count; j++) {
            float *active = kept.active + (size_t)j * inner_width(g) + begin;
            memcpy(active, gate, cols * sizeof *active);
            memcpy(own_up, up, cols * sizeof *own_up);
            add_expert(g, segment, m, 0, row, j, begin, cols, active);
            add_expert(g, segment, m, 1, row, j, begin, cols, own_up);
            g->d->kernels->silu_mul(active, own_up, cols, active);
        }
    }
}

void ffn_mix(const struct group *g, const struct lr_segment *segment, int row, size_t begin, size_t cols,
             float *y)
{
    float rest = 1; /* the share of the activation without experts */
    for (int m = 0; m < segment->member_count; m++) {
        if (!ffn_router(g, &segment->members[m])) continue;
        struct kept kept = kept_of(g, segment, m, row);
        if (lr_record_count(&kept.chosen) > 0) rest -= segment->members[m].weight;
    }
    for (size_t c = 0; c < cols; c++) y[c] *= rest;
    for (int m = 0; m < segment->member_count; m++) {
        if (!ffn_router(g, &segment->members[m])) continue;
        struct kept kept = kept_of(g, segment, m, row);
        lr_add_floats(g->d->kernels, kept.active + begin, inner_width(g), lr_record_count(&kept.chosen), kept.gate,
                      cols, y);
    }
}

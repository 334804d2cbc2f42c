/* What a product of phase two is told to ask for, since at many rows it leaves memory nearly idle: the B that the deltas
 * of its columns will read, and its share of what the sites of the next group read first, their routers and A.
 * Columns are shared out to threads in the order in which records are, so as a rule a thread asks for what it will read
 * itself. */
#include "kernels/cpu/sites_int.h"

#include "base/memory.h"

/* Of a segment: what they chose is most of what all of its rows chose. */
#define ROWS_ASKED 8

/* The group that follows that of p in a layer's computation: [first, last]. */
static void projections_after(enum projection p, enum projection *first, enum projection *last)
{
    switch (p) {
    case PROJ_DOWN: *first = PROJ_Q, *last = PROJ_V; break;
    case PROJ_O: *first = PROJ_GATE, *last = PROJ_UP; break;
    case PROJ_GATE:
    case PROJ_UP: *first = *last = PROJ_DOWN; break;
    default: *first = *last = PROJ_O; break;
    }
}

static void add_next(const struct group *g, const struct lr_segment *segment, struct lr_lines *l)
{
    enum projection own = g->a->site[g->a->site_count - 1].projection, first, last;
    projections_after(own, &first, &last);
    int layer = g->a->layer + (first < own ? 1 : 0);
    for (int m = 0; m < segment->member_count; m++) {
        const struct lr_adapter *adapter = segment->members[m].adapter;
        if (layer >= adapter->layers) continue;
        const struct lr_site *const *sites = adapter->sites + layer * PROJ_COUNT;
        if (adapter->ffn && adapter->ffn[layer] && first == PROJ_GATE)
            lr_lines_fill(l, adapter->ffn[layer], segment->row_count);
        for (int p = (int)first; p <= (int)last; p++)
            if (sites[p]) lr_lines_fill(l, sites[p], segment->row_count);
    }
}

void ahead_plan(const struct group *g)
{
    size_t *first = g->d->scratch.first_line, lines = 0;
    for (int i = 0; i < g->a->segment_count; i++) {
        struct lr_lines l = {0};
        add_next(g, &g->a->segments[i], &l);
        first[i] = lines;
        lines += l.seen;
    }
    first[g->a->segment_count] = lines;
}

/* Lines [begin, end) of what the next group reads first. */
static void add_share(const struct group *g, size_t begin, size_t end, struct lr_lines *l)
{
    const size_t *first = g->d->scratch.first_line;
    size_t room = l->room;
    if (room > l->count + (end - begin)) l->room = l->count + (end - begin);
    size_t segments = (size_t)g->a->segment_count;
    for (size_t i = cpu_item_of_unit(first, segments, begin); i < segments && l->count < l->room; i++) {
        l->skip = begin > first[i] ? begin - first[i] : 0;
        l->seen = 0;
        add_next(g, &g->a->segments[i], l);
    }
    l->room = room;
}

static void add_applied(const struct group *g, int site, size_t begin, size_t end, struct lr_lines *l)
{
    for (int i = 0; i < g->a->segment_count; i++) {
        const struct lr_segment *segment = &g->a->segments[i];
        for (int m = 0; m < segment->member_count; m++) {
            if (!group_lr_site(g, &segment->members[m], site)) continue;
            struct lr_records records = {.first = group_record(g, segment, m, site, segment->first_row),
                                         .stride = (size_t)g->d->limits.lr_width,
                                         .count = segment->row_count};
            if (records.count > ROWS_ASKED) records.count = ROWS_ASKED;
            lr_lines_apply(l, &records, begin, end - begin);
        }
    }
}

struct cpu_ahead ahead_list(const struct group *g, size_t product, int site, size_t begin, size_t end, int worker)
{
    struct lr_lines l = {.line = g->d->scratch.ahead + (size_t)worker * CPU_AHEAD_LINES, .room = CPU_AHEAD_LINES};
    if (g->a->segment_count > 0) {
        size_t next = g->d->scratch.first_line[g->a->segment_count];
        add_applied(g, site, begin, end, &l);
        size_t from = next * product / g->products, to = next * (product + 1) / g->products;
        if (from < to) add_share(g, from, to, &l);
    }
    return (struct cpu_ahead){l.line, l.count};
}

/* The site group: base products, routed low-rank deltas and the epilogue, in two phases.
 *
 * Phase one works on rows: it packs the activations and fills the low-rank records (router, gates, z).
 * Phase two works on columns: a chunk's base product, the deltas of those columns, the
 * epilogue while they are in cache. So adapters cost no phase of their own. */
#include "kernels/cpu/sites_int.h"

#include "base/memory.h"

#include <string.h>

static const struct cpu_weight *weight_of(const struct group *g, int site)
{
    return (const struct cpu_weight *)g->a->site[site].weight;
}

const struct lr_site *group_lr_site(const struct group *g, const struct lr_member *m, int site)
{
    const struct lr_adapter *adapter = m->adapter;
    if (g->a->layer >= adapter->layers) return NULL;
    return adapter->sites[g->a->layer * PROJ_COUNT + (int)g->a->site[site].projection];
}

static int chosen_max(const struct group *g, const struct lr_member *m, const struct lr_site *lr)
{
    const struct lr_site *router = lr->rule == GATE_FFN ? ffn_router(g, m) : lr;
    CHECK(router && router->experts == lr->experts);
    return lr_chosen_max(router->rule, router->experts, router->top_k);
}

/* Where the record of (member, site) begins among a row's: those before it come first. With member =
 * member_count it is the width of all. */
static size_t record_offset(const struct group *g, const struct lr_segment *segment, int member, int site)
{
    size_t offset = 0;
    for (int m = 0; m <= member && m < segment->member_count; m++) {
        for (int s = 0; s < (m == member ? site : g->a->site_count); s++) {
            const struct lr_site *lr = group_lr_site(g, &segment->members[m], s);
            if (lr) offset += lr_record_width(lr, chosen_max(g, &segment->members[m], lr));
        }
    }
    return offset;
}

float *group_row_scratch(const struct group *g, int row)
{
    return g->d->scratch.lr + (size_t)row * (size_t)g->d->limits.lr_width;
}

struct lr_record group_record(const struct group *g, const struct lr_segment *segment, int member, int site,
                              int row)
{
    const struct lr_member *m = &segment->members[member];
    const struct lr_site *lr = group_lr_site(g, m, site);
    return (struct lr_record){lr, chosen_max(g, m, lr),
                              group_row_scratch(g, row) + record_offset(g, segment, member, site)};
}

/* A unit of phase one is the record of one row for one (member, site), rows innermost, so that those a thread
 * takes in turn share A. */
struct record_unit {
    const struct lr_segment *segment;
    int member, site, row; /* of the segment */
};

static struct record_unit record_unit(const struct group *g, size_t unit)
{
    const size_t *first = g->d->scratch.first_unit;
    size_t index = cpu_item_of_unit(first, (size_t)g->a->segment_count, unit);
    const struct lr_segment *segment = &g->a->segments[index];
    size_t local = unit - first[index], rows = (size_t)segment->row_count, pair = local / rows,
           sites = (size_t)g->a->site_count;
    return (struct record_unit){segment, (int)(pair / sites), (int)(pair % sites), (int)(local % rows)};
}

/* Records of `count` rows from u on. */
static void fill_records(const struct group *g, const struct record_unit *u, int count)
{
    const struct lr_segment *segment = u->segment;
    const struct lr_member *m = &segment->members[u->member];
    const struct lr_site *lr = group_lr_site(g, m, u->site);
    bool down = g->a->site[u->site].projection == PROJ_DOWN;
    int first = segment->first_row + u->row;

    if (u->site == 0 && !down && ffn_router(g, m))
        for (int r = first; r < first + count; r++) ffn_route(g, segment, u->member, r);
    if (lr && lr->rule == GATE_FFN) {
        for (int r = first; down && r < first + count; r++) ffn_fill_down(g, segment, u->member, r);
    } else if (lr) {
        struct lr_records records = {.first = group_record(g, segment, u->member, u->site, first),
                                     .stride = (size_t)g->d->limits.lr_width,
                                     .count = count};
        lr_records_fill(g->d->kernels, &records, m->weight, g->a->x + (size_t)first * g->a->x_stride,
                        g->a->x_stride);
    }
}

static void rows_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct group *g = ctx;
    size_t record_chunks = cpu_chunks(g->record_units, g->record_chunk);
    if (chunk < record_chunks) {
        size_t end = (chunk + 1) * g->record_chunk;
        if (end > g->record_units) end = g->record_units;
        for (size_t unit = chunk * g->record_chunk, count; unit < end; unit += count) {
            struct record_unit u = record_unit(g, unit);
            count = (size_t)(u.segment->row_count - u.row);
            if (count > LR_ROWS) count = LR_ROWS;
            if (count > end - unit) count = end - unit;
            fill_records(g, &u, (int)count);
        }
        return;
    }
    chunk -= record_chunks;
    const struct packing *p = &g->packing[chunk / g->row_chunks];
    size_t begin = chunk % g->row_chunks * g->row_chunk, end = begin + g->row_chunk;
    if (end > (size_t)g->a->rows) end = (size_t)g->a->rows;
    p->product->act_pack(p->act, g->a->x, g->a->x_stride, g->inputs, g->a->rows, (int)begin, (int)end);
}

/* The part of deltas that scales the base product, which y holds: all members' gains add up. */
static void scale_base(const struct group *g, const struct lr_segment *segment, int site, size_t begin,
                       size_t cols, float *y, size_t y_stride)
{
    float factor[CPU_COLUMNS_MAX];
    bool any = false;
    for (int m = 0; m < segment->member_count; m++) {
        const struct cpu_lr_site *lr =
            (const struct cpu_lr_site *)group_lr_site(g, &segment->members[m], site);
        if (!lr || !lr->gain) continue;
        for (size_t c = 0; c < cols && !any; c++) factor[c] = 1;
        any = true;
        lr_add_floats(g->d->kernels, lr->gain + begin, cols, 1, &segment->members[m].weight, cols, factor);
    }
    for (int r = segment->first_row; any && r < segment->first_row + segment->row_count; r++)
        for (size_t c = 0; c < cols; c++) y[(size_t)r * y_stride + c] *= factor[c];
}

/* What the experts that the rows chose, and the bias, add to their columns. */
static void add_member(const struct group *g, const struct lr_segment *segment, int member, int site,
                       size_t begin, size_t cols, float *y, size_t y_stride)
{
    const struct lr_member *m = &segment->members[member];
    const struct cpu_kernels *k = g->d->kernels;
    const float *bias = ((const struct cpu_lr_site *)group_lr_site(g, m, site))->bias;
    struct lr_records records = {.first = group_record(g, segment, member, site, segment->first_row),
                                 .stride = (size_t)g->d->limits.lr_width};
    y += (size_t)segment->first_row * y_stride;
    for (int r = 0; r < segment->row_count; r += records.count) {
        int left = segment->row_count - r;
        records.count = left < LR_ROWS ? left : LR_ROWS;
        lr_records_apply(k, &records, begin, cols, y, y_stride);
        records.first.data += (size_t)records.count * records.stride;
        for (int i = 0; i < records.count; i++, y += y_stride)
            if (bias) lr_add_floats(k, bias + begin, cols, 1, &m->weight, cols, y);
    }
}

/* Adds the deltas of every segment to columns [begin, end) of one site, which y holds. Those of a
 * routed FFN come with its experts' activations. */
static void add_deltas(const struct group *g, int site, size_t begin, size_t end, float *y, size_t y_stride)
{
    bool down = g->a->site[site].projection == PROJ_DOWN;
    for (int i = 0; i < g->a->segment_count; i++) {
        const struct lr_segment *segment = &g->a->segments[i];
        scale_base(g, segment, site, begin, end - begin, y, y_stride);
        for (int m = 0; m < segment->member_count; m++) {
            const struct lr_site *lr = group_lr_site(g, &segment->members[m], site);
            if (lr && (down || lr->rule != GATE_FFN))
                add_member(g, segment, m, site, begin, end - begin, y, y_stride);
        }
    }
}

/* Columns [begin, end) of a site, one product of phase two. */
struct columns {
    size_t product; /* of g->products */
    int site, worker;
    size_t begin, end;
};

/* y[r * y_stride + c] = (W x_r + deltas)[c->begin + c] for each of its columns. */
static void compute_columns(const struct group *g, const struct columns *c, float *y, size_t y_stride)
{
    const struct cpu_weight *w = weight_of(g, c->site);
    struct cpu_ahead ahead = ahead_list(g, c->product, c->site, c->begin, c->end, c->worker);
    w->product->multiply(w->packed ? w->packed : w->file.data, w->base.type, g->site_packing[c->site]->act,
                         g->inputs, w->base.rows, g->a->rows, c->begin, c->end, y, y_stride, &ahead);
    add_deltas(g, c->site, c->begin, c->end, y, y_stride);
}

/* y = silu(y) * up on columns [begin, begin + cols), and what experts of routed FFNs make of it. */
static void activate_columns(const struct group *g, size_t begin, size_t cols, float *y, size_t y_stride,
                             const float *up)
{
    int next = 0;
    for (int r = 0; r < g->a->rows; r++, y += y_stride, up += cols) {
        const struct lr_segment *segment = next < g->a->segment_count ? &g->a->segments[next] : NULL;
        bool inside = segment && r >= segment->first_row;
        bool routed = inside && ffn_width(g, segment, segment->member_count) > 0;
        if (routed) ffn_activate(g, segment, r, begin, cols, y, up);
        g->d->kernels->silu_mul(y, up, cols, y);
        if (routed) ffn_mix(g, segment, r, begin, cols, y);
        if (inside && r == segment->first_row + segment->row_count - 1) next++;
    }
}

static void columns_chunk(void *ctx, size_t chunk, int worker)
{
    const struct group *g = ctx;
    const struct site_group_args *a = g->a;
    const struct cpu_kernels *k = g->d->kernels;

    int site = (int)cpu_item_of_unit(g->first_chunk, (size_t)a->site_count, chunk);
    size_t begin = (chunk - g->first_chunk[site]) * g->column_chunk[site],
           end = begin + g->column_chunk[site];
    if (end > a->site[site].weight->rows) end = a->site[site].weight->rows;
    size_t cols = end - begin, stride = a->site[site].y_stride;
    float *y = a->site[site].y + begin;
    float *own = g->d->scratch.columns + (size_t)worker * g->d->scratch.columns_stride;

    struct columns c = {chunk, site, worker, begin, end};
    switch (a->epilogue) {
    case EPILOGUE_STORE: compute_columns(g, &c, y, stride); break;
    case EPILOGUE_ADD:
        compute_columns(g, &c, own, cols);
        for (size_t r = 0; r < (size_t)a->rows; r++) k->add(y + r * stride, own + r * cols, cols);
        break;
    case EPILOGUE_SILU_MUL:
        c.product = 2 * chunk;
        compute_columns(g, &c, y, stride);
        c.product++, c.site++;
        compute_columns(g, &c, own, cols);
        activate_columns(g, begin, cols, y, stride, own);
        break;
    }
}

static void plan_rows(struct group *g)
{
    const struct site_group_args *a = g->a;
    struct cpu_scratch *s = &g->d->scratch;
    int tile_rows = 1;
    for (int site = 0; site < a->site_count; site++) {
        const struct cpu_product *product = weight_of(g, site)->product;
        int p = 0;
        while (p < g->packing_count && g->packing[p].product->act_pack != product->act_pack) p++;
        if (p == g->packing_count) g->packing[g->packing_count++] = (struct packing){product, s->act[p]};
        g->site_packing[site] = &g->packing[p];
        if (product->tile_rows > tile_rows) tile_rows = product->tile_rows; /* powers of two */
    }
    g->row_chunk = cpu_row_chunk(g->d, a->rows, g->inputs, tile_rows);
    g->row_chunks = cpu_chunks((size_t)a->rows, g->row_chunk);

    for (int i = 0; i < a->segment_count; i++) {
        const struct lr_segment *segment = &a->segments[i];
        CHECK(segment->row_count > 0 && segment->first_row >= 0);
        CHECK(segment->first_row + segment->row_count <= a->rows);
        CHECK(record_offset(g, segment, segment->member_count, 0) +
                  ffn_width(g, segment, segment->member_count) <=
              (size_t)g->d->limits.lr_width);
        s->first_unit[i] = g->record_units;
        g->record_units += (size_t)segment->row_count * (size_t)segment->member_count * (size_t)a->site_count;
        s->first_unit[i + 1] = g->record_units;
    }
    g->record_chunk = pool_chunk(g->d->pool, g->record_units, 1);
}

/* Threads take chunks of about equal width from all sites. */
static void plan_columns(struct group *g)
{
    const struct site_group_args *a = g->a;
    bool pair = a->epilogue == EPILOGUE_SILU_MUL;
    int panel = a->segment_count > 0 ? LR_PANEL : 1, planned = pair ? 1 : a->site_count;
    size_t outputs = 0, most = CPU_COLUMNS_MAX;
    for (int site = 0; site < a->site_count; site++) {
        int own = weight_of(g, site)->product->panel_outputs;
        if (own > panel) panel = own; /* powers of two */
        if (site < planned) outputs += a->site[site].weight->rows;
    }
    if (a->epilogue != EPILOGUE_STORE) most = CPU_COLUMN_FLOATS / (size_t)a->rows;
    if (most > CPU_COLUMNS_MAX) most = CPU_COLUMNS_MAX;
    most -= most % (size_t)panel;

    size_t chunk = pool_chunk(g->d->pool, outputs, (size_t)panel);
    if (chunk > most) chunk = most ? most : (size_t)panel;
    for (int site = 0; site < a->site_count; site++) {
        size_t chunks = site < planned ? cpu_chunks(a->site[site].weight->rows, chunk) : 0;
        g->column_chunk[site] = chunk;
        g->first_chunk[site + 1] = g->first_chunk[site] + chunks;
    }
    g->products = g->first_chunk[a->site_count] * (pair ? 2 : 1);
}

static void check_args(const struct cpu_device *d, const struct site_group_args *a)
{
    CHECK(a->site_count >= 1 && a->site_count <= SITE_GROUP_MAX);
    CHECK(a->rows >= 1 && a->rows <= d->limits.rows);
    CHECK(a->site[0].weight->cols <= d->limits.cols);
    CHECK(a->segment_count >= 0 && a->segment_count <= a->rows);
    for (int i = 1; i < a->site_count; i++) CHECK(a->site[i].weight->cols == a->site[0].weight->cols);
    if (a->epilogue == EPILOGUE_SILU_MUL)
        CHECK(a->site_count == 2 && a->site[0].weight->rows == a->site[1].weight->rows);
}

void cpu_site_group(struct device *device, const struct site_group_args *a)
{
    struct cpu_device *d = cpu_device_of(device);
    check_args(d, a);
    struct group g = {.d = d, .a = a, .inputs = a->site[0].weight->cols};
    ffn_check_order(&g);
    plan_rows(&g);
    plan_columns(&g);
    ahead_plan(&g);

    size_t record_chunks = cpu_chunks(g.record_units, g.record_chunk);
    cpu_run(d, record_chunks + (size_t)g.packing_count * g.row_chunks, rows_chunk, &g);
    cpu_run(d, g.first_chunk[a->site_count], columns_chunk, &g);
}

struct gather_job {
    const struct cpu_device *d;
    const struct logits_args *a;
    size_t chunk;
};

static void gather_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct gather_job *job = ctx;
    const struct logits_args *a = job->a;
    size_t count = (size_t)a->count, cols = a->head->cols;
    size_t end = (chunk + 1) * job->chunk < count ? (chunk + 1) * job->chunk : count;
    for (size_t i = chunk * job->chunk; i < end; i++)
        job->d->kernels->rmsnorm(a->x + (size_t)a->row[i] * a->x_stride, a->norm_weight, a->eps, cols,
                                 job->d->scratch.norm + i * cols);
}

void cpu_logits(struct device *device, const struct logits_args *a)
{
    struct cpu_device *d = cpu_device_of(device);
    if (a->count == 0) return;
    CHECK(a->count > 0 && a->count <= d->limits.rows && a->head->cols <= d->limits.cols);

    struct gather_job job = {d, a, cpu_row_chunk(d, a->count, a->head->cols, 1)};
    cpu_run(d, cpu_chunks((size_t)a->count, job.chunk), gather_chunk, &job);
    struct site_group_args product = {
        .rows = a->count,
        .x = d->scratch.norm,
        .x_stride = a->head->cols,
        .site_count = 1,
        .site = {{.weight = a->head, .y = a->y, .y_stride = a->head->rows}},
        .epilogue = EPILOGUE_STORE,
    };
    cpu_site_group(device, &product);
}

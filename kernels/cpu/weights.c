/* Weights: packing into the layout of the best product that takes their shape. */
#include "kernels/cpu/device_int.h"

#include "base/memory.h"

#include <string.h>

struct pack_job {
    const struct cpu_product *product;
    void *dst;
    const struct matrix *m;
    size_t begin, end, chunk; /* outputs */
};

static void pack_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct pack_job *job = ctx;
    size_t begin = job->begin + chunk * job->chunk, end = begin + job->chunk;
    job->product->weight_pack(job->dst, job->m, begin, end < job->end ? end : job->end);
}

/* Uses all threads if nobody else does. Packing while steps run is rare and may take its time. */
static void pack(struct cpu_device *d, struct pack_job *job)
{
    size_t count = job->end - job->begin;
    job->chunk = pool_chunk(d->pool, count, (size_t)job->product->panel_outputs);
    size_t chunks = cpu_chunks(count, job->chunk);
    if (pthread_mutex_trylock(&d->pool_lock) == 0) {
        pool_run(d->pool, chunks, pack_chunk, job);
        pthread_mutex_unlock(&d->pool_lock);
        return;
    }
    for (size_t i = 0; i < chunks; i++) pack_chunk(job, i, 0);
}

/* The highest level's product that takes this shape; the reference takes all. */
static enum status choose_product(const struct cpu_device *d, const struct matrix *m,
                                  const struct cpu_product **out, size_t *bytes)
{
    if (m->rows == 0 || m->cols == 0 || !dtype_known(m->type)) return ST_INVALID;
    if (dtype_row_bytes(m->type, m->cols) == SIZE_MAX) return ST_INVALID;
    for (int level = (int)d->level; level >= 0; level--) {
        const struct cpu_product *product = d->table[level].product[m->type];
        size_t n = product ? product->weight_bytes(m->type, m->rows, m->cols) : SIZE_MAX;
        if (n == SIZE_MAX) continue;
        CHECK(product->panel_outputs <= CPU_PANEL_MAX && WEIGHT_FILL_ROWS % product->panel_outputs == 0);
        *out = product;
        *bytes = n;
        return ST_OK;
    }
    return ST_UNSUPPORTED;
}

enum status cpu_weight_layout(struct device *device, const struct matrix *m, const char **name, size_t *bytes)
{
    const struct cpu_product *product;
    enum status st = choose_product(cpu_device_of(device), m, &product, bytes);
    if (!st) *name = product->layout;
    return st;
}

void cpu_weight_fill(struct device *device, const struct matrix *m, void *packed, size_t begin, size_t end)
{
    struct cpu_device *d = cpu_device_of(device);
    struct pack_job job = {.dst = packed, .m = m, .begin = begin, .end = end};
    size_t bytes;
    CHECK(choose_product(d, m, &job.product, &bytes) == ST_OK && begin < end && end <= m->rows);
    CHECK(begin % WEIGHT_FILL_ROWS == 0);
    if (bytes) pack(d, &job);
}

bool cpu_weight_filled(struct device *device, const struct matrix *m, const void *packed, size_t row)
{
    const struct cpu_product *product;
    size_t bytes;
    CHECK(choose_product(cpu_device_of(device), m, &product, &bytes) == ST_OK && row < m->rows);
    if (!bytes) return true;

    /* The panel's rows as a matrix of their own. */
    size_t outputs = (size_t)product->panel_outputs, panel = row / outputs, first = panel * outputs;
    struct matrix part = *m;
    part.rows = m->rows - first < outputs ? m->rows - first : outputs;
    part.data = (const char *)m->data + first * dtype_row_bytes(m->type, m->cols);
    size_t panel_bytes = product->weight_bytes(m->type, part.rows, m->cols);
    void *fresh = memory_alloc(panel_bytes);
    if (!fresh) return false;
    product->weight_pack(fresh, &part, 0, part.rows);
    bool same = memcmp(fresh, (const char *)packed + panel * panel_bytes, panel_bytes) == 0;
    memory_free(fresh);
    return same;
}

static enum status weight_new(const struct matrix *m, const struct cpu_product *product, size_t bytes,
                              const void *packed, struct cpu_weight **out)
{
    struct cpu_weight *w = memory_zalloc(1, sizeof *w);
    if (!w) return ST_NOMEM;
    w->base = (struct weight){.type = m->type, .rows = m->rows, .cols = m->cols, .bytes = bytes};
    w->file = *m;
    w->product = product;
    w->packed = bytes ? packed : NULL;
    *out = w;
    return ST_OK;
}

enum status cpu_weight_open(struct device *device, const struct matrix *m, const void *packed,
                            struct weight **out)
{
    const struct cpu_product *product;
    size_t bytes;
    struct cpu_weight *w;
    enum status st = choose_product(cpu_device_of(device), m, &product, &bytes);
    if (!st) st = weight_new(m, product, bytes, packed, &w);
    if (!st) *out = &w->base;
    return st;
}

/* Packs into memory of the weight's own. */
static enum status weight_pack(struct cpu_device *d, const struct matrix *m, const struct cpu_product *product,
                               size_t bytes, struct weight **out)
{
    struct cpu_weight *w;
    void *packed = bytes ? memory_alloc(bytes) : NULL;
    enum status st = bytes && !packed ? ST_NOMEM : weight_new(m, product, bytes, packed, &w);
    if (st) {
        memory_free(packed);
        return st;
    }
    w->owned = packed;
    struct pack_job job = {.product = product, .dst = packed, .m = m, .end = m->rows};
    if (packed) pack(d, &job);
    *out = &w->base;
    return ST_OK;
}

enum status cpu_weight_pack(struct device *device, const struct matrix *m, struct weight **out)
{
    struct cpu_device *d = cpu_device_of(device);
    const struct cpu_product *product;
    size_t bytes;
    enum status st = choose_product(d, m, &product, &bytes);
    return st ? st : weight_pack(d, m, product, bytes, out);
}

enum status cpu_grad_weight_pack(struct device *device, const struct matrix *m, struct weight **out)
{
    struct cpu_device *d = cpu_device_of(device);
    const struct cpu_product *product = d->kernels->grad_product;
    if (m->rows == 0 || m->cols == 0 || m->type != DTYPE_F32) return ST_INVALID;
    return weight_pack(d, m, product, product->weight_bytes(m->type, m->rows, m->cols), out);
}

void cpu_weight_free(struct device *device, struct weight *w)
{
    (void)device;
    if (!w) return;
    struct cpu_weight *own = (struct cpu_weight *)w;
    memory_free(own->owned);
    memory_free(own);
}

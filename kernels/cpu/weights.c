/* Weights: packing into the layout of the best product that takes their shape. */
#include "kernels/cpu/device_int.h"

#include "base/memory.h"

struct pack_job {
    const struct cpu_product *product;
    void *dst;
    const struct matrix *m;
    size_t chunk; /* outputs */
};

static void pack_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct pack_job *job = ctx;
    size_t begin = chunk * job->chunk, end = begin + job->chunk;
    if (end > job->m->rows) end = job->m->rows;
    job->product->weight_pack(job->dst, job->m, begin, end);
}

/* Uses all threads if nobody else does. Packing while steps run is rare and may take its time. */
static void pack(struct cpu_device *d, struct pack_job *job)
{
    job->chunk = pool_chunk(d->pool, job->m->rows, (size_t)job->product->panel_outputs);
    size_t chunks = (job->m->rows + job->chunk - 1) / job->chunk;
    if (pthread_mutex_trylock(&d->pool_lock) == 0) {
        pool_run(d->pool, chunks, pack_chunk, job);
        pthread_mutex_unlock(&d->pool_lock);
        return;
    }
    for (size_t i = 0; i < chunks; i++) pack_chunk(job, i, 0);
}

/* The highest level's product that takes this shape; the reference takes all. */
static const struct cpu_product *choose_product(const struct cpu_device *d, const struct matrix *m,
                                                size_t *bytes)
{
    for (int level = (int)d->level; level >= 0; level--) {
        const struct cpu_product *product = d->table[level].product[m->type];
        if (!product) continue;
        *bytes = product->weight_bytes(m->type, m->rows, m->cols);
        if (*bytes != SIZE_MAX) return product;
    }
    return NULL;
}

enum status cpu_weight_pack(struct device *device, const struct matrix *m, struct weight **out)
{
    struct cpu_device *d = cpu_device_of(device);
    if (m->rows == 0 || m->cols == 0 || !dtype_known(m->type)) return ST_INVALID;
    if (dtype_row_bytes(m->type, m->cols) == SIZE_MAX) return ST_INVALID;

    size_t bytes;
    const struct cpu_product *product = choose_product(d, m, &bytes);
    if (!product) return ST_UNSUPPORTED;
    CHECK(product->panel_outputs <= CPU_PANEL_MAX);

    struct cpu_weight *w = memory_zalloc(1, sizeof *w);
    if (!w) return ST_NOMEM;
    w->base = (struct weight){.type = m->type, .rows = m->rows, .cols = m->cols, .bytes = bytes};
    w->file = *m;
    w->product = product;
    if (bytes) {
        w->packed = memory_alloc(bytes);
        if (!w->packed) {
            memory_free(w);
            return ST_NOMEM;
        }
        struct pack_job job = {.product = product, .dst = w->packed, .m = &w->file};
        pack(d, &job);
    }
    *out = &w->base;
    return ST_OK;
}

void cpu_weight_free(struct device *device, struct weight *w)
{
    (void)device;
    if (!w) return;
    struct cpu_weight *own = (struct cpu_weight *)w;
    memory_free(own->packed);
    memory_free(own);
}

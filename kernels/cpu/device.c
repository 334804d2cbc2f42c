/* The CPU device: opening, memory, and the ops that need no plan. */
#include "kernels/cpu/device_int.h"

#include "base/memory.h"
#include "kernels/cpu/cores.h"
#include "kernels/cpu/grad_int.h"
#include "kernels/cpu/lowrank.h"

#include <stdio.h>
#include <string.h>

void cpu_run(struct cpu_device *d, size_t total, pool_fn fn, void *ctx)
{
    pthread_mutex_lock(&d->pool_lock);
    pool_run(d->pool, total, fn, ctx);
    pthread_mutex_unlock(&d->pool_lock);
}

size_t cpu_row_chunk(const struct cpu_device *d, int rows, size_t row_elems, int multiple)
{
    size_t all = size_round_up((size_t)rows, (size_t)multiple);
    if ((size_t)rows * row_elems <= CPU_SERIAL_ELEMS) return all;
    return pool_chunk(d->pool, (size_t)rows, (size_t)multiple);
}

static void device_close(struct device *device)
{
    if (!device) return;
    struct cpu_device *d = cpu_device_of(device);
    pool_close(d->pool);
    pthread_mutex_destroy(&d->pool_lock);
    cpu_scratch_release(d);
    memory_free(d->grad);
    memory_free(d);
}

static void device_attach(struct device *d) { pool_attach(cpu_device_of(d)->pool); }

static void *device_alloc(struct device *d, size_t bytes)
{
    (void)d;
    return memory_zalloc(bytes, 1);
}

static void device_free(struct device *d, void *p)
{
    (void)d;
    memory_free(p);
}

static void device_write(struct device *d, void *dst, const void *src_host, size_t bytes)
{
    (void)d;
    if (bytes) memcpy(dst, src_host, bytes);
}

static void device_read(struct device *d, void *dst_host, const void *src, size_t bytes)
{
    (void)d;
    if (bytes) memcpy(dst_host, src, bytes);
}

/* Every op is done when it returns, and none can fail. */
static enum status device_sync(struct device *d)
{
    (void)d;
    return ST_OK;
}

struct embed_job {
    const struct cpu_weight *table;
    const int32_t *id;
    float *y;
    size_t count, chunk;
};

static void embed_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct embed_job *job = ctx;
    const struct matrix *m = &job->table->file;
    size_t row_bytes = dtype_row_bytes(m->type, m->cols);
    size_t end = (chunk + 1) * job->chunk < job->count ? (chunk + 1) * job->chunk : job->count;
    for (size_t i = chunk * job->chunk; i < end; i++)
        dtype_decode(m->type, (const char *)m->data + (size_t)job->id[i] * row_bytes, job->y + i * m->cols,
                     m->cols);
}

static void device_embed(struct device *device, const struct weight *table, int count, const int32_t *id,
                         float *y)
{
    struct cpu_device *d = cpu_device_of(device);
    for (int i = 0; i < count; i++) CHECK(id[i] >= 0 && (size_t)id[i] < table->rows);
    struct embed_job job = {(const struct cpu_weight *)table, id, y, (size_t)count,
                            cpu_row_chunk(d, count, table->cols, 1)};
    cpu_run(d, cpu_chunks((size_t)count, job.chunk), embed_chunk, &job);
}

struct rmsnorm_job {
    const struct cpu_kernels *kernels;
    const struct rmsnorm_args *a;
    size_t chunk;
};

static void rmsnorm_chunk(void *ctx, size_t chunk, int worker)
{
    (void)worker;
    const struct rmsnorm_job *job = ctx;
    const struct rmsnorm_args *a = job->a;
    size_t rows = (size_t)a->rows, end = (chunk + 1) * job->chunk < rows ? (chunk + 1) * job->chunk : rows;
    for (size_t r = chunk * job->chunk; r < end; r++)
        job->kernels->rmsnorm(a->x + r * a->cols, a->weight, a->eps, a->cols, a->y + r * a->cols);
}

static void device_rmsnorm(struct device *device, const struct rmsnorm_args *a)
{
    struct cpu_device *d = cpu_device_of(device);
    struct rmsnorm_job job = {d->kernels, a, cpu_row_chunk(d, a->rows, a->cols, 1)};
    cpu_run(d, cpu_chunks((size_t)a->rows, job.chunk), rmsnorm_chunk, &job);
}

static void device_host_run(struct device *device, size_t count, pool_fn fn, void *ctx)
{
    cpu_run(cpu_device_of(device), count, fn, ctx);
}

static const struct device_ops cpu_ops = {
    .close = device_close,
    .attach = device_attach,
    .alloc = device_alloc,
    .free = device_free,
    .write = device_write,
    .read = device_read,
    .sync = device_sync,
    .reserve = cpu_reserve,
    .weight_pack = cpu_weight_pack,
    .weight_free = cpu_weight_free,
    .weight_layout = cpu_weight_layout,
    .weight_fill = cpu_weight_fill,
    .weight_filled = cpu_weight_filled,
    .weight_open = cpu_weight_open,
    .lr_site_pack = cpu_lr_site_pack,
    .lr_site_free = cpu_lr_site_free,
    .lr_site_usage = cpu_lr_site_usage,
    .embed = device_embed,
    .rmsnorm = device_rmsnorm,
    .site_group = cpu_site_group,
    .rope_kv = cpu_rope_kv,
    .attention = cpu_attention,
    .logits = cpu_logits,
    .host_run = device_host_run,
};

enum status cpu_device_open(const struct cpu_device_config *config, struct device **out, struct error *err)
{
    enum cpu_level best = cpu_level_supported();
    enum cpu_level level = config->level == CPU_LEVEL_BEST ? best : config->level;
    if (!cpu_level_usable(level))
        return error_set(err, ST_UNSUPPORTED, "this machine has no %s; the best it can do is %s",
                         cpu_level_name(level), cpu_level_name(best));

    struct cpu_device *d = memory_zalloc(1, sizeof *d);
    if (!d) return error_set(err, ST_NOMEM, "no memory for the compute device");
    d->base = (struct device){.ops = &cpu_ops, .grad = &cpu_grad_ops, .name = d->name};
    d->level = level;
    snprintf(d->name, sizeof d->name, "cpu %s", cpu_level_name(level));
    for (int i = 0; i <= (int)level; i++)
        if (cpu_level_usable((enum cpu_level)i)) cpu_level_kernels((enum cpu_level)i, &d->table[i]);
    d->kernels = &d->table[level];
    pthread_mutex_init(&d->pool_lock, NULL);

    int threads = config->threads > 0 ? config->threads : cores_count();
    enum status st = pool_open(threads, !config->no_pin, &d->pool);
    if (st) {
        device_close(&d->base);
        return error_set(err, st, "cannot start %d compute threads", threads);
    }
    d->base.host_threads = threads;
    d->base.memory_nodes = cores_nodes();
    *out = &d->base;
    return ST_OK;
}

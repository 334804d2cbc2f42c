#include "engine/pack.h"

#include "base/log.h"
#include "base/memory.h"
#include "engine/pack_file.h"

#include <inttypes.h>
#include <pthread.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* Packed between two calls of on_progress. */
#define FILL_BYTES ((size_t)4 << 20)
/* A closing waits so long for the file that is being written. */
#define CLOSE_WAIT_S 10
#define NICENESS_MAX 19

struct pack {
    struct pack_config config;
    struct pack_item *items;
    size_t count;
    size_t *offset; /* [count] into the data */
    struct pack_spec spec;
    const char *data;    /* of map or block */
    struct file_map map; /* an earlier start's file, or */
    char *block;         /* packed now */

    pthread_t writer;
    bool writing;
    atomic_bool stop;
    char *path[PACK_PATHS], *model_path; /* the writer's own */
};

/* --- the plan: which weight lies where ------------------------------------------------------------ */

static size_t matrix_bytes(const struct matrix *m) { return m->rows * dtype_row_bytes(m->type, m->cols); }

/* A description of the data that differs whenever their bytes do, but for the model's own values. */
static enum status plan_make(struct pack *p, struct error *err)
{
    crypto_generichash_state hash;
    crypto_generichash_init(&hash, NULL, 0, PACK_HASH_BYTES);
    size_t bytes = 0;
    for (size_t i = 0; i < p->count; i++) {
        const struct pack_item *item = &p->items[i];
        const struct matrix *m = &item->matrix;
        struct device *d = p->config.device;
        const char *layout = "";
        size_t size = 0;
        enum status st = d->ops->weight_layout(d, m, &layout, &size);
        if (st)
            return error_set(err, st, "tensor '%s' (%s, %zu x %zu) on %s: %s", item->name,
                             dtype_name(m->type), m->cols, m->rows, d->name, status_text(st));
        p->offset[i] = bytes;
        char line[256];
        int n = snprintf(line, sizeof line, "%s %s %s %zu %zu %s %zu %zu\n", MEDLEY_VERSION, item->name,
                         dtype_name(m->type), m->rows, m->cols, layout, bytes, size);
        CHECK(n > 0 && (size_t)n < sizeof line);
        crypto_generichash_update(&hash, (const unsigned char *)line, (size_t)n);
        bytes = size_add(bytes, size_round_up(size, MEMORY_ALIGN));
    }
    crypto_generichash_final(&hash, p->spec.plan, PACK_HASH_BYTES);
    p->spec.bytes = bytes;
    return ST_OK;
}

/* --- an earlier start's file ---------------------------------------------------------------------- */

/* A last doubt, that the layout changed and its name did not: some rows of each weight are packed anew. */
static bool samples_agree(const struct pack *p)
{
    struct device *d = p->config.device;
    for (size_t i = 0; i < p->count; i++) {
        const struct matrix *m = &p->items[i].matrix;
        if (!d->ops->weight_filled(d, m, p->data + p->offset[i], (i * 2654435761u) % m->rows)) return false;
    }
    return true;
}

static bool file_use(struct pack *p, const char *path)
{
    struct error err;
    const void *data;
    enum status st = pack_file_open(path, &p->spec, p->config.device, &p->map, &data, &err);
    if (st == ST_NOT_FOUND) return false;
    if (st) {
        log_info("%s; the weights are packed anew", err.message);
        return false;
    }
    p->data = data;
    if (samples_agree(p)) {
        log_debug("packed weights are those of '%s'", path);
        return true;
    }
    log_warn("'%s' holds weights in another layout than its name says; they are packed anew", path);
    file_unmap(&p->map);
    p->data = NULL;
    return false;
}

/* --- a new one ------------------------------------------------------------------------------------ */

static void *writer_main(void *arg)
{
    struct pack *p = arg;
    (void)setpriority(PRIO_PROCESS, (id_t)gettid(), NICENESS_MAX); /* of this thread only, on Linux */
    struct error err = {0};
    for (int i = 0; i < PACK_PATHS && p->path[i]; i++) {
        enum status st = pack_file_write(p->path[i], &p->spec, p->data, &p->stop, &err);
        if (!st) log_debug("packed weights are kept in '%s' for the next start", p->path[i]);
        if (!st || st == ST_BUSY || st == ST_CANCELLED) return NULL; /* trying elsewhere would not help */
    }
    log_warn("packed weights are not kept for the next start: %s", err.message);
    return NULL;
}

/* Without a thread there is no file, which costs the next start's time only. */
static void writer_start(struct pack *p)
{
    p->model_path = strdup(p->config.model_path);
    p->spec.model_path = p->model_path;
    bool copied = p->model_path != NULL;
    for (int i = 0; i < PACK_PATHS && p->config.path[i]; i++) {
        p->path[i] = strdup(p->config.path[i]);
        copied &= p->path[i] != NULL;
    }
    p->writing = copied && p->path[0] && pthread_create(&p->writer, NULL, writer_main, p) == 0;
}

static void writer_finish(struct pack *p)
{
    if (!p->writing) return;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += CLOSE_WAIT_S;
    if (pthread_timedjoin_np(p->writer, NULL, &until) == 0) return;
    atomic_store(&p->stop, true);
    pthread_join(p->writer, NULL);
}

/* --- opening -------------------------------------------------------------------------------------- */

static void progress(const struct pack *p, size_t done, size_t all)
{
    if (p->config.on_progress) p->config.on_progress(p->config.progress_ctx, (double)done / (double)all);
}

/* All threads pack a few rows at a time, so that progress is smooth. Progress is counted in the file's bytes.
 */
static void block_fill(struct pack *p)
{
    size_t all = 0, done = 0;
    for (size_t i = 0; i < p->count; i++) all += matrix_bytes(&p->items[i].matrix);
    for (size_t i = 0; i < p->count; i++) {
        const struct matrix *m = &p->items[i].matrix;
        size_t row_bytes = dtype_row_bytes(m->type, m->cols);
        size_t step = size_round_up(FILL_BYTES / row_bytes + 1, WEIGHT_FILL_ROWS);
        for (size_t begin = 0; begin < m->rows; begin += step) {
            size_t end = m->rows - begin < step ? m->rows : begin + step;
            p->config.device->ops->weight_fill(p->config.device, m, p->block + p->offset[i], begin, end);
            done += (end - begin) * row_bytes;
            progress(p, done, all);
        }
    }
}

/* Pages of a file lie on the node of whoever read them first, in any process: with several nodes, weights are packed at
 * every start by the threads that will read them. */
static enum status data_get(struct pack *p, struct error *err)
{
    bool keep = p->spec.bytes >= PACK_FILE_BYTES_MIN && p->config.device->memory_nodes == 1;
    for (int i = 0; keep && i < PACK_PATHS && p->config.path[i]; i++) {
        if (!file_use(p, p->config.path[i])) continue;
        progress(p, 1, 1);
        return ST_OK;
    }
    p->block = memory_alloc(p->spec.bytes);
    if (!p->block)
        return error_set(err, ST_NOMEM, "out of memory for packed weights (%zu bytes)", p->spec.bytes);
    p->data = p->block;
    block_fill(p);
    if (keep) writer_start(p);
    return ST_OK;
}

static enum status weights_open(struct pack *p, struct error *err)
{
    struct device *d = p->config.device;
    for (size_t i = 0; i < p->count; i++) {
        const struct pack_item *item = &p->items[i];
        enum status st = d->ops->weight_open(d, &item->matrix, p->data + p->offset[i], item->weight);
        if (st) return error_set(err, st, "tensor '%s' on %s: %s", item->name, d->name, status_text(st));
    }
    return ST_OK;
}

enum status pack_open(const struct pack_config *config, struct pack_item *items, size_t count,
                      struct pack **out, struct error *err)
{
    struct pack *p = calloc(1, sizeof *p);
    if (!p) {
        free(items);
        return error_set(err, ST_NOMEM, "out of memory");
    }
    p->config = *config;
    p->spec.model = config->model;
    p->spec.model_path = config->model_path;
    p->items = items;
    p->count = count;
    p->offset = calloc(count, sizeof *p->offset);
    enum status st = p->offset ? plan_make(p, err) : error_set(err, ST_NOMEM, "out of memory");
    if (!st) st = data_get(p, err);
    if (!st) st = weights_open(p, err);
    if (st) {
        pack_close(p);
        return st;
    }
    *out = p;
    return ST_OK;
}

void pack_close(struct pack *p)
{
    if (!p) return;
    writer_finish(p);
    struct device *d = p->config.device;
    for (size_t i = 0; i < p->count; i++) {
        struct weight **w = p->items[i].weight;
        if (*w) d->ops->weight_free(d, *w);
        *w = NULL;
    }
    file_unmap(&p->map);
    memory_free(p->block);
    for (int i = 0; i < PACK_PATHS; i++) free(p->path[i]);
    free(p->model_path);
    free(p->offset);
    free(p->items);
    free(p);
}

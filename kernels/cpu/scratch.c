/* The memory ops work in: one block, laid out for the limits that were promised. */
#include "kernels/cpu/device_int.h"

#include "base/memory.h"
#include "kernels/cpu/carver.h"

#include <pthread.h>
#include <string.h>

/* Packed activations of any product this device may choose. */
static size_t act_bytes_max(const struct cpu_device *d, int rows, size_t cols)
{
    size_t most = 0;
    for (int level = 0; level <= (int)d->level; level++) {
        for (int type = 0; type < DTYPE_COUNT; type++) {
            const struct cpu_product *product = d->table[level].product[type];
            if (!product) continue;
            /* No type's blocks are longer than 256: a width the type cannot have is rounded to one. */
            size_t bytes = product->act_bytes(rows, size_round_up(cols, 256));
            if (bytes > most) most = bytes;
        }
    }
    return most;
}

static void scratch_lay_out(const struct cpu_device *d, const struct device_limits *limits, struct carver *c,
                            struct cpu_scratch *s)
{
    size_t rows = (size_t)limits->rows, cols = limits->cols, workers = (size_t)pool_size(d->pool);
    size_t act_bytes = act_bytes_max(d, limits->rows, cols);

    for (int i = 0; i < SITE_GROUP_MAX; i++) s->act[i] = carve(c, 1, act_bytes);
    s->norm = carve(c, size_mul(rows, cols), sizeof *s->norm);
    s->lr = carve(c, size_mul(rows, (size_t)limits->lr_width), sizeof *s->lr);
    s->first_unit = carve(c, rows + 1, sizeof *s->first_unit);
    s->first_line = carve(c, rows + 1, sizeof *s->first_line);
    s->rope_cos = carve(c, size_mul(rows, cols / 2), sizeof *s->rope_cos);
    s->rope_sin = carve(c, size_mul(rows, cols / 2), sizeof *s->rope_sin);
    s->rope_position = carve(c, rows, sizeof *s->rope_position);
    s->rope_freq = carve(c, cols / 2, sizeof *s->rope_freq);

    size_t columns = size_mul(rows, CPU_PANEL_MAX);
    if (columns < CPU_COLUMN_FLOATS) columns = CPU_COLUMN_FLOATS;
    s->columns_stride = size_round_up(columns, MEMORY_ALIGN);
    s->columns = carve(c, size_mul(workers, s->columns_stride), sizeof *s->columns);
    s->ahead = carve(c, size_mul(workers, CPU_AHEAD_LINES), sizeof *s->ahead);
    /* What the heads of one row need at any head_dim, or a full block of rows at a usual one. */
    s->attention_floats = size_round_up(size_add(size_mul(cols, 2 * CPU_ATTENTION_ROWS), 64), MEMORY_ALIGN);
    s->attention = carve(c, size_mul(workers, s->attention_floats), sizeof *s->attention);
    s->parts_floats = size_mul(cols, CPU_ATTENTION_PARTS);
    s->parts = carve(c, s->parts_floats, sizeof *s->parts);
}

void cpu_scratch_release(struct cpu_device *d)
{
    memory_free(d->scratch.block);
    d->scratch = (struct cpu_scratch){0};
    d->limits = (struct device_limits){0};
}

enum status cpu_reserve(struct device *device, const struct device_limits *limits)
{
    struct cpu_device *d = cpu_device_of(device);
    if (limits->rows < 1 || limits->rows > CPU_ROWS_MAX || limits->cols < 1 || limits->lr_width < 0)
        return ST_INVALID;

    struct carver measure = {0};
    struct cpu_scratch s = {0};
    scratch_lay_out(d, limits, &measure, &s);
    char *block = memory_alloc(measure.used);
    if (!block) return ST_NOMEM;

    struct carver c = {.block = block};
    scratch_lay_out(d, limits, &c, &s);
    s.block = block;
    for (int r = 0; r < limits->rows; r++) s.rope_position[r] = -1;
    cpu_scratch_release(d);
    d->scratch = s;
    d->limits = *limits;
    return ST_OK;
}

/* What the files of this folder share: the CPU device, its packed weights and its scratch. */
#ifndef KERNELS_CPU_DEVICE_INT_H
#define KERNELS_CPU_DEVICE_INT_H

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/pool.h"
#include "kernels/device.h"

#include <pthread.h>

/* Work on fewer elements than this is not worth a second thread: waking one costs about a
 * microsecond, in which a core norms or packs some thousand elements. */
#define CPU_SERIAL_ELEMS 8192

/* Floats a worker has for the columns it is computing: half of a small L2. */
#define CPU_COLUMN_FLOATS 32768
/* The widest panel of any product, and the widest chunk of columns. */
#define CPU_PANEL_MAX   64
#define CPU_COLUMNS_MAX 512
/* Rows of a step, whatever is asked for: sums of rows and tiles stay far from overflow. */
#define CPU_ROWS_MAX 65536
/* Query rows one attention call takes. */
#define CPU_ATTENTION_ROWS 16
/* Positions that are one part of a softmax. Parts are joined in order, so that a long sequence can be shared out among
 * threads, and what comes out is the same whether it was or not. */
#define CPU_ATTENTION_SPAN 512
/* Cache lines that one product is told of. */
#define CPU_AHEAD_LINES 4096
/* Parts of all heads of one row that may stand side by side. */
#define CPU_ATTENTION_PARTS 128

struct cpu_weight {
    struct weight base;
    struct matrix file;
    const struct cpu_product *product; /* may be of a lower level than the device's */
    const void *packed;                /* NULL where the file's rows are used in place */
    void *owned;                       /* packed, where this weight made it; else NULL */
};

/* Everything ops need beyond their arguments, carved from one block by cpu_reserve. */
struct cpu_scratch {
    void *block;
    void *act[SITE_GROUP_MAX];  /* packed activations, one for each way of packing in a group */
    float *norm;                /* (rows, cols) */
    float *lr;                  /* (rows, lr_width): see lowrank.h of this folder */
    size_t *first_unit;         /* [rows + 1] */
    size_t *first_line;         /* [rows + 1]: of sites_ahead.c */
    float *rope_cos, *rope_sin; /* (rows, cols / 2), dense by rope_dims / 2 */
    int32_t *rope_position;     /* [rows]: of each row of the two tables; -1 where not computed */
    float *rope_freq;           /* [cols / 2] the tables were made with */

    /* Of each worker: */
    float *columns;        /* CPU_COLUMN_FLOATS, or rows * CPU_PANEL_MAX where that is more */
    size_t columns_stride; /* floats from one worker's to the next's */
    const void **ahead;    /* CPU_AHEAD_LINES */
    float *attention;
    size_t attention_floats;

    float *parts; /* of attention, where a sequence's are computed apart */
    size_t parts_floats;
};

struct cpu_grad;

struct cpu_device {
    struct device base;
    char name[32];
    enum cpu_level level;
    struct cpu_kernels table[CPU_LEVEL_COUNT]; /* usable ones up to `level`; products fall back downwards */
    const struct cpu_kernels *kernels;         /* table[level] */
    struct pool *pool;
    pthread_mutex_t pool_lock; /* the pool is the ops', or one packer's */
    struct device_limits limits;
    struct cpu_scratch scratch;
    struct cpu_grad *grad; /* grad_int.h; NULL until something is trained */

    /* The group of gate and up whose routed experts' activations stand in scratch.lr; rows 0: none. */
    int ffn_layer, ffn_rows;
    size_t ffn_inner;

    /* of the rope tables */
    size_t rope_dims;
    float rope_magnitude;
};

static inline struct cpu_device *cpu_device_of(struct device *d) { return (struct cpu_device *)d; }

/* pool_run for ops: waits for a packer that holds the pool. */
void cpu_run(struct cpu_device *d, size_t total, pool_fn fn, void *ctx);
static inline size_t cpu_chunks(size_t count, size_t chunk) { return (count + chunk - 1) / chunk; }
/* Rows a chunk of light work on rows takes, a multiple of `multiple`; all of them where there is too
 * little to share. */
size_t cpu_row_chunk(const struct cpu_device *d, int rows, size_t row_elems, int multiple);

enum status cpu_reserve(struct device *device, const struct device_limits *limits);
void cpu_scratch_release(struct cpu_device *d);

enum status cpu_weight_pack(struct device *device, const struct matrix *m, struct weight **out);
enum status cpu_grad_weight_pack(struct device *device, const struct matrix *m, struct weight **out);
void cpu_weight_free(struct device *device, struct weight *w);
enum status cpu_weight_layout(struct device *device, const struct matrix *m, const char **name,
                              size_t *bytes);
void cpu_weight_fill(struct device *device, const struct matrix *m, void *packed, size_t begin, size_t end);
bool cpu_weight_filled(struct device *device, const struct matrix *m, const void *packed, size_t row);
enum status cpu_weight_open(struct device *device, const struct matrix *m, const void *packed,
                            struct weight **out);

void cpu_site_group(struct device *device, const struct site_group_args *a);
void cpu_logits(struct device *device, const struct logits_args *a);
void cpu_rope_kv(struct device *device, const struct rope_kv_args *a);
void cpu_attention(struct device *device, const struct attention_args *a);

/* The largest i with first_unit[i] <= unit, where first_unit[0] = 0 and first_unit[count] > unit: which
 * item of `count` the unit of work belongs to. */
static inline size_t cpu_item_of_unit(const size_t *first_unit, size_t count, size_t unit)
{
    size_t low = 0, high = count;
    while (high - low > 1) {
        size_t mid = low + (high - low) / 2;
        if (first_unit[mid] <= unit)
            low = mid;
        else
            high = mid;
    }
    return low;
}

#endif

/* A compute device: memory, packed weights, and the ops a forward pass is made of.
 *
 * engine/forward.c is written once against this table; a backend (the CPU here, CUDA as another
 * table) fills it. Rules that hold for every backend:
 *
 *  1. Pointers named in op arguments are device pointers, from device_alloc, unless said
 *     otherwise; fp32 activations, rows contiguous with the given stride in elements.
 *  2. Ops are enqueued in order and may return before they are done. Only `read` waits.
 *     Host structures passed to an op (struct *_args and what they point to) may be reused by
 *     the caller after the next `read` or `sync` and no sooner.
 *  3. No op allocates. Scratch for rows up to `limits.rows` is reserved by `reserve`.
 *  4. Batch invariance: what an op computes for a row depends on that row (and its sequence's
 *     cache) only, bit for bit, never on the other rows, their number, or the thread count.
 *  5. One thread at a time calls ops, read, write and sync (the engine thread). alloc, free, weight_*
 *     and lr_site_pack/free may be called from any thread meanwhile. */
#ifndef KERNELS_DEVICE_H
#define KERNELS_DEVICE_H

#include "base/dtype.h"
#include "base/status.h"
#include "kernels/lowrank.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A matrix as it stands in a model file: rows of `cols` elements. Row i gives output i of the
 * product y = W x. Host memory that outlives every weight made from it. */
struct matrix {
    enum dtype type;
    size_t rows, cols;
    const void *data;
};

/* A matrix in the backend's layout. The backend embeds this first in its own struct. */
struct weight {
    enum dtype type;
    size_t rows, cols; /* outputs, inputs */
    size_t bytes;      /* memory it holds beyond the file's */
};

#define WEIGHT_FILL_ROWS 64

#define KV_PAGE_TOKENS 16

/* Keys and values of all layers: element (layer, kv_head, page, token in page, i) of each of k and v, in
 * that order of dimensions: where a sequence's pages are neighbours, so is all that one head reads. */
struct kv_cache {
    enum dtype type; /* F32 or F16 */
    int layers, kv_heads, head_dim, pages;
    void *k, *v;
};
/* of k alone; v takes as much */
size_t kv_cache_bytes(enum dtype type, int layers, int kv_heads, int head_dim, int pages);
/* of one page over all layers, keys and values */
size_t kv_page_bytes(enum dtype type, int layers, int kv_heads, int head_dim);

/* Consecutive rows of a batch that continue one sequence: row first_row + i is at position
 * first_position + i, whose key and value live in pages[position / KV_PAGE_TOKENS]. */
struct seq_rows {
    int first_row, row_count;
    int first_position;
    const int32_t *pages; /* host memory */
};

enum epilogue {
    EPILOGUE_STORE,    /* y_s = ... */
    EPILOGUE_ADD,      /* y_s += ... : the residual stream */
    EPILOGUE_SILU_MUL, /* two sites: y_0 = silu(gate) * up; site 1 has no output of its own */
};

#define SITE_GROUP_MAX 3

/* The central op: for the sites that share an input, y_s = W_s x + routed deltas of each row's
 * set, then the epilogue. x never aliases an output. Where a member routes the layer's FFN (lr_adapter.ffn),
 * gate and up are one group with EPILOGUE_SILU_MUL, and the next group is down, for the same rows and
 * segments: the experts' activations stay in the device between the two. */
struct site_group_args {
    int rows;
    const float *x; /* (rows, cols of the weights) */
    size_t x_stride;
    int site_count;
    struct {
        enum projection projection;
        const struct weight *weight;
        float *y; /* (rows, rows of the weight) */
        size_t y_stride;
    } site[SITE_GROUP_MAX];
    enum epilogue epilogue;
    int layer;
    int segment_count;                 /* 0: no adapter work is done at all */
    const struct lr_segment *segments; /* sorted by first_row, disjoint */
};

struct rmsnorm_args {
    int rows;
    size_t cols;
    const float *x;      /* (rows, cols), stride cols */
    const float *weight; /* (cols) */
    float eps;
    float *y; /* (rows, cols), stride cols; may be x */
};

/* Rotates q and k in place by position, then writes k and v into the cache. */
struct rope_kv_args {
    int rows, heads, layer;
    float *q;              /* (rows, heads * head_dim) */
    float *k;              /* (rows, kv_heads * head_dim) */
    const float *v;        /* (rows, kv_heads * head_dim) */
    size_t rope_dims;      /* even, <= head_dim; the rest of a head is not rotated */
    const float *inv_freq; /* (rope_dims / 2), host memory: radians per position of each pair */
    float magnitude;       /* multiplies cos and sin (YaRN's attention factor; 1 otherwise) */
    bool adjacent_pairs;   /* pairs (2i, 2i+1), as GGUF's llama; else (i, i + rope_dims/2) */
    int seq_count;
    const struct seq_rows *seqs; /* cover all rows */
    struct kv_cache *cache;
};

/* Causal grouped-query attention: for each row and head, softmax(scale q K^T) V over the
 * positions 0..own of its sequence. */
struct attention_args {
    int rows, heads, layer;
    const float *q; /* (rows, heads * head_dim) */
    float *y;       /* (rows, heads * head_dim) */
    float scale;    /* 1/sqrt(head_dim) as a rule */
    int seq_count;
    const struct seq_rows *seqs;
    const struct kv_cache *cache;
};

/* Final norm and vocabulary product for the rows that need one. */
struct logits_args {
    int count;
    const int32_t *row; /* [count], host memory: indices of rows of x */
    const float *x;     /* (any, cols of head) */
    size_t x_stride;
    const float *norm_weight;
    float eps;
    const struct weight *head;
    float *y; /* (count, rows of head), contiguous */
};

/* Largest sizes any later op will have. */
struct device_limits {
    int rows;     /* in a step */
    size_t cols;  /* of any activation */
    int lr_width; /* of any set: the sum of its members' lr_adapter.width. A wider one is the
                     caller's mistake (CHECK): refuse it when the request comes */
};

struct device;

struct device_ops {
    void (*close)(struct device *d);
    /* The calling thread is the one that will call ops most: where the device pins its threads, it is pinned too, and
     * so are threads that it starts. */
    void (*attach)(struct device *d);

    /* Zeroed, 64-byte aligned. NULL when there is no room. */
    void *(*alloc)(struct device *d, size_t bytes);
    void (*free)(struct device *d, void *p);
    void (*write)(struct device *d, void *dst, const void *src_host, size_t bytes);
    void (*read)(struct device *d, void *dst_host, const void *src, size_t bytes);
    enum status (*sync)(struct device *d); /* ST_DEVICE if any op since the last sync failed */

    /* May be called again, between steps. ST_INVALID beyond what the backend can do at all. */
    enum status (*reserve)(struct device *d, const struct device_limits *limits);

    enum status (*weight_pack)(struct device *d, const struct matrix *m, struct weight **out);
    void (*weight_free)(struct device *d, struct weight *w);

    /* The same in steps, for who keeps packed weights, also from one process to the next: `packed` is host
     * memory of the caller's, 64-byte aligned, that outlives the weight; its bytes depend on the matrix and the
     * layout only, and any bytes are safe to multiply with.
     * weight_layout: the name of m's layout, another one whenever the bytes change, and how many there
     * are; 0: m is used in place, and `packed` may be NULL. ST_INVALID, ST_UNSUPPORTED.
     * weight_fill: packs rows [begin, end), multiples of WEIGHT_FILL_ROWS or the end.
     * weight_filled: whether weight_fill would leave the rows around `row` as they are. */
    enum status (*weight_layout)(struct device *d, const struct matrix *m, const char **name, size_t *bytes);
    void (*weight_fill)(struct device *d, const struct matrix *m, void *packed, size_t begin, size_t end);
    bool (*weight_filled)(struct device *d, const struct matrix *m, const void *packed, size_t row);
    enum status (*weight_open)(struct device *d, const struct matrix *m, const void *packed,
                               struct weight **out);
    enum status (*lr_site_pack)(struct device *d, const struct lr_site_source *src, struct lr_site **out);
    void (*lr_site_free)(struct device *d, struct lr_site *s);
    /* Of a site with a router of its own; any thread, also during a step. */
    void (*lr_site_usage)(struct device *d, const struct lr_site *s, struct lr_usage *out);

    /* y (count, cols of table) = rows `id` of table, decoded exactly. id is host memory, in range. */
    void (*embed)(struct device *d, const struct weight *table, int count, const int32_t *id, float *y);
    void (*rmsnorm)(struct device *d, const struct rmsnorm_args *a);
    void (*site_group)(struct device *d, const struct site_group_args *a);
    void (*rope_kv)(struct device *d, const struct rope_kv_args *a);
    void (*attention)(struct device *d, const struct attention_args *a);
    void (*logits)(struct device *d, const struct logits_args *a);

    /* Host work of the caller's: fn(ctx, i, worker) once for each i in [0, count), on the threads the
     * device has for host work, the caller's among them; returns when all are done. worker is below
     * host_threads. An op as to rule 5. */
    void (*host_run)(struct device *d, size_t count, void (*fn)(void *ctx, size_t i, int worker),
                     void *ctx);
};

/* The part of a device every backend shares. */
struct grad_ops;
struct device {
    const struct device_ops *ops;
    const struct grad_ops *grad; /* kernels/grad.h; NULL where the backend cannot train */
    const char *name; /* "cpu avx2", for logs and metrics */
    int host_threads; /* of host_run, at least 1 */
    /* At least 1. Where there are more, weights are read fastest from memory that weight_fill was the first to write. */
    int memory_nodes;
};

/* The CPU backend. level forces a lower instruction set than the machine has; asking for one it
 * has not is ST_UNSUPPORTED. threads 0: one per physical core this process may use; as many are pinned, each
 * to one, unless no_pin.
 * The calling thread of each op is worker 0; the others spin for a moment, then park. */
enum cpu_level { CPU_REFERENCE, CPU_AVX2, CPU_AVXVNNI, CPU_AVX512, CPU_LEVEL_COUNT };
#define CPU_LEVEL_BEST CPU_LEVEL_COUNT
struct cpu_device_config {
    enum cpu_level level;
    int threads;
    bool no_pin;
};
NODISCARD enum status cpu_device_open(const struct cpu_device_config *config, struct device **out,
                                      struct error *err);
enum cpu_level cpu_level_supported(void); /* the best usable one */
/* Whether this machine and build have it. One of the lower ones may be missing: not all that have AVX-512 have
 * AVX-VNNI. */
bool cpu_level_usable(enum cpu_level level);
const char *cpu_level_name(enum cpu_level level);
/* ST_INVALID for an unknown name. */
enum status cpu_level_parse(const char *name, enum cpu_level *out);

#endif

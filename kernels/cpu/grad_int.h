/* Training on the CPU: the scratch its ops share, and the ops that others of them are made of. */
#ifndef KERNELS_CPU_GRAD_INT_H
#define KERNELS_CPU_GRAD_INT_H

#include "kernels/cpu/device_int.h"
#include "kernels/grad.h"

/* Blocks are cut by shape alone, never by the number of threads: each is one thread's, and sums over several
 * are added up in order. */
#define CPU_MATMUL_ROWS   96
#define CPU_MATMUL_SERIAL 65536 /* multiply-adds that are not worth a second thread */
#define CPU_STRIP_ROWS    48    /* queries of attention that go together */
#define CPU_ROUTE_ROWS    64
#define CPU_VECTOR_FLOATS 16384 /* of a long vector */
#define CPU_SUM_PARTS_MAX 1024

/* One block of memory, this struct at its start. */
struct cpu_grad {
    struct grad_limits limits;

    float *worker;              /* of each: CPU_MATMUL_FLOATS, then two strips of attention */
    size_t worker_stride;       /* floats */
    float *head_d_k, *head_d_v; /* (rows, heads * head_dim): each query head's part */
    double *route_sums;         /* (blocks of CPU_ROUTE_ROWS, 3, experts) */

    float *rope_cos, *rope_sin; /* (seq_rows, rope_dims / 2) by position, sin negative */
    float *rope_freq;           /* (head_dim / 2) they were made with */
    size_t rope_dims;
    float rope_magnitude;

    /* of `contrast`; er = experts * rank */
    int32_t *pair_row, *pair_expert; /* [CONTRAST_PAIRS_MAX] */
    float *pair_norm, *pair_loss, *pair_apart, *pair_near;
    float *gram, *mix;                /* (er, er) */
    float *unit, *unit_gram, *d_unit; /* (CONTRAST_PAIRS_MAX, er) */
    float *cosine;                    /* (CONTRAST_PAIRS_MAX, CONTRAST_PAIRS_MAX) */
};

extern const struct grad_ops cpu_grad_ops;

static inline float *cpu_grad_worker(const struct cpu_device *d, int worker)
{
    return d->grad->worker + (size_t)worker * d->grad->worker_stride;
}

/* Work on rows, `chunk` of them at a time; `kernels` and `grad` are the device's. */
struct grad_rows {
    const struct cpu_kernels *kernels;
    const struct cpu_grad *grad;
    const void *args;
    size_t rows, chunk;
};
/* fn's ctx is a struct grad_rows. row_elems says how much work a row is. */
void cpu_rows_run(struct cpu_device *d, int rows, size_t row_elems, const void *args, pool_fn fn);
static inline size_t grad_rows_end(const struct grad_rows *job, size_t chunk)
{
    size_t end = (chunk + 1) * job->chunk;
    return end < job->rows ? end : job->rows;
}

void cpu_matmul(struct device *device, const struct matmul_args *a);
void cpu_rope_backward(struct device *device, const struct rope_backward_args *a);
void cpu_attention_backward(struct device *device, const struct attention_backward_args *a);
void cpu_route(struct device *device, const struct route_args *a);
void cpu_route_backward(struct device *device, const struct route_backward_args *a);
void cpu_gate(struct device *device, const struct gate_args *a);
void cpu_gate_backward(struct device *device, const struct gate_backward_args *a);
void cpu_contrast(struct device *device, const struct contrast_args *a);

#endif

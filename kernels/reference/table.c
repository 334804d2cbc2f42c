/* The small elementwise kernels, and the table itself. */
#include "kernels/reference/reference.h"

#include <math.h>
#include <string.h>

/* Zhang and Sennrich, arXiv 1910.07467: y = x / sqrt(mean(x^2) + eps) * weight. */
static void rmsnorm(const float *x, const float *weight, float eps, size_t n, float *y)
{
    double squares = 0;
    for (size_t i = 0; i < n; i++) squares += (double)x[i] * x[i];
    float factor = (float)(1 / sqrt(squares / (double)n + eps));
    for (size_t i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
}

static void silu_mul(const float *gate, const float *up, size_t n, float *y)
{
    for (size_t i = 0; i < n; i++) y[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
}

static void add(float *x, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

static void rope(float *x, size_t rope_dims, const float *cos, const float *sin, bool adjacent_pairs)
{
    for (size_t i = 0; i < rope_dims / 2; i++) {
        float *a = adjacent_pairs ? &x[2 * i] : &x[i];
        float *b = adjacent_pairs ? &x[2 * i + 1] : &x[i + rope_dims / 2];
        float a_old = *a, b_old = *b;
        *a = a_old * cos[i] - b_old * sin[i];
        *b = a_old * sin[i] + b_old * cos[i];
    }
}

static void kv_store(void *dst, enum dtype type, const float *src, size_t n)
{
    if (type == DTYPE_F32) {
        memcpy(dst, src, n * sizeof *src);
        return;
    }
    uint16_t *half = dst;
    for (size_t i = 0; i < n; i++) half[i] = f32_to_f16(src[i]);
}

void cpu_kernels_reference(struct cpu_kernels *k)
{
    *k = (struct cpu_kernels){
        .name = "reference",
        .rmsnorm = rmsnorm,
        .silu_mul = silu_mul,
        .add = add,
        .rope = rope,
        .kv_store = kv_store,
        .attention = ref_attention,
        .lr_shrink = ref_lr_shrink,
        .lr_expand = ref_lr_expand,
        .grad_product = &ref_product,
        .matmul = ref_matmul,
        .silu_mul_backward = ref_silu_mul_backward,
        .rmsnorm_backward = ref_rmsnorm_backward,
        .softmax = ref_softmax,
        .adamw = ref_adamw,
        .sum_squares = ref_sum_squares,
    };
#define X(name, number, elems, bytes) k->product[DTYPE_##name] = &ref_product;
    DTYPE_TABLE(X)
#undef X
}

/* Training's kernels: products, and the backward halves of rows. */
#include "kernels/reference/reference.h"

#include <math.h>

#define COLS 64
#define DEEP (CPU_MATMUL_FLOATS / COLS)

/* Rows [first, first + deep) and columns [col, col + cols) of op(B), rows COLS apart. */
static void pack_b(const struct matmul_args *p, int first, int deep, int col, int cols, float *packed)
{
    size_t row_step = p->b_transposed ? 1 : p->b_stride, col_step = p->b_transposed ? p->b_stride : 1;
    const float *b = p->b + (size_t)first * row_step + (size_t)col * col_step;
    for (int l = 0; l < deep; l++)
        for (int j = 0; j < cols; j++) packed[l * COLS + j] = b[(size_t)l * row_step + (size_t)j * col_step];
}

/* One row of C, over `deep` of the inner dimension. beta is that of the first call for it, then 1. */
static void product_row(const float *a, size_t step, int deep, const float *packed, int cols, float alpha,
                        float beta, float *c)
{
    float sum[COLS] = {0};
    for (int l = 0; l < deep; l++)
        for (int j = 0; j < cols; j++) sum[j] += a[(size_t)l * step] * packed[l * COLS + j];
    for (int j = 0; j < cols; j++) c[j] = alpha * sum[j] + (beta == 0 ? 0 : beta * c[j]);
}

void ref_matmul(const struct matmul_args *p, float *scratch)
{
    size_t row_step = p->a_transposed ? 1 : p->a_stride, step = p->a_transposed ? p->a_stride : 1;
    for (int col = 0; col < p->n; col += COLS) {
        int cols = p->n - col < COLS ? p->n - col : COLS, first = 0;
        do { /* once even for k = 0: C = beta C */
            int deep = p->k - first < DEEP ? p->k - first : DEEP;
            pack_b(p, first, deep, col, cols, scratch);
            for (int i = 0; i < p->m; i++)
                product_row(p->a + (size_t)i * row_step + (size_t)first * step, step, deep, scratch, cols,
                            p->alpha, first ? 1 : p->beta, p->c + (size_t)i * p->c_stride + col);
            first += deep;
        } while (first < p->k);
    }
}

/* With s = 1 / (1 + exp(-t)): silu(t) = t s, silu'(t) = s (1 + t (1 - s)). */
void ref_silu_mul_backward(const float *gate, const float *up, const float *d_y, size_t n, float *d_gate,
                           float *d_up)
{
    for (size_t i = 0; i < n; i++) {
        float t = gate[i], s = 1 / (1 + expf(-t)), u = up[i];
        d_gate[i] = d_y[i] * u * s * (1 + t * (1 - s));
        d_up[i] = d_y[i] * t * s;
    }
}

/* y = f x w with f = (mean(x^2) + eps)^(-1/2): dx = f w dy - x f^3 / n sum(w dy x). */
void ref_rmsnorm_backward(const float *x, const float *weight, float eps, size_t n, const float *d_y,
                          float *d_x)
{
    double squares = 0, along = 0;
    for (size_t i = 0; i < n; i++) {
        squares += (double)x[i] * x[i];
        along += (double)weight[i] * d_y[i] * x[i];
    }
    double factor = 1 / sqrt(squares / (double)n + eps);
    float f = (float)factor, back = (float)(factor * factor * factor / (double)n * along);
    for (size_t i = 0; i < n; i++) d_x[i] += f * weight[i] * d_y[i] - back * x[i];
}

float ref_softmax(const float *x, size_t n, float scale, float factor, float *y)
{
    float max = -INFINITY;
    double sum = 0;
    for (size_t i = 0; i < n; i++) max = fmaxf(max, scale * x[i]);
    for (size_t i = 0; i < n; i++) {
        float e = expf(scale * x[i] - max);
        sum += e;
        if (y) y[i] = e;
    }
    if (y)
        for (size_t i = 0; i < n; i++) y[i] = (float)(factor / sum) * y[i];
    return (float)(max + log(sum));
}

/* Coefficients stand in variables of their own, which no store to the vectors can change. */
void ref_adamw(const struct adamw_args *a)
{
    const float beta1 = a->beta1, beta2 = a->beta2, rate = a->rate, eps = a->eps, decay = a->weight_decay;
    const float correction1 = a->correction1, correction2 = a->correction2, grad_scale = a->grad_scale;
    float *value = a->value, *grad = a->grad, *m = a->m, *v = a->v;
    for (size_t i = 0; i < a->n; i++) {
        float g = grad[i] * grad_scale;
        m[i] = beta1 * m[i] + (1 - beta1) * g;
        v[i] = beta2 * v[i] + (1 - beta2) * g * g;
        value[i] -= rate * (m[i] / correction1 / (sqrtf(v[i] / correction2) + eps) + decay * value[i]);
        grad[i] = 0;
    }
}

double ref_sum_squares(const float *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

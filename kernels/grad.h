/* What training needs of a device beyond the forward pass: fp32 matrix products, backward twins of the forward
 * ops, losses, and the optimiser. A backend that can train sets device.grad.
 *
 * Rules 1, 2, 3 and 5 of kernels/device.h hold; scratch is reserved by this table's own `reserve`. In place of
 * rule 4: the same arguments give the same bits, whatever the number of threads.
 *
 * The base model is frozen, so no op makes gradients of its weights. Its backward product dx = W^T dy is the forward
 * op `site_group` on a weight packed from the transposed matrix, by `weight_pack` of either table. Names: d_x is dL/dx. "+=" outputs
 * accumulate, "=" outputs are overwritten. */
#ifndef KERNELS_GRAD_H
#define KERNELS_GRAD_H

#include "kernels/device.h"

/* C (m, n) = alpha op(A) op(B) + beta C. op(A) is (m, k): A is (m, k), or (k, m) where transposed; op(B) is (k, n)
 * likewise. Row-major with strides in elements. beta 0 overwrites, whatever C held. C overlaps neither. */
struct matmul_args {
    int m, n, k;
    bool a_transposed, b_transposed;
    const float *a, *b;
    size_t a_stride, b_stride;
    float alpha, beta;
    float *c;
    size_t c_stride;
};

/* y = silu(gate) * up over n contiguous floats, as EPILOGUE_SILU_MUL; and its backward:
 * d_gate = d_y up silu'(gate), d_up = d_y silu(gate). d_gate may be gate, d_up may be up. */
struct silu_mul_args {
    size_t n;
    const float *gate, *up;
    float *y;
};
struct silu_mul_backward_args {
    size_t n;
    const float *gate, *up, *d_y;
    float *d_gate, *d_up;
};

/* Of y_i = rmsnorm(x_row[i]): d_x[row[i]] += J^T d_y[i]. The norm's weight is frozen. */
struct rmsnorm_backward_args {
    int rows;
    const int32_t *row; /* [rows] distinct, host memory; NULL: row[i] = i */
    size_t cols;
    const float *x, *weight; /* (any, cols), (cols) */
    float eps;
    const float *d_y; /* (rows, cols) */
    float *d_x;       /* (any, cols) */
};

/* d_x = R^T d_x in place, where rope_kv rotated x = R x: the same angles backwards, the same magnitude. */
struct rope_backward_args {
    int rows, heads;
    size_t head_dim, rope_dims;
    const int32_t *position; /* [rows], below limits.seq_rows; host memory */
    const float *inv_freq;   /* (rope_dims / 2), host memory */
    float magnitude;
    bool adjacent_pairs;
    float *d_x; /* (rows, heads * head_dim) */
};

/* Of causal grouped-query attention over whole sequences, each beginning at position 0: rows first_row ..
 * first_row + row_count. Probabilities are made anew from q and k. d_q, d_k, d_v "=". */
struct attention_backward_args {
    int rows, heads, kv_heads;
    size_t head_dim;
    float scale;
    const float *q;          /* (rows, heads * head_dim), rotated */
    const float *k, *v;      /* (rows, kv_heads * head_dim), k rotated */
    const float *y, *d_y;    /* (rows, heads * head_dim): the op's output and its gradient */
    float *d_q, *d_k, *d_v;  /* as q, k, v */
    int seq_count;
    const struct seq_rows *seqs; /* first_position 0; pages unused */
};

/* Gates of one site from its router's logits, by lowrank.h's rules GATE_DENSE, GATE_TOPK and GATE_TOPK_RAW:
 * p = softmax(u / temperature), g as the rule says, 0 where not chosen, ties to the lower index.
 * stats (3, experts), "=": how many rows chose expert i; sum of g_i; sum of p_i. */
struct route_args {
    int rows, experts, top_k;
    enum gate_rule rule;
    float temperature;
    const float *u; /* (rows, experts) */
    float *p, *g;   /* (rows, experts) */
    float *stats;
};
/* d_u = the gradient through g and p: through g by d_g (top-k is a constant mask); through p by a term that is the
 * same for all rows, d_p[t, i] = balance * stats[0, i]: of the balance loss, whose counts have no gradient. */
struct route_backward_args {
    int rows, experts;
    enum gate_rule rule;
    float temperature, balance;
    const float *p, *g, *d_g, *stats;
    float *d_u; /* (rows, experts); may be d_g */
};

/* zg[t, i * rank + j] = scale_i g[t, i] z[t, i * rank + j]; and its backward:
 * d_g[t, i] = scale_i sum_j d_zg z, and in place d_zg becomes d_z = scale_i g d_zg. g NULL: all 1, and d_g too is NULL. */
struct gate_args {
    int rows, experts, rank;
    const float *scale; /* (experts) */
    const float *g, *z;
    float *zg; /* may be z */
};
struct gate_backward_args {
    int rows, experts, rank;
    const float *scale;
    const float *g, *z;
    float *d_zg; /* in: d_zg, out: d_z */
    float *d_g;
};

#define CONTRAST_PAIRS_MAX 1024
#define CONTRAST_RESULTS   3
/* Supervised contrastive loss (InfoNCE with several positives: arXiv 2004.11362, eq. 2) on the unit-normalised outputs
 * o(t, i) = B_i z(t, i) of experts. Pairs are all (t, i) with t among `row` and g[t, i] != 0, in that order, the
 * first CONTRAST_PAIRS_MAX of them, without those with |o| < CONTRAST_NORM_MIN, which have no direction. For an anchor a,
 * P(a) are the other pairs of its expert, A(a) all other pairs, s cosine similarity:
 *
 *     L = mean over anchors with P(a) not empty of
 *         -1/|P(a)| sum_{p in P(a)} log(exp(s_ap / temperature) / sum_{n in A(a)} exp(s_an / temperature))
 *
 * loss[0] "=" L (0 without anchors), loss[1] "=" the mean s of pairs of different experts, loss[2] "=" of pairs of the same
 * (0 without any).
 * d_z += weight dL/dz, d_bt += weight dL/dbt. Since o . o' = z_i^T (B_i^T B_j) z'_j, all of it is done in rank space
 * from the Gram matrix of B. Experts of the same token are negatives like any others. */
#define CONTRAST_NORM_MIN 1e-6f
struct contrast_args {
    int count;
    const int32_t *row; /* [count] distinct, host memory */
    int experts, rank;
    size_t d_out;
    const float *g, *z; /* (any, experts), (any, experts * rank) */
    const float *bt;    /* (experts * rank, d_out): B transposed */
    float temperature, weight;
    float *loss;        /* (CONTRAST_RESULTS) */
    float *d_z, *d_bt;  /* as z, bt; NULL both: the loss alone */
};

/* For each row: logprob "=" log softmax(logits)[target]; then in place
 * logits = weight (softmax(logits) - onehot(target)), the gradient of -weight logprob. weight NULL: logits stay. */
struct cross_entropy_args {
    int rows;
    size_t vocab;
    float *logits;         /* (rows, vocab) */
    const int32_t *target; /* [rows], host memory */
    const float *weight;   /* [rows], host memory */
    float *logprob;        /* (rows) */
};

/* AdamW (arXiv 1711.05101): g = grad * grad_scale; m, v moving averages of g and g^2;
 * value -= rate * (m / correction1 / (sqrt(v / correction2) + eps) + weight_decay * value). grad is zeroed. */
struct adamw_args {
    size_t n;
    float *value, *grad, *m, *v;
    float rate, beta1, beta2, eps, weight_decay;
    float correction1, correction2; /* 1 - beta^step */
    float grad_scale;
};

/* Largest sizes any later op will have. */
struct grad_limits {
    int rows;
    size_t cols;      /* of any activation row, the vocabulary included */
    int seq_rows;     /* of the longest sequence */
    int heads;
    size_t head_dim;
    int experts_rank; /* experts * rank of any site */
};

struct grad_ops {
    /* A weight for gradients, of a matrix in F32. Both its elements and the gradients that it is multiplied with may be
     * rounded by up to 2^-14 of the largest among 32 neighbours, where that is faster: a product's error is then about
     * 1e-4 of it. device_ops.weight_pack rounds neither. Otherwise as that. */
    enum status (*weight_pack)(struct device *d, const struct matrix *m, struct weight **out);
    /* May be called again, between ops; only grows. ST_NOMEM. */
    enum status (*reserve)(struct device *d, const struct grad_limits *limits);

    void (*matmul)(struct device *d, const struct matmul_args *a);
    void (*silu_mul)(struct device *d, const struct silu_mul_args *a);
    void (*silu_mul_backward)(struct device *d, const struct silu_mul_backward_args *a);
    void (*rmsnorm_backward)(struct device *d, const struct rmsnorm_backward_args *a);
    void (*rope_backward)(struct device *d, const struct rope_backward_args *a);
    void (*attention_backward)(struct device *d, const struct attention_backward_args *a);
    void (*route)(struct device *d, const struct route_args *a);
    void (*route_backward)(struct device *d, const struct route_backward_args *a);
    void (*gate)(struct device *d, const struct gate_args *a);
    void (*gate_backward)(struct device *d, const struct gate_backward_args *a);
    void (*contrast)(struct device *d, const struct contrast_args *a);
    void (*cross_entropy)(struct device *d, const struct cross_entropy_args *a);
    void (*adamw)(struct device *d, const struct adamw_args *a);

    void (*fill)(struct device *d, float *x, size_t n, float value);
    void (*add)(struct device *d, float *x, const float *y, size_t n);             /* x += y */
    void (*sum_squares)(struct device *d, const float *x, size_t n, float *out);   /* out[0] "=", summed in double */
};

#endif

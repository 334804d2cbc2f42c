/* Training's ops on the CPU but routing: products and backward passes against double precision and finite
 * differences, optimiser and sums, at every level this machine has; and that threads change no bit. */
#include "kernels/grad.h"
#include "tests/support/check.h"
#include "tests/support/gradient.h"
#include "tests/support/sites.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* One fp32 rounding, relative. */
#define EPS (FLT_EPSILON / 2)

static void each_level(void (*run)(struct device *d, struct test_random *r))
{
    for (int level = 0; level < CPU_LEVEL_COUNT; level++) {
        if (!cpu_level_usable((enum cpu_level)level)) continue;
        struct device *d = grad_device_open((enum cpu_level)level, 2);
        struct test_random r = {.state = 7};
        run(d, &r);
        d->ops->close(d);
    }
}

/* ---- products ---------------------------------------------------------------------------------- */

struct product_shape {
    int m, n, k;
    float alpha, beta;
    size_t gap; /* between rows of each matrix */
};

static double element(const struct twin *t, bool transposed, size_t stride, int row, int col)
{
    return transposed ? t->d[(size_t)col * stride + (size_t)row] : t->d[(size_t)row * stride + (size_t)col];
}

static size_t stride_of(bool transposed, int rows, int cols, size_t gap)
{
    return (size_t)(transposed ? rows : cols) + gap;
}

static size_t size_of(bool transposed, int rows, int cols, size_t stride)
{
    return (size_t)(transposed ? cols : rows) * stride;
}

static void check_product(struct device *d, struct test_random *r, struct product_shape s, bool at, bool bt)
{
    size_t a_stride = stride_of(at, s.m, s.k, s.gap), b_stride = stride_of(bt, s.k, s.n, s.gap);
    size_t c_stride = (size_t)s.n + s.gap, c_size = (size_t)s.m * c_stride;
    struct twin a = twin_make(r, size_of(at, s.m, s.k, a_stride), 1);
    struct twin b = twin_make(r, size_of(bt, s.k, s.n, b_stride), 1);
    struct twin c = twin_make(r, c_size, 1);
    if (s.beta == 0)
        for (size_t i = 0; i < c_size; i++) c.f[i] = NAN;
    struct matmul_args args = {s.m,      s.n,      s.k,     at,     bt,  a.f,     b.f,
                               a_stride, b_stride, s.alpha, s.beta, c.f, c_stride};
    d->grad->matmul(d, &args);

    for (int i = 0; i < s.m; i++)
        for (int j = 0; j < s.n; j++) {
            double sum = 0, terms = 0, was = s.beta * c.d[(size_t)i * c_stride + (size_t)j];
            for (int l = 0; l < s.k; l++) {
                double term = element(&a, at, a_stride, i, l) * element(&b, bt, b_stride, l, j);
                sum += term;
                terms += fabs(term);
            }
            double want = s.alpha * sum + was;
            /* a rounding for each term of a plain sum, times their magnitudes; and for alpha, beta and parts
             * of the sum that pass through C */
            double bound = EPS * ((s.k + 8) * fabs(s.alpha) * terms + 8 * (fabs(was) + fabs(want)));
            double got = c.f[(size_t)i * c_stride + (size_t)j];
            if (!(fabs(got - want) <= bound))
                fail_msg("%d x %d x %d (%d %d) at %d, %d: %g, not %g within %g", s.m, s.n, s.k, at, bt, i, j,
                         got, want, bound);
        }
    for (int i = 0; i < s.m && s.beta != 0; i++)
        for (size_t j = (size_t)s.n; j < c_stride; j++)
            assert_true(c.f[(size_t)i * c_stride + j] == (float)c.d[(size_t)i * c_stride + j]);
    twin_free(&a);
    twin_free(&b);
    twin_free(&c);
}

static void run_products(struct device *d, struct test_random *r)
{
    static const struct product_shape shapes[] = {
        {1, 1, 1, 1, 0, 0},      {1, 1, 0, 1, 0.5f, 1},   {3, 5, 7, 2, 1, 3},      {6, 16, 8, 1, 0, 0},
        {7, 17, 9, -1, 0.5f, 1}, {5, 33, 300, 1, 1, 0},   {97, 65, 31, 1, 0, 2},   {200, 8, 96, 0.25f, 1, 0},
        {13, 130, 520, 1, 0, 5}, {193, 100, 64, 1, 1, 0}, {64, 200, 700, 1, 1, 0}, {400, 48, 16, 1, 0, 1},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int t = 0; t < 4; t++) check_product(d, r, shapes[i], t & 1, t & 2);
    for (int i = 0; i < 40; i++) {
        struct product_shape s = {(int)random_below(r, 40),
                                  1 + (int)random_below(r, 40),
                                  (int)random_below(r, 40),
                                  random_f32(r, -2, 2),
                                  i % 3 ? 1 : 0,
                                  i % 5};
        check_product(d, r, s, i & 1, i & 2);
    }
}

static void products_are_right(void **state)
{
    (void)state;
    each_level(run_products);
}

/* Elements are below 1, so weight_pack may round each by 1/16382; signs of all roundings may conspire. And sums are
 * rounded. */
static void run_weights(struct device *d, struct test_random *r)
{
    enum { ROWS = 5, OUTPUTS = 35, INPUTS = 70 };
    struct twin w = twin_make(r, OUTPUTS * INPUTS, 1), x = twin_make(r, ROWS * INPUTS, 1);
    const struct device_limits limits = {.rows = ROWS, .cols = INPUTS};
    struct matrix m = {DTYPE_F32, OUTPUTS, INPUTS, w.f};
    struct weight *packed;
    float y[ROWS * OUTPUTS];
    assert_int_equal(d->ops->reserve(d, &limits), ST_OK);
    assert_int_equal(d->grad->weight_pack(d, &m, &packed), ST_OK);
    struct site_group_args args = {.rows = ROWS, .x = x.f, .x_stride = INPUTS, .site_count = 1,
                                   .site = {{.weight = packed, .y = y, .y_stride = OUTPUTS}}};
    d->ops->site_group(d, &args);
    for (int i = 0; i < ROWS; i++)
        for (int o = 0; o < OUTPUTS; o++) {
            double want = 0, bound = 0;
            for (int k = 0; k < INPUTS; k++) {
                double wk = w.d[o * INPUTS + k], xk = x.d[i * INPUTS + k];
                want += wk * xk;
                bound += (fabs(xk) + fabs(wk)) / 16382 * 1.001 + EPS * (INPUTS + 8) * fabs(wk * xk);
            }
            if (!(fabs(y[i * OUTPUTS + o] - want) <= bound))
                fail_msg("row %d, output %d: %g, not %g within %g", i, o, y[i * OUTPUTS + o], want, bound);
        }
    d->ops->weight_free(d, packed);
    m.type = DTYPE_BF16;
    assert_int_equal(d->grad->weight_pack(d, &m, &packed), ST_INVALID);
    twin_free(&w);
    twin_free(&x);
}

static void weights_are_right(void **state)
{
    (void)state;
    each_level(run_weights);
}

/* ---- the gated activation ------------------------------------------------------------------------ */

struct silu_world {
    struct twin gate, up, d_y;
};

static double silu_loss(void *ctx)
{
    struct silu_world *w = ctx;
    double loss = 0;
    for (size_t i = 0; i < w->gate.n; i++)
        loss += w->d_y.d[i] * w->gate.d[i] / (1 + exp(-w->gate.d[i])) * w->up.d[i];
    return loss;
}

static void run_silu(struct device *d, struct test_random *r)
{
    static const size_t sizes[] = {1, 7, 8, 9, 123};
    for (size_t i = 0; i < 5; i++) {
        size_t n = sizes[i];
        struct silu_world w = {twin_make(r, n, 12), twin_make(r, n, 2), twin_make(r, n, 1)};
        struct twin y = twin_make(r, n, 1), d_gate = twin_make(r, n, 1), d_up = twin_make(r, n, 1);
        d->grad->silu_mul(d, &(struct silu_mul_args){n, w.gate.f, w.up.f, y.f});
        for (size_t j = 0; j < n; j++) {
            double want = w.gate.d[j] / (1 + exp(-w.gate.d[j])) * w.up.d[j];
            assert_true(fabs(y.f[j] - want) <= 12 * EPS * fabs(want)); /* an exponential and four roundings */
        }
        d->grad->silu_mul_backward(
            d, &(struct silu_mul_backward_args){n, w.gate.f, w.up.f, w.d_y.f, d_gate.f, d_up.f});
        /* some ten roundings of quantities up to three times the largest result */
        check_gradient("d_gate", r, silu_loss, &w, &w.gate, d_gate.f, n, 30 * EPS);
        check_gradient("d_up", r, silu_loss, &w, &w.up, d_up.f, n, 30 * EPS);
        d->grad->silu_mul_backward(
            d, &(struct silu_mul_backward_args){n, w.gate.f, w.up.f, w.d_y.f, w.gate.f, w.up.f});
        assert_memory_equal(w.gate.f, d_gate.f, n * sizeof(float));
        assert_memory_equal(w.up.f, d_up.f, n * sizeof(float));
        struct twin *all[] = {&w.gate, &w.up, &w.d_y, &y, &d_gate, &d_up};
        for (int j = 0; j < 6; j++) twin_free(all[j]);
    }
}

static void silu_is_right(void **state)
{
    (void)state;
    each_level(run_silu);
}

/* ---- the norm ------------------------------------------------------------------------------------ */

struct norm_world {
    int rows;
    size_t cols;
    const int32_t *row;
    struct twin x, weight, d_y;
};

static double norm_loss(void *ctx)
{
    struct norm_world *w = ctx;
    double loss = 0;
    for (int i = 0; i < w->rows; i++) {
        const double *x = w->x.d + (size_t)w->row[i] * w->cols, *d_y = w->d_y.d + (size_t)i * w->cols;
        double squares = 0, along = 0;
        for (size_t c = 0; c < w->cols; c++) {
            squares += x[c] * x[c];
            along += d_y[c] * w->weight.d[c] * x[c];
        }
        loss += along / sqrt(squares / (double)w->cols + 1e-5);
    }
    return loss;
}

static void run_rmsnorm(struct device *d, struct test_random *r)
{
    static const int32_t row[] = {4, 0, 2, 1};
    for (size_t cols = 2; cols < 80; cols += 13) {
        struct norm_world w = {
            4, cols, row, twin_make(r, 5 * cols, 3), twin_make(r, cols, 2), twin_make(r, 4 * cols, 1)};
        struct twin d_x = twin_make(r, 5 * cols, 1);
        struct rmsnorm_backward_args a = {4, row, cols, w.x.f, w.weight.f, 1e-5f, w.d_y.f, d_x.f};
        d->grad->rmsnorm_backward(d, &a);
        for (size_t c = 0; c < cols; c++) assert_true(d_x.f[3 * cols + c] == (float)d_x.d[3 * cols + c]);
        for (size_t i = 0; i < d_x.n; i++) d_x.f[i] -= (float)d_x.d[i];
        /* sums of up to 80 terms, and the addition to and subtraction of what stood there */
        check_gradient("d_x", r, norm_loss, &w, &w.x, d_x.f, w.x.n, 50 * EPS);

        a.row = NULL; /* in order, onto zero: the same rows as the list gives */
        w.row = (const int32_t[]){0, 1, 2, 3};
        d->grad->fill(d, d_x.f, d_x.n, 0);
        d->grad->rmsnorm_backward(d, &a);
        check_gradient("d_x in order", r, norm_loss, &w, &w.x, d_x.f, w.x.n, 50 * EPS);
        struct twin *all[] = {&w.x, &w.weight, &w.d_y, &d_x};
        for (int j = 0; j < 4; j++) twin_free(all[j]);
    }
}

static void rmsnorm_is_right(void **state)
{
    (void)state;
    each_level(run_rmsnorm);
}

/* ---- rotation ------------------------------------------------------------------------------------ */

/* d_x = R^T d_y: component by component of the 2 x 2 rotation's transpose. */
static void check_rope(struct device *d, struct test_random *r, size_t dim, size_t rope_dims, bool adjacent,
                       float magnitude)
{
    enum { ROWS = 9, HEADS = 3 };
    size_t half = rope_dims / 2;
    int32_t position[ROWS];
    struct twin freq = twin_make(r, half, 1), x = twin_make(r, ROWS * HEADS * dim, 1);
    for (int i = 0; i < ROWS; i++) position[i] = (int32_t)random_below(r, GRAD_TEST_SEQ_ROWS);
    struct rope_backward_args a = {ROWS, HEADS, dim, rope_dims, position, freq.f, magnitude, adjacent, x.f};
    d->grad->rope_backward(d, &a);
    for (size_t h = 0; h < ROWS * HEADS; h++) {
        const double *was = x.d + h * dim;
        const float *got = x.f + h * dim;
        for (size_t i = 0; i < half; i++) {
            size_t first = adjacent ? 2 * i : i, second = adjacent ? 2 * i + 1 : i + half;
            float angle = (float)position[h / HEADS] * freq.f[i]; /* rounded as the forward op's */
            double c = magnitude * cos(angle), s = magnitude * sin(angle), bound = 16 * EPS * magnitude;
            assert_true(fabs(got[first] - (c * was[first] + s * was[second])) <= bound);
            assert_true(fabs(got[second] - (c * was[second] - s * was[first])) <= bound);
        }
        for (size_t i = rope_dims; i < dim; i++) assert_true(got[i] == (float)was[i]);
    }
    twin_free(&freq);
    twin_free(&x);
}

static void run_rope(struct device *d, struct test_random *r)
{
    check_rope(d, r, 24, 24, true, 1);
    check_rope(d, r, 24, 24, false, 1);
    check_rope(d, r, 24, 10, false, 1.25f);
    check_rope(d, r, 20, 6, true, 0.5f);
    check_rope(d, r, 8, 0, true, 1);
}

static void rope_is_right(void **state)
{
    (void)state;
    each_level(run_rope);
}

/* ---- attention ----------------------------------------------------------------------------------- */

struct attention_world {
    int rows, heads, kv_heads;
    size_t dim;
    float scale;
    int seq_count;
    const struct seq_rows *seqs;
    struct twin q, k, v, d_y;
    float *y; /* NULL, or written by the loss */
};

static double attend(struct attention_world *w, const struct seq_rows *s, int row, int head)
{
    size_t dim = w->dim, q_row = (size_t)(s->first_row + row) * (size_t)w->heads + (size_t)head;
    const double *q = w->q.d + q_row * dim, *d_y = w->d_y.d + q_row * dim;
    double score[GRAD_TEST_SEQ_ROWS], max = -INFINITY, total = 0, loss = 0;
    for (int t = 0; t <= row; t++) {
        size_t at =
            ((size_t)(s->first_row + t) * (size_t)w->kv_heads + (size_t)(head / (w->heads / w->kv_heads))) *
            dim;
        score[t] = 0;
        for (size_t i = 0; i < dim; i++) score[t] += w->scale * q[i] * w->k.d[at + i];
        max = fmax(max, score[t]);
    }
    for (int t = 0; t <= row; t++) total += score[t] = exp(score[t] - max);
    for (size_t i = 0; i < dim; i++) {
        double y = 0;
        for (int t = 0; t <= row; t++)
            y += score[t] / total *
                 w->v.d[((size_t)(s->first_row + t) * (size_t)w->kv_heads +
                         (size_t)(head / (w->heads / w->kv_heads))) *
                            dim +
                        i];
        loss += y * d_y[i];
        if (w->y) w->y[q_row * dim + i] = (float)y;
    }
    return loss;
}

static double attention_loss(void *ctx)
{
    struct attention_world *w = ctx;
    double loss = 0;
    for (int i = 0; i < w->seq_count; i++)
        for (int row = 0; row < w->seqs[i].row_count; row++)
            for (int h = 0; h < w->heads; h++) loss += attend(w, &w->seqs[i], row, h);
    return loss;
}

static void check_attention(struct device *d, struct test_random *r, struct attention_world w, double spread)
{
    size_t q_size = (size_t)w.rows * (size_t)w.heads * w.dim,
           kv_size = (size_t)w.rows * (size_t)w.kv_heads * w.dim;
    w.q = twin_make(r, q_size, spread);
    w.k = twin_make(r, kv_size, spread);
    w.v = twin_make(r, kv_size, 1);
    w.d_y = twin_make(r, q_size, 1);
    struct twin y = twin_make(r, q_size, 1), d_q = twin_make(r, q_size, 1), d_k = twin_make(r, kv_size, 1),
                d_v = twin_make(r, kv_size, 1);
    w.y = y.f;
    attention_loss(&w);
    w.y = NULL;
    struct attention_backward_args a = {w.rows, w.heads, w.kv_heads, w.dim,       w.scale,
                                        w.q.f,  w.k.f,   w.v.f,      y.f,         w.d_y.f,
                                        d_q.f,  d_k.f,   d_v.f,      w.seq_count, w.seqs};
    d->grad->attention_backward(d, &a);

    /* A score of magnitude s is off by about s eps sqrt(dim), and so is its weight, relatively; weights,
     * gradients of weights and products with them add up over at most 130 keys. */
    double score = spread * spread * w.scale * (double)w.dim, tolerance = EPS * (60 + 8 * score);
    check_gradient("d_q", r, attention_loss, &w, &w.q, d_q.f, 60, tolerance);
    check_gradient("d_k", r, attention_loss, &w, &w.k, d_k.f, 60, tolerance);
    check_gradient("d_v", r, attention_loss, &w, &w.v, d_v.f, 60, tolerance);
    struct twin *all[] = {&w.q, &w.k, &w.v, &w.d_y, &y, &d_q, &d_k, &d_v};
    for (int i = 0; i < 8; i++) twin_free(all[i]);
}

static void run_attention(struct device *d, struct test_random *r)
{
    static const struct seq_rows seqs[] = {{.first_row = 0, .row_count = 1},
                                           {.first_row = 1, .row_count = 50},
                                           {.first_row = 51, .row_count = 7},
                                           {.first_row = 58, .row_count = 96}};
    static const struct seq_rows longest[] = {{.first_row = 0, .row_count = GRAD_TEST_SEQ_ROWS}};
    check_attention(d, r, (struct attention_world){154, 6, 2, 8, 0.35f, 4, seqs}, 2);
    check_attention(d, r, (struct attention_world){154, 3, 3, 16, 0.25f, 4, seqs}, 1);
    check_attention(d, r, (struct attention_world){130, 2, 1, 24, 0.2f, 1, longest}, 1);
    check_attention(d, r, (struct attention_world){51, 4, 4, 5, 0.5f, 2, seqs},
                    8); /* all weight on few keys */
}

static void attention_is_right(void **state)
{
    (void)state;
    each_level(run_attention);
}

/* ---- cross-entropy ------------------------------------------------------------------------------- */

struct entropy_world {
    int rows;
    size_t vocab;
    const int32_t *target;
    const float *weight;
    struct twin logits;
};

static double logprob(const double *x, size_t n, int32_t target)
{
    double max = -INFINITY, total = 0;
    for (size_t i = 0; i < n; i++) max = fmax(max, x[i]);
    for (size_t i = 0; i < n; i++) total += exp(x[i] - max);
    return x[target] - max - log(total);
}

static double entropy_loss(void *ctx)
{
    struct entropy_world *w = ctx;
    double loss = 0;
    for (int i = 0; i < w->rows; i++)
        loss -= w->weight[i] * logprob(w->logits.d + (size_t)i * w->vocab, w->vocab, w->target[i]);
    return loss;
}

static void run_cross_entropy(struct device *d, struct test_random *r)
{
    static const size_t sizes[] = {1, 2, 9, 100, 515, 3001};
    static const float weight[] = {1, -0.5f, 0};
    for (size_t s = 0; s < 6; s++) {
        size_t n = sizes[s];
        int32_t target[] = {0, (int32_t)n - 1, (int32_t)random_below(r, n)};
        struct entropy_world w = {3, n, target, weight, twin_make(r, 3 * n, 15)};
        float lp[3], alone[3];
        struct cross_entropy_args a = {3, n, w.logits.f, target, NULL, alone};
        d->grad->cross_entropy(d, &a);
        for (size_t i = 0; i < w.logits.n; i++) assert_true(w.logits.f[i] == (float)w.logits.d[i]);
        a.weight = weight;
        a.logprob = lp;
        d->grad->cross_entropy(d, &a);
        for (int i = 0; i < 3; i++) {
            double want = logprob(w.logits.d + (size_t)i * n, n, target[i]);
            /* the difference of two numbers up to 25, and a sum of up to 3001 exponentials */
            assert_true(fabs(lp[i] - want) <= EPS * 200);
            assert_true(lp[i] == alone[i]);
        }
        for (size_t i = 2 * n; i < 3 * n; i++) assert_true(w.logits.f[i] == 0);
        /* an exponential of a difference up to 30, which rounds to 30 eps, and the sum's error */
        check_gradient("d_logits", r, entropy_loss, &w, &w.logits, w.logits.f, 200, 60 * EPS);
        twin_free(&w.logits);
    }
    float bad[20] = {0}, lp;
    bad[13] = NAN;
    d->grad->cross_entropy(d, &(struct cross_entropy_args){1, 20, bad, (int32_t[]){2}, NULL, &lp});
    assert_true(isnan(lp));
    bad[13] = INFINITY;
    d->grad->cross_entropy(d, &(struct cross_entropy_args){1, 20, bad, (int32_t[]){2}, NULL, &lp});
    assert_false(isfinite(lp));
}

static void cross_entropy_is_right(void **state)
{
    (void)state;
    each_level(run_cross_entropy);
}

/* ---- optimiser and sums -------------------------------------------------------------------------- */

static void adamw_step_f64(const struct adamw_args *a, const double *grad, double *value, double *m,
                           double *v)
{
    for (size_t i = 0; i < a->n; i++) {
        double g = grad[i] * a->grad_scale;
        m[i] = a->beta1 * m[i] + (1 - (double)a->beta1) * g;
        v[i] = a->beta2 * v[i] + (1 - (double)a->beta2) * g * g;
        value[i] -= a->rate * (m[i] / a->correction1 / (sqrt(v[i] / a->correction2) + a->eps) +
                               a->weight_decay * value[i]);
    }
}

static void check_adamw(struct device *d, struct test_random *r, size_t n, float decay)
{
    struct twin value = twin_make(r, n, 1), m = twin_make(r, n, 0), v = twin_make(r, n, 0);
    struct adamw_args a = {.n = n,
                           .value = value.f,
                           .m = m.f,
                           .v = v.f,
                           .rate = 0.01f,
                           .beta1 = 0.9f,
                           .beta2 = 0.95f,
                           .eps = 1e-8f,
                           .weight_decay = decay,
                           .grad_scale = 0.5f};
    for (int step = 1; step <= 5; step++) {
        struct twin grad = twin_make(r, n, step == 3 ? 0 : 2);
        a.grad = grad.f;
        a.correction1 = (float)(1 - pow(0.9, step));
        a.correction2 = (float)(1 - pow(0.95, step));
        d->grad->adamw(d, &a);
        adamw_step_f64(&a, grad.d, value.d, m.d, v.d);
        for (size_t i = 0; i < n; i++) assert_true(grad.f[i] == 0);
        twin_free(&grad);
    }
    for (size_t i = 0; i < n; i++) {
        /* five steps of at most about 3 rates, each right to some ten roundings, where m is not a small rest
         * of terms up to 1; and a rounding of the value each */
        assert_true(fabs(m.f[i] - m.d[i]) <= 10 * EPS);
        assert_true(fabs(v.f[i] - v.d[i]) <= 20 * EPS * v.d[i] + 1e-12);
        assert_true(fabs(value.f[i] - value.d[i]) <= 20 * EPS);
    }
    struct twin *all[] = {&value, &m, &v};
    for (int i = 0; i < 3; i++) twin_free(all[i]);
}

static void run_vectors(struct device *d, struct test_random *r)
{
    static const size_t sizes[] = {1, 5, 8, 31, 16384, 40001};
    for (size_t s = 0; s < 6; s++) {
        size_t n = sizes[s];
        struct twin x = twin_make(r, n, 3), y = twin_make(r, n, 2);
        double sum = 0;
        float got, fill = (float)n;
        for (size_t i = 0; i < n; i++) sum += x.d[i] * x.d[i];
        d->grad->sum_squares(d, x.f, n, &got);
        assert_true(fabs(got - sum) <= 2 * EPS * sum); /* rounded once */
        d->grad->add(d, x.f, y.f, n);
        for (size_t i = 0; i < n; i++) assert_true(x.f[i] == (float)x.d[i] + y.f[i]);
        d->grad->fill(d, y.f, n, fill);
        for (size_t i = 0; i < n; i++) assert_true(y.f[i] == fill);
        twin_free(&x);
        twin_free(&y);
        check_adamw(d, r, n, s % 2 ? 0.1f : 0);
    }
    float none = 1;
    d->grad->sum_squares(d, NULL, 0, &none);
    assert_true(none == 0);
}

static void vectors_are_right(void **state)
{
    (void)state;
    each_level(run_vectors);
}

/* More parts than a vector is cut into at most. */
static void long_sums_are_right(void **state)
{
    (void)state;
    struct device *d = grad_device_open(CPU_LEVEL_BEST, 2);
    size_t n = (size_t)1 << 25;
    float *x = d->ops->alloc(d, n * sizeof *x), got;
    assert_non_null(x);
    d->grad->fill(d, x, n, 0.5f);
    d->grad->sum_squares(d, x, n, &got);
    assert_true(got == (float)n / 4);
    d->ops->free(d, x);
    d->ops->close(d);
}

/* ---- threads, limits ----------------------------------------------------------------------------- */

#define BITS_ROWS 400

/* A large case of every op whose work is shared out; returns a copy of all results. */
static float *results(int threads, size_t *count_out)
{
    static const struct seq_rows seqs[] = {{.first_row = 0, .row_count = 130},
                                           {.first_row = 130, .row_count = 41},
                                           {.first_row = 171, .row_count = 129},
                                           {.first_row = 300, .row_count = 100}};
    struct device *d = grad_device_open(CPU_LEVEL_BEST, threads);
    struct test_random r = {.state = 3};
    enum { HEADS = 6, KV = 2, DIM = 24, WIDTH = HEADS * DIM, VOCAB = 1000 };
    size_t n = BITS_ROWS * WIDTH, wide = BITS_ROWS * VOCAB;
    struct twin x = twin_make(&r, n, 1), y = twin_make(&r, n, 1), z = twin_make(&r, n, 1),
                out = twin_make(&r, 4 * n, 1), logits = twin_make(&r, wide, 5),
                product = twin_make(&r, WIDTH * VOCAB, 1);
    int32_t target[BITS_ROWS];
    float weight[BITS_ROWS], *lp = malloc((BITS_ROWS + 1) * sizeof *lp);
    for (int i = 0; i < BITS_ROWS; i++) {
        target[i] = (int32_t)random_below(&r, VOCAB);
        weight[i] = 1;
    }
    d->grad->matmul(d, &(struct matmul_args){BITS_ROWS, WIDTH, WIDTH, false, true, x.f, y.f, WIDTH, WIDTH, 1,
                                             0, out.f, WIDTH});
    d->grad->matmul(d, &(struct matmul_args){WIDTH, VOCAB, BITS_ROWS, true, false, x.f, logits.f, WIDTH,
                                             VOCAB, 1, 0, product.f, VOCAB});
    d->grad->attention_backward(d, &(struct attention_backward_args){BITS_ROWS, HEADS, KV, DIM, 0.2f, x.f,
                                                                     y.f, z.f, y.f, z.f, out.f + n,
                                                                     out.f + 2 * n, out.f + 3 * n, 4, seqs});
    d->grad->cross_entropy(d, &(struct cross_entropy_args){BITS_ROWS, VOCAB, logits.f, target, weight, lp});
    d->grad->rmsnorm_backward(
        d, &(struct rmsnorm_backward_args){BITS_ROWS, NULL, WIDTH, x.f, y.f, 1e-5f, z.f, out.f});
    d->grad->silu_mul_backward(d, &(struct silu_mul_backward_args){n, x.f, y.f, z.f, x.f, y.f});
    d->grad->sum_squares(d, logits.f, wide, &lp[BITS_ROWS]);
    d->ops->close(d);

    const struct twin *parts[] = {&x, &y, &z, &out, &logits, &product};
    size_t total = BITS_ROWS + 1;
    for (int i = 0; i < 6; i++) total += parts[i]->n;
    float *all = malloc(total * sizeof *all), *at = all;
    for (int i = 0; i < 6; i++) {
        memcpy(at, parts[i]->f, parts[i]->n * sizeof *at);
        at += parts[i]->n;
    }
    memcpy(at, lp, (BITS_ROWS + 1) * sizeof *at);
    free(lp);
    struct twin *owned[] = {&x, &y, &z, &out, &logits, &product};
    for (int i = 0; i < 6; i++) twin_free(owned[i]);
    *count_out = total;
    return all;
}

static void threads_change_no_bit(void **state)
{
    (void)state;
    size_t count;
    float *one = results(1, &count);
    for (int threads = 2; threads <= 4; threads++) {
        float *more = results(threads, &count);
        assert_memory_equal(one, more, count * sizeof *one);
        free(more);
    }
    free(one);
}

static void reserve_only_grows(void **state)
{
    (void)state;
    struct device *d = grad_device_open(CPU_LEVEL_BEST, 1);
    struct grad_limits huge = {
        .rows = 1 << 30, .cols = 1, .seq_rows = 1, .heads = 1 << 30, .head_dim = 1 << 30};
    assert_int_equal(d->grad->reserve(d, &huge), ST_NOMEM);
    struct grad_limits small = {
        .rows = 1, .cols = 1, .seq_rows = 1, .heads = 1, .head_dim = 1, .experts_rank = 1};
    assert_int_equal(d->grad->reserve(d, &small), ST_OK);
    struct test_random r = {.state = 7};
    run_attention(d, &r);
    small.seq_rows = 2 * GRAD_TEST_SEQ_ROWS;
    assert_int_equal(d->grad->reserve(d, &small), ST_OK);
    run_rope(d, &r);
    run_attention(d, &r);
    d->ops->close(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(products_are_right),    cmocka_unit_test(weights_are_right),     cmocka_unit_test(silu_is_right),
        cmocka_unit_test(rmsnorm_is_right),      cmocka_unit_test(rope_is_right),
        cmocka_unit_test(attention_is_right),    cmocka_unit_test(cross_entropy_is_right),
        cmocka_unit_test(vectors_are_right),     cmocka_unit_test(long_sums_are_right),
        cmocka_unit_test(threads_change_no_bit), cmocka_unit_test(reserve_only_grows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

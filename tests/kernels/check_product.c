/* The products of every weight type, and those of gradients. */
#include "tests/kernels/check.h"

#include "base/memory.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A product may round activations in blocks of this many inputs, with a step of the block's largest magnitude over
 * so many: to 8 bits where weights have blocks of their own, not at all where they have none. That of gradients may
 * round weights too. */
#define ROUND_BLOCK 32
#define ACT_STEPS   127
#define GRAD_STEPS  8191

struct shape {
    enum dtype type;
    size_t outputs, inputs;
    int rows;
};

struct operands {
    struct shape s;
    struct matrix m;
    float *decoded; /* the weights' exact values (outputs, inputs) */
    float *x;       /* (rows, x_stride) */
    size_t x_stride;
    bool random; /* x is random, so that rounding errors are independent */
    const struct cpu_product *product;
    double x_steps, w_steps; /* of a block's largest; 0: not rounded */
};

/* Packs weights and activations as the device does, in two parts each, and multiplies outputs
 * [begin, end) for `rows` rows from first_row on. y (rows, y_stride). */
static void multiply_by(const struct cpu_product *p, const struct operands *o, int first_row, int rows,
                     size_t begin, size_t end, float *y, size_t y_stride)
{
    const struct shape *s = &o->s;
    size_t w_bytes = p->weight_bytes(s->type, s->outputs, s->inputs);
    const void *w = o->m.data;
    if (w_bytes) {
        void *packed = check_buffer(w_bytes, MEMORY_ALIGN);
        size_t panel = (size_t)p->panel_outputs, half = size_round_up(s->outputs / 2, panel);
        if (half > s->outputs) half = s->outputs;
        p->weight_pack(packed, &o->m, 0, half);
        if (half < s->outputs) p->weight_pack(packed, &o->m, half, s->outputs);
        w = packed;
    }

    const float *x = o->x + (size_t)first_row * o->x_stride;
    void *act = check_buffer(p->act_bytes(rows, s->inputs), MEMORY_ALIGN);
    int split = (int)size_round_up((size_t)rows / 2, (size_t)p->tile_rows);
    if (split > 0 && split < rows)
        p->act_pack(act, x, o->x_stride, s->inputs, rows, 0, split);
    else
        split = 0;
    p->act_pack(act, x, o->x_stride, s->inputs, rows, split, rows);
    /* a hint: it may be of any length, nothing beyond it is read, and it changes no result */
    struct cpu_ahead ahead = {.count = check_below(200)};
    const void **line = check_buffer(ahead.count * sizeof *line, sizeof *line);
    for (size_t i = 0; i < ahead.count; i++) line[i] = x;
    ahead.line = line;
    p->multiply(w, s->type, act, s->inputs, s->outputs, rows, begin, end, y, y_stride,
                check_below(4) ? &ahead : NULL);
}

/* What rounding one block of one operand may do to a sum of products: `step` is its largest magnitude by `steps`. For
 * given signs of all roundings it is sum |other| step / 2; independent ones have a variance of
 * step^2 / 12 sum other^2. */
static void add_rounding(const float *rounded, const float *other, size_t n, double steps, double *worst,
                         double *variance)
{
    double largest = 0, sum = 0, squares = 0;
    for (size_t i = 0; i < n && steps > 0; i++) {
        largest = fmax(largest, fabs((double)rounded[i]));
        sum += fabs((double)other[i]);
        squares += (double)other[i] * other[i];
    }
    double step = steps > 0 ? largest / steps : 0;
    *worst += step / 2 * sum;
    *variance += step * step / 12 * squares;
}

/* How far one output may be from the exact product: rounding of sums, and of operands, of whose standard deviation 6.5
 * are never seen. */
static float tolerance(const struct operands *o, size_t output, int row)
{
    const float *w = o->decoded + output * o->s.inputs, *x = o->x + (size_t)row * o->x_stride;
    double magnitude = 0, worst = 0, variance = 0;
    for (size_t k = 0; k < o->s.inputs; k += ROUND_BLOCK) {
        size_t n = o->s.inputs - k < ROUND_BLOCK ? o->s.inputs - k : ROUND_BLOCK;
        for (size_t i = k; i < k + n; i++) magnitude += fabs((double)w[i] * x[i]);
        add_rounding(x + k, w + k, n, o->x_steps, &worst, &variance);
        add_rounding(w + k, x + k, n, o->w_steps, &worst, &variance);
    }
    double tol = magnitude * CHECK_EPS * (16 + (double)o->s.inputs / 4) + 1e-30;
    /* 2^-10: the step itself is rounded, by a half-precision number at worst */
    double rounding = o->random ? fmin(worst, 6.5 * sqrt(variance)) : worst;
    return (float)(tol + rounding * (1 + 1.0 / 1024));
}

/* Zeros, constants, single spikes, a denormal row: whole rows each. */
static void fill_special(float *x, size_t inputs, int kind)
{
    for (size_t k = 0; k < inputs; k++) x[k] = kind == 1 ? -3.5f : kind == 3 ? 1e-41f : 0;
    if (kind == 2) x[inputs / 2] = 1000;
    if (kind == 4)
        for (size_t k = 0; k < inputs; k++) x[k] = k % 2 ? 1 : -1;
    if (kind == 5)
        for (size_t k = 0; k < inputs; k++) x[k] = k % ROUND_BLOCK ? 0.01f : 100;
}

/* Which product of a table: that of gradients, or the type's. */
static const struct cpu_product *product_of(const struct cpu_kernels *table, enum dtype type, bool grad)
{
    return grad ? table->grad_product : table->product[type];
}

static void make_operands(const struct check *c, struct shape s, bool grad, bool random, struct operands *o)
{
    size_t bytes = s.outputs * dtype_row_bytes(s.type, s.inputs);
    /* GGUF aligns tensors, safetensors do not: blocks have no alignment to speak of */
    char *data = check_buffer(bytes, 1);
    check_fill_type(s.type, data, s.outputs * s.inputs, 1);
    *o = (struct operands){.s = s,
                           .m = {s.type, s.outputs, s.inputs, data},
                           .random = random,
                           .product = product_of(c->table, s.type, grad),
                           .x_steps = grad ? GRAD_STEPS : dtype_block_elems(s.type) > 1 ? ACT_STEPS : 0,
                           .w_steps = grad ? GRAD_STEPS : 0};
    o->decoded = check_floats(s.outputs * s.inputs);
    dtype_decode(s.type, data, o->decoded, s.outputs * s.inputs);

    o->x_stride = s.inputs + check_below(4);
    o->x = check_floats((size_t)(s.rows - 1) * o->x_stride + s.inputs);
    for (int r = 0; r < s.rows; r++) {
        float *x = o->x + (size_t)r * o->x_stride;
        if (random)
            check_fill_normal(x, s.inputs, 1);
        else
            fill_special(x, s.inputs, r % 6);
    }
}

static float *multiply_all(const struct cpu_product *p, const struct operands *o)
{
    size_t n = (size_t)o->s.rows * o->s.outputs;
    float *y = check_floats(n);
    multiply_by(p, o, 0, o->s.rows, 0, o->s.outputs, y, o->s.outputs);
    return y;
}

static void check_values(const struct check *c, const struct operands *o)
{
    size_t n = (size_t)o->s.rows * o->s.outputs;
    float *want = multiply_all(c->reference->product[o->s.type], o), *got = multiply_all(o->product, o);
    float *tol = check_floats(n);
    for (int r = 0; r < o->s.rows; r++)
        for (size_t i = 0; i < o->s.outputs; i++) tol[(size_t)r * o->s.outputs + i] = tolerance(o, i, r);
    check_near("y", got, want, tol, n);
}

/* A row alone, and a part of the columns, give the same bits as all at once; nothing between the
 * columns asked for is written. */
static void check_invariance(const struct operands *o)
{
    const struct cpu_product *p = o->product;
    const struct shape *s = &o->s;
    float *all = multiply_all(p, o);
    size_t panel = (size_t)p->panel_outputs, panels = (s->outputs + panel - 1) / panel;
    size_t begin = check_below(panels) * panel, end = begin + (1 + check_below(panels)) * panel;
    if (end > s->outputs) end = s->outputs;

    int row = (int)check_below((size_t)s->rows);
    float *one = check_floats(end - begin);
    multiply_by(p, o, row, 1, begin, end, one, s->outputs);
    check_equal("one row alone", one, all + (size_t)row * s->outputs + begin, (end - begin) * sizeof *one);

    int first = (int)check_below((size_t)s->rows), rows = 1 + (int)check_below((size_t)(s->rows - first));
    size_t cols = end - begin, stride = cols + 3;
    float *some = check_floats((size_t)rows * stride);
    multiply_by(p, o, first, rows, begin, end, some, stride);
    for (int r = 0; r < rows; r++) {
        const float *want = all + (size_t)(first + r) * s->outputs + begin;
        check_equal("some rows and columns", some + (size_t)r * stride, want, cols * sizeof *want);
        check_untouched("past the columns", some + (size_t)r * stride + cols, 3 * sizeof *some);
    }
}

/* A row that is not finite spoils no other. */
static void check_poison(const struct operands *o)
{
    if (o->s.rows < 2) return;
    float *before = multiply_all(o->product, o);
    int bad = (int)check_below((size_t)o->s.rows);
    float *x = o->x + (size_t)bad * o->x_stride;
    for (size_t k = 0; k < o->s.inputs; k++) x[k] = k % 3 ? INFINITY : NAN;
    float *after = multiply_all(o->product, o);
    for (int r = 0; r < o->s.rows; r++)
        if (r != bad)
            check_equal("a row beside one of NaN", after + (size_t)r * o->s.outputs,
                        before + (size_t)r * o->s.outputs, o->s.outputs * sizeof *after);
}

static void check_shape(const struct check *c, struct shape s, bool grad)
{
    const struct cpu_product *p = product_of(c->table, s.type, grad);
    if (p->weight_bytes(s.type, s.outputs, s.inputs) == SIZE_MAX) return; /* the level below takes it */
    for (int random = 0; random < 2; random++) {
        check_begin(c, "%s product%s, %zu outputs, %zu inputs, %d rows, %s", dtype_name(s.type),
                    grad ? " of gradients" : "", s.outputs, s.inputs, s.rows, random ? "random" : "special rows");
        struct operands o;
        make_operands(c, s, grad, random, &o);
        check_values(c, &o);
        check_invariance(&o);
        check_poison(&o);
        check_end();
    }
}

/* The share of outputs' errors that rounding of operands explains, over many outputs: an average that no
 * single tolerance sees. */
static void check_mean_error(const struct check *c, enum dtype type, bool grad)
{
    struct shape s = {type, 64, 1024, 8};
    const struct cpu_product *p = product_of(c->table, type, grad);
    if (p->weight_bytes(type, s.outputs, s.inputs) == SIZE_MAX) return;
    check_begin(c, "%s product%s, mean error", dtype_name(type), grad ? " of gradients" : "");
    struct operands o;
    make_operands(c, s, grad, true, &o);
    float *want = multiply_all(c->reference->product[type], &o), *got = multiply_all(p, &o);
    double error = 0, allowed = 0;
    for (size_t i = 0; i < (size_t)s.rows * s.outputs; i++) {
        error += fabs((double)got[i] - want[i]);
        allowed += tolerance(&o, i % s.outputs, (int)(i / s.outputs));
    }
    /* The tolerance is 6.5 standard deviations, and a normal error's mean magnitude 0.8 of one: half
     * as much again for the luck of the draw */
    if (!(error <= allowed / 6.5 * 0.8 * 1.5))
        check_fail("mean error %.3g of %.3g allowed", error, allowed / 6.5 * 1.2);
    check_end();
}

static void check_type(const struct check *c, enum dtype type, bool grad)
{
    static const size_t outputs[] = {1, 5, 16, 31, 32, 33, 64, 100};
    static const size_t blocks[] = {1, 2, 3, 5, 18};
    static const size_t plain[] = {1, 7, 16, 31, 32, 100, 576};
    static const int rows[] = {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33};
    size_t elems = dtype_block_elems(type);

    for (size_t o = 0; o < sizeof outputs / sizeof *outputs; o++) {
        for (size_t i = 0; i < (elems > 1 ? sizeof blocks / sizeof *blocks : sizeof plain / sizeof *plain);
             i++) {
            size_t inputs = elems > 1 ? blocks[i] * elems : plain[i];
            /* two row counts of the list for each shape, so that all meet without a full product */
            for (int j = 0; j < 2; j++)
                check_shape(c, (struct shape){type, outputs[o], inputs,
                                              rows[check_below(sizeof rows / sizeof *rows)]}, grad);
        }
    }
    check_mean_error(c, type, grad);
}

void check_products(const struct check *c)
{
    for (int type = 0; type < DTYPE_COUNT; type++)
        if (c->table->product[type]) check_type(c, (enum dtype)type, false);
    check_type(c, DTYPE_F32, true);
}

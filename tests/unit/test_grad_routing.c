/* Training's ops on routed low-rank adapters: gates, gated sums and the contrastive loss, against double
 * precision and finite differences of formulas written anew. */
#include "kernels/grad.h"
#include "tests/support/check.h"
#include "tests/support/gradient.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

/* One fp32 rounding, relative. */
#define EPS         (FLT_EPSILON / 2)
#define ROWS        70
#define EXPERTS_MAX 16

static const enum gate_rule rules[] = {GATE_DENSE, GATE_TOPK, GATE_TOPK_RAW};

/* ---- gates --------------------------------------------------------------------------------------- */

struct route_world {
    int rows, experts, top_k;
    enum gate_rule rule;
    double temperature, balance;
    struct twin u, d_g;
    double counts[EXPERTS_MAX]; /* as stats[0]: constants of the loss */
    int skipped;                /* first rows that the loss leaves out */
};

/* p and g of one row. */
static void gates(const struct route_world *w, const double *u, double *p, double *g)
{
    double max = -INFINITY, total = 0, kept = 0;
    for (int i = 0; i < w->experts; i++) max = fmax(max, u[i]);
    for (int i = 0; i < w->experts; i++) total += p[i] = exp((u[i] - max) / w->temperature);
    for (int i = 0; i < w->experts; i++) {
        int above = 0;
        p[i] /= total;
        for (int j = 0; j < w->experts; j++) above += u[j] > u[i] || (u[j] == u[i] && j < i);
        g[i] = w->rule == GATE_DENSE || above < w->top_k ? p[i] : 0;
        kept += g[i];
    }
    for (int i = 0; i < w->experts && w->rule == GATE_TOPK; i++) g[i] /= kept;
}

static double route_loss(void *ctx)
{
    struct route_world *w = ctx;
    double loss = 0, p[EXPERTS_MAX], g[EXPERTS_MAX];
    for (int t = w->skipped; t < w->rows; t++) {
        gates(w, w->u.d + t * w->experts, p, g);
        for (int i = 0; i < w->experts; i++)
            loss += w->d_g.d[t * w->experts + i] * g[i] + w->balance * w->counts[i] * p[i];
    }
    return loss;
}

static void check_gates(struct route_world *w, const float *p_got, const float *g_got, const float *stats)
{
    double sums[3][EXPERTS_MAX] = {{0}}, p[EXPERTS_MAX], g[EXPERTS_MAX];
    for (int t = 0; t < w->rows; t++) {
        gates(w, w->u.d + t * w->experts, p, g);
        for (int i = 0; i < w->experts; i++) {
            int at = t * w->experts + i;
            /* an exponential of a difference up to 12 / temperature, and a sum of 16 */
            double bound = EPS * (40 + 12 / w->temperature);
            assert_true(fabs(p_got[at] - p[i]) <= bound * p[i] && fabs(g_got[at] - g[i]) <= bound * g[i]);
            sums[0][i] += g[i] != 0;
            sums[1][i] += g[i];
            sums[2][i] += p[i];
        }
    }
    for (int s = 0; s < 3; s++)
        for (int i = 0; i < w->experts; i++)
            assert_true(fabs(stats[s * w->experts + i] - sums[s][i]) <= EPS * 60 * sums[s][i]);
}

static void check_route(struct device *d, struct test_random *r, struct route_world w)
{
    size_t n = (size_t)w.rows * (size_t)w.experts;
    w.u = twin_make(r, n, 3);
    w.d_g = twin_make(r, n, 1);
    if (w.rows > 1) { /* equal logits: the lower index is chosen */
        w.u.f[0] = w.u.f[w.experts - 1];
        w.u.d[0] = w.u.f[0];
    }
    struct twin p = twin_make(r, n, 1), g = twin_make(r, n, 1), d_u = twin_make(r, n, 1);
    float stats[3 * EXPERTS_MAX];
    d->grad->route(d, &(struct route_args){w.rows, w.experts, w.top_k, w.rule, (float)w.temperature, w.u.f,
                                           p.f, g.f, stats});
    check_gates(&w, p.f, g.f, stats);

    for (int i = 0; i < w.experts; i++) w.counts[i] = stats[i];
    struct route_backward_args a = {
        w.rows, w.experts, w.rule, (float)w.temperature, (float)w.balance, p.f, g.f, w.d_g.f, stats, d_u.f};
    d->grad->route_backward(d, &a);
    /* A tie has no derivative: the loss and the op's results leave that row out. */
    w.skipped = w.rows > 1 ? 1 : 0;
    memset(d_u.f, 0, (size_t)(w.skipped * w.experts) * sizeof(float));
    /* gates right to some 50 roundings, times gradients that cancel against their mean */
    check_gradient("d_u", r, route_loss, &w, &w.u, d_u.f, 200, 300 * EPS);

    float *kept = memcpy(malloc(n * sizeof *kept), d_u.f, n * sizeof *kept);
    a.d_u = w.d_g.f;
    d->grad->route_backward(d, &a);
    size_t skip = (size_t)(w.skipped * w.experts);
    assert_memory_equal(w.d_g.f + skip, kept + skip, (n - skip) * sizeof *kept);
    free(kept);
    struct twin *all[] = {&w.u, &w.d_g, &p, &g, &d_u};
    for (int i = 0; i < 5; i++) twin_free(all[i]);
}

static void gates_are_right(void **state)
{
    (void)state;
    struct device *d = grad_device_open(CPU_LEVEL_BEST, 2);
    struct test_random r = {.state = 5};
    for (int rule = 0; rule < 3; rule++) {
        check_route(d, &r, (struct route_world){ROWS, 8, 2, rules[rule], 1, 0.01});
        check_route(d, &r, (struct route_world){130, 16, 3, rules[rule], 0.5, 0});
        check_route(d, &r, (struct route_world){3, 5, 1, rules[rule], 2, 0.1});
        check_route(d, &r, (struct route_world){9, 4, 4, rules[rule], 1, 0.1});
        check_route(d, &r, (struct route_world){1, 1, 1, rules[rule], 1, 0.1});
    }
    d->ops->close(d);
}

static void threads_change_no_gate(void **state)
{
    (void)state;
    enum { EXPERTS = 8, PAIRS = GRAD_TEST_ROWS * EXPERTS };
    struct test_random r = {.state = 5};
    struct twin u = twin_make(&r, PAIRS, 3);
    float *p = malloc(PAIRS * sizeof *p), *g = malloc(PAIRS * sizeof *g), *d_u = malloc(PAIRS * sizeof *d_u);
    float *first = malloc(PAIRS * sizeof *first);
    float stats[3 * EXPERTS], first_stats[3 * EXPERTS];
    for (int threads = 1; threads <= 4; threads++) {
        struct device *d = grad_device_open(CPU_LEVEL_BEST, threads);
        d->grad->route(d, &(struct route_args){GRAD_TEST_ROWS, EXPERTS, 2, GATE_TOPK, 1, u.f, p, g, stats});
        d->grad->route_backward(d, &(struct route_backward_args){GRAD_TEST_ROWS, EXPERTS, GATE_TOPK, 1, 0.1f,
                                                                 p, g, u.f, stats, d_u});
        d->ops->close(d);
        if (threads == 1) {
            memcpy(first, d_u, PAIRS * sizeof *d_u);
            memcpy(first_stats, stats, sizeof stats);
        }
        assert_memory_equal(first, d_u, PAIRS * sizeof *d_u);
        assert_memory_equal(first_stats, stats, sizeof stats);
    }
    free(p);
    free(g);
    free(d_u);
    free(first);
    twin_free(&u);
}

/* ---- gated sums ---------------------------------------------------------------------------------- */

struct gate_world {
    int rows, experts, rank;
    struct twin scale, g, z, d_zg;
    bool gated;
};

static double gate_loss(void *ctx)
{
    struct gate_world *w = ctx;
    double loss = 0;
    for (size_t i = 0; i < w->z.n; i++) {
        size_t pair = i / (size_t)w->rank;
        loss +=
            w->d_zg.d[i] * w->scale.d[pair % (size_t)w->experts] * (w->gated ? w->g.d[pair] : 1) * w->z.d[i];
    }
    return loss;
}

static void check_gate(struct device *d, struct test_random *r, struct gate_world w)
{
    size_t pairs = (size_t)w.rows * (size_t)w.experts, n = pairs * (size_t)w.rank;
    w.scale = twin_make(r, (size_t)w.experts, 2);
    w.g = twin_make(r, pairs, 1);
    w.z = twin_make(r, n, 3);
    w.d_zg = twin_make(r, n, 1);
    struct twin zg = twin_make(r, n, 1), d_g = twin_make(r, pairs, 1);
    const float *g = w.gated ? w.g.f : NULL;
    d->grad->gate(d, &(struct gate_args){w.rows, w.experts, w.rank, w.scale.f, g, w.z.f, zg.f});
    for (size_t i = 0; i < n; i++) {
        size_t pair = i / (size_t)w.rank;
        double want = w.scale.d[pair % (size_t)w.experts] * (w.gated ? w.g.d[pair] : 1) * w.z.d[i];
        assert_true(fabs(zg.f[i] - want) <= 2.1 * EPS * fabs(want)); /* two products */
    }
    d->grad->gate_backward(d, &(struct gate_backward_args){w.rows, w.experts, w.rank, w.scale.f, g, w.z.f,
                                                           w.d_zg.f, w.gated ? d_g.f : NULL});
    check_gradient("d_z", r, gate_loss, &w, &w.z, w.d_zg.f, 200, 4 * EPS);
    /* sums of `rank` terms up to the largest */
    if (w.gated) check_gradient("d_g", r, gate_loss, &w, &w.g, d_g.f, 200, 2 * w.rank * EPS);
    float *alone = memcpy(malloc(n * sizeof *alone), w.z.f, n * sizeof *alone);
    d->grad->gate(d, &(struct gate_args){w.rows, w.experts, w.rank, w.scale.f, g, alone, alone});
    assert_memory_equal(alone, zg.f, n * sizeof *alone);
    free(alone);
    struct twin *all[] = {&w.scale, &w.g, &w.z, &w.d_zg, &zg, &d_g};
    for (int i = 0; i < 6; i++) twin_free(all[i]);
}

static void gated_sums_are_right(void **state)
{
    (void)state;
    struct device *d = grad_device_open(CPU_LEVEL_BEST, 2);
    struct test_random r = {.state = 5};
    for (int gated = 0; gated < 2; gated++) {
        check_gate(d, &r, (struct gate_world){ROWS, 8, 4, .gated = gated});
        check_gate(d, &r, (struct gate_world){3, 5, 3, .gated = gated});
        check_gate(d, &r, (struct gate_world){50, 1, 16, .gated = gated});
        check_gate(d, &r, (struct gate_world){50, 3, 1, .gated = gated});
    }
    d->ops->close(d);
}

/* ---- the contrastive loss ------------------------------------------------------------------------ */

struct contrast_world {
    int count, experts, rank;
    size_t d_out;
    double temperature;
    int32_t row[ROWS];
    struct twin g, z, bt;
    double similarity, cohesion; /* of different experts, and of the same; written by the loss */
};

/* The pairs as the op's comment says, with their outputs made unit vectors in full size. */
static int pairs_list(const struct contrast_world *w, int *expert, double *unit)
{
    int count = 0;
    size_t width = (size_t)(w->experts * w->rank);
    for (int t = 0, seen = 0; t < w->count; t++)
        for (int i = 0; i < w->experts && seen < CONTRAST_PAIRS_MAX; i++) {
            if (w->g.d[w->row[t] * w->experts + i] == 0) continue;
            seen++;
            double *o = unit + (size_t)count * w->d_out, norm = 0;
            for (size_t c = 0; c < w->d_out; c++) {
                o[c] = 0;
                for (int j = 0; j < w->rank; j++)
                    o[c] += w->bt.d[(size_t)(i * w->rank + j) * w->d_out + c] *
                            w->z.d[(size_t)w->row[t] * width + (size_t)(i * w->rank + j)];
                norm += o[c] * o[c];
            }
            if (sqrt(norm) < CONTRAST_NORM_MIN) continue;
            for (size_t c = 0; c < w->d_out; c++) o[c] /= sqrt(norm);
            expert[count++] = i;
        }
    return count;
}

static double contrast_loss(void *ctx)
{
    struct contrast_world *w = ctx;
    static int expert[CONTRAST_PAIRS_MAX];
    static double unit[CONTRAST_PAIRS_MAX * 96];
    int n = pairs_list(w, expert, unit), anchors = 0, apart_count = 0, together_count = 0;
    double loss = 0, apart = 0, together = 0;
    for (int a = 0; a < n; a++) {
        double all = 0, near = 0;
        int positives = 0;
        for (int b = 0; b < n; b++) {
            double s = 0;
            for (size_t c = 0; c < w->d_out; c++)
                s += unit[(size_t)a * w->d_out + c] * unit[(size_t)b * w->d_out + c];
            if (expert[b] != expert[a]) {
                apart += s;
                apart_count++;
            }
            if (b == a) continue;
            all += exp(s / w->temperature);
            if (expert[b] == expert[a]) {
                near += s / w->temperature;
                positives++;
                together += s;
                together_count++;
            }
        }
        if (!positives) continue;
        anchors++;
        loss += log(all) - near / positives;
    }
    w->similarity = apart_count ? apart / apart_count : 0;
    w->cohesion = together_count ? together / together_count : 0;
    return anchors ? loss / anchors : 0;
}

static void contrast_world_make(struct test_random *r, int rows, struct contrast_world *w)
{
    size_t width = (size_t)(w->experts * w->rank);
    w->g = twin_make(r, (size_t)(rows * w->experts), 1);
    w->z = twin_make(r, (size_t)rows * width, 1);
    w->bt = twin_make(r, width * w->d_out, 0.3);
    for (int t = 0; t < rows; t++)
        for (int i = 0; i < w->experts; i++)
            if ((t + i * 3) % w->experts > 1) w->g.f[t * w->experts + i] = 0, w->g.d[t * w->experts + i] = 0;
    for (int t = 0; t < w->count; t++) w->row[t] = (int32_t)((t * 7 + 2) % rows); /* rows: prime */
}

static void contrast_world_free(struct contrast_world *w)
{
    twin_free(&w->g);
    twin_free(&w->z);
    twin_free(&w->bt);
}

static void contrast_run(struct device *d, const struct contrast_world *w, float weight, float *loss,
                         float *d_z, float *d_bt)
{
    d->grad->contrast(d,
                      &(struct contrast_args){w->count, w->row, w->experts, w->rank, w->d_out, w->g.f, w->z.f,
                                              w->bt.f, (float)w->temperature, weight, loss, d_z, d_bt});
}

static void check_contrast(struct device *d, struct test_random *r, struct contrast_world w, int rows)
{
    contrast_world_make(r, rows, &w);
    struct twin d_z = twin_make(r, w.z.n, 0), d_bt = twin_make(r, w.bt.n, 0);
    float loss[CONTRAST_RESULTS], alone[CONTRAST_RESULTS];
    contrast_run(d, &w, 1, alone, NULL, NULL);
    contrast_run(d, &w, 1, loss, d_z.f, d_bt.f);
    assert_memory_equal(loss, alone, sizeof loss);
    double want = contrast_loss(&w);
    /* Cosines are right to the roundings of sums of d_out and of rank^2 terms, some 100 eps here, and the
     * exponent is a cosine over the temperature. */
    double tolerance = 100 * EPS / w.temperature;
    assert_true(fabs(loss[0] - want) <= tolerance * (1 + fabs(want)));
    assert_true(fabs(loss[1] - w.similarity) <= 100 * EPS);
    assert_true(fabs(loss[2] - w.cohesion) <= 100 * EPS);
    check_gradient("d_z", r, contrast_loss, &w, &w.z, d_z.f, 60, 4 * tolerance);
    check_gradient("d_bt", r, contrast_loss, &w, &w.bt, d_bt.f, 60, 4 * tolerance);

    /* Added to what is there, times the weight. */
    float *once = memcpy(malloc(d_bt.n * sizeof *once), d_bt.f, d_bt.n * sizeof *once), largest = 0;
    contrast_run(d, &w, 2, loss, d_z.f, d_bt.f);
    for (size_t i = 0; i < d_bt.n; i++) largest = fmaxf(largest, fabsf(once[i]));
    for (size_t i = 0; i < d_bt.n; i++) assert_true(fabsf(d_bt.f[i] - 3 * once[i]) <= 8 * EPS * largest);
    free(once);
    twin_free(&d_z);
    twin_free(&d_bt);
    contrast_world_free(&w);
}

static void contrast_is_right(void **state)
{
    (void)state;
    struct device *d = grad_device_open(CPU_LEVEL_BEST, 2);
    struct test_random r = {.state = 5};
    check_contrast(d, &r, (struct contrast_world){40, 8, 4, 96, 0.1}, 67);
    check_contrast(d, &r, (struct contrast_world){25, 4, 3, 33, 0.5}, 31);
    check_contrast(d, &r, (struct contrast_world){7, 16, 4, 40, 1}, 11);
    check_contrast(d, &r, (struct contrast_world){9, 2, 2, 20, 1}, 11);
    d->ops->close(d);
}

/* Nothing to compare: no loss, no gradients, no NaN. */
static void contrast_of_nothing_is_zero(void **state)
{
    (void)state;
    struct device *d = grad_device_open(CPU_LEVEL_BEST, 1);
    struct test_random r = {.state = 5};
    struct contrast_world w = {20, 4, 3, 33, 0.1};
    contrast_world_make(&r, 31, &w);
    struct twin d_z = twin_make(&r, w.z.n, 0), d_bt = twin_make(&r, w.bt.n, 0);
    float loss[CONTRAST_RESULTS] = {1, 1, 1};

    d->grad->fill(d, w.bt.f, w.bt.n, 0); /* as a fresh adapter's: outputs have no direction */
    contrast_run(d, &w, 1, loss, d_z.f, d_bt.f);
    assert_true(loss[0] == 0 && loss[1] == 0 && loss[2] == 0);
    w.count = 0;
    contrast_run(d, &w, 1, loss, d_z.f, d_bt.f);
    assert_true(loss[0] == 0 && loss[1] == 0 && loss[2] == 0);
    for (size_t i = 0; i < w.bt.n; i++) w.bt.f[i] = (float)w.bt.d[i];
    w.count = 1; /* two experts of one token: no positives, but a similarity */
    contrast_run(d, &w, 1, loss, d_z.f, d_bt.f);
    assert_true(loss[0] == 0 && loss[1] != 0 && loss[2] == 0);
    for (size_t i = 0; i < d_z.n; i++) assert_true(d_z.f[i] == 0);
    for (size_t i = 0; i < d_bt.n; i++) assert_true(d_bt.f[i] == 0);
    twin_free(&d_z);
    twin_free(&d_bt);
    contrast_world_free(&w);
    d->ops->close(d);
}

/* More pairs than are taken, and the same bits on any number of threads. */
static void contrast_takes_the_first_pairs(void **state)
{
    (void)state;
    enum { COUNT = GRAD_TEST_ROWS - 1, TAKEN = CONTRAST_PAIRS_MAX / 4 };
    struct test_random r = {.state = 5};
    struct twin g = twin_make(&r, GRAD_TEST_ROWS * 4, 0), z = twin_make(&r, GRAD_TEST_ROWS * 16, 1),
                bt = twin_make(&r, 16 * 50, 1);
    int32_t row[COUNT];
    for (size_t i = 0; i < g.n; i++) g.f[i] = 0.25f;
    for (int t = 0; t < COUNT; t++) row[t] = t;
    float loss[5][CONTRAST_RESULTS], *d_z[5], *d_bt[5];
    for (int run = 0; run < 5; run++) { /* one to four threads, then only the tokens that count */
        struct device *d = grad_device_open(CPU_LEVEL_BEST, run % 4 + 1);
        d_z[run] = calloc(z.n, sizeof(float));
        d_bt[run] = calloc(bt.n, sizeof(float));
        d->grad->contrast(d, &(struct contrast_args){run < 4 ? COUNT : TAKEN, row, 4, 4, 50, g.f, z.f, bt.f,
                                                     0.1f, 1, loss[run], d_z[run], d_bt[run]});
        d->ops->close(d);
        assert_memory_equal(loss[run], loss[0], sizeof loss[0]);
        assert_memory_equal(d_z[run], d_z[0], z.n * sizeof(float));
        assert_memory_equal(d_bt[run], d_bt[0], bt.n * sizeof(float));
    }
    assert_true(loss[0][0] > 0 && d_z[0][TAKEN * 16 - 1] != 0 && d_z[0][TAKEN * 16] == 0);
    for (int run = 0; run < 5; run++) {
        free(d_z[run]);
        free(d_bt[run]);
    }
    twin_free(&g);
    twin_free(&z);
    twin_free(&bt);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gates_are_right),
        cmocka_unit_test(threads_change_no_gate),
        cmocka_unit_test(gated_sums_are_right),
        cmocka_unit_test(contrast_is_right),
        cmocka_unit_test(contrast_of_nothing_is_zero),
        cmocka_unit_test(contrast_takes_the_first_pairs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

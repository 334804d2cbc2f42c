#include "training/learner.h"

#include <math.h>
#include <stdlib.h>

/* --- opening --- */

static enum status build(struct learner *l, const struct adapter_bundle *b, struct error *err)
{
    enum status st = engine_turn_open(l->engine, &l->turn);
    if (!st) st = engine_turn_begin(l->turn);
    if (st) return error_set(err, st, "the device cannot be had: %s", status_text(st));
    st = params_open(l->device, b, &l->params, err);
    if (!st) {
        l->norm = l->device->ops->alloc(l->device, sizeof *l->norm);
        if (!l->norm) st = error_set(err, ST_NOMEM, "out of memory");
    }
    engine_turn_end(l->turn);
    return st;
}

enum status learner_open(struct engine *e, struct device *d, struct transposed *t,
                         const struct adapter_bundle *b, struct learner **out, struct error *err)
{
    struct learner *l = calloc(1, sizeof *l);
    if (!l) return error_set(err, ST_NOMEM, "out of memory");
    l->engine = e;
    l->device = d;
    l->transposed = t;
    enum status st = build(l, b, err);
    if (st)
        learner_close(l);
    else
        *out = l;
    return st;
}

void learner_close(struct learner *l)
{
    if (!l) return;
    pass_close(l->pass);
    if (l->norm) l->device->ops->free(l->device, l->norm);
    params_close(l->params);
    engine_turn_close(l->turn);
    train_batch_release(&l->batch);
    free(l);
}

size_t learner_bytes(const struct learner *l)
{
    return l->params->count * 4 * sizeof(float) + (l->pass ? pass_bytes(l->pass) : 0);
}

enum status learner_reserve(struct learner *l, int rows, int seq_rows)
{
    if (l->pass && rows <= l->rows_max && seq_rows <= l->seq_rows_max) return ST_OK;
    if (rows > l->rows_max) l->rows_max = rows;
    if (seq_rows > l->seq_rows_max) l->seq_rows_max = seq_rows;
    pass_close(l->pass);
    l->pass = NULL;
    return pass_open(l->engine, l->transposed, l->params, l->rows_max, l->seq_rows_max, LEARNER_KEEP_BYTES,
                     &l->pass);
}

void learner_rest(struct learner *l)
{
    pass_close(l->pass);
    l->pass = NULL;
    l->rows_max = l->seq_rows_max = 0;
}

/* --- the optimiser --- */

/* In double, as beta2 near 1 leaves a float few digits. */
static float correction(double beta, int64_t step) { return (float)(1 - pow(beta, (double)step)); }

static void adamw(struct learner *l, const struct train_settings *s, double rate, double grad_scale)
{
    struct params *p = l->params;
    const struct adamw_args args = {
        .n = p->count,
        .value = p->value,
        .grad = p->grad,
        .m = p->m,
        .v = p->v,
        .rate = (float)rate,
        .beta1 = (float)s->beta1,
        .beta2 = (float)s->beta2,
        .eps = (float)s->eps,
        .weight_decay = (float)s->weight_decay,
        .correction1 = correction(s->beta1, l->optim_steps),
        .correction2 = correction(s->beta2, l->optim_steps),
        .grad_scale = (float)grad_scale,
    };
    l->device->grad->adamw(l->device, &args);
}

static void grad_zero(struct learner *l)
{
    l->device->grad->fill(l->device, l->params->grad, l->params->count, 0);
}

enum status learner_update(struct learner *l, const struct train_settings *s, double rate, double *norm_out)
{
    struct device *d = l->device;
    float squares = 0;
    enum status st = engine_turn_begin(l->turn);
    if (st) return st;
    d->grad->sum_squares(d, l->params->grad, l->params->count, l->norm);
    d->ops->read(d, &squares, l->norm, sizeof squares);
    double norm = sqrt((double)squares);
    bool finite = isfinite(norm);
    if (finite) {
        l->optim_steps++;
        adamw(l, s, rate, s->clip > 0 && norm > s->clip ? s->clip / norm : 1);
    } else {
        grad_zero(l);
    }
    st = d->ops->sync(d);
    engine_turn_end(l->turn);
    if (st) return st;
    *norm_out = norm;
    return finite ? ST_OK : ST_REJECTED;
}

enum status learner_forget(struct learner *l)
{
    enum status st = engine_turn_begin(l->turn);
    if (st) return st;
    grad_zero(l);
    st = l->device->ops->sync(l->device);
    engine_turn_end(l->turn);
    return st;
}

/* --- what checkpoints and publishing read --- */

static float *vector_of(const struct learner *l, enum learner_vector which)
{
    const struct params *p = l->params;
    return which == LEARNER_VALUE ? p->value : which == LEARNER_M ? p->m : p->v;
}

enum status learner_read(struct learner *l, enum learner_vector which, size_t first, size_t count, float *out)
{
    enum status st = engine_turn_begin(l->turn);
    if (st) return st;
    l->device->ops->read(l->device, out, vector_of(l, which) + first, count * sizeof *out);
    engine_turn_end(l->turn);
    return ST_OK;
}

enum status learner_write(struct learner *l, enum learner_vector which, size_t first, size_t count,
                          const float *in)
{
    enum status st = engine_turn_begin(l->turn);
    if (st) return st;
    l->device->ops->write(l->device, vector_of(l, which) + first, in, count * sizeof *in);
    st = l->device->ops->sync(l->device); /* `in` is the caller's again */
    engine_turn_end(l->turn);
    return st;
}

enum status learner_bundle(struct learner *l, const struct adapter_base *base, struct adapter_bundle **out,
                           struct error *err)
{
    enum status st = engine_turn_begin(l->turn);
    if (st) return error_set(err, st, "the device cannot be had: %s", status_text(st));
    st = params_bundle(l->params, base, DTYPE_F32, out, err);
    engine_turn_end(l->turn);
    return st;
}

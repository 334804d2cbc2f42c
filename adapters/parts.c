#include "adapters/parts.h"

#include "adapters/reader_int.h"
#include "base/safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const projection_paths[PROJ_COUNT] = {
    [PROJ_Q] = "self_attn.q_proj", [PROJ_K] = "self_attn.k_proj", [PROJ_V] = "self_attn.v_proj",
    [PROJ_O] = "self_attn.o_proj", [PROJ_GATE] = "mlp.gate_proj", [PROJ_UP] = "mlp.up_proj",
    [PROJ_DOWN] = "mlp.down_proj",
};

const char *projection_name(enum projection p) { return strchr(projection_paths[p], '.') + 1; }

const char *module_name(const struct module *m, char buffer[MODULE_NAME_SIZE])
{
    const char *path = m->projection == PROJ_FFN ? "mlp" : projection_paths[m->projection];
    snprintf(buffer, MODULE_NAME_SIZE, "%slayers.%d.%s", m->root, m->layer, path);
    return buffer;
}

/* --- names --- */

/* Drops `prefix` from *s if it is there. */
static bool skip(const char **s, const char *prefix)
{
    size_t n = strlen(prefix);
    if (strncmp(*s, prefix, n) != 0) return false;
    *s += n;
    return true;
}

/* Up to five digits, and no sign or space. */
static bool skip_number(const char **s, int *out)
{
    const char *digits = *s;
    int n = 0;
    for (; **s >= '0' && **s <= '9'; ++*s) {
        if (*s - digits == 5) return false;
        n = n * 10 + (**s - '0');
    }
    *out = n;
    return *s > digits;
}

static bool skip_projection(const char **s, enum projection *out)
{
    for (int p = 0; p < PROJ_COUNT; p++) {
        if (!skip(s, projection_paths[p])) continue;
        *out = (enum projection)p;
        return true;
    }
    return false;
}

/* What follows "layers.N." in a tensor's name; NULL where it does not begin so. */
static const char *name_rest(const char *name, const char *prefix, struct module *m)
{
    m->root = "";
    if (prefix) {
        if (!skip(&name, prefix)) return NULL;
    } else {
        (void)skip(&name, "base_model.model.");
        if (skip(&name, "model.")) m->root = "model.";
    }
    return skip(&name, "layers.") && skip_number(&name, &m->layer) && skip(&name, ".") ? name : NULL;
}

static bool name_matches(const char *s, const struct part_name *n, struct module *m, int *expert)
{
    m->projection = n->projection;
    *expert = 0;
    for (const char *p = n->pattern; *p; p++) {
        if (*p == '@'   ? !skip_projection(&s, &m->projection)
            : *p == '%' ? !skip_number(&s, expert)
                        : *s++ != *p)
            return false;
    }
    return *s == '\0';
}

static enum status name_unclaimed(const char *name, const char *rest, struct error *err)
{
    enum projection p;
    return error_set(err, ST_REJECTED, "tensor '%.200s' cannot be used: %s", name,
                     rest && skip_projection(&rest, &p)
                         ? "it is no part of an adapter of this format"
                         : "adapters apply to q, k, v, o, gate, up and down projections of the layers only");
}

/* --- collecting --- */

void parts_release(struct parts *p)
{
    free(p->part);
    blocks_free(&p->memory);
    *p = (struct parts){0};
}

static bool parts_grow(struct parts *p)
{
    size_t capacity = p->capacity ? 2 * p->capacity : 64;
    struct part *grown = realloc(p->part, capacity * sizeof *grown);
    if (!grown) return false;
    p->part = grown;
    p->capacity = capacity;
    return true;
}

static bool kind_is_vector(enum part_kind k)
{
    return k == PART_BIAS || k == PART_MAGNITUDE || k == PART_THRESHOLD_BIAS;
}

static enum status shape_take(const struct safetensor *t, enum part_kind kind, struct part *out,
                              struct error *err)
{
    bool empty = t->bytes == 0, vector = kind_is_vector(kind);
    /* Vectors come as (n), (1, n) or (n, 1). */
    bool fits = vector ? t->dim_count == 1 || (t->dim_count == 2 && (t->dim[0] == 1 || t->dim[1] == 1))
                       : t->dim_count == 2;
    if (!fits || empty)
        return error_set(err, ST_REJECTED, "tensor '%s' must be a %s; it has %d dimensions%s", t->name,
                         vector ? "vector" : "matrix", t->dim_count, empty ? ", one of them empty" : "");
    size_t second = t->dim_count == 2 ? (size_t)t->dim[1] : 1;
    out->rows = vector ? (size_t)t->dim[0] * second : (size_t)t->dim[0];
    out->cols = vector ? 1 : second;
    return ST_OK;
}

enum status parts_claim(struct parts *p, const struct safetensor *t, const struct module *m,
                        const struct part_name *name, int expert, struct error *err)
{
    struct part part = {.name = t->name,
                        .module = *m,
                        .kind = name->kind,
                        .expert = expert,
                        .copy = name->copy,
                        .type = t->type,
                        .data = t->data};
    enum status st = shape_take(t, name->kind, &part, err);
    if (st) return st;
    if (expert >= LR_EXPERTS_MAX)
        return error_set(err, ST_REJECTED, "tensor '%s' is of expert %d; at most %d experts are supported",
                         t->name, expert, LR_EXPERTS_MAX);
    if (p->count == p->capacity && !parts_grow(p)) return ST_NOMEM;
    p->part[p->count++] = part;
    return ST_OK;
}

enum status parts_collect(struct parts *p, const struct safetensors *tensors, const char *prefix,
                          const struct part_name *names, struct error *err)
{
    for (size_t i = 0; i < safetensors_count(tensors); i++) {
        const struct safetensor *t = safetensors_at(tensors, i);
        struct module m = {0};
        int expert = 0;
        const char *rest = name_rest(t->name, prefix, &m);
        const struct part_name *n = names;
        while (rest && n->pattern && !name_matches(rest, n, &m, &expert)) n++;
        if (!rest || !n->pattern) return name_unclaimed(t->name, rest, err);
        enum status st = parts_claim(p, t, &m, n, expert, err);
        if (st) return st;
    }
    return ST_OK;
}

#include "server/options.h"

#include "base/memory.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum status bytes_parse(const char *text, size_t *out)
{
    static const char units[] = "KMGT";
    char *end;
    if (text[0] < '0' || text[0] > '9') return ST_INVALID;
    errno = 0;
    size_t v = strtoull(text, &end, 10);
    if (errno) return ST_INVALID;
    const char *unit = *end ? strchr(units, *end & ~0x20) : NULL;
    if (unit) {
        for (const char *u = units; u <= unit; u++) v = size_mul(v, 1024);
        end++;
    }
    if (unit && *end == 'i') end++;
    if (*end == 'B' || *end == 'b') end++;
    if (*end || v == SIZE_MAX) return ST_INVALID;
    *out = v;
    return ST_OK;
}

/* Is the n-byte text one of "a|b|c"? */
static bool is_choice(const char *choices, const char *text)
{
    size_t n = strlen(text);
    for (const char *c = choices; c; c = strchr(c, '|') ? strchr(c, '|') + 1 : NULL)
        if (strcspn(c, "|") == n && !strncmp(c, text, n)) return true;
    return false;
}

static enum status refuse(const struct option *o, const char *text, struct error *err)
{
    const char *wants = o->kind == OPTION_BYTES ? "a size such as 512M or 2G" : "a number";
    if (o->choices)
        return error_set(err, ST_INVALID, "--%s: '%.60s' is not one of %s", o->name, text, o->choices);
    if (o->kind == OPTION_INT || o->kind == OPTION_REAL)
        return error_set(err, ST_INVALID, "--%s: '%.60s' is not a number from %g to %g", o->name, text,
                         o->min, o->max);
    return error_set(err, ST_INVALID, "--%s: '%.60s' is not %s", o->name, text, wants);
}

static enum status set_number(const struct option *o, double v, const char *text, void *at, struct error *err)
{
    if (!(v >= o->min && v <= o->max) || (o->kind == OPTION_INT && v != floor(v)))
        return refuse(o, text, err);
    if (o->kind == OPTION_INT)
        *(int *)at = (int)v;
    else
        *(double *)at = v;
    return ST_OK;
}

static enum status set_text(const struct option *o, const char *text, void *at, struct error *err)
{
    char *end;
    switch (o->kind) {
    case OPTION_STRING:
        if (o->choices && !is_choice(o->choices, text)) return refuse(o, text, err);
        *(const char **)at = text;
        return ST_OK;
    case OPTION_LIST: {
        struct option_list *l = at;
        if (l->count == OPTION_LIST_MAX)
            return error_set(err, ST_INVALID, "--%s may be given %d times at most", o->name, OPTION_LIST_MAX);
        l->items[l->count++] = text;
        return ST_OK;
    }
    case OPTION_BYTES: return bytes_parse(text, at) ? refuse(o, text, err) : ST_OK;
    case OPTION_SEED: {
        struct option_seed *seed = at;
        errno = 0;
        seed->value = strtoull(text, &end, 10);
        seed->given = true;
        return *text && !*end && !errno ? ST_OK : refuse(o, text, err);
    }
    default: {
        double v = strtod(text, &end);
        return *text && !*end ? set_number(o, v, text, at, err) : refuse(o, text, err);
    }
    }
}

/* Dashes and underscores are the same. */
static bool name_equal(const char *a, const char *b, size_t n)
{
    if (strlen(a) != n) return false;
    for (size_t i = 0; i < n; i++)
        if ((a[i] == '_' ? '-' : a[i]) != (b[i] == '_' ? '-' : b[i])) return false;
    return true;
}

static const struct option *find(const struct option_table *t, const char *name, size_t n)
{
    for (size_t i = 0; i < t->count; i++)
        if ((t->options[i].commands & t->command) && name_equal(t->options[i].name, name, n))
            return &t->options[i];
    return NULL;
}

/* Reads the option at argv[*i], and steps *i over its value. */
static enum status read_one(const struct option_table *t, int argc, char **argv, int *i, void *values,
                            bool *given, struct error *err)
{
    const char *name = argv[*i] + 2;
    size_t n = strcspn(name, "=");
    const char *value = name[n] ? name + n + 1 : NULL;
    const struct option *o = find(t, name, n);
    if (!o)
        return error_set(err, ST_INVALID, "unknown option --%.*s; --help lists those there are",
                         (int)(n > 60 ? 60 : n), name);
    void *at = (char *)values + o->offset;
    given[o - t->options] = true;
    if (o->kind == OPTION_FLAG) {
        if (value) return error_set(err, ST_INVALID, "--%s takes no value", o->name);
        *(bool *)at = true;
        return ST_OK;
    }
    if (!value) {
        if (*i + 1 >= argc)
            return error_set(err, ST_INVALID, "--%s needs a value: --%s %s", o->name, o->name, o->metavar);
        value = argv[++*i];
    }
    return set_text(o, value, at, err);
}

enum status options_read(const struct option_table *t, int argc, char **argv, void *values, bool *given,
                         struct option_list *words, struct error *err)
{
    bool options_ended = false;
    for (int i = 0; i < argc; i++) {
        enum status st = ST_OK;
        if (!options_ended && !strcmp(argv[i], "--"))
            options_ended = true;
        else if (!options_ended && argv[i][0] == '-' && argv[i][1] == '-')
            st = read_one(t, argc, argv, &i, values, given, err);
        else if (!options_ended && argv[i][0] == '-' && argv[i][1])
            st = error_set(err, ST_INVALID, "unknown option %.60s; options begin with two dashes", argv[i]);
        else if (words->count == OPTION_LIST_MAX)
            st = error_set(err, ST_INVALID, "too many arguments");
        else
            words->items[words->count++] = argv[i];
        if (st) return st;
    }
    return ST_OK;
}

static enum status set_json(const struct option *o, const cJSON *v, void *at, struct error *err)
{
    if (o->kind == OPTION_FLAG && cJSON_IsBool(v)) {
        *(bool *)at = cJSON_IsTrue(v);
        return ST_OK;
    }
    if (cJSON_IsString(v) && o->kind != OPTION_FLAG) return set_text(o, v->valuestring, at, err);
    if (cJSON_IsNumber(v) && (o->kind == OPTION_INT || o->kind == OPTION_REAL))
        return set_number(o, v->valuedouble, "its value", at, err);
    if (cJSON_IsNumber(v) && o->kind == OPTION_BYTES && v->valuedouble >= 0 && v->valuedouble < 0x1p53) {
        *(size_t *)at = (size_t)v->valuedouble;
        return ST_OK;
    }
    return error_set(err, ST_INVALID, "configuration: '%s' has a value of the wrong kind", o->name);
}

enum status options_read_object(const struct option_table *t, const cJSON *object, void *values,
                                const bool *given, struct error *err)
{
    if (!cJSON_IsObject(object))
        return error_set(err, ST_INVALID, "configuration: the file must hold one JSON object");
    for (const cJSON *v = object->child; v; v = v->next) {
        const struct option *o = find(t, v->string, strlen(v->string));
        if (!o) return error_set(err, ST_INVALID, "configuration: unknown option '%.60s'", v->string);
        if (given[o - t->options]) continue;
        enum status st = set_json(o, v, (char *)values + o->offset, err);
        if (st) return st;
    }
    return ST_OK;
}

void options_help(const struct option_table *t, FILE *out)
{
    for (size_t i = 0; i < t->count; i++) {
        const struct option *o = &t->options[i];
        if (!(o->commands & t->command)) continue;
        char left[64];
        snprintf(left, sizeof left, "--%s%s%s", o->name, o->metavar ? " " : "", o->metavar ? o->metavar : "");
        fprintf(out, "  %-28s %s", left, o->help);
        fprintf(out, o->choices ? " (%s)\n" : "\n", o->choices);
    }
    fprintf(out, "  %-28s %s\n  %-28s %s\n", "--help", "this text", "--version", "the version");
}

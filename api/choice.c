#include "api/completion.h"
#include "api/parse.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* What one parameter asked for. Several may be given if they agree. */
struct choices {
    struct adapter_choice items[COMPLETION_ADAPTERS_MAX];
    size_t count;
};

static void choices_release(struct choices *c)
{
    for (size_t i = 0; i < c->count; i++) {
        free(c->items[i].name);
        free(c->items[i].version);
    }
    c->count = 0;
}

/* "name" or "name@version". */
static void choices_add(struct parse *p, struct choices *c, const char *text, const char *version,
                        float weight)
{
    const char *at = strchr(text, '@');
    size_t n = at ? (size_t)(at - text) : strlen(text);
    struct adapter_choice *item = &c->items[c->count];
    *item = (struct adapter_choice){.name = strndup(text, n), .weight = weight};
    if (at && at[1]) version = at + 1;
    if (version && version[0]) item->version = strdup(version);
    c->count++; /* releases what there is, also after a failure */
    if (!item->name || (version && version[0] && !item->version))
        parse_fail(p, ST_NOMEM, NULL, "out of memory");
}

static bool choice_equal(const struct adapter_choice *a, const struct adapter_choice *b)
{
    const char *va = a->version ? a->version : "", *vb = b->version ? b->version : "";
    bool same_name = a->name && b->name ? !strcmp(a->name, b->name) : a->name == b->name;
    return same_name && a->number == b->number && !strcmp(va, vb) && a->weight == b->weight;
}

static bool choices_equal(const struct choices *a, const struct choices *b)
{
    if (a->count != b->count) return false;
    for (size_t i = 0; i < a->count; i++)
        if (!choice_equal(&a->items[i], &b->items[i])) return false;
    return true;
}

/* Reads the members of one entry of `adapters`. */
static void parse_set_entry(struct parse *p, const cJSON *entry, struct choices *c)
{
    const char *name = NULL, *version = NULL;
    double weight = 1;
    struct parse inner = {.body = entry, .err = p->err};
    if (cJSON_IsString(entry)) {
        name = entry->valuestring;
    } else if (cJSON_IsObject(entry)) {
        parse_string(&inner, "name", &name);
        parse_string(&inner, "version", &version);
        parse_f64(&inner, "weight", -100, 100, &weight);
    }
    if (inner.failed)
        p->failed = true;
    else if (!name || !name[0])
        parse_fail(p, ST_INVALID, "adapters",
                   "'adapters' entries must be {\"name\": \"...\", \"version\": \"...\", \"weight\": 1}; "
                   "version and weight may be left out");
    else
        choices_add(p, c, name, version, (float)weight);
}

static void refuse_duplicates(struct parse *p, const struct choices *c)
{
    for (size_t i = 0; i < c->count && !p->failed; i++)
        for (size_t j = 0; j < i && !p->failed; j++)
            if (!strcmp(c->items[i].name, c->items[j].name))
                parse_fail(p, ST_INVALID, "adapters",
                           "'adapters' names '%.128s' twice; add up its weights instead", c->items[i].name);
}

static bool parse_set(struct parse *p, struct choices *c)
{
    const cJSON *v = json_get(p->body, "adapters");
    if (!v) return false;
    if (!cJSON_IsArray(v) || cJSON_GetArraySize(v) > COMPLETION_ADAPTERS_MAX) {
        parse_fail(p, ST_INVALID, "adapters", "'adapters' must be an array of at most %d entries",
                   COMPLETION_ADAPTERS_MAX);
        return false;
    }
    for (const cJSON *e = v->child; e && !p->failed; e = e->next) parse_set_entry(p, e, c);
    if (!p->failed) refuse_duplicates(p, c);
    return true;
}

/* llama.cpp's: adapters by their numbers. */
static void parse_number_entry(struct parse *p, const cJSON *entry, struct choices *c)
{
    int number = -1;
    double scale = 1;
    struct parse inner = {.body = entry, .err = p->err};
    if (cJSON_IsObject(entry)) {
        parse_int(&inner, "id", 0, INT_MAX, &number);
        parse_f64(&inner, "scale", -100, 100, &scale);
    }
    if (inner.failed)
        p->failed = true;
    else if (number < 0)
        parse_fail(p, ST_INVALID, "lora",
                   "'lora' entries must be {\"id\": 1, \"scale\": 1}; see GET /lora-adapters");
    for (size_t i = 0; i < c->count && !p->failed; i++)
        if (c->items[i].number == number) parse_fail(p, ST_INVALID, "lora", "'lora' has id %d twice", number);
    if (!p->failed) c->items[c->count++] = (struct adapter_choice){.number = number, .weight = (float)scale};
}

static bool parse_numbers(struct parse *p, struct choices *c)
{
    const cJSON *v = json_get(p->body, "lora");
    if (!v) return false;
    if (!cJSON_IsArray(v) || cJSON_GetArraySize(v) > COMPLETION_ADAPTERS_MAX) {
        parse_fail(p, ST_INVALID, "lora", "'lora' must be an array of at most %d entries",
                   COMPLETION_ADAPTERS_MAX);
        return false;
    }
    for (const cJSON *e = v->child; e && !p->failed; e = e->next) parse_number_entry(p, e, c);
    return v->child != NULL;
}

static bool parse_adapter_id(struct parse *p, struct choices *c)
{
    const char *id = NULL;
    parse_string(p, "adapter_id", &id);
    if (id && id[0]) choices_add(p, c, id, NULL, 1);
    return id && id[0];
}

/* The base's own name asks for nothing in particular: the other parameters may still name adapters. */
static bool parse_model(struct parse *p, const char *base_name, const char **model_out, struct choices *c)
{
    const char *model = NULL;
    parse_string(p, "model", &model);
    if (!model || !model[0]) return false;
    *model_out = model;
    if (!strcmp(model, base_name)) return false;
    size_t n = strlen(base_name);
    if (!strncmp(model, base_name, n) && model[n] == ':') model += n + 1;
    choices_add(p, c, model, NULL, 1);
    return true;
}

void parse_adapter_choice(struct parse *p, const char *base_name, struct completion_request *r)
{
    enum { SET, NUMBERS, ID, MODEL, WAYS };
    static const char *const param[WAYS] = {"adapters", "lora", "adapter_id", "model"};
    struct choices c[WAYS] = {0};
    bool given[WAYS] = {0};
    if (p->failed) return;
    given[SET] = parse_set(p, &c[SET]);
    given[NUMBERS] = parse_numbers(p, &c[NUMBERS]);
    given[ID] = parse_adapter_id(p, &c[ID]);
    given[MODEL] = parse_model(p, base_name, &r->model, &c[MODEL]);

    int chosen = -1;
    for (int way = 0; way < WAYS && !p->failed; way++) {
        if (!given[way]) continue;
        if (chosen < 0)
            chosen = way;
        else if (!choices_equal(&c[chosen], &c[way]))
            parse_fail(p, ST_INVALID, param[way], "'%s' and '%s' name different adapters: give one of them",
                       param[chosen], param[way]);
    }
    if (chosen >= 0 && !p->failed) {
        memcpy(r->adapters, c[chosen].items, sizeof r->adapters);
        r->adapter_count = c[chosen].count;
        r->adapter_param = param[chosen];
        c[chosen].count = 0; /* moved */
    }
    for (int way = 0; way < WAYS; way++) choices_release(&c[way]);
}

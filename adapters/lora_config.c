#include "adapters/lora_config.h"

#include "adapters/pattern.h"
#include "kernels/lowrank.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ALPHA_MAX 1e6

struct module_value {
    struct pattern *pattern; /* owned */
    double value;
};

enum status config_error(struct error *err, enum status st, const struct error *inner)
{
    if (st == ST_NOMEM) return st;
    return error_set(err, st == ST_INVALID ? ST_REJECTED : st, "adapter_config.json: %s", inner->message);
}

bool config_on(const cJSON *v)
{
    if (!v || cJSON_IsNull(v) || cJSON_IsFalse(v)) return false;
    if (cJSON_IsNumber(v)) return v->valuedouble != 0;
    if (cJSON_IsString(v)) return v->valuestring[0] != '\0';
    return cJSON_IsTrue(v) || v->child;
}

bool config_counts(const cJSON *v, int max)
{
    if (!cJSON_IsArray(v) || !v->child) return false;
    for (const cJSON *e = v->child; e; e = e->next)
        if (!cJSON_IsNumber(e) || e->valuedouble < 1 || e->valuedouble > max ||
            e->valuedouble != floor(e->valuedouble))
            return false;
    return true;
}

/* Of every format: what lora_config_read reads, and what says nothing of what is computed. */
static const char *const common_keys[] = {
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "peft_type",
    "peft_version",
    "auto_mapping",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",
    NULL,
};

static const struct config_refusal common_refusals[] = {
    {"modules_to_save", "'modules_to_save' replaces weights of the base model, which is not supported"},
    {NULL, NULL},
};

static bool key_among(const char *key, const char *const *keys)
{
    for (; *keys; keys++)
        if (strcmp(key, *keys) == 0) return true;
    return false;
}

static const char *refusal_of(const char *key, const struct config_refusal *refused)
{
    for (; refused && refused->key; refused++)
        if (strcmp(key, refused->key) == 0) return refused->reason;
    return NULL;
}

enum status config_keys_check(const cJSON *config, const char *const *known,
                              const struct config_refusal *refused, struct error *err)
{
    for (const cJSON *v = config->child; v; v = v->next) {
        if (!config_on(v) || key_among(v->string, common_keys) || key_among(v->string, known)) continue;
        const char *reason = refusal_of(v->string, refused);
        if (!reason) reason = refusal_of(v->string, common_refusals);
        if (reason) return error_set(err, ST_UNSUPPORTED, "%s", reason);
        return error_set(err, ST_INVALID,
                         "'%.60s' is set, and what it changes is not known here; remove it "
                         "if the adapter computes the same without it",
                         v->string);
    }
    return ST_OK;
}

/* --- reading --- */

static void module_values_release(struct module_values *v)
{
    for (size_t i = 0; i < v->count; i++) pattern_free(v->entry[i].pattern);
    free(v->entry);
}

static enum status module_values_read(const cJSON *config, const char *key, bool whole, double max,
                                      struct module_values *out, struct error *err)
{
    const cJSON *map = json_get(config, key);
    if (!map) return ST_OK;
    if (!cJSON_IsObject(map))
        return error_set(err, ST_INVALID, "'%s' must be an object of patterns to numbers", key);
    int n = cJSON_GetArraySize(map);
    if (n > LORA_PATTERNS_MAX)
        return error_set(err, ST_INVALID, "'%s' has %d entries; at most %d are allowed", key, n,
                         LORA_PATTERNS_MAX);
    if (n == 0) return ST_OK;
    out->entry = calloc((size_t)n, sizeof *out->entry);
    if (!out->entry) return ST_NOMEM;
    for (const cJSON *v = map->child; v; v = v->next) {
        double x = v->valuedouble;
        if (!cJSON_IsNumber(v) || x == 0 || fabs(x) > max || (whole && (x != floor(x) || x < 1)))
            return error_set(err, ST_INVALID, "'%s' for '%.60s' must be %s, not 0, up to %g", key, v->string,
                             whole ? "a whole number" : "a number", max);
        enum status st = pattern_compile_suffix(v->string, &out->entry[out->count].pattern, err);
        if (st) return st;
        out->entry[out->count++].value = x;
    }
    return ST_OK;
}

static enum status module_set_read(const cJSON *config, const char *key, struct module_set *out,
                                   struct error *err)
{
    const cJSON *v = json_get(config, key);
    if (!config_on(v)) return ST_OK;
    out->given = true;
    if (cJSON_IsString(v)) {
        out->all_linear = strcmp(v->valuestring, "all-linear") == 0;
        return out->all_linear ? ST_OK : pattern_compile(v->valuestring, &out->regex, err);
    }
    if (!cJSON_IsArray(v))
        return error_set(err, ST_INVALID, "'%s' must be a list of module names, a regular expression or null",
                         key);
    for (const cJSON *e = v->child; e; e = e->next)
        if (!cJSON_IsString(e)) return error_set(err, ST_INVALID, "'%s' must hold module names only", key);
    out->list = v;
    return ST_OK;
}

static enum status layers_read(const cJSON *config, struct lora_config *out, struct error *err)
{
    const cJSON *v = json_get(config, "layers_to_transform");
    if (!v || (cJSON_IsArray(v) && !v->child)) return ST_OK;
    const cJSON *e = cJSON_IsArray(v) ? v->child : v;
    for (; e; e = cJSON_IsArray(v) ? e->next : NULL)
        if (!cJSON_IsNumber(e) || e->valuedouble < 0 || e->valuedouble != floor(e->valuedouble))
            return error_set(err, ST_INVALID, "'layers_to_transform' must be layer numbers");
    out->layers = v;

    const cJSON *holder = json_get(config, "layers_pattern");
    if (!config_on(holder)) return ST_OK;
    if (cJSON_IsArray(holder) && cJSON_GetArraySize(holder) == 1) holder = holder->child;
    if (!cJSON_IsString(holder)) return error_set(err, ST_INVALID, "'layers_pattern' must be one pattern");
    char regex[PATTERN_BYTES_MAX + 1];
    int n = snprintf(regex, sizeof regex, "(?:^|.*?\\.)(?:%s)\\.\\d+\\..*", holder->valuestring);
    if (n < 0 || (size_t)n >= sizeof regex) return error_set(err, ST_INVALID, "'layers_pattern' is too long");
    return pattern_compile(regex, &out->layers_holder, err);
}

static enum status rank_read(const cJSON *config, const char *key, struct lora_config *out, struct error *err)
{
    const cJSON *list = json_get(config, key);
    if (cJSON_IsArray(list)) {
        if (!config_counts(list, LR_RANK_MAX))
            return error_set(err, ST_INVALID, "'%s' must be a rank from 1 to %d, or one for each layer", key,
                             LR_RANK_MAX);
        out->rank_by_layer = list;
        return ST_OK;
    }
    int64_t rank = out->rank;
    enum status st = json_get_i64(config, key, 1, LR_RANK_MAX, &rank, err);
    out->rank = (int)rank;
    return st == ST_NOT_FOUND ? ST_OK : st;
}

static enum status numbers_read(const cJSON *config, const char *rank_key, struct lora_config *out,
                                struct error *err)
{
    enum status st = rank_read(config, rank_key, out, err);
    if (st) return st;
    st = json_get_f64(config, "lora_alpha", -ALPHA_MAX, ALPHA_MAX, &out->alpha, err);
    if (st && st != ST_NOT_FOUND) return st;
    if (st == ST_OK && out->alpha == 0)
        return error_set(err, ST_INVALID, "'lora_alpha' is 0: the adapter would do nothing");

    st = json_get_bool(config, "use_rslora", &out->rslora, err);
    return st == ST_NOT_FOUND ? ST_OK : st;
}

static enum status bias_check(const cJSON *config, struct error *err)
{
    const cJSON *bias = json_get(config, "bias");
    if (config_on(bias) && !(cJSON_IsString(bias) && strcmp(bias->valuestring, "none") == 0))
        return error_set(err, ST_UNSUPPORTED, "'bias' must be 'none': trained biases are not supported");
    return ST_OK;
}

enum status lora_config_read(const cJSON *config, const char *rank_key, struct lora_config *out,
                             struct error *err)
{
    struct lora_config c = {0};
    struct error inner = {0};
    enum status st = bias_check(config, &inner);
    if (!st) st = numbers_read(config, rank_key, &c, &inner);
    if (!st) st = module_values_read(config, "rank_pattern", true, LR_RANK_MAX, &c.rank_pattern, &inner);
    if (!st) st = module_values_read(config, "alpha_pattern", false, ALPHA_MAX, &c.alpha_pattern, &inner);
    if (!st) st = module_set_read(config, "target_modules", &c.targets, &inner);
    if (!st) st = module_set_read(config, "exclude_modules", &c.excludes, &inner);
    if (!st) st = layers_read(config, &c, &inner);
    if (st) {
        lora_config_release(&c);
        return config_error(err, st, &inner);
    }
    *out = c;
    return ST_OK;
}

enum status lora_config_override(struct lora_config *c, const cJSON *config, struct error *err)
{
    enum status st = bias_check(config, err);
    return st ? st : numbers_read(config, "r", c, err);
}

void lora_config_release(struct lora_config *c)
{
    module_values_release(&c->rank_pattern);
    module_values_release(&c->alpha_pattern);
    pattern_free(c->targets.regex);
    pattern_free(c->excludes.regex);
    pattern_free(c->layers_holder);
    *c = (struct lora_config){0};
}

/* --- asking --- */

static enum status module_values_find(const struct module_values *v, const char *module, double *out,
                                      struct error *err)
{
    for (size_t i = 0; i < v->count; i++) {
        bool match = false;
        enum status st = pattern_match(v->entry[i].pattern, module, &match, err);
        if (st) return st;
        if (match) {
            *out = v->entry[i].value;
            break;
        }
    }
    return ST_OK;
}

enum status lora_config_rank(const struct lora_config *c, const char *module, int layer, int *out,
                             struct error *err)
{
    double rank = c->rank;
    if (c->rank_by_layer) {
        const cJSON *r = cJSON_GetArrayItem(c->rank_by_layer, layer);
        if (!r)
            return error_set(err, ST_REJECTED,
                             "adapter_config.json has ranks for %d layers only, none for %s",
                             cJSON_GetArraySize(c->rank_by_layer), module);
        rank = r->valuedouble;
    }
    enum status st = module_values_find(&c->rank_pattern, module, &rank, err);
    if (st) return st;
    *out = (int)rank;
    return ST_OK;
}

enum status lora_config_scale(const struct lora_config *c, const char *module, int rank, float *out,
                              struct error *err)
{
    if (c->unscaled) {
        *out = 1;
        return ST_OK;
    }
    double alpha = c->alpha;
    enum status st = module_values_find(&c->alpha_pattern, module, &alpha, err);
    if (st) return st;
    if (alpha == 0)
        return error_set(
            err, ST_REJECTED,
            "adapter_config.json has no 'lora_alpha', so the scale of %s is unknown; add the value the "
            "adapter was trained with",
            module);
    *out = (float)(alpha / (c->rslora ? sqrt((double)rank) : (double)rank));
    return ST_OK;
}

/* A list names a module by its whole name or by the end of it, after a dot. */
static bool list_names(const cJSON *list, const char *module)
{
    size_t n = strlen(module);
    for (const cJSON *e = list->child; e; e = e->next) {
        size_t k = strlen(e->valuestring);
        if (k > n || strcmp(module + n - k, e->valuestring) != 0) continue;
        if (k == n || (k > 0 && module[n - k - 1] == '.')) return true;
    }
    return false;
}

static enum status module_set_has(const struct module_set *s, const char *module, bool *out,
                                  struct error *err)
{
    if (s->regex) return pattern_match(s->regex, module, out, err);
    *out = s->all_linear || (s->list && list_names(s->list, module));
    return ST_OK;
}

static bool layer_among(const cJSON *layers, int layer)
{
    if (!cJSON_IsArray(layers)) return layers->valuedouble == layer;
    for (const cJSON *e = layers->child; e; e = e->next)
        if (e->valuedouble == layer) return true;
    return false;
}

enum status lora_config_targets(const struct lora_config *c, const char *module, int layer, bool *out,
                                struct error *err)
{
    bool excluded = false, targeted = true;
    enum status st = module_set_has(&c->excludes, module, &excluded, err);
    if (!st && c->targets.given) st = module_set_has(&c->targets, module, &targeted, err);
    /* As in PEFT, layers_to_transform narrows a list, not a regular expression. */
    if (!st && targeted && c->layers && !c->targets.regex) {
        bool held = true;
        if (c->layers_holder) st = pattern_match(c->layers_holder, module, &held, err);
        targeted = held && layer_among(c->layers, layer);
    }
    if (st) return st;
    *out = targeted && !excluded;
    return ST_OK;
}

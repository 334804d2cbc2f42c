#include "api/training.h"

#include "api/parse.h"
#include "api/scan.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------ members */

static bool is_one_of(const char *name, const char *const *names)
{
    for (; *names; names++)
        if (!strcmp(name, *names)) return true;
    return false;
}

static bool never(const char *name)
{
    (void)name;
    return false;
}

/* A misspelt setting must not train with its default. */
static void parse_known(struct parse *p, const char *const *names, bool (*is_setting)(const char *))
{
    struct strbuf known = {0};
    for (const cJSON *m = p->body->child; m && !p->failed; m = m->next) {
        if (is_one_of(m->string, names) || is_setting(m->string)) continue;
        for (const char *const *n = names; *n; n++) strbuf_printf(&known, "%s%s", known.size ? ", " : "", *n);
        parse_fail(p, ST_INVALID, m->string, "there is no parameter '%.64s'; there are %s%s", m->string,
                   known.data ? known.data : "none",
                   is_setting == never ? "" : ", and the trainer's settings");
    }
    strbuf_release(&known);
}

static void parse_short(struct parse *p, const char *key, const char **out)
{
    const char *text = NULL;
    parse_string(p, key, &text);
    if (p->failed || !text) return;
    if (!*text || strlen(text) > TRAIN_BODY_TEXT_MAX)
        parse_fail(p, ST_INVALID, key, "'%s' must have 1 to %d bytes", key, TRAIN_BODY_TEXT_MAX);
    else
        *out = text;
}

static void parse_needed(struct parse *p, const char *key, const char **out)
{
    parse_short(p, key, out);
    if (!p->failed && !*out) parse_fail(p, ST_INVALID, key, "'%s' is needed", key);
}

/* ------------------------------------------------------------------ fresh adapters */

static void parse_gate(struct parse *p, struct fresh_request *r)
{
    static const char *const gates[] = {"topk", "topk_raw", "dense", NULL};
    r->gate = gates[0];
    parse_string(p, "gate", &r->gate);
    if (!p->failed && !is_one_of(r->gate, gates))
        parse_fail(p, ST_INVALID, "gate", "'gate' must be topk, topk_raw or dense, not '%.40s'", r->gate);
}

/* PEFT's spelling of all of them is a string. */
static void parse_targets(struct parse *p, struct fresh_request *r)
{
    const cJSON *v = json_get(p->body, "target_modules");
    if (!v || (cJSON_IsString(v) && !strcmp(v->valuestring, "all-linear"))) return;
    parse_strings(p, "target_modules", FRESH_TARGETS_MAX, &r->targets, &r->target_count);
    if (!p->failed && !r->target_count)
        parse_fail(p, ST_INVALID, "target_modules",
                   "'target_modules' is empty: leave it out for all of them");
}

static void parse_shape(struct parse *p, const struct fresh_limits *limits, struct fresh_request *r)
{
    r->rank = limits->rank_max < 8 ? limits->rank_max : 8;
    r->experts = 1;
    parse_int(p, "r", 1, limits->rank_max, &r->rank);
    parse_int(p, "num_experts", 1, limits->experts_max, &r->experts);
    r->top_k = r->experts < 2 ? r->experts : 2;
    parse_int(p, "top_k", 1, r->experts, &r->top_k);
    r->alpha = 2.0 * r->rank;
    parse_f64(p, "lora_alpha", 1e-3, 1e6, &r->alpha);
    parse_bool(p, "use_rslora", &r->rslora);
}

bool fresh_request_parse(const char *text, size_t size, const struct fresh_limits *limits,
                         struct fresh_request *out, struct api_error *err)
{
    static const char *const names[] = {"name",           "description", "r",    "num_experts",
                                        "top_k",          "lora_alpha",  "gate", "use_rslora",
                                        "target_modules", "seed",        NULL};
    struct fresh_request r = {0};
    struct parse p = {.err = err};
    if (!parse_body(text, size, &r.body, err)) return false;
    p.body = r.body;
    parse_known(&p, names, never);
    parse_needed(&p, "name", &r.name);
    parse_string(&p, "description", &r.description);
    parse_shape(&p, limits, &r);
    parse_gate(&p, &r);
    parse_targets(&p, &r);
    parse_seed(&p, text, size, &r.seed);
    if (p.failed) {
        fresh_request_release(&r);
        return false;
    }
    *out = r;
    return true;
}

void fresh_request_release(struct fresh_request *r)
{
    free(r->targets);
    cJSON_Delete(r->body);
    *r = (struct fresh_request){0};
}

/* ------------------------------------------------------------------ training */

static const char *const job_names[] = {"examples", "training_file",    "validation_file",
                                        "version",  "expected_version", "idempotency_key",
                                        "wait",     "stream",           NULL};
static const char *const forward_names[] = {"examples", "forward_only", NULL};
static const char *const optim_names[] = {NULL};
static const char *const publish_names[] = {"job", "expected_version", NULL};

static const char *const *const names_by_kind[] = {
    [TRAIN_BODY_JOB] = job_names,
    [TRAIN_BODY_FORWARD] = forward_names,
    [TRAIN_BODY_OPTIM] = optim_names,
    [TRAIN_BODY_PUBLISH] = publish_names,
};

static void take_examples(struct parse *p, char *text, size_t size, struct train_body *b)
{
    enum status st = scan_take_lines(text, size, "examples", &b->examples);
    if (st == ST_NOMEM) parse_fail(p, st, "examples", "out of memory");
    b->has_examples = !st;
}

/* From where the examples come: exactly one of two. */
static void check_source(struct parse *p, enum train_body_kind kind, const struct train_body *b)
{
    const cJSON *v = json_get(p->body, "examples");
    if (p->failed) return;
    if (v && !b->has_examples)
        parse_fail(p, ST_INVALID, "examples", "'examples' must be an array");
    else if (b->has_examples && !b->examples.size)
        parse_fail(p, ST_INVALID, "examples", "'examples' is empty");
    else if (kind == TRAIN_BODY_JOB && b->has_examples == (b->training_file != NULL))
        parse_fail(p, ST_INVALID, "examples", "send either 'examples' or 'training_file'");
    else if (kind == TRAIN_BODY_FORWARD && !b->has_examples)
        parse_fail(p, ST_INVALID, "examples", "'examples' is needed");
}

bool train_body_parse(enum train_body_kind kind, char *text, size_t size,
                      bool (*is_setting)(const char *name), struct train_body *out, struct api_error *err)
{
    struct train_body b = {0};
    struct parse p = {.err = err};
    bool takes_examples = kind == TRAIN_BODY_JOB || kind == TRAIN_BODY_FORWARD;
    if (takes_examples) take_examples(&p, text, size, &b);
    if (p.failed || !parse_body(text, size, &b.body, err)) goto failed;
    p.body = b.body;
    parse_known(&p, names_by_kind[kind], is_setting);
    parse_short(&p, "training_file", &b.training_file);
    parse_short(&p, "validation_file", &b.validation_file);
    parse_short(&p, "version", &b.version);
    parse_string(&p, "expected_version", &b.expected_version);
    parse_short(&p, "idempotency_key", &b.idempotency_key);
    parse_short(&p, "job", &b.job);
    parse_bool(&p, "wait", &b.wait);
    parse_bool(&p, "stream", &b.stream);
    parse_bool(&p, "forward_only", &b.forward_only);
    if (takes_examples) check_source(&p, kind, &b);
    if (b.wait && b.stream) parse_fail(&p, ST_INVALID, "stream", "send either 'wait' or 'stream'");
    if (p.failed) goto failed;
    *out = b;
    return true;
failed:
    train_body_release(&b);
    return false;
}

void train_body_release(struct train_body *b)
{
    cJSON_Delete(b->body);
    strbuf_release(&b->examples);
    *b = (struct train_body){0};
}

/* ------------------------------------------------------------------ fine-tuning jobs */

#define BATCH_SIZE_MAX    256 /* OpenAI's */
#define METADATA_MAX      16
#define METADATA_KEY_MAX  64
#define METADATA_TEXT_MAX 512
#define SUFFIX_MAX        64

struct fine_tuning {
    struct parse *p;
    const struct fine_tuning_limits *limits;
    cJSON *settings;
};

/* The last word on a setting. Takes value, which may be NULL: out of memory. */
static void settle(struct fine_tuning *f, const char *name, cJSON *value)
{
    cJSON_DeleteItemFromObjectCaseSensitive(f->settings, name);
    if (value && cJSON_AddItemToObject(f->settings, name, value)) return;
    cJSON_Delete(value);
    parse_fail(f->p, ST_NOMEM, name, "out of memory");
}

/* A number, or "auto" or null, which leave the default: 0. */
static double number_of(struct fine_tuning *f, const cJSON *v, double min, double max)
{
    if (cJSON_IsNull(v) || (cJSON_IsString(v) && !strcmp(v->valuestring, "auto"))) return 0;
    if (cJSON_IsNumber(v) && v->valuedouble >= min && v->valuedouble <= max) return v->valuedouble;
    parse_fail(f->p, ST_INVALID, v->string, "'%.64s' must be \"auto\" or a number from %g to %g", v->string,
               min, max);
    return 0;
}

static void take_hyperparameter(struct fine_tuning *f, const cJSON *v)
{
    const struct fine_tuning_limits *l = f->limits;
    double number;
    if (!strcmp(v->string, "n_epochs")) {
        if ((number = number_of(f, v, 1, 1000)) > 0) settle(f, "epochs", cJSON_CreateNumber(number));
    } else if (!strcmp(v->string, "batch_size")) {
        if ((number = number_of(f, v, 1, BATCH_SIZE_MAX)) > 0)
            settle(f, "batch_tokens", cJSON_CreateNumber(floor(number * l->tokens_per_example)));
    } else if (!strcmp(v->string, "learning_rate_multiplier")) {
        if ((number = number_of(f, v, 1e-6, 1e6)) > 0)
            settle(f, "learning_rate", cJSON_CreateNumber(number * l->learning_rate));
    } else if (!strcmp(v->string, "beta")) {
        if ((number = number_of(f, v, 1e-6, 1e6)) > 0) settle(f, "dpo_beta", cJSON_CreateNumber(number));
    } else if (l->is_setting(v->string)) {
        settle(f, v->string, cJSON_Duplicate(v, true));
    } else {
        parse_fail(
            f->p, ST_INVALID, v->string,
            "there is no hyperparameter '%.64s'; there are n_epochs, batch_size, learning_rate_multiplier, "
            "beta, and the trainer's settings",
            v->string);
    }
}

static void take_hyperparameters(struct fine_tuning *f, const cJSON *object)
{
    if (object && !cJSON_IsObject(object))
        parse_fail(f->p, ST_INVALID, "hyperparameters", "'hyperparameters' must be an object");
    for (const cJSON *v = object ? object->child : NULL; v && !f->p->failed; v = v->next)
        take_hyperparameter(f, v);
}

/* {"type": "dpo", "dpo": {"hyperparameters": {..}}} */
static void take_method(struct fine_tuning *f, const cJSON *method)
{
    const char *type = NULL;
    struct error e = {0};
    if (!method || f->p->failed) return;
    if (!cJSON_IsObject(method) || json_get_string(method, "type", &type, &e) ||
        (strcmp(type, "supervised") && strcmp(type, "dpo"))) {
        parse_fail(f->p, type ? ST_UNSUPPORTED : ST_INVALID, "method",
                   "'method' must be an object whose 'type' is supervised or dpo");
        return;
    }
    for (const cJSON *v = method->child; v; v = v->next)
        if (strcmp(v->string, "type") && strcmp(v->string, type) && !cJSON_IsNull(v))
            parse_fail(f->p, ST_INVALID, "method", "'method': there is no '%.64s' in the method %s",
                       v->string, type);
    settle(f, "loss", cJSON_CreateString(strcmp(type, "dpo") ? "cross_entropy" : "dpo"));
    take_hyperparameters(f, json_get(json_get(method, type), "hyperparameters"));
}

static void check_metadata(struct parse *p)
{
    const cJSON *v = json_get(p->body, "metadata");
    if (!v || p->failed) return;
    bool ok = cJSON_IsObject(v) && cJSON_GetArraySize(v) <= METADATA_MAX;
    for (const cJSON *m = ok ? v->child : NULL; m && ok; m = m->next)
        ok = strlen(m->string) <= METADATA_KEY_MAX && cJSON_IsString(m) &&
             strlen(m->valuestring) <= METADATA_TEXT_MAX;
    if (!ok)
        parse_fail(
            p, ST_INVALID, "metadata",
            "'metadata' must be an object of at most %d strings of up to %d bytes under names of up to %d",
            METADATA_MAX, METADATA_TEXT_MAX, METADATA_KEY_MAX);
}

static void check_integrations(struct parse *p)
{
    const cJSON *v = json_get(p->body, "integrations");
    if (v && (!cJSON_IsArray(v) || cJSON_GetArraySize(v)))
        parse_fail(p, ST_UNSUPPORTED, "integrations", "'integrations' are not supported");
}

/* The members that the job's object shows again as they were written. */
static void keep(struct parse *p, struct strbuf *out)
{
    static const char *const names[] = {"hyperparameters", "method", "metadata"};
    strbuf_putc(out, '{');
    for (size_t i = 0; i < sizeof names / sizeof *names && !p->failed; i++) {
        const cJSON *v = json_get(p->body, names[i]);
        char *text = v ? cJSON_PrintUnformatted(v) : NULL;
        if (v && !text) parse_fail(p, ST_NOMEM, NULL, "out of memory");
        strbuf_printf(out, "%s\"%s\": %s", i ? ", " : "", names[i], text ? text : "null");
        cJSON_free(text);
    }
    strbuf_putc(out, '}');
    if (out->failed) parse_fail(p, ST_NOMEM, NULL, "out of memory");
}

bool fine_tuning_parse(const char *text, size_t size, const struct fine_tuning_limits *limits,
                       struct fine_tuning_request *out, struct api_error *err)
{
    static const char *const names[] = {
        "model",           "training_file", "validation_file", "suffix",       "seed",
        "hyperparameters", "method",        "metadata",        "integrations", NULL};
    struct fine_tuning_request r = {0};
    struct parse p = {.err = err};
    if (!parse_body(text, size, &r.body, err)) return false;
    p.body = r.body;
    r.settings = cJSON_CreateObject();
    if (!r.settings) parse_fail(&p, ST_NOMEM, NULL, "out of memory");
    parse_known(&p, names, limits->is_setting);
    parse_needed(&p, "model", &r.model);
    parse_needed(&p, "training_file", &r.training_file);
    parse_short(&p, "validation_file", &r.validation_file);
    parse_short(&p, "suffix", &r.suffix);
    if (r.suffix && strlen(r.suffix) > SUFFIX_MAX)
        parse_fail(&p, ST_INVALID, "suffix", "'suffix' must have at most %d bytes", SUFFIX_MAX);
    check_metadata(&p);
    check_integrations(&p);
    struct fine_tuning f = {&p, limits, r.settings};
    for (const cJSON *v = p.body->child; v && !p.failed; v = v->next)
        if (limits->is_setting(v->string)) settle(&f, v->string, cJSON_Duplicate(v, true));
    if (!p.failed) take_hyperparameters(&f, json_get(p.body, "hyperparameters"));
    take_method(&f, json_get(p.body, "method"));
    keep(&p, &r.kept);
    if (p.failed) {
        fine_tuning_release(&r);
        return false;
    }
    *out = r;
    return true;
}

void fine_tuning_release(struct fine_tuning_request *r)
{
    cJSON_Delete(r->body);
    cJSON_Delete(r->settings);
    strbuf_release(&r->kept);
    *r = (struct fine_tuning_request){0};
}

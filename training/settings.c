#include "training/settings.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define AT(member) offsetof(struct train_settings, member)
#define LARGE      1e9

const struct train_setting train_setting_table[] = {
    {"steps", "steps of the optimiser; 0: as many as the epochs take", SETTING_INT, AT(steps), 0, 1e7, 0},
    {"epochs", "passes over the examples, where no steps are given", SETTING_REAL, AT(epochs), 1e-6, 1000,
     1},
    {"batch_tokens", "tokens of a step at most, whole examples", SETTING_INT, AT(batch_tokens), 2, 1 << 20,
     2048},
    {"learning_rate", "of AdamW, after the warm-up", SETTING_REAL, AT(learning_rate), 0, 10, 1e-3},
    {"schedule", "of the learning rate after the warm-up", SETTING_CHOICE, AT(schedule), 0, 0,
     SCHEDULE_CONSTANT, "constant|cosine|linear"},
    {"warmup_steps", "steps in which the learning rate grows from 0", SETTING_INT, AT(warmup_steps), 0, 1e7,
     0},
    {"balance", "coefficient of the loss that shares work among experts", SETTING_REAL, AT(balance), 0, 1000,
     1e-3},
    {"contrast", "coefficient of the loss that tells experts apart", SETTING_REAL, AT(contrast), 0, 1000,
     1e-2},
    {"contrast_temperature", "of that loss", SETTING_REAL, AT(contrast_temperature), 1e-3, 100, 0.1},
    {"contrast_pairs", "outputs it compares, a site and step", SETTING_INT, AT(contrast_pairs), 2, 1024, 256},
    {"weight_decay", "of AdamW", SETTING_REAL, AT(weight_decay), 0, 10, 0},
    {"beta1", "of AdamW", SETTING_REAL, AT(beta1), 0, 0.9999999, 0.9},
    {"beta2", "of AdamW", SETTING_REAL, AT(beta2), 0, 0.9999999, 0.95},
    {"eps", "of AdamW", SETTING_REAL, AT(eps), 1e-12, 1, 1e-8},
    {"clip", "largest norm of a step's gradient; 0: any", SETTING_REAL, AT(clip), 0, LARGE, 1},
    {"seed", "of the order of examples and all other chance", SETTING_SEED, AT(seed), 0, 0, 0},
    {"held_out", "share of the examples, 1000 at most, that is not trained on but judges the result",
     SETTING_REAL, AT(held_out), 0, 0.9, 0.1},
    {"publish", "when the result becomes the adapter's next version", SETTING_CHOICE, AT(publish), 0, 0,
     PUBLISH_ON_SUCCESS, "on_success|manual|on_improvement"},
    {"loss", "what is made small", SETTING_CHOICE, AT(loss), 0, 0, LOSS_CROSS_ENTROPY,
     "cross_entropy|dpo|importance_sampling|ppo"},
    {"dpo_beta", "how strongly DPO holds to the model it began with", SETTING_REAL, AT(dpo_beta), 1e-4, 100,
     0.1},
    {"clip_low", "how far PPO's ratio may fall below 1", SETTING_REAL, AT(clip_low), 0, 1, 0.2},
    {"clip_high", "how far PPO's ratio may rise above 1", SETTING_REAL, AT(clip_high), 0, 1000, 0.2},
    {"reduction", "of a step-wise loss over its weights", SETTING_CHOICE, AT(reduction), 0, 0, REDUCTION_MEAN,
     "mean|sum"},
    {"evaluate_steps", "held-out examples are looked at after so many steps; 0: at the start and the end",
     SETTING_INT, AT(evaluate_steps), 0, 1e7, 0},
    {"checkpoint_steps", "a checkpoint after so many steps; 0: by time alone", SETTING_INT,
     AT(checkpoint_steps), 0, 1e7, 0},
    {"checkpoint_seconds", "a checkpoint after so much time; 0: by steps alone", SETTING_REAL,
     AT(checkpoint_seconds), 0, LARGE, 60},
};
const size_t train_setting_count = sizeof train_setting_table / sizeof *train_setting_table;

static void *place(struct train_settings *s, const struct train_setting *t) { return (char *)s + t->offset; }

static void set_number(struct train_settings *s, const struct train_setting *t, double v)
{
    switch (t->kind) {
    case SETTING_INT: *(int64_t *)place(s, t) = (int64_t)v; break;
    case SETTING_SEED: *(uint64_t *)place(s, t) = (uint64_t)v; break;
    case SETTING_REAL: *(double *)place(s, t) = v; break;
    case SETTING_CHOICE: *(int *)place(s, t) = (int)v; break;
    }
}

void train_settings_default(struct train_settings *out)
{
    *out = (struct train_settings){0};
    for (size_t i = 0; i < train_setting_count; i++)
        set_number(out, &train_setting_table[i], train_setting_table[i].otherwise);
}

const struct train_setting *train_setting_find(const char *name)
{
    for (size_t i = 0; i < train_setting_count; i++)
        if (strcmp(train_setting_table[i].name, name) == 0) return &train_setting_table[i];
    return NULL;
}

/* --- choices --- */

/* The start of choice i, and its length; NULL beyond the last. */
static const char *choice_at(const struct train_setting *t, int i, size_t *size)
{
    const char *c = t->choices;
    for (; i > 0 && c; i--) {
        c = strchr(c, '|');
        if (c) c++;
    }
    if (c) *size = strcspn(c, "|");
    return c;
}

void train_choice_write(const struct train_setting *t, int value, struct strbuf *out)
{
    size_t size = 0;
    const char *c = choice_at(t, value, &size);
    if (c) strbuf_append(out, c, size);
}

static enum status set_choice(struct train_settings *s, const struct train_setting *t, const char *text,
                              struct error *err)
{
    size_t size;
    const char *c;
    for (int i = 0; (c = choice_at(t, i, &size)); i++) {
        if (strlen(text) != size || memcmp(c, text, size) != 0) continue;
        set_number(s, t, i);
        return ST_OK;
    }
    return error_set(err, ST_INVALID, "%s: '%.64s' is none of %s", t->name, text, t->choices);
}

/* --- numbers --- */

static enum status check_range(const struct train_setting *t, double v, struct error *err)
{
    if (v >= t->min && v <= t->max && (t->kind != SETTING_INT || v == floor(v))) return ST_OK;
    return error_set(err, ST_INVALID, "%s: must be %s from %g to %g", t->name,
                     t->kind == SETTING_INT ? "a whole number" : "a number", t->min, t->max);
}

static enum status read_one(const cJSON *object, struct train_settings *s, const struct train_setting *t,
                            struct error *err)
{
    int64_t seed;
    const char *text;
    enum status st = ST_OK;
    const cJSON *v = json_get(object, t->name);
    if (!v) return ST_OK;
    if (t->kind == SETTING_SEED) {
        st = json_get_i64(object, t->name, 0, TRAIN_SEED_MAX, &seed, err);
        if (!st) *(uint64_t *)place(s, t) = (uint64_t)seed;
        return st;
    }
    if (t->kind == SETTING_CHOICE) {
        st = json_get_string(object, t->name, &text, err);
        return st ? st : set_choice(s, t, text, err);
    }
    st = cJSON_IsNumber(v) ? check_range(t, v->valuedouble, err) : check_range(t, NAN, err);
    if (!st) set_number(s, t, v->valuedouble);
    return st;
}

enum status train_settings_read(const cJSON *object, struct train_settings *s, struct error *err)
{
    struct train_settings read = *s;
    enum status st = ST_OK;
    for (size_t i = 0; object && !st && i < train_setting_count; i++)
        st = read_one(object, &read, &train_setting_table[i], err);
    if (!st) *s = read;
    return st;
}

enum status train_settings_set(struct train_settings *s, const char *name, const char *text,
                               struct error *err)
{
    const struct train_setting *t = train_setting_find(name);
    if (!t) return error_set(err, ST_INVALID, "there is no setting '%.64s'", name);
    if (t->kind == SETTING_CHOICE) return set_choice(s, t, text, err);
    char *end;
    if (t->kind == SETTING_SEED) {
        uint64_t seed = strtoull(text, &end, 10);
        if (*text < '0' || *text > '9' || *end || seed > (uint64_t)TRAIN_SEED_MAX)
            return error_set(err, ST_INVALID, "%s: must be a whole number from 0 to 2^53", name);
        *(uint64_t *)place(s, t) = seed;
        return ST_OK;
    }
    double v = strtod(text, &end);
    enum status st = check_range(t, *text && !*end ? v : NAN, err);
    if (!st) set_number(s, t, v);
    return st;
}

/* --- writing --- */

void train_setting_write(const struct train_settings *s, const struct train_setting *t, struct strbuf *out)
{
    const void *at = (const char *)s + t->offset;
    strbuf_printf(out, "\"%s\":", t->name);
    switch (t->kind) {
    case SETTING_INT: strbuf_printf(out, "%lld", (long long)*(const int64_t *)at); break;
    case SETTING_SEED: strbuf_printf(out, "%llu", (unsigned long long)*(const uint64_t *)at); break;
    case SETTING_REAL: json_write_f64(out, *(const double *)at); break;
    case SETTING_CHOICE:
        strbuf_putc(out, '"');
        train_choice_write(t, *(const int *)at, out);
        strbuf_putc(out, '"');
        break;
    }
}

void train_settings_write(const struct train_settings *s, struct strbuf *out)
{
    strbuf_putc(out, '{');
    for (size_t i = 0; i < train_setting_count; i++) {
        if (i) strbuf_putc(out, ',');
        train_setting_write(s, &train_setting_table[i], out);
    }
    strbuf_putc(out, '}');
}

/* --- the schedule --- */

#define PI 3.14159265358979323846

double train_rate(const struct train_settings *s, int64_t step, int64_t steps)
{
    if (step <= s->warmup_steps) return s->learning_rate * (double)step / (double)s->warmup_steps;
    if (s->schedule == SCHEDULE_CONSTANT) return s->learning_rate;
    /* 1 at the warm-up's end, 0 one step after the last, so that the last step still moves. */
    double left = (double)(steps + 1 - step) / (double)(steps + 1 - s->warmup_steps);
    if (left < 0) left = 0;
    return s->learning_rate * (s->schedule == SCHEDULE_LINEAR ? left : 0.5 * (1 - cos(PI * left)));
}

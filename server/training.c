#include "server/training.h"

#include <stdlib.h>
#include <string.h>

bool training_ready(struct exchange *x)
{
    struct service *s = service_of(x);
    struct api_error err;
    if (s->training) return true;
    api_error_set(&err, 400, "unsupported", NULL, "this server does not train: %s", s->no_training);
    exchange_reply_error(x, &err);
    return false;
}

void training_failed(struct api_error *err, enum status st, const struct error *cause, const char *missing)
{
    api_error_from(err, st, cause, st == ST_NOT_FOUND ? missing : NULL);
    if (st != ST_NOT_FOUND) return;
    if (!strcmp(missing, "name") || !strcmp(missing, "model")) err->code = "model_not_found";
}

/* ------------------------------------------------------------------ look-ups and lists */

struct training_lookup *training_lookup_of(struct call *c) { return (struct training_lookup *)c; }

static void lookup(struct exchange *x, int limit, int limit_max, void (*work)(struct call *))
{
    const char *after = exchange_query(x, "after"), *wanted = exchange_query(x, "limit");
    struct api_error err = {0};
    char *end = NULL;
    struct training_lookup *l = calloc(1, sizeof *l);
    if (!l) {
        api_error_from(&err, ST_NOMEM, NULL, NULL);
    } else if (limit_max) {
        l->limit = wanted ? (int)strtol(wanted, &end, 10) : limit;
        if (wanted && (!*wanted || *end || l->limit < 1 || l->limit > limit_max || strlen(wanted) > 9))
            api_error_set(&err, 400, "invalid_value", "limit", "'limit' must be a number from 1 to %d",
                          limit_max);
        if (after && strlen(after) >= sizeof l->after)
            api_error_set(&err, 400, "invalid_value", "after", "'after' is too long");
    }
    if (err.http) {
        free(l);
        exchange_reply_error(x, &err);
        return;
    }
    snprintf(l->id, sizeof l->id, "%s", exchange_param(x));
    if (limit_max) snprintf(l->after, sizeof l->after, "%s", after ? after : "");
    l->call.work = work;
    call_start(x, &l->call);
}

void training_lookup_start(struct exchange *x, void (*work)(struct call *))
{
    if (training_ready(x)) lookup(x, 0, 0, work);
}

void training_lookup_page(struct exchange *x, int limit, int limit_max, void (*work)(struct call *))
{
    if (training_ready(x)) lookup(x, limit, limit_max, work);
}

static void put_id(struct strbuf *out, const char *key, const char *id)
{
    if (id)
        strbuf_printf(out, ", \"%s\": \"%s\"", key, id);
    else
        strbuf_printf(out, ", \"%s\": null", key);
}

void page_end(struct strbuf *out, const char *first_id, const char *last_id, bool more)
{
    strbuf_putc(out, ']');
    put_id(out, "first_id", first_id);
    put_id(out, "last_id", last_id);
    strbuf_printf(out, ", \"has_more\": %s}", more ? "true" : "false");
}

/* ------------------------------------------------------------------ settings and submission */

bool training_is_setting(const char *name) { return train_setting_find(name) != NULL; }

/* A message about a setting begins with its name: programs read it from `param`. */
static void blame_setting(struct api_error *err)
{
    char name[sizeof err->param];
    size_t n = strcspn(err->message, ":");
    if (n >= sizeof name) return;
    memcpy(name, err->message, n);
    name[n] = 0;
    if (training_is_setting(name)) strcpy(err->param, name);
}

bool training_settings(const cJSON *object, struct train_settings *out, struct api_error *err)
{
    struct error cause = {0};
    train_settings_default(out);
    enum status st = train_settings_read(object, out, &cause);
    if (!st) return true;
    api_error_from(err, st, &cause, NULL);
    blame_setting(err);
    return false;
}

static bool file_there(struct service *s, const char *id, const char *param, struct api_error *err)
{
    struct train_file file;
    struct error cause = {0};
    enum status st = id ? jobs_file_get(s->training, TENANT, id, &file, &cause) : ST_OK;
    if (st) training_failed(err, st, &cause, param);
    return !st;
}

bool training_submit(struct service *s, const struct train_request *r, char id_out[TRAIN_ID_MAX],
                     bool *existing, struct api_error *err)
{
    struct error cause = {0};
    if (!file_there(s, r->file_id, "training_file", err) ||
        !file_there(s, r->validation_file_id, "validation_file", err))
        return false;
    enum status st = jobs_submit(s->training, TENANT, r, id_out, existing, &cause);
    if (!st) return true;
    training_failed(err, st, &cause, "name");
    if (st == ST_INVALID) blame_setting(err);
    if (st == ST_INVALID && !err->param[0] && r->examples) strcpy(err->param, "examples");
    return false;
}

void training_write_job(struct service *s, const char *id, struct strbuf *out, struct api_error *err)
{
    struct train_job job;
    struct train_routing routing;
    struct error cause = {0};
    enum status st = jobs_get(s->training, TENANT, id, &job, &cause);
    if (st) {
        training_failed(err, st, &cause, "id");
        return;
    }
    bool routed = !jobs_routing(s->training, TENANT, id, &routing, NULL);
    train_job_write(out, &job, routed ? &routing : NULL);
    if (routed) train_routing_release(&routing);
    train_job_release(&job);
}

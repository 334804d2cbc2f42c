/* `medley train --server`: the examples go to a running server, which trains one of its adapters. */
#include "server/client.h"
#include "server/commands.h"
#include "server/train_local.h"
#include "server/train_show.h"

#include "base/strbuf.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

struct remote {
    const struct config *config;
    struct train_show show;
    char job[80];
    bool ended;
    struct error error; /* what the stream said, or how the job ended */
};

static const char *text_of(const cJSON *object, const char *key)
{
    const char *text = "";
    (void)json_get_string(object, key, &text, NULL);
    return text;
}

static double number_of(const cJSON *object, const char *key, double otherwise)
{
    (void)json_get_f64(object, key, -1e300, 1e300, &otherwise, NULL);
    return otherwise;
}

/* --- the stream --- */

static void show_end(struct remote *r, const cJSON *job)
{
    const char *status = text_of(job, "status"), *version = text_of(job, "version_after");
    const cJSON *error = json_get(job, "error");
    double before = number_of(job, "loss_before", NAN), after = number_of(job, "loss_after", NAN);
    r->ended = true;
    if (!isnan(before) && !isnan(after))
        fprintf(stderr, "held-out loss: %.4f before, %.4f after\n", before, after);
    if (strcmp(status, "succeeded") != 0)
        error_set(&r->error, ST_REJECTED, "the job %s %s: %s", r->job, status,
                  cJSON_IsObject(error) ? text_of(error, "message") : "no reason is given");
    else if (*version)
        printf("%s@%s\n", r->config->train.adapter, version);
}

static void on_event(struct remote *r, const cJSON *e)
{
    const char *type = text_of(e, "type");
    const cJSON *job = json_get(e, "job"), *error = json_get(e, "error");
    if (strcmp(type, "step") == 0)
        train_show_json(&r->show, e);
    else if (strcmp(type, "job") == 0)
        snprintf(r->job, sizeof r->job, "%s", text_of(job, "id"));
    else if (strcmp(type, "done") == 0)
        show_end(r, job);
    else if (cJSON_IsObject(error))
        error_set(&r->error, ST_IO, "the server ends the stream: %s", text_of(error, "message"));
}

/* A line of server-sent events; false ends the call. */
static bool on_line(void *ctx, const char *line, size_t size)
{
    cJSON *e = NULL;
    if (atomic_load(train_interrupted())) return false;
    if (size < 6 || strncmp(line, "data: ", 6) != 0 || line[6] != '{') return true;
    if (json_parse(line + 6, size - 6, &e, NULL) == ST_OK && cJSON_IsObject(e)) on_event(ctx, e);
    cJSON_Delete(e);
    return true;
}

/* --- the calls --- */

static struct client_call call_of(const struct config *c)
{
    return (struct client_call){.server = c->train.server, .api_key = c->api_key, .method = "POST"};
}

static void write_targets(const char *list, struct strbuf *out)
{
    strbuf_puts(out, ",\"target_modules\":[");
    for (size_t n; *list; list += n + (list[n] == ',')) {
        n = strcspn(list, ",");
        json_write_string(out, list, n);
        if (list[n]) strbuf_putc(out, ',');
    }
    strbuf_putc(out, ']');
}

static enum status create(const struct config *c, struct error *err)
{
    struct client_call call = call_of(c);
    struct strbuf body = {0};
    cJSON *answer = NULL;
    int http;
    strbuf_puts(&body, "{\"name\":");
    json_write_string(&body, c->train.adapter, strlen(c->train.adapter));
    strbuf_printf(&body, ",\"r\":%d,\"num_experts\":%d", c->train.rank, c->train.experts);
    if (c->train.experts > 1) strbuf_printf(&body, ",\"top_k\":%d", c->train.top_k);
    if (c->train.alpha > 0) strbuf_printf(&body, ",\"lora_alpha\":%g", c->train.alpha);
    if (c->train.rule) strbuf_printf(&body, ",\"gate\":\"%s\"", c->train.rule);
    if (c->train.rslora) strbuf_puts(&body, ",\"use_rslora\":true");
    if (c->train.targets) write_targets(c->train.targets, &body);
    strbuf_putc(&body, '}');
    call.json = body.data;
    enum status st =
        body.failed ? error_set(err, ST_NOMEM, "out of memory") : client_call(&call, &http, &answer, err);
    cJSON_Delete(answer);
    strbuf_release(&body);
    return st;
}

/* Sends a file of examples; its id in out. */
static enum status send_file(const struct config *c, const char *path, char out[80], struct error *err)
{
    struct client_call call = call_of(c);
    cJSON *answer = NULL;
    int http;
    call.path = "/v1/files";
    call.examples = path;
    enum status st = client_call(&call, &http, &answer, err);
    if (st) return st;
    snprintf(out, 80, "%s", text_of(answer, "id"));
    cJSON_Delete(answer);
    return ST_OK;
}

static enum status write_request(const struct config *c, struct strbuf *body, struct error *err)
{
    struct train_settings settings;
    char id[80];
    enum status st = send_file(c, c->train.examples, id, err);
    if (st) return st;
    strbuf_puts(body, "{\"stream\":true,\"training_file\":");
    json_write_string(body, id, strlen(id));
    if (c->train.held_out) {
        st = send_file(c, c->train.held_out, id, err);
        if (st) return st;
        strbuf_puts(body, ",\"validation_file\":");
        json_write_string(body, id, strlen(id));
    }
    st = train_settings_given(c, &settings, body, err);
    strbuf_putc(body, '}');
    return st ? st : body->failed ? error_set(err, ST_NOMEM, "out of memory") : ST_OK;
}

static enum status follow(struct remote *r, const char *body, struct error *err)
{
    struct client_call call = call_of(r->config);
    cJSON *answer = NULL;
    int http;
    call.name = r->config->train.adapter;
    call.action = "train";
    call.json = body;
    call.on_line = on_line;
    call.ctx = r;
    enum status st = client_call(&call, &http, &answer, err);
    cJSON_Delete(answer);
    if (atomic_load(train_interrupted()) && r->job[0])
        return error_set(
            err, ST_CANCELLED,
            "the job %s goes on in the server; POST /v1/fine_tuning/jobs/%s/cancel there ends it", r->job,
            r->job);
    if (st) return st;
    if (r->error.message[0]) return error_set(err, r->error.status, "%s", r->error.message);
    return r->ended
               ? ST_OK
               : error_set(err, ST_IO, "the server went away; the job %s goes on when it is back", r->job);
}

static enum status check_arguments(const struct config *c, struct error *err)
{
    struct train_settings settings;
    if (!c->train.adapter)
        return error_set(err, ST_INVALID, "--adapter NAME is required: the server's name of the adapter");
    if (!c->train.examples)
        return error_set(err, ST_INVALID, "--data FILE is required: examples, a JSON object a line");
    if (c->train.out || c->train.log || c->train.checkpoint || c->train.resume)
        return error_set(
            err, ST_INVALID,
            "--out, --log, --checkpoint and --resume are not for --server, which keeps all of it");
    return train_settings_given(c, &settings, NULL, err);
}

int train_remote_run(const struct config *c)
{
    struct remote r = {.config = c};
    struct strbuf body = {0};
    struct error err = {0};
    train_interrupt_watch();
    enum status st = check_arguments(c, &err);
    if (!st && c->train.create) st = create(c, &err);
    if (!st) st = write_request(c, &body, &err);
    if (!st) st = follow(&r, body.data, &err);
    strbuf_release(&body);
    return st ? command_failed(&err) : 0;
}

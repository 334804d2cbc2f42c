/* PUT /v1/adapters/{name}: a body streamed into an upload's folder, then published.
 *
 * Bytes are gathered in memory up to FLUSH_BYTES; then the connection is paused while a worker writes them,
 * so the loop never waits for a disk. Every path ends in a task that closes the upload. */
#include "adapters/registry.h"
#include "base/file.h"
#include "server/adapters.h"
#include "server/handlers.h"
#include "server/service.h"

#include <errno.h>
#include <fcntl.h>
#include <microhttpd.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FLUSH_BYTES       ((size_t)1 << 20)
#define FORM_BUFFER_BYTES ((size_t)64 << 10)

/* A file of the upload's folder. */
struct sink {
    const char *name;
    int fd; /* -1 before its first byte is written */
    struct strbuf pending;
    bool used; /* the body has this file */
};
enum { SINK_CONFIG, SINK_TENSORS, SINK_BODY, SINK_COUNT };

struct put {
    struct task task;
    struct service *service;
    struct exchange *x; /* NULL once answered or gone */
    char name[ADAPTER_NAME_MAX + 1];
    struct upload *upload;
    struct sink sinks[SINK_COUNT];
    struct MHD_PostProcessor *form; /* of multipart/form-data; NULL: the body goes to SINK_BODY as it is */
    struct condition condition;     /* version "": the name must be new */
    size_t field_size;              /* of it, while the form's field comes in */
    size_t seen;
    bool working, closing;
    struct api_error error; /* http != 0: failed */
    struct put_result result;
    struct strbuf answer;
};

/* ------------------------------------------------------------------ on a worker */

static void put_fail(struct put *p, enum status st, const struct error *cause)
{
    if (!p->error.http) adapter_put_failed(&p->error, st, cause);
}

static void put_fail_errno(struct put *p, const char *name)
{
    struct error cause;
    enum status st = errno == ENOSPC || errno == EDQUOT ? ST_NO_SPACE : ST_IO;
    put_fail(p, error_set(&cause, st, "cannot write '%s': %s", name, strerror(errno)), &cause);
}

static void sink_write(struct put *p, struct sink *s)
{
    if (!s->used || p->error.http) return;
    if (s->fd < 0) {
        char *path = NULL;
        if (asprintf(&path, "%s/%s", upload_path(p->upload), s->name) < 0) {
            put_fail(p, ST_NOMEM, NULL);
            return;
        }
        s->fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        free(path);
        if (s->fd < 0) put_fail_errno(p, s->name);
    }
    if (!p->error.http && !file_write_all(s->fd, s->pending.data, s->pending.size))
        put_fail_errno(p, s->name);
    strbuf_clear(&s->pending);
}

static void write_all(struct put *p)
{
    for (int i = 0; i < SINK_COUNT; i++) sink_write(p, &p->sinks[i]);
}

static struct put *put_of(struct task *t) { return (struct put *)((char *)t - offsetof(struct put, task)); }

static void work_open(struct task *t)
{
    struct put *p = put_of(t);
    struct error cause = {0};
    enum status st = upload_open(p->service->registry, &p->upload, &cause);
    if (st) put_fail(p, st, &cause);
}

static void work_flush(struct task *t) { write_all(put_of(t)); }

static void work_close(struct task *t)
{
    struct put *p = put_of(t);
    for (int i = 0; i < SINK_COUNT; i++)
        if (p->sinks[i].fd >= 0) close(p->sinks[i].fd);
    if (p->upload) upload_close(p->upload);
}

static void work_publish(struct task *t)
{
    struct put *p = put_of(t);
    struct registry *r = p->service->registry;
    struct error cause = {0};
    write_all(p);
    if (p->error.http) return;
    enum status st =
        registry_put(r, TENANT, p->name, p->upload, condition_version(&p->condition), &p->result, &cause);
    struct adapter_info info;
    if (!st && !(st = registry_get(r, TENANT, p->name, &info, &cause))) {
        adapter_info_write(&p->answer, &info);
        adapter_info_release(&info);
    }
    if (st) put_fail(p, st, &cause);
}

/* ------------------------------------------------------------------ on the loop */

static void closed(struct task *t)
{
    struct put *p = put_of(t);
    for (int i = 0; i < SINK_COUNT; i++) strbuf_release(&p->sinks[i].pending);
    strbuf_release(&p->answer);
    free(p);
}

/* The put is over: the exchange, if there is one left, was answered. */
static void put_close(struct put *p)
{
    if (p->closing) return;
    p->closing = true;
    p->x = NULL;
    if (p->form) MHD_destroy_post_processor(p->form);
    p->form = NULL;
    task_start(p->service, &p->task, work_close, closed);
}

static void reply_failure(struct put *p)
{
    struct exchange *x = p->x;
    if (x) exchange_reply_error(x, &p->error);
    put_close(p);
}

static void on_close(void *ctx)
{
    struct put *p = ctx;
    p->x = NULL;
    if (!p->working) put_close(p);
}

/* After opening and after each flush. */
static void ready_for_more(struct task *t)
{
    struct put *p = put_of(t);
    p->working = false;
    if (!p->x || p->error.http)
        reply_failure(p);
    else
        exchange_resume(p->x);
}

static void published(struct task *t)
{
    struct put *p = put_of(t);
    char version[ADAPTER_NAME_MAX + ADAPTER_VERSION_HEX + 2];
    p->working = false;
    if (!p->x || p->error.http) {
        reply_failure(p);
        return;
    }
    snprintf(version, sizeof version, "%s@%s", p->name, p->result.version);
    exchange_add_etag(p->x, p->result.version);
    exchange_add_header(p->x, "x-adapter-version", version);
    exchange_reply(p->x, p->result.created ? 201 : 200, "application/json", &p->answer);
    put_close(p);
}

static void work_start(struct put *p, void (*work)(struct task *), void (*done)(struct task *))
{
    p->working = true;
    task_start(p->service, &p->task, work, done);
}

static int sink_of(const char *key, const char *filename)
{
    static const char *const names[] = {"adapter_config.json", "adapter_model.safetensors"};
    for (int i = SINK_CONFIG; i <= SINK_TENSORS; i++)
        if ((filename && !strcmp(filename, names[i])) || (key && !strcmp(key, names[i]))) return i;
    return -1;
}

static void take_field(struct put *p, const char *data, size_t n)
{
    p->condition.given = true;
    if (p->field_size + n >= sizeof p->condition.version) {
        api_error_set(&p->error, 400, "invalid_value", "expected_version", "'expected_version' is too long");
        return;
    }
    memcpy(p->condition.version + p->field_size, data, n);
    p->field_size += n;
}

/* A piece of a form's part. */
static enum MHD_Result on_part(void *cls, enum MHD_ValueKind kind, const char *key, const char *filename,
                               const char *type, const char *encoding, const char *data, uint64_t at,
                               size_t n)
{
    (void)kind;
    (void)type;
    (void)encoding;
    struct put *p = cls;
    int i = sink_of(key, filename);
    if (p->error.http) return MHD_NO;
    if (i >= 0 && at == 0 && p->sinks[i].used && p->sinks[i].pending.size + (p->sinks[i].fd >= 0) > 0) {
        api_error_set(&p->error, 400, "invalid_form", NULL, "the form has '%s' twice", p->sinks[i].name);
    } else if (i >= 0) {
        p->sinks[i].used = true;
        strbuf_append(&p->sinks[i].pending, data, n);
    } else if (key && !strcmp(key, "expected_version")) {
        take_field(p, data, n);
    } else {
        api_error_set(
            &p->error, 400, "invalid_form", NULL,
            "the form has a part '%.64s'; it may have adapter_config.json, adapter_model.safetensors and "
            "expected_version",
            filename ? filename
            : key    ? key
                     : "");
    }
    return p->error.http ? MHD_NO : MHD_YES;
}

static size_t pending_bytes(const struct put *p)
{
    size_t n = 0;
    for (int i = 0; i < SINK_COUNT; i++) n += p->sinks[i].pending.size;
    return n;
}

void adapter_put_data(struct exchange *x, const char *data, size_t n)
{
    struct put *p = exchange_held(x);
    p->seen += n;
    if (p->seen > p->service->config->upload_bytes)
        api_error_set(&p->error, 413, "too_large", NULL,
                      "the upload is larger than %zu bytes, the most this server takes",
                      p->service->config->upload_bytes);
    else if (!p->form)
        strbuf_append(&p->sinks[SINK_BODY].pending, data, n);
    else if (MHD_post_process(p->form, data, n) != MHD_YES && !p->error.http)
        api_error_set(&p->error, 400, "invalid_form", NULL,
                      "the body is not the multipart form its Content-Type promises");
    for (int i = 0; i < SINK_COUNT; i++)
        if (p->sinks[i].pending.failed) put_fail(p, ST_NOMEM, NULL);

    if (p->error.http) {
        reply_failure(p);
    } else if (pending_bytes(p) >= FLUSH_BYTES) {
        exchange_pause(x);
        work_start(p, work_flush, ready_for_more);
    }
}

/* false: the form ended too early, or lacks a file. */
static bool form_complete(struct put *p)
{
    if (!p->form) return true;
    enum MHD_Result whole = MHD_destroy_post_processor(p->form); /* may still hand over the last bytes */
    p->form = NULL;
    if (p->error.http) return false;
    if (whole != MHD_YES)
        api_error_set(&p->error, 400, "invalid_form", NULL, "the multipart form is cut off before its end");
    else if (!p->sinks[SINK_CONFIG].used || !p->sinks[SINK_TENSORS].used)
        api_error_set(&p->error, 400, "invalid_form", NULL, "the form lacks %s",
                      p->sinks[SINK_CONFIG].used ? "adapter_model.safetensors" : "adapter_config.json");
    return !p->error.http;
}

void adapter_put_end(struct exchange *x)
{
    struct put *p = exchange_held(x);
    if (!form_complete(p)) {
        reply_failure(p);
    } else if (!p->seen) {
        api_error_set(&p->error, 400, "empty_body", NULL, "the body is empty: send the adapter's files");
        reply_failure(p);
    } else {
        work_start(p, work_publish, published);
    }
}

/* As condition_take; or If-None-Match: *, the name must be new. */
static bool take_condition(struct exchange *x, struct put *p, struct api_error *err)
{
    const char *none = exchange_header(x, "If-None-Match");
    if (!condition_take(x, &p->condition, err)) return false;
    if (!none) return true;
    if (p->condition.given || strcmp(none, "*") != 0) {
        api_error_set(err, 400, "invalid_value", "expected_version",
                      "expected version: send one of If-Match: \"version\", If-None-Match: * or "
                      "?expected_version=version");
        return false;
    }
    p->condition.given = true;
    return true;
}

/* Which kinds of bodies there are. */
static bool take_type(struct exchange *x, struct put *p, struct api_error *err)
{
    static const char *const raw[] = {"application/x-tar",       "application/gzip",   "application/x-gzip",
                                      "application/zstd",        "application/x-zstd", "application/zip",
                                      "application/octet-stream"};
    const char *type = exchange_header(x, "Content-Type");
    size_t n = type ? strcspn(type, "; \t") : 0;
    if (n == strlen("multipart/form-data") && !strncasecmp(type, "multipart/form-data", n)) {
        p->form = MHD_create_post_processor(exchange_connection(x), FORM_BUFFER_BYTES, on_part, p);
        if (!p->form)
            api_error_set(err, 400, "invalid_form", NULL,
                          "the Content-Type of a multipart form needs a boundary");
        return p->form != NULL;
    }
    for (size_t i = 0; i < sizeof raw / sizeof *raw; i++)
        if (n == strlen(raw[i]) && !strncasecmp(type, raw[i], n)) return p->sinks[SINK_BODY].used = true;
    api_error_set(
        err, 415, "unsupported_media_type", NULL,
        "send multipart/form-data with adapter_config.json and adapter_model.safetensors, or an archive of "
        "them as "
        "application/x-tar, application/gzip, application/zstd, application/zip or application/octet-stream");
    return false;
}

static bool check_put(struct exchange *x, struct put *p, struct api_error *err)
{
    const char *length = exchange_header(x, "Content-Length");
    size_t max = p->service->config->upload_bytes;
    if (!adapter_name_valid(p->name))
        api_error_set(err, 400, "invalid_value", "name",
                      "'%.40s...' is no adapter name: 1 to %d letters, digits, '.', '_' "
                      "and '-', the first a letter or digit",
                      exchange_param(x), ADAPTER_NAME_MAX);
    else if (!strcmp(p->name, p->service->config->model_name))
        api_error_set(err, 400, "invalid_value", "name", "'%s' is the base model's name", p->name);
    else if (length && strtoull(length, NULL, 10) > max)
        api_error_set(err, 413, "too_large", NULL,
                      "the upload is larger than %zu bytes, the most this server takes", max);
    else if (take_condition(x, p, err))
        return take_type(x, p, err);
    return false;
}

void adapter_put_begin(struct exchange *x)
{
    struct api_error err = {0};
    struct put *p = calloc(1, sizeof *p);
    if (!p) {
        api_error_from(&err, ST_NOMEM, NULL, NULL);
        exchange_reply_error(x, &err);
        return;
    }
    static const char *const names[SINK_COUNT] = {"adapter_config.json", "adapter_model.safetensors", "body"};
    for (int i = 0; i < SINK_COUNT; i++) p->sinks[i] = (struct sink){.name = names[i], .fd = -1};
    p->service = service_of(x);
    p->x = x;
    const char *name = exchange_param(x);
    if (strlen(name) <= ADAPTER_NAME_MAX) strcpy(p->name, name);
    if (!check_put(x, p, &err)) {
        free(p);
        exchange_reply_error(x, &err);
        return;
    }
    exchange_hold(x, p, on_close);
    exchange_pause(x);
    work_start(p, work_open, ready_for_more);
}

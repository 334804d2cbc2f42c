/* PUT /v1/adapters/{name}: a body streamed into an upload's folder, then published. */
#include "adapters/registry.h"
#include "server/adapters.h"
#include "server/handlers.h"
#include "server/intake.h"

#include <stdlib.h>
#include <string.h>

struct put {
    struct intake intake;
    char name[ADAPTER_NAME_MAX + 1];
    struct upload *upload;
    struct condition condition; /* version "": the name must be new */
    struct put_result result;
    struct strbuf answer;
};

enum { FIELD_EXPECTED_VERSION };

static struct put *put_of(struct intake *i) { return (struct put *)i; }

/* ------------------------------------------------------------------ on a worker */

static void put_open(struct intake *i)
{
    struct put *p = put_of(i);
    struct error cause = {0};
    enum status st = upload_open(i->service->registry, &p->upload, &cause);
    if (st)
        intake_fail(i, st, &cause);
    else
        i->folder = upload_path(p->upload);
}

static void put_publish(struct intake *i)
{
    struct put *p = put_of(i);
    struct registry *r = i->service->registry;
    struct error cause = {0};
    enum status st =
        registry_put(r, TENANT, p->name, p->upload, condition_version(&p->condition), &p->result, &cause);
    struct adapter_info info;
    if (!st && !(st = registry_get(r, TENANT, p->name, &info, &cause))) {
        adapter_info_write(&p->answer, &info);
        adapter_info_release(&info);
    }
    if (st) adapter_put_failed(&i->error, st, &cause);
}

static void put_close(struct intake *i)
{
    struct put *p = put_of(i);
    if (p->upload) upload_close(p->upload);
}

/* ------------------------------------------------------------------ on the loop */

static void put_release(struct intake *i)
{
    strbuf_release(&put_of(i)->answer);
    free(i);
}

static bool put_complete(struct intake *i)
{
    struct put *p = put_of(i);
    if (!i->seen)
        api_error_set(&i->error, 400, "empty_body", NULL, "the body is empty: send the adapter's files");
    if (i->fields[FIELD_EXPECTED_VERSION].given) p->condition.given = true;
    return !i->error.http;
}

static void put_reply(struct intake *i)
{
    struct put *p = put_of(i);
    char version[ADAPTER_NAME_MAX + ADAPTER_VERSION_HEX + 2];
    snprintf(version, sizeof version, "%s@%s", p->name, p->result.version);
    exchange_add_etag(i->x, p->result.version);
    exchange_add_header(i->x, "x-adapter-version", version);
    exchange_reply(i->x, p->result.created ? 201 : 200, "application/json", &p->answer);
}

static const struct intake_kind put_kind = {put_open,  NULL,      put_complete, put_publish,
                                            put_reply, put_close, put_release};

/* ------------------------------------------------------------------ from the headers */

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
    struct intake *i = &p->intake;
    if (intake_has_type(x, "multipart/form-data")) {
        intake_add_file(i, "adapter_config.json", "adapter_config.json");
        intake_add_file(i, "adapter_model.safetensors", "adapter_model.safetensors");
        intake_add_field(i, "expected_version", p->condition.version, sizeof p->condition.version);
        return intake_begin_form(x, i, err);
    }
    for (size_t r = 0; r < sizeof raw / sizeof *raw; r++)
        if (intake_has_type(x, raw[r])) {
            intake_add_file(i, "body", NULL);
            i->files[0].used = true;
            return true;
        }
    api_error_set(
        err, 415, "unsupported_media_type", NULL,
        "send multipart/form-data with adapter_config.json and adapter_model.safetensors, or an archive of "
        "them as "
        "application/x-tar, application/gzip, application/zstd, application/zip or application/octet-stream");
    return false;
}

static bool check_put(struct exchange *x, struct put *p, struct api_error *err)
{
    return adapter_name_check(service_of(x), exchange_param(x), err) && intake_fits(x, &p->intake, err) &&
           take_condition(x, p, err) && take_type(x, p, err);
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
    p->intake.kind = &put_kind;
    p->intake.service = service_of(x);
    p->intake.bytes_max = p->intake.service->config->upload_bytes;
    const char *name = exchange_param(x);
    if (strlen(name) <= ADAPTER_NAME_MAX) strcpy(p->name, name);
    if (!check_put(x, p, &err)) {
        free(p);
        exchange_reply_error(x, &err);
        return;
    }
    intake_start(x, &p->intake);
}

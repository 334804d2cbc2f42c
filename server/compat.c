/* The adapter calls of llama.cpp (/lora-adapters) and vLLM (/v1/load_lora_adapter, /v1/unload_lora_adapter).
 */
#include "base/file.h"
#include "base/json.h"
#include "server/adapters.h"
#include "server/beneath.h"
#include "server/handlers.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ------------------------------------------------------------------ llama.cpp */

/* scale is what a request without `lora` gets: nothing. */
static void work_numbers(struct call *c)
{
    struct adapter_info *infos;
    size_t count;
    struct error cause = {0};
    enum status st = registry_list(c->service->registry, TENANT, &infos, &count, &cause);
    if (lookup_failed((struct lookup *)c, st, &cause)) return;
    strbuf_putc(&c->body, '[');
    for (size_t i = 0; i < count; i++) {
        strbuf_printf(&c->body, "%s{\"id\": %" PRId64 ", \"path\": \"%s\", \"scale\": 0}", i ? ", " : "",
                      infos[i].number, infos[i].name);
        adapter_info_release(&infos[i]);
    }
    free(infos);
    strbuf_putc(&c->body, ']');
}

void lora_adapters_get(struct exchange *x) { lookup_start(x, work_numbers); }

void lora_adapters_post(struct exchange *x)
{
    struct api_error err;
    api_error_set(&err, 400, "unsupported", NULL,
                  "scales for all requests are not supported, since they would change what others get: send "
                  "'lora': [{\"id\": N, \"scale\": X}] with each request");
    exchange_reply_error(x, &err);
}

/* ------------------------------------------------------------------ vLLM */

/* Copies what the path names, a folder with the two files or one file, into an upload. */
static enum status copy_in(struct service *s, const char *path, struct upload *u, struct error *err)
{
    static const char *const files[] = {"adapter_config.json", "adapter_model.safetensors"};
    const char *root = s->config->adapter_root;
    struct beneath from;
    enum status st = beneath_open(root, path, &from, err);
    if (st) return st;
    if (!from.is_folder) st = beneath_copy(from.fd, upload_path(u), "body", s->config->upload_bytes, err);
    for (size_t i = 0; from.is_folder && i < sizeof files / sizeof *files && !st; i++) {
        int fd = -1;
        st = beneath_open_file(from.fd, files[i], &fd, err);
        if (!st) st = beneath_copy(fd, upload_path(u), files[i], s->config->upload_bytes, err);
        if (fd >= 0) close(fd);
    }
    close(from.fd);
    return st;
}

static bool load_failed(struct call *c, enum status st, const struct error *cause)
{
    if (st == ST_CONFLICT)
        api_error_set(&c->error, 400, "version_conflict", "lora_name",
                      "%.400s; to replace it set 'load_inplace' to true", cause->message);
    else if (st)
        adapter_put_failed(&c->error, st, cause);
    return st != ST_OK;
}

static void work_load(struct call *c)
{
    const struct adapter_request *q = &((struct lookup *)c)->request;
    struct upload *u = NULL;
    struct put_result result;
    struct error cause = {0};
    enum status st = upload_open(c->service->registry, &u, &cause);
    if (!st) st = copy_in(c->service, q->path, u, &cause);
    if (st == ST_INVALID || st == ST_NOT_FOUND) {
        api_error_from(&c->error, st, &cause, "lora_path");
        goto done;
    }
    if (!st)
        st = registry_put(c->service->registry, TENANT, q->name, u, q->in_place ? NULL : "", &result, &cause);
    if (load_failed(c, st, &cause)) goto done;
    c->type = "text/plain";
    strbuf_printf(&c->body, "Success: LoRA adapter '%s' added successfully.", q->name);
done:
    if (u) upload_close(u);
}

static void work_unload(struct call *c)
{
    const struct adapter_request *q = &((struct lookup *)c)->request;
    struct error cause = {0};
    enum status st = registry_delete(c->service->registry, TENANT, q->name, NULL, &cause);
    if (lookup_failed((struct lookup *)c, st, &cause)) return;
    c->type = "text/plain";
    strbuf_printf(&c->body, "Success: LoRA adapter '%s' removed successfully.", q->name);
}

/* Both act on the server's own files, so an operator must want them. */
static void start_if_allowed(struct exchange *x, enum adapter_request_kind kind, void (*work)(struct call *))
{
    struct api_error err;
    if (service_of(x)->config->adapter_root) {
        lookup_start_with(x, kind, work);
        return;
    }
    api_error_set(
        &err, 403, "not_allowed", NULL,
        "this server loads no adapters from its own disk: upload them with PUT /v1/adapters/NAME, or "
        "start it with --adapter-root DIR");
    exchange_reply_error(x, &err);
}

void lora_load_post(struct exchange *x) { start_if_allowed(x, ADAPTER_LOAD, work_load); }
void lora_unload_post(struct exchange *x) { start_if_allowed(x, ADAPTER_UNLOAD, work_unload); }

/* GET /v1/adapters/{name}/download: a version's files, read by a worker a piece at a time, each when the
 * client has taken the one before. */
#include "adapters/export.h"
#include "server/adapters.h"
#include "server/handlers.h"

#include <stdlib.h>
#include <string.h>

#define PIECE_BYTES ((size_t)1 << 20)

struct download {
    struct task task;
    struct service *service;
    struct exchange *x; /* NULL: gone */
    char name[160], version[65];
    struct export *export;
    struct strbuf piece;
    bool working;
    enum status status; /* of the last work */
    struct error cause;
};

static struct download *download_of(struct task *t)
{
    return (struct download *)((char *)t - offsetof(struct download, task));
}

/* ------------------------------------------------------------------ on a worker */

static void work_open(struct task *t)
{
    struct download *d = download_of(t);
    d->status = export_open(d->service->registry, TENANT, d->name, d->version, &d->export, &d->cause);
}

static void work_read(struct task *t)
{
    struct download *d = download_of(t);
    d->status = export_read(d->export, PIECE_BYTES, &d->piece, &d->cause);
}

static void work_close(struct task *t) { export_close(download_of(t)->export); }

/* ------------------------------------------------------------------ on the loop */

static void closed(struct task *t)
{
    struct download *d = download_of(t);
    strbuf_release(&d->piece);
    free(d);
}

/* The exchange, if there is one left, was ended. */
static void download_close(struct download *d)
{
    d->x = NULL;
    d->working = true;
    task_start(d->service, &d->task, work_close, closed);
}

static void on_close(void *ctx)
{
    struct download *d = ctx;
    d->x = NULL;
    if (!d->working) download_close(d);
}

static void piece_read(struct task *t)
{
    struct download *d = download_of(t);
    struct exchange *x = d->x;
    bool last = !d->piece.size;
    d->working = false;
    if (x && !d->status && !last && exchange_write(x, &d->piece)) return;
    if (x && !d->status && last)
        exchange_end(x);
    else if (x)
        exchange_abort(x);
    download_close(d);
}

static void read_more(void *ctx)
{
    struct download *d = ctx;
    if (d->working) return;
    d->working = true;
    task_start(d->service, &d->task, work_read, piece_read);
}

static void opened(struct task *t)
{
    struct download *d = download_of(t);
    struct exchange *x = d->x;
    struct api_error err = {0};
    char text[256];
    d->working = false;
    if (d->status) {
        api_error_from(&err, d->status, &d->cause, d->status == ST_NOT_FOUND ? "name" : NULL);
        if (d->status == ST_NOT_FOUND) err.code = "model_not_found";
        if (x) exchange_reply_error(x, &err);
        x = NULL;
    }
    if (!x) {
        download_close(d);
        return;
    }
    exchange_add_etag(x, export_version(d->export));
    snprintf(text, sizeof text, "attachment; filename=\"%.128s@%s.%s\"", d->name, export_version(d->export),
             export_extension(d->export));
    exchange_add_header(x, "Content-Disposition", text);
    exchange_on_drained(x, read_more);
    exchange_stream(x, export_type(d->export));
}

void adapter_download(struct exchange *x)
{
    struct api_error err = {0};
    const char *version = exchange_query(x, "version");
    struct download *d = calloc(1, sizeof *d);
    if (!d)
        api_error_from(&err, ST_NOMEM, NULL, NULL);
    else if (version && strlen(version) >= sizeof d->version)
        api_error_set(&err, 400, "invalid_value", "version", "'version' is too long");
    if (err.http) {
        free(d);
        exchange_reply_error(x, &err);
        return;
    }
    d->service = service_of(x);
    d->x = x;
    snprintf(d->name, sizeof d->name, "%s", exchange_param(x));
    snprintf(d->version, sizeof d->version, "%s", version ? version : "");
    exchange_hold(x, d, on_close);
    d->working = true;
    task_start(d->service, &d->task, work_open, opened);
}

/* GET /v1/adapters/{name}/download: a version's files. */
#include "adapters/export.h"
#include "server/adapters.h"
#include "server/handlers.h"
#include "server/sending.h"

#include <stdlib.h>
#include <string.h>

struct download {
    struct sending sending;
    char name[160], version[65];
    struct export *export;
};

static struct download *download_of(struct sending *s) { return (struct download *)s; }

static void download_open(struct sending *s)
{
    struct download *d = download_of(s);
    struct error cause = {0};
    enum status st = export_open(s->service->registry, TENANT, d->name, d->version, &d->export, &cause);
    if (st) api_error_from(&s->error, st, &cause, st == ST_NOT_FOUND ? "name" : NULL);
    if (st == ST_NOT_FOUND) s->error.code = "model_not_found";
}

static const char *download_head(struct sending *s)
{
    struct download *d = download_of(s);
    char text[256];
    exchange_add_etag(s->x, export_version(d->export));
    snprintf(text, sizeof text, "attachment; filename=\"%.128s@%s.%s\"", d->name, export_version(d->export),
             export_extension(d->export));
    exchange_add_header(s->x, "Content-Disposition", text);
    return export_type(d->export);
}

static enum status download_read(struct sending *s)
{
    return export_read(download_of(s)->export, SENDING_PIECE_BYTES, &s->piece, NULL);
}

static void download_close(struct sending *s) { export_close(download_of(s)->export); }

static const struct sending_kind download_kind = {download_open, download_head, download_read,
                                                  download_close};

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
    d->sending.kind = &download_kind;
    snprintf(d->name, sizeof d->name, "%s", exchange_param(x));
    snprintf(d->version, sizeof d->version, "%s", version ? version : "");
    sending_start(x, &d->sending);
}

#include "server/http_int.h"

#include "base/log.h"
#include "server/routes.h"

#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

/* A refused request's body up to this size is read and thrown away, so that the client gets to read the
 * answer and may keep the connection. Beyond, the connection is closed. */
#define BODY_DRAIN_MAX ((size_t)64 << 20)

/* ------------------------------------------------------------------ hang-ups */

/* Takes the connection out of the daemon's hands until `wake`. A client who has said that it will not speak
 * again is gone by then. */
static void suspend(struct exchange *x)
{
    if (x->suspended || x->gone) return;
    if (x->peer->half_closed) {
        exchange_cut(x);
        return;
    }
    x->suspended = true;
    MHD_suspend_connection(x->connection);
}

static void wake(struct exchange *x)
{
    if (!x->suspended) return;
    x->suspended = false;
    MHD_resume_connection(x->connection);
    http_schedule(x->http);
}

static void tell_closed(struct exchange *x)
{
    void (*on_close)(void *) = x->on_close;
    x->on_close = NULL;
    if (on_close) on_close(x->held);
}

void exchange_cut(struct exchange *x)
{
    if (x->gone) return;
    x->gone = true;
    tell_closed(x);
    wake(x);
    /* Where it was not suspended, this is what makes the daemon look. */
    shutdown(x->peer->fd, SHUT_RDWR);
}

/* ------------------------------------------------------------------ life */

static void take_id(struct exchange *x)
{
    static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    const char *given = exchange_header(x, "x-request-id");
    size_t n = given ? strlen(given) : 0;
    if (n && n < sizeof x->id && strspn(given, allowed) == n) {
        memcpy(x->id, given, n + 1);
        return;
    }
    unsigned char random[12];
    randombytes_buf(random, sizeof random);
    memcpy(x->id, "req_", 4);
    sodium_bin2hex(x->id + 4, sizeof x->id - 4, random, sizeof random);
}

static struct exchange *exchange_new(struct http *h, struct MHD_Connection *connection)
{
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    struct peer *peer = info ? info->socket_context : NULL;
    struct exchange *x = peer ? calloc(1, sizeof *x) : NULL;
    if (!x) return NULL;
    x->http = h;
    x->connection = connection;
    x->peer = peer;
    peer->x = x;
    x->next = h->exchanges;
    if (x->next) x->next->previous = x;
    h->exchanges = x;
    h->count++;
    take_id(x);
    return x;
}

static void headers_clear(struct exchange *x)
{
    for (int i = 0; i < x->header_count; i++) free(x->headers[i].value);
    x->header_count = 0;
}

void exchange_on_completed(void *cls, struct MHD_Connection *connection, void **con_cls,
                           enum MHD_RequestTerminationCode why)
{
    (void)connection;
    (void)why;
    struct http *h = cls;
    struct exchange *x = *con_cls;
    if (!x) return;
    *con_cls = NULL;
    tell_closed(x);
    x->peer->x = NULL;
    if (x->next) x->next->previous = x->previous;
    if (x->previous)
        x->previous->next = x->next;
    else
        h->exchanges = x->next;
    h->count--;
    if (x->response) MHD_destroy_response(x->response);
    headers_clear(x);
    strbuf_release(&x->body);
    strbuf_release(&x->out);
    free(x);
    if (!h->count && h->config.on_idle) h->config.on_idle(h->config.ctx);
}

/* ------------------------------------------------------------------ the request */

void *exchange_ctx(const struct exchange *x) { return x->http->config.ctx; }
const char *exchange_id(const struct exchange *x) { return x->id; }
const char *exchange_param(const struct exchange *x) { return x->param; }
const struct route *exchange_route(const struct exchange *x) { return x->route; }
struct MHD_Connection *exchange_connection(const struct exchange *x) { return x->connection; }
void *exchange_held(const struct exchange *x) { return x->held; }

const char *exchange_header(const struct exchange *x, const char *name)
{
    return MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, name);
}

const char *exchange_query(const struct exchange *x, const char *name)
{
    return MHD_lookup_connection_value(x->connection, MHD_GET_ARGUMENT_KIND, name);
}

char *exchange_body(struct exchange *x, size_t *size_out)
{
    if (!x->body.data) strbuf_puts(&x->body, "");
    *size_out = x->body.size;
    static char empty[1];
    return x->body.data ? x->body.data : empty;
}

void exchange_hold(struct exchange *x, void *ctx, void (*on_close)(void *ctx))
{
    x->held = ctx;
    x->on_close = on_close;
}

void exchange_pause(struct exchange *x) { x->paused = true; }

void exchange_resume(struct exchange *x)
{
    x->paused = false;
    wake(x);
}

static bool is_json(const char *type)
{
    size_t n = type ? strcspn(type, "; \t") : 0;
    return n == strlen("application/json") && !strncasecmp(type, "application/json", n);
}

/* Content-Length, or 0 where there is none. */
static size_t announced_bytes(const struct exchange *x)
{
    const char *text = exchange_header(x, MHD_HTTP_HEADER_CONTENT_LENGTH);
    return text ? strtoull(text, NULL, 10) : 0;
}

static void too_large(const struct exchange *x, struct api_error *err)
{
    api_error_set(err, 413, "too_large", NULL,
                  "the body is larger than %zu bytes, which is the most %s %s takes",
                  x->route->body_bytes_max, x->route->method, x->route->path);
}

/* All that can be said from the headers. */
static bool check_headers(struct exchange *x, const char *method, const char *url, struct api_error *err)
{
    const struct http_config *c = &x->http->config;
    char allow[64];
    x->route =
        route_find(c->routes, c->route_count, method, url, x->param, sizeof x->param, allow, sizeof allow);
    if (!x->route) {
        if (allow[0]) {
            exchange_add_header(x, MHD_HTTP_HEADER_ALLOW, allow);
            api_error_set(err, 405, "method_not_allowed", NULL, "%.16s is not allowed here; allowed: %s",
                          method, allow);
        } else {
            api_error_set(err, 404, "route_not_found", NULL, "there is nothing at %.16s %.200s", method, url);
        }
        return false;
    }
    if (c->admit && !c->admit(x, err)) return false;
    if (x->route->body == BODY_JSON && !is_json(exchange_header(x, MHD_HTTP_HEADER_CONTENT_TYPE))) {
        api_error_set(err, 415, "unsupported_media_type", NULL,
                      "send the body with Content-Type: application/json");
        return false;
    }
    if (x->route->body != BODY_NONE && announced_bytes(x) > x->route->body_bytes_max) {
        too_large(x, err);
        return false;
    }
    return true;
}

static enum MHD_Result queue_answer(struct exchange *x)
{
    x->queued = true;
    return MHD_queue_response(x->connection, (unsigned)x->status, x->response);
}

/* Must a refused request be answered before its body? Its client waits for that, or would send too much of
 * it. */
static bool refuse_body(const struct exchange *x)
{
    return exchange_header(x, MHD_HTTP_HEADER_EXPECT) || announced_bytes(x) > BODY_DRAIN_MAX;
}

/* After the headers: go on with the body, wait, or refuse it. */
static enum MHD_Result after_headers(struct exchange *x)
{
    if (x->gone) return MHD_NO;
    if (x->response && refuse_body(x)) return queue_answer(x);
    x->in_headers = x->paused;
    if (x->paused) suspend(x);
    return x->gone ? MHD_NO : MHD_YES;
}

static enum MHD_Result on_headers(struct exchange *x, const char *method, const char *url)
{
    struct api_error err = {0};
    if (!check_headers(x, method, url, &err))
        exchange_reply_error(x, &err);
    else if (x->route->body == BODY_STREAM)
        x->route->begin(x);
    return after_headers(x);
}

static enum MHD_Result on_body(struct exchange *x, const char *data, size_t n)
{
    struct api_error err = {0};
    if (x->response || x->route->body == BODY_NONE) {
        x->drained += n;
        return x->drained > BODY_DRAIN_MAX ? MHD_NO : MHD_YES;
    }
    x->body_seen += n;
    if (x->body_seen > x->route->body_bytes_max) {
        too_large(x, &err);
        exchange_reply_error(x, &err);
        return MHD_YES;
    }
    if (x->route->body == BODY_STREAM)
        x->route->on_data(x, data, n);
    else
        strbuf_append(&x->body, data, n);
    if (x->paused) suspend(x);
    return x->gone ? MHD_NO : MHD_YES;
}

enum MHD_Result exchange_on_request(void *cls, struct MHD_Connection *connection, const char *url,
                                    const char *method, const char *version, const char *upload_data,
                                    size_t *upload_data_size, void **con_cls)
{
    (void)version;
    struct exchange *x = *con_cls;
    if (!x) {
        x = *con_cls = exchange_new(cls, connection);
        return x ? on_headers(x, method, url) : MHD_NO;
    }
    if (x->gone) return MHD_NO;
    if (x->in_headers) return after_headers(x);
    if (*upload_data_size) {
        /* Of a chunked body several chunks may wait in the daemon's buffer: it goes on handing them over
         * although the connection was just suspended. Left unread, they come again. */
        if (x->paused) return MHD_YES;
        size_t n = *upload_data_size;
        *upload_data_size = 0;
        return on_body(x, upload_data, n);
    }
    if (!x->handled && !x->response) {
        x->handled = true;
        struct api_error err = {0};
        if (x->body.failed) {
            api_error_from(&err, ST_NOMEM, NULL, NULL);
            exchange_reply_error(x, &err);
        } else {
            x->route->handle(x);
        }
    }
    if (x->gone) return MHD_NO; /* the handler may have found no memory to answer */
    if (x->response) return x->queued ? MHD_YES : queue_answer(x);
    suspend(x);
    return x->gone ? MHD_NO : MHD_YES;
}

/* ------------------------------------------------------------------ the answer */

void exchange_add_header(struct exchange *x, const char *name, const char *value)
{
    char *copy = strdup(value);
    if (!copy || x->header_count == (int)(sizeof x->headers / sizeof *x->headers)) {
        free(copy);
        return;
    }
    x->headers[x->header_count++] = (struct header){name, copy};
}

/* Headers that every answer carries, and those that were added. Takes the response, which may be NULL. */
static void answer(struct exchange *x, int status, const char *type, struct MHD_Response *response)
{
    if (!response) { /* no memory for an answer: the connection ends */
        exchange_cut(x);
        return;
    }
    MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, type);
    MHD_add_response_header(response, "x-request-id", x->id);
    for (int i = 0; i < x->header_count; i++)
        MHD_add_response_header(response, x->headers[i].name, x->headers[i].value);
    if (x->http->quiesced) MHD_add_response_header(response, MHD_HTTP_HEADER_CONNECTION, "close");
    headers_clear(x);
    x->status = status;
    x->response = response;
    x->paused = false;
    wake(x);
}

void exchange_reply(struct exchange *x, int status, const char *type, struct strbuf *body)
{
    x->on_close = NULL;
    if (x->gone || x->response) {
        strbuf_release(body);
        return;
    }
    size_t size = body->size;
    char *bytes = strbuf_take(body);
    strbuf_release(body);
    struct MHD_Response *r =
        bytes ? MHD_create_response_from_buffer(size, bytes, MHD_RESPMEM_MUST_FREE) : NULL;
    if (!r) free(bytes);
    answer(x, status, type, r);
}

void exchange_reply_error(struct exchange *x, const struct api_error *err)
{
    struct strbuf body = {0};
    api_error_write(err, &body);
    if (err->http == 409) exchange_add_header(x, "x-should-retry", "false");
    if (err->http == 429 || err->http == 503) exchange_add_header(x, MHD_HTTP_HEADER_RETRY_AFTER, "1");
    if (err->http == 401) exchange_add_header(x, MHD_HTTP_HEADER_WWW_AUTHENTICATE, "Bearer");
    exchange_reply(x, err->http, "application/json", &body);
}

/* libmicrohttpd asks for the next bytes of a stream. With none there, it must be suspended, or it asks again
 * at once. */
static ssize_t read_stream(void *cls, uint64_t at, char *buffer, size_t max)
{
    (void)at;
    struct exchange *x = cls;
    if (x->gone) return MHD_CONTENT_READER_END_WITH_ERROR;
    size_t n = x->out.size - x->out_at;
    if (n) {
        if (n > max) n = max;
        memcpy(buffer, x->out.data + x->out_at, n);
        x->out_at += n;
        if (x->out_at == x->out.size) {
            strbuf_clear(&x->out);
            x->out_at = 0;
        }
        return (ssize_t)n;
    }
    if (x->ended) return MHD_CONTENT_READER_END_OF_STREAM;
    if (x->on_drained && x->on_close) x->on_drained(x->held);
    suspend(x);
    return x->gone ? MHD_CONTENT_READER_END_WITH_ERROR : 0;
}

void exchange_stream(struct exchange *x, const char *type)
{
    if (x->gone || x->response) return;
    x->streaming = true;
    exchange_add_header(x, MHD_HTTP_HEADER_CACHE_CONTROL, "no-cache");
    answer(x, 200, type, MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 4096, read_stream, x, NULL));
}

bool exchange_write(struct exchange *x, struct strbuf *bytes)
{
    if (!x->gone && bytes->size) {
        strbuf_append(&x->out, bytes->data, bytes->size);
        wake(x);
    }
    bool ok = !bytes->failed && !x->out.failed && x->out.size - x->out_at <= EXCHANGE_BACKLOG_MAX;
    strbuf_clear(bytes);
    return ok;
}

void exchange_end(struct exchange *x)
{
    x->on_close = NULL;
    x->ended = true;
    if (x->out.failed || x->out.size - x->out_at > EXCHANGE_BACKLOG_MAX) exchange_cut(x);
    wake(x);
}

void exchange_abort(struct exchange *x)
{
    x->on_close = NULL;
    exchange_cut(x);
}

void exchange_on_drained(struct exchange *x, void (*on_drained)(void *ctx)) { x->on_drained = on_drained; }

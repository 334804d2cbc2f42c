/* HTTP over libmicrohttpd inside a libuv loop: requests come in whole, answers go out whole or in parts.
 *
 * An *exchange* is one request and its answer. A route's handler gets it when the body is read and either
 * answers at once or keeps it; then it owes exactly one of exchange_reply, exchange_reply_error or
 * exchange_end (after exchange_stream). With that call its hold ends and it must forget the exchange. Where
 * the client hangs up first, the hold ends with the `on_close` call instead, in the same turn of the loop in
 * which the kernel reports it. Everything here belongs to the loop's thread. */
#ifndef SERVER_HTTP_H
#define SERVER_HTTP_H

#include "api/error.h"
#include "base/strbuf.h"

#include <stdbool.h>
#include <stddef.h>
#include <uv.h>

struct http;
struct exchange;
struct MHD_Connection;

enum body_kind {
    BODY_NONE,
    BODY_JSON,   /* application/json, collected in memory */
    BODY_STREAM, /* handed to on_data as it comes */
};

struct route {
    const char *method; /* "GET" answers HEAD too */
    const char *path;   /* "/v1/adapters/{name}": one segment may be a parameter */
    enum body_kind body;
    size_t body_bytes_max;
    void (*handle)(struct exchange *x);
    /* BODY_STREAM: called before the body is read; the hold of `handle` begins here. Instead of `handle`'s
     * single call, on_data gets the bytes in order, then handle is called at the end. */
    void (*begin)(struct exchange *x);
    void (*on_data)(struct exchange *x, const char *data, size_t n);
    bool open;           /* answered without a key, and while the server loads or drains */
    const char *summary; /* for people */
};

struct http_config {
    uv_loop_t *loop;
    int listen_fd; /* owned by the server from here on */
    int connections_max;
    const struct route *routes;
    size_t route_count;
    void *ctx;
    /* May refuse a request by its headers. NULL: none is refused. */
    bool (*admit)(struct exchange *x, struct api_error *err);
    void (*on_idle)(void *ctx); /* an exchange ended and none is left; may be NULL */
};

NODISCARD enum status http_open(const struct http_config *config, struct http **out, struct error *err);
/* No new connections; those that are open go on, and are told to close with their next answer. */
void http_quiesce(struct http *h);
size_t http_exchange_count(const struct http *h);
/* Ends what is left and frees. All exchanges must be answered or their clients gone, else they are cut. Then
 * run the loop until its handles are closed. */
void http_close(struct http *h);

/* The request. */
void *exchange_ctx(const struct exchange *x);         /* http_config.ctx */
const char *exchange_id(const struct exchange *x);    /* the client's x-request-id, or one of ours */
const char *exchange_param(const struct exchange *x); /* the path's parameter, or "" */
const char *exchange_header(const struct exchange *x, const char *name); /* NULL if absent */
const char *exchange_query(const struct exchange *x, const char *name);  /* NULL if absent */
char *exchange_body(struct exchange *x, size_t *size_out);               /* writable, never NULL */
const struct route *exchange_route(const struct exchange *x);
struct MHD_Connection *exchange_connection(const struct exchange *x); /* for MHD's post processor */

/* The hold: ctx is the handler's, on_close is called if the client goes away first. */
void exchange_hold(struct exchange *x, void *ctx, void (*on_close)(void *ctx));
void *exchange_held(const struct exchange *x); /* the handler's ctx */
/* Stop and go on reading a BODY_STREAM. */
void exchange_pause(struct exchange *x);
void exchange_resume(struct exchange *x);

/* The answer. Headers first; value is copied. */
void exchange_add_header(struct exchange *x, const char *name, const char *value);
/* The body moves out of *body, which is left empty. */
void exchange_reply(struct exchange *x, int status, const char *type, struct strbuf *body);
void exchange_reply_error(struct exchange *x, const struct api_error *err);

void exchange_stream(struct exchange *x, const char *type);
/* Takes what is in *bytes (cleared, memory kept). False when the client reads too slowly: more than
 * EXCHANGE_BACKLOG_MAX waits; the caller should cancel and end. */
bool exchange_write(struct exchange *x, struct strbuf *bytes);
void exchange_end(struct exchange *x);
/* Instead of exchange_end, where the rest cannot come: the client sees a cut connection. */
void exchange_abort(struct exchange *x);
/* on_drained(held ctx) is called when the client has taken all that was written, and at the start: the time
 * to get more. It may come more than once. Set before exchange_stream. */
void exchange_on_drained(struct exchange *x, void (*on_drained)(void *ctx));
#define EXCHANGE_BACKLOG_MAX ((size_t)16 << 20)

#endif

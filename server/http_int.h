/* What http.c (the loop and the daemon) and exchange.c (one request and its answer) share. */
#ifndef SERVER_HTTP_INT_H
#define SERVER_HTTP_INT_H

#include "server/http.h"

#include <microhttpd.h>

/* An open connection, idle or not. */
struct peer {
    int fd;             /* libmicrohttpd's */
    uv_poll_t *watch;   /* sees the client's end of the connection close */
    bool half_closed;   /* it did */
    struct exchange *x; /* the request under way, or NULL */
};

struct http {
    struct http_config config;
    struct MHD_Daemon *daemon;
    uv_poll_t *poll;            /* the daemon's epoll descriptor */
    uv_timer_t *timer;          /* when it wants to run again */
    struct exchange *exchanges; /* all that are under way */
    size_t count;
    bool quiesced;
};

struct exchange {
    struct http *http;
    struct MHD_Connection *connection;
    struct peer *peer;
    const struct route *route;
    struct exchange *next, *previous;
    char id[65], param[160];

    struct strbuf body;
    size_t body_seen; /* bytes handed on */
    size_t drained;   /* bytes thrown away */
    bool handled;     /* the handler was called */
    bool in_headers;  /* suspended before the body: the daemon will call once more for the headers */

    void *held;
    void (*on_close)(void *ctx); /* NULL where nobody holds it */

    struct MHD_Response *response; /* ready to be queued, or queued: see `queued` */
    struct header {
        const char *name;
        char *value;
    } headers[8]; /* owned values, for the response to come */
    int header_count, status;
    bool queued, suspended, paused, gone;

    struct strbuf out; /* of a stream: bytes from out_at on still wait */
    size_t out_at;
    bool streaming, ended;
    void (*on_drained)(void *ctx); /* may be NULL */
};

/* http.c */
void http_schedule(struct http *h);

/* exchange.c: libmicrohttpd's callbacks; cls is the struct http. */
enum MHD_Result exchange_on_request(void *cls, struct MHD_Connection *connection, const char *url,
                                    const char *method, const char *version, const char *upload_data,
                                    size_t *upload_data_size, void **con_cls);
void exchange_on_completed(void *cls, struct MHD_Connection *connection, void **con_cls,
                           enum MHD_RequestTerminationCode why);
/* Ends an exchange whose client is gone, or whose server is closing. */
void exchange_cut(struct exchange *x);

#endif

#include "server/http_int.h"

#include "base/log.h"

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Headers and one read, which takes half of it; larger headers are 431. Only what is used of it becomes memory. */
#define CONNECTION_POOL_BYTES (256 * 1024)
#define CONNECTION_IDLE_S     75

/* The daemon's sockets are edge-triggered: it says in its timeout whether it has more to do right now. */
static void http_run(struct http *h);

static void on_timer(uv_timer_t *t) { http_run(t->data); }
static void on_readable(uv_poll_t *p, int status, int events)
{
    (void)status;
    (void)events;
    http_run(p->data);
}

static void http_run(struct http *h)
{
    MHD_UNSIGNED_LONG_LONG timeout_ms;
    MHD_run(h->daemon);
    if (MHD_get_timeout(h->daemon, &timeout_ms) == MHD_YES)
        uv_timer_start(h->timer, on_timer, timeout_ms, 0);
    else
        uv_timer_stop(h->timer);
}

void http_schedule(struct http *h) { uv_timer_start(h->timer, on_timer, 0, 0); }

static void free_handle(uv_handle_t *handle) { free(handle); }

/* Percent escapes in paths are decoded, but never to a NUL or a slash: those stay as written and match
 * nothing. */
static size_t unescape(void *cls, struct MHD_Connection *connection, char *text)
{
    (void)cls;
    (void)connection;
    for (const char *p = text; (p = strchr(p, '%')); p++)
        if (!strncmp(p, "%00", 3) || !strncasecmp(p, "%2f", 3)) return strlen(text);
    return MHD_http_unescape(text);
}

static void on_daemon_log(void *cls, const char *fmt, va_list args)
{
    (void)cls;
    char line[256];
    vsnprintf(line, sizeof line, fmt, args);
    line[strcspn(line, "\r\n")] = 0;
    log_debug("http: %s", line);
}

/* The client will send no more; as good as always it has gone altogether. Two things keep the daemon from
 * seeing that by itself: suspended connections are not in its epoll, and, edge-triggered as it is, it misses
 * an end that came together with the last bytes it read. */
static void on_half_closed(uv_poll_t *watch, int status, int events)
{
    (void)status;
    (void)events;
    struct peer *p = watch->data;
    p->half_closed = true;
    uv_poll_stop(watch);
    if (!p->x || !p->x->handled)
        shutdown(p->fd, SHUT_RD); /* a new edge: it reads to the end of what has come */
    else if (!p->x->queued || p->x->streaming)
        exchange_cut(p->x);
}

static struct peer *peer_new(struct http *h, int fd)
{
    struct peer *p = calloc(1, sizeof *p);
    if (p) p->watch = calloc(1, sizeof *p->watch);
    if (!p || !p->watch || uv_poll_init_socket(h->config.loop, p->watch, fd)) {
        if (p) free(p->watch);
        free(p);
        return NULL;
    }
    p->fd = fd;
    p->watch->data = p;
    uv_poll_start(p->watch, UV_DISCONNECT, on_half_closed);
    return p;
}

static void on_connection(void *cls, struct MHD_Connection *connection, void **context,
                          enum MHD_ConnectionNotificationCode what)
{
    struct peer *p = *context;
    const union MHD_ConnectionInfo *info;
    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
        info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
        *context = info ? peer_new(cls, info->connect_fd) : NULL; /* NULL: its requests are refused */
    } else if (p) {
        uv_poll_stop(p->watch);
        uv_close((uv_handle_t *)p->watch, free_handle);
        free(p);
    }
}

static struct MHD_Daemon *start_daemon(struct http *h)
{
    struct MHD_OptionItem options[] = {
        {MHD_OPTION_LISTEN_SOCKET, h->config.listen_fd, NULL},
        {MHD_OPTION_CONNECTION_LIMIT, h->config.connections_max, NULL},
        {MHD_OPTION_CONNECTION_MEMORY_LIMIT, CONNECTION_POOL_BYTES, NULL},
        {MHD_OPTION_CONNECTION_TIMEOUT, CONNECTION_IDLE_S, NULL},
        {MHD_OPTION_END, 0, NULL},
    };
    return MHD_start_daemon(MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, 0, NULL, NULL,
                            exchange_on_request, h, MHD_OPTION_EXTERNAL_LOGGER, on_daemon_log, NULL,
                            MHD_OPTION_UNESCAPE_CALLBACK, unescape, NULL, MHD_OPTION_NOTIFY_COMPLETED,
                            exchange_on_completed, h, MHD_OPTION_NOTIFY_CONNECTION, on_connection, h,
                            MHD_OPTION_ARRAY, options, MHD_OPTION_END);
}

enum status http_open(const struct http_config *config, struct http **out, struct error *err)
{
    struct http *h = calloc(1, sizeof *h);
    if (!h) return error_set(err, ST_NOMEM, "out of memory");
    h->config = *config;
    h->poll = calloc(1, sizeof *h->poll);
    h->timer = calloc(1, sizeof *h->timer);
    h->daemon = h->poll && h->timer ? start_daemon(h) : NULL;
    const union MHD_DaemonInfo *info =
        h->daemon ? MHD_get_daemon_info(h->daemon, MHD_DAEMON_INFO_EPOLL_FD) : NULL;
    if (!info || uv_poll_init(config->loop, h->poll, info->epoll_fd)) {
        if (h->daemon) MHD_stop_daemon(h->daemon);
        free(h->poll);
        free(h->timer);
        free(h);
        return error_set(err, ST_IO, "the HTTP server cannot be started");
    }
    uv_timer_init(config->loop, h->timer);
    h->poll->data = h->timer->data = h;
    uv_poll_start(h->poll, UV_READABLE, on_readable);
    http_schedule(h);
    *out = h;
    return ST_OK;
}

void http_quiesce(struct http *h)
{
    if (h->quiesced) return;
    h->quiesced = true;
    MHD_socket fd = MHD_quiesce_daemon(h->daemon);
    if (fd != MHD_INVALID_SOCKET) close(fd);
}

size_t http_exchange_count(const struct http *h) { return h->count; }

void http_close(struct http *h)
{
    if (!h) return;
    http_quiesce(h);
    /* Stopping with suspended connections is an error of the library's user: wake them all first. */
    for (struct exchange *x = h->exchanges; x; x = x->next) exchange_cut(x);
    MHD_run(h->daemon);
    uv_poll_stop(h->poll);
    uv_timer_stop(h->timer);
    MHD_stop_daemon(h->daemon);
    uv_close((uv_handle_t *)h->poll, free_handle);
    uv_close((uv_handle_t *)h->timer, free_handle);
    free(h);
}

#include "server/listen.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define BACKLOG 512

/* "[::1]:80" to "::1" and "80". */
static enum status split(const char *text, char host[256], char port[8], struct error *err)
{
    const char *colon = strrchr(text, ':');
    size_t n = colon ? (size_t)(colon - text) : 0;
    const char *start = text;
    if (n >= 2 && text[0] == '[' && text[n - 1] == ']') {
        start++;
        n -= 2;
    }
    if (!colon || n == 0 || n >= 256 || strlen(colon + 1) >= 8 || strlen(colon + 1) == 0)
        return error_set(err, ST_INVALID, "--listen: '%.60s' is not HOST:PORT, such as 127.0.0.1:8080", text);
    memcpy(host, start, n);
    host[n] = 0;
    strcpy(port, colon + 1);
    return ST_OK;
}

static bool is_loopback(const struct sockaddr *a)
{
    if (a->sa_family == AF_INET) return ntohl(((const struct sockaddr_in *)a)->sin_addr.s_addr) >> 24 == 127;
    return a->sa_family == AF_INET6 && IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)a)->sin6_addr);
}

static int open_one(const struct addrinfo *a)
{
    int one = 1;
    int fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, a->ai_addr, a->ai_addrlen) == 0 && listen(fd, BACKLOG) == 0) return fd;
    int reason = errno;
    close(fd);
    errno = reason;
    return -1;
}

static void name_address(int fd, struct listen_address *out)
{
    struct sockaddr_storage own;
    socklen_t size = sizeof own;
    char host[64] = "", port[8] = "";
    getsockname(fd, (struct sockaddr *)&own, &size);
    getnameinfo((struct sockaddr *)&own, size, host, sizeof host, port, sizeof port,
                NI_NUMERICHOST | NI_NUMERICSERV);
    bool v6 = own.ss_family == AF_INET6;
    snprintf(out->url, sizeof out->url, "http://%s%s%s:%s", v6 ? "[" : "", host, v6 ? "]" : "", port);
    out->loopback = is_loopback((struct sockaddr *)&own);
    out->fd = fd;
}

enum status listen_open(const char *text, struct listen_address *out, struct error *err)
{
    char host[256], port[8];
    enum status st = split(text, host, port, err);
    if (st) return st;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV | AI_PASSIVE};
    struct addrinfo *found = NULL;
    int why = getaddrinfo(host, port, &hints, &found);
    if (why) return error_set(err, ST_INVALID, "--listen: '%.60s': %s", text, gai_strerror(why));
    int fd = -1;
    for (const struct addrinfo *a = found; a && fd < 0; a = a->ai_next) fd = open_one(a);
    if (fd < 0)
        st = error_set(err, ST_IO, "cannot listen on %.60s: %s%s", text, strerror(errno),
                       errno == EADDRINUSE ? "; choose another port with --listen, or port 0" : "");
    else
        name_address(fd, out);
    freeaddrinfo(found);
    return st;
}

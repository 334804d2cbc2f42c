/* The listening socket. */
#ifndef SERVER_LISTEN_H
#define SERVER_LISTEN_H

#include "base/status.h"

#include <stdbool.h>

struct listen_address {
    int fd;        /* owned by the caller */
    bool loopback; /* nobody outside this machine can reach it */
    char url[128]; /* "http://127.0.0.1:8080", with the port in use where 0 was asked for */
};

/* "HOST:PORT", "[::1]:8080", "localhost:0". ST_INVALID: not such a thing; ST_IO: cannot listen there. */
NODISCARD enum status listen_open(const char *text, struct listen_address *out, struct error *err);

#endif

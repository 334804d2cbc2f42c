/* An answer too large for memory: read by a worker a piece at a time, each when the client has taken the one
 * before. */
#ifndef SERVER_SENDING_H
#define SERVER_SENDING_H

#include "server/service.h"

#define SENDING_PIECE_BYTES ((size_t)1 << 20)

struct sending;

struct sending_kind {
    void (*open)(struct sending *s);        /* a worker: finds what is sent, or sets `error` */
    const char *(*head)(struct sending *s); /* adds headers of its own; the media type */
    enum status (*read)(struct sending *s); /* a worker: the next piece into `piece`, nothing at the end */
    void (*close)(struct sending *s);       /* a worker: whether or not `open` found it */
};

/* Embedded first in what the kind needs besides, which was calloc'd. */
struct sending {
    struct task task;
    struct service *service;
    struct exchange *x; /* NULL: gone */
    const struct sending_kind *kind;
    struct strbuf piece;
    struct api_error error; /* http != 0: answered instead */
    enum status status;     /* of the last read */
    bool working;
};

/* Takes over the exchange and s, of which kind is set. */
void sending_start(struct exchange *x, struct sending *s);

#endif

/* What the handlers share: the engine, the registry, and the loop's side of other threads.
 *
 * All of it belongs to the loop's thread, except mailbox_post. Work that may block (disks, packing, long
 * texts) goes to libuv's worker threads as a *task*; news from the engine's thread comes back through the
 * *mailbox*. */
#ifndef SERVER_SERVICE_H
#define SERVER_SERVICE_H

#include "adapters/registry.h"
#include "engine/engine.h"
#include "server/config.h"
#include "server/http.h"
#include "server/metrics.h"
#include "server/set_key.h"

#include <uv.h>

#define TENANT "local" /* the one tenant there is without keys */

/* A message to the loop's thread. deliver is called there, once, in the order of posting. */
struct mail {
    struct mail *next;
    void (*deliver)(struct mail *m);
};

struct mailbox {
    uv_async_t async;
    uv_mutex_t lock;
    struct mail *first, **last; /* under lock */
};
NODISCARD enum status mailbox_open(struct mailbox *m, uv_loop_t *loop);
void mailbox_close(struct mailbox *m);                   /* nobody posts any more */
void mailbox_post(struct mailbox *m, struct mail *mail); /* any thread */

enum service_state { SERVICE_LOADING, SERVICE_READY, SERVICE_DRAINING };

struct job;
struct jobs;
struct follow;
struct session_request;

struct service {
    uv_loop_t *loop;
    const struct config *config;
    enum service_state state;
    struct device *device; /* these three from SERVICE_READY on */
    struct engine *engine;
    struct registry *registry;
    struct adapter_base base; /* what adapters must fit */
    struct jobs *training;    /* NULL: this server does not train, */
    const char *no_training;  /* for this reason */
    struct http *http;
    struct mailbox mailbox;
    int64_t started;                            /* unix seconds */
    unsigned char set_secret[SET_SECRET_BYTES]; /* random */
    struct job *jobs;                           /* completions under way */
    struct follow *follows;                     /* requests that wait for training */
    struct session_request *session_requests;   /* step-wise calls under way */
    size_t task_count;
    struct metrics metrics;
    void (*on_settled)(struct service *s); /* draining, and nothing is under way any more */
};

/* The service a request belongs to. */
struct service *service_of(const struct exchange *x);
/* Keys and states: http_config.admit. */
bool service_admit(struct exchange *x, struct api_error *err);
/* To be called whenever something ended. */
void service_settle(struct service *s);

/* work runs on a worker thread, then done on the loop's. The struct is embedded in what it works on. */
struct task {
    uv_work_t request;
    struct service *service;
    void (*work)(struct task *t);
    void (*done)(struct task *t);
    bool yields; /* to the engine's threads, where cores are short */
};
void task_start(struct service *s, struct task *t, void (*work)(struct task *), void (*done)(struct task *));

/* A request that one task answers: work fills `body`, or `error`; call_start does the rest. Embedded first in
 * what a handler needs besides, which was calloc'd and which `release` (may be NULL) empties before it is
 * freed. */
struct call {
    struct task task;
    struct exchange *x; /* NULL when the client is gone; not for work */
    struct service *service;
    int status;                            /* 200 unless work sets another */
    const char *type;                      /* of the body, JSON unless work sets another */
    char version[ADAPTER_VERSION_HEX + 1]; /* the ETag, unless empty */
    struct strbuf body;
    struct api_error error; /* http != 0: answered instead */
    void (*work)(struct call *c);
    void (*release)(struct call *c);
};
void call_start(struct exchange *x, struct call *c);

/* ETag: "version" */
void exchange_add_etag(struct exchange *x, const char *version);

#endif

#include "server/sending.h"

#include <stdlib.h>

static struct sending *sending_of(struct task *t)
{
    return (struct sending *)((char *)t - offsetof(struct sending, task));
}

/* ------------------------------------------------------------------ on a worker */

static void work_open(struct task *t)
{
    struct sending *s = sending_of(t);
    s->kind->open(s);
}

static void work_read(struct task *t)
{
    struct sending *s = sending_of(t);
    s->status = s->kind->read(s);
}

static void work_close(struct task *t)
{
    struct sending *s = sending_of(t);
    s->kind->close(s);
}

/* ------------------------------------------------------------------ on the loop */

static void closed(struct task *t)
{
    struct sending *s = sending_of(t);
    strbuf_release(&s->piece);
    free(s);
}

/* The exchange, if there is one left, was ended. */
static void sending_close(struct sending *s)
{
    s->x = NULL;
    s->working = true;
    task_start(s->service, &s->task, work_close, closed);
}

static void on_close(void *ctx)
{
    struct sending *s = ctx;
    s->x = NULL;
    if (!s->working) sending_close(s);
}

static void piece_read(struct task *t)
{
    struct sending *s = sending_of(t);
    struct exchange *x = s->x;
    bool last = !s->piece.size;
    s->working = false;
    if (x && !s->status && !last && exchange_write(x, &s->piece)) return;
    if (x && !s->status && last)
        exchange_end(x);
    else if (x)
        exchange_abort(x);
    sending_close(s);
}

static void read_more(void *ctx)
{
    struct sending *s = ctx;
    if (s->working) return;
    s->working = true;
    task_start(s->service, &s->task, work_read, piece_read);
}

static void opened(struct task *t)
{
    struct sending *s = sending_of(t);
    struct exchange *x = s->x;
    s->working = false;
    if (x && !s->error.http) {
        const char *type = s->kind->head(s);
        exchange_on_drained(x, read_more);
        exchange_stream(x, type);
        return;
    }
    if (x) exchange_reply_error(x, &s->error);
    sending_close(s);
}

void sending_start(struct exchange *x, struct sending *s)
{
    s->service = service_of(x);
    s->x = x;
    exchange_hold(x, s, on_close);
    s->working = true;
    task_start(s->service, &s->task, work_open, opened);
}

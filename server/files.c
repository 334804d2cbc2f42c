/* /v1/files: files of examples, as OpenAI's. */
#include "base/utf8.h"
#include "server/handlers.h"
#include "server/intake.h"
#include "server/sending.h"
#include "server/training.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PURPOSE        "fine-tune"
#define FORM_EXTRA     ((size_t)64 << 10) /* of a form around its file */
#define LIST_LIMIT     10000
#define LIST_LIMIT_MAX 10000

/* ------------------------------------------------------------------ POST */

struct post {
    struct intake intake;
    struct train_upload *upload;
    char purpose[64];
    struct strbuf answer;
};

static struct post *post_of(struct intake *i) { return (struct post *)i; }

static void post_open(struct intake *i)
{
    struct error cause = {0};
    enum status st = train_upload_open(i->service->training, TENANT, &post_of(i)->upload, &cause);
    if (st) intake_fail(i, st, &cause);
}

static enum status post_write(struct intake *i, const void *bytes, size_t size, struct error *err)
{
    return size ? train_upload_write(post_of(i)->upload, bytes, size, err) : ST_OK;
}

static bool post_complete(struct intake *i)
{
    struct post *p = post_of(i);
    if (strcmp(p->purpose, PURPOSE) != 0)
        api_error_set(&i->error, 400, "invalid_value", "purpose",
                      "'purpose' must be " PURPOSE ", not '%.40s'", p->purpose);
    return !i->error.http;
}

/* What follows the last slash, if it is text. */
static const char *plain_name(const char *name)
{
    for (const char *c = name; *c; c++)
        if (*c == '/' || *c == '\\') name = c + 1;
    for (const char *c = name; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f) return "file";
    return *name && utf8_valid(name, strlen(name)) ? name : "file";
}

static void post_publish(struct intake *i)
{
    struct post *p = post_of(i);
    struct train_file file;
    struct error cause = {0};
    enum status st = train_upload_finish(p->upload, plain_name(i->file_name), p->purpose, &file, &cause);
    p->upload = NULL;
    if (st)
        intake_fail(i, st, &cause);
    else
        train_file_write(&p->answer, &file);
}

static void post_reply(struct intake *i)
{
    exchange_reply(i->x, 200, "application/json", &post_of(i)->answer);
}

static void post_close(struct intake *i) { train_upload_drop(post_of(i)->upload); }

static void post_release(struct intake *i)
{
    strbuf_release(&post_of(i)->answer);
    free(i);
}

static const struct intake_kind post_kind = {post_open,  post_write, post_complete, post_publish,
                                             post_reply, post_close, post_release};

static bool post_begin(struct exchange *x, struct post *p, struct api_error *err)
{
    struct intake *i = &p->intake;
    i->kind = &post_kind;
    i->service = service_of(x);
    i->bytes_max = i->service->config->train_file_bytes + FORM_EXTRA;
    intake_add_file(i, "examples", "file");
    intake_add_field(i, "purpose", p->purpose, sizeof p->purpose);
    if (intake_has_type(x, "multipart/form-data"))
        return intake_fits(x, i, err) && intake_begin_form(x, i, err);
    api_error_set(err, 415, "unsupported_media_type", NULL,
                  "send multipart/form-data with the parts 'file' and 'purpose'");
    return false;
}

void files_post_begin(struct exchange *x)
{
    struct api_error err = {0};
    if (!training_ready(x)) return;
    struct post *p = calloc(1, sizeof *p);
    if (!p) api_error_from(&err, ST_NOMEM, NULL, NULL);
    if (p && post_begin(x, p, &err)) {
        intake_start(x, &p->intake);
        return;
    }
    free(p);
    exchange_reply_error(x, &err);
}

/* ------------------------------------------------------------------ GET, DELETE */

static void work_list(struct call *c)
{
    const struct training_lookup *l = training_lookup_of(c);
    struct train_file *files;
    size_t count;
    bool more;
    struct error cause = {0};
    enum status st = jobs_file_list(c->service->training, TENANT, l->after[0] ? l->after : NULL,
                                    (size_t)l->limit, &files, &count, &more, &cause);
    if (st) {
        training_failed(&c->error, st, &cause, "after");
        return;
    }
    list_begin(&c->body);
    for (size_t i = 0; i < count; i++) {
        list_separate(&c->body, i == 0);
        train_file_write(&c->body, &files[i]);
    }
    page_end(&c->body, count ? files[0].id : NULL, count ? files[count - 1].id : NULL, more);
    free(files);
}

void files_get(struct exchange *x)
{
    const char *purpose = exchange_query(x, "purpose");
    struct api_error err;
    if (!purpose || !strcmp(purpose, PURPOSE)) {
        training_lookup_page(x, LIST_LIMIT, LIST_LIMIT_MAX, work_list);
        return;
    }
    api_error_set(&err, 400, "invalid_value", "purpose",
                  "'purpose' must be " PURPOSE "; there are no other files");
    exchange_reply_error(x, &err);
}

static void work_get(struct call *c)
{
    struct train_file file;
    struct error cause = {0};
    enum status st = jobs_file_get(c->service->training, TENANT, training_lookup_of(c)->id, &file, &cause);
    if (st)
        training_failed(&c->error, st, &cause, "file_id");
    else
        train_file_write(&c->body, &file);
}

static void work_delete(struct call *c)
{
    const char *id = training_lookup_of(c)->id;
    struct error cause = {0};
    enum status st = jobs_file_delete(c->service->training, TENANT, id, &cause);
    if (st)
        training_failed(&c->error, st, &cause, "file_id");
    else
        strbuf_printf(&c->body, "{\"id\": \"%s\", \"object\": \"file\", \"deleted\": true}", id);
}

void file_get(struct exchange *x) { training_lookup_start(x, work_get); }
void file_delete(struct exchange *x) { training_lookup_start(x, work_delete); }

/* ------------------------------------------------------------------ content */

struct content {
    struct sending sending;
    char id[160];
    int fd;
};

static struct content *content_of(struct sending *s) { return (struct content *)s; }

static void content_open(struct sending *s)
{
    struct content *c = content_of(s);
    size_t bytes;
    struct error cause = {0};
    enum status st = jobs_file_content(s->service->training, TENANT, c->id, &c->fd, &bytes, &cause);
    if (st) training_failed(&s->error, st, &cause, "file_id");
}

static const char *content_head(struct sending *s)
{
    (void)s;
    return "application/octet-stream";
}

static enum status content_read(struct sending *s)
{
    char bytes[1 << 16];
    ssize_t n;
    do {
        n = read(content_of(s)->fd, bytes, sizeof bytes);
        if (n > 0) strbuf_append(&s->piece, bytes, (size_t)n);
    } while (n > 0 && s->piece.size < SENDING_PIECE_BYTES);
    return n < 0 ? ST_IO : s->piece.failed ? ST_NOMEM : ST_OK;
}

static void content_close(struct sending *s)
{
    if (content_of(s)->fd >= 0) close(content_of(s)->fd);
}

static const struct sending_kind content_kind = {content_open, content_head, content_read, content_close};

void file_content_get(struct exchange *x)
{
    struct api_error err;
    if (!training_ready(x)) return;
    struct content *c = calloc(1, sizeof *c);
    if (!c) {
        api_error_from(&err, ST_NOMEM, NULL, NULL);
        exchange_reply_error(x, &err);
        return;
    }
    c->sending.kind = &content_kind;
    c->fd = -1;
    snprintf(c->id, sizeof c->id, "%s", exchange_param(x));
    sending_start(x, &c->sending);
}

#include "server/intake.h"

#include "base/file.h"
#include "base/utf8.h"

#include <errno.h>
#include <fcntl.h>
#include <microhttpd.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FLUSH_BYTES       ((size_t)1 << 20)
#define FORM_BUFFER_BYTES ((size_t)64 << 10)

void intake_fail(struct intake *i, enum status st, const struct error *cause)
{
    if (!i->error.http) api_error_from(&i->error, st, cause, NULL);
}

/* ------------------------------------------------------------------ on a worker */

static void fail_errno(struct intake *i, const char *name)
{
    struct error cause;
    enum status st = errno == ENOSPC || errno == EDQUOT ? ST_NO_SPACE : ST_IO;
    intake_fail(i, error_set(&cause, st, "cannot write '%s': %s", name, strerror(errno)), &cause);
}

static bool file_open(struct intake *i, struct intake_file *f)
{
    char *path = NULL;
    if (f->fd >= 0) return true;
    if (asprintf(&path, "%s/%s", i->folder, f->name) < 0) {
        intake_fail(i, ST_NOMEM, NULL);
        return false;
    }
    f->fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    free(path);
    if (f->fd < 0) fail_errno(i, f->name);
    return f->fd >= 0;
}

static void file_flush(struct intake *i, struct intake_file *f)
{
    struct error cause = {0};
    enum status st = ST_OK;
    if (!f->used || i->error.http) return;
    if (i->kind->write)
        st = i->kind->write(i, f->pending.data, f->pending.size, &cause);
    else if (file_open(i, f) && !file_write_all(f->fd, f->pending.data, f->pending.size))
        fail_errno(i, f->name);
    if (st) intake_fail(i, st, &cause);
    f->flushed |= f->pending.size > 0;
    strbuf_clear(&f->pending);
}

static void flush_all(struct intake *i)
{
    for (int f = 0; f < i->file_count; f++) file_flush(i, &i->files[f]);
}

static struct intake *intake_of(struct task *t)
{
    return (struct intake *)((char *)t - offsetof(struct intake, task));
}

static void work_open(struct task *t)
{
    struct intake *i = intake_of(t);
    i->kind->open(i);
}

static void work_flush(struct task *t) { flush_all(intake_of(t)); }

static void work_publish(struct task *t)
{
    struct intake *i = intake_of(t);
    flush_all(i);
    if (!i->error.http) i->kind->publish(i);
}

static void work_close(struct task *t)
{
    struct intake *i = intake_of(t);
    for (int f = 0; f < i->file_count; f++)
        if (i->files[f].fd >= 0) close(i->files[f].fd);
    i->kind->close(i);
}

/* ------------------------------------------------------------------ on the loop */

static void closed(struct task *t)
{
    struct intake *i = intake_of(t);
    for (int f = 0; f < i->file_count; f++) strbuf_release(&i->files[f].pending);
    i->kind->release(i);
}

/* It is over: the exchange, if there is one left, was answered. */
static void intake_close(struct intake *i)
{
    if (i->closing) return;
    i->closing = true;
    i->x = NULL;
    if (i->form) MHD_destroy_post_processor(i->form);
    i->form = NULL;
    task_start(i->service, &i->task, work_close, closed);
}

static void reply_failure(struct intake *i)
{
    struct exchange *x = i->x;
    if (x) exchange_reply_error(x, &i->error);
    intake_close(i);
}

static void on_close(void *ctx)
{
    struct intake *i = ctx;
    i->x = NULL;
    if (!i->working) intake_close(i);
}

static void work_start(struct intake *i, void (*work)(struct task *), void (*done)(struct task *))
{
    i->working = true;
    task_start(i->service, &i->task, work, done);
}

/* After opening and after each flush. */
static void ready_for_more(struct task *t)
{
    struct intake *i = intake_of(t);
    i->working = false;
    if (!i->x || i->error.http)
        reply_failure(i);
    else
        exchange_resume(i->x);
}

static void published(struct task *t)
{
    struct intake *i = intake_of(t);
    i->working = false;
    if (!i->x || i->error.http) {
        reply_failure(i);
        return;
    }
    i->kind->reply(i);
    intake_close(i);
}

/* ------------------------------------------------------------------ forms */

static struct intake_file *file_of_part(struct intake *i, const char *key, const char *filename)
{
    for (int f = 0; f < i->file_count; f++) {
        const char *part = i->files[f].part;
        if (part && ((filename && !strcmp(filename, part)) || (key && !strcmp(key, part))))
            return &i->files[f];
    }
    return NULL;
}

static struct intake_field *field_of_part(struct intake *i, const char *key)
{
    for (int f = 0; key && f < i->field_count; f++)
        if (!strcmp(key, i->fields[f].part)) return &i->fields[f];
    return NULL;
}

static void take_file(struct intake *i, struct intake_file *f, const char *filename, const char *data,
                      uint64_t at, size_t n)
{
    if (at == 0 && f->used && (f->pending.size || f->flushed)) {
        api_error_set(&i->error, 400, "invalid_form", NULL, "the form has '%s' twice", f->part);
        return;
    }
    if (at == 0 && filename) {
        snprintf(i->file_name, sizeof i->file_name, "%s", filename);
        i->file_name[utf8_complete_prefix(i->file_name, strlen(i->file_name))] = 0;
    }
    f->used = true;
    strbuf_append(&f->pending, data, n);
}

static void take_field(struct intake *i, struct intake_field *f, const char *data, uint64_t at, size_t n)
{
    if (at == 0 && f->length)
        api_error_set(&i->error, 400, "invalid_form", f->part, "the form has '%s' twice", f->part);
    else if (n >= f->size - f->length)
        api_error_set(&i->error, 400, "invalid_value", f->part, "'%s' is too long", f->part);
    if (i->error.http) return;
    f->given = true;
    memcpy(f->text + f->length, data, n);
    f->length += n;
    f->text[f->length] = 0;
}

static void refuse_part(struct intake *i, const char *name)
{
    struct strbuf known = {0};
    for (int f = 0; f < i->file_count; f++)
        if (i->files[f].part) strbuf_printf(&known, "%s%s", known.size ? ", " : "", i->files[f].part);
    for (int f = 0; f < i->field_count; f++) strbuf_printf(&known, ", %s", i->fields[f].part);
    api_error_set(&i->error, 400, "invalid_form", NULL, "the form has a part '%.64s'; it may have %s", name,
                  known.data ? known.data : "none");
    strbuf_release(&known);
}

/* A piece of a form's part. */
static enum MHD_Result on_part(void *cls, enum MHD_ValueKind kind, const char *key, const char *filename,
                               const char *type, const char *encoding, const char *data, uint64_t at,
                               size_t n)
{
    (void)kind;
    (void)type;
    (void)encoding;
    struct intake *i = cls;
    if (i->error.http) return MHD_NO;
    struct intake_file *file = file_of_part(i, key, filename);
    struct intake_field *field = file ? NULL : field_of_part(i, key);
    if (file)
        take_file(i, file, filename, data, at, n);
    else if (field)
        take_field(i, field, data, at, n);
    else
        refuse_part(i, filename ? filename : key ? key : "");
    return i->error.http ? MHD_NO : MHD_YES;
}

/* false: the form ended too early, or lacks a file. */
static bool form_complete(struct intake *i)
{
    if (!i->form) return true;
    enum MHD_Result whole = MHD_destroy_post_processor(i->form); /* may still hand over the last bytes */
    i->form = NULL;
    if (i->error.http) return false;
    if (whole != MHD_YES)
        api_error_set(&i->error, 400, "invalid_form", NULL, "the multipart form is cut off before its end");
    for (int f = 0; f < i->file_count && !i->error.http; f++)
        if (i->files[f].part && !i->files[f].used)
            api_error_set(&i->error, 400, "invalid_form", NULL, "the form lacks %s", i->files[f].part);
    return !i->error.http;
}

/* ------------------------------------------------------------------ the body */

static void too_large(const struct intake *i, struct api_error *err)
{
    api_error_set(err, 413, "too_large", NULL,
                  "the upload is larger than %zu bytes, the most this server takes", i->bytes_max);
}

static size_t pending_bytes(const struct intake *i)
{
    size_t n = 0;
    for (int f = 0; f < i->file_count; f++) n += i->files[f].pending.size;
    return n;
}

/* A body that is no form goes to the file that is no part. */
static void take_raw(struct intake *i, const char *data, size_t n)
{
    for (int f = 0; f < i->file_count; f++)
        if (!i->files[f].part) strbuf_append(&i->files[f].pending, data, n);
}

void intake_data(struct exchange *x, const char *data, size_t n)
{
    struct intake *i = exchange_held(x);
    i->seen += n;
    if (i->seen > i->bytes_max)
        too_large(i, &i->error);
    else if (!i->form)
        take_raw(i, data, n);
    else if (MHD_post_process(i->form, data, n) != MHD_YES && !i->error.http)
        api_error_set(&i->error, 400, "invalid_form", NULL,
                      "the body is not the multipart form its Content-Type promises");
    for (int f = 0; f < i->file_count; f++)
        if (i->files[f].pending.failed) intake_fail(i, ST_NOMEM, NULL);

    if (i->error.http) {
        reply_failure(i);
    } else if (pending_bytes(i) >= FLUSH_BYTES) {
        exchange_pause(x);
        work_start(i, work_flush, ready_for_more);
    }
}

void intake_end(struct exchange *x)
{
    struct intake *i = exchange_held(x);
    if (form_complete(i) && i->kind->complete(i))
        work_start(i, work_publish, published);
    else
        reply_failure(i);
}

/* ------------------------------------------------------------------ begin */

void intake_add_file(struct intake *i, const char *name, const char *part)
{
    CHECK(i->file_count < INTAKE_FILES_MAX);
    i->files[i->file_count++] = (struct intake_file){.name = name, .part = part, .fd = -1};
}

void intake_add_field(struct intake *i, const char *part, char *text, size_t size)
{
    CHECK(i->field_count < INTAKE_FIELDS_MAX);
    i->fields[i->field_count++] = (struct intake_field){.part = part, .text = text, .size = size};
}

bool intake_has_type(const struct exchange *x, const char *type)
{
    const char *given = exchange_header(x, "Content-Type");
    size_t n = given ? strcspn(given, "; \t") : 0;
    return n == strlen(type) && !strncasecmp(given, type, n);
}

bool intake_begin_form(struct exchange *x, struct intake *i, struct api_error *err)
{
    i->form = MHD_create_post_processor(exchange_connection(x), FORM_BUFFER_BYTES, on_part, i);
    if (!i->form)
        api_error_set(err, 400, "invalid_form", NULL,
                      "the Content-Type of a multipart form needs a boundary");
    return i->form != NULL;
}

bool intake_fits(const struct exchange *x, const struct intake *i, struct api_error *err)
{
    const char *length = exchange_header(x, "Content-Length");
    if (!length || strtoull(length, NULL, 10) <= i->bytes_max) return true;
    too_large(i, err);
    return false;
}

void intake_start(struct exchange *x, struct intake *i)
{
    i->x = x;
    exchange_hold(x, i, on_close);
    exchange_pause(x);
    work_start(i, work_open, ready_for_more);
}

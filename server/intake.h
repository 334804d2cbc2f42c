/* A body on its way to disk: PUT /v1/adapters/{name}, POST /v1/files.
 *
 * Bytes are gathered in memory up to a limit; then the connection is paused while a worker writes them, so
 * the loop never waits for a disk. Every path ends with `close` on a worker, then `release` on the loop. */
#ifndef SERVER_INTAKE_H
#define SERVER_INTAKE_H

#include "server/service.h"

struct intake;
struct MHD_PostProcessor;

/* What a call makes of its body. */
struct intake_kind {
    void (*open)(struct intake *i); /* a worker: sets `folder`, or fails */
    /* A worker: the next bytes. NULL: files of the intake are files of the folder. */
    enum status (*write)(struct intake *i, const void *bytes, size_t size, struct error *err);
    bool (*complete)(struct intake *i); /* all has come; false, with `error`: something is missing */
    void (*publish)(struct intake *i);  /* a worker: what the body was sent for, or fails */
    void (*reply)(struct intake *i);    /* answers `x`, which is there */
    void (*close)(struct intake *i);    /* a worker: the folder, if it was made, is no longer needed */
    void (*release)(struct intake *i);  /* frees */
};

struct intake_file {
    const char *name; /* in the folder */
    const char *part; /* of a form: by its key or its file's name; NULL: takes a body that is no form */
    bool used;        /* the body has this file */
    bool flushed;     /* some of it was written */
    int fd;           /* -1 before its first byte is written */
    struct strbuf pending;
};

/* A short text among a form's parts. */
struct intake_field {
    const char *part;
    char *text;  /* (size), of the kind's own struct; NUL-terminated */
    size_t size; /* more is an error */
    bool given;
    size_t length;
};

#define INTAKE_FILES_MAX  3
#define INTAKE_FIELDS_MAX 2

struct intake {
    struct task task;
    struct service *service;
    struct exchange *x; /* NULL once answered or gone */
    const struct intake_kind *kind;
    const char *folder;
    size_t bytes_max; /* of the body */
    int file_count, field_count;
    struct intake_file files[INTAKE_FILES_MAX];
    struct intake_field fields[INTAKE_FIELDS_MAX];
    struct MHD_PostProcessor *form; /* of multipart/form-data; NULL: the body goes to a file as it is */
    char file_name[256];            /* as the client calls the last file of its form, cut to this size */
    size_t seen;
    bool working, closing;
    struct api_error error; /* http != 0: failed */
};

void intake_add_file(struct intake *i, const char *name, const char *part);
void intake_add_field(struct intake *i, const char *part, char *text, size_t size);

/* Whether Content-Type is this one, whatever its parameters. */
bool intake_has_type(const struct exchange *x, const char *type);
/* The body is a multipart form; false, with err: it has no boundary. */
bool intake_begin_form(struct exchange *x, struct intake *i, struct api_error *err);
/* false: Content-Length says already that it is too large. */
bool intake_fits(const struct exchange *x, const struct intake *i, struct api_error *err);

/* Takes over the exchange and i, of which kind, service, bytes_max, files and fields are set. */
void intake_start(struct exchange *x, struct intake *i);

/* route.on_data and route.handle. */
void intake_data(struct exchange *x, const char *data, size_t n);
void intake_end(struct exchange *x);

void intake_fail(struct intake *i, enum status st, const struct error *cause);

#endif

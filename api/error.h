/* Errors as clients see them: an HTTP status and one JSON body.
 *
 *   {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
 *
 * All four members are always there; `code` is a stable string that programs may compare. This is the one
 * place that turns a status into HTTP. */
#ifndef API_ERROR_H
#define API_ERROR_H

#include "base/status.h"
#include "base/strbuf.h"

struct api_error {
    int http;         /* status code; 0 while there is no error */
    const char *code; /* static */
    char param[64];   /* the parameter at fault, or "" (written as null) */
    char message[512];
};

/* The HTTP status and code that stand for st; a failure nobody foresaw is a 500. */
int api_status_http(enum status st);
const char *api_status_code(enum status st);

/* Fills *err by the given status; param may be NULL. */
void api_error_set(struct api_error *err, int http, const char *code, const char *param, const char *fmt, ...)
    PRINTF_LIKE(5, 6);
/* From a library's failure; an empty message becomes the status's text. */
void api_error_from(struct api_error *err, enum status st, const struct error *cause, const char *param);

/* Appends the body. */
void api_error_write(const struct api_error *err, struct strbuf *out);

#endif

#include "api/error.h"

#include "base/json.h"
#include "base/utf8.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const struct {
    int http;
    const char *code;
} by_status[ST_COUNT] = {
    [ST_OK] = {200, "ok"},
    [ST_NOMEM] = {503, "out_of_memory"},
    [ST_INVALID] = {400, "invalid_value"},
    [ST_BAD_FORMAT] = {400, "malformed"},
    [ST_UNSUPPORTED] = {400, "unsupported"},
    [ST_REJECTED] = {422, "adapter_rejected"},
    [ST_NOT_FOUND] = {404, "not_found"},
    [ST_CONFLICT] = {409, "version_conflict"},
    [ST_BUSY] = {503, "busy"},
    [ST_FULL] = {429, "queue_full"},
    [ST_TOO_LARGE] = {413, "too_large"},
    [ST_NO_SPACE] = {507, "storage_full"},
    [ST_IO] = {500, "io_error"},
    [ST_CANCELLED] = {503, "cancelled"},
    [ST_DRAINING] = {503, "shutting_down"},
    [ST_DEVICE] = {500, "device_error"},
};

int api_status_http(enum status st)
{
    return (unsigned)st < ST_COUNT && by_status[st].http ? by_status[st].http : 500;
}

const char *api_status_code(enum status st)
{
    return (unsigned)st < ST_COUNT && by_status[st].code ? by_status[st].code : "internal_error";
}

/* The names that OpenAI's clients know. */
static const char *type_of(int http)
{
    switch (http) {
    case 401: return "authentication_error";
    case 403: return "permission_error";
    case 429: return "rate_limit_error";
    default: return http >= 500 ? "server_error" : "invalid_request_error";
    }
}

static void error_fill(struct api_error *err, int http, const char *code, const char *param)
{
    err->http = http;
    err->code = code;
    snprintf(err->param, sizeof err->param, "%s", param ? param : "");
}

void api_error_set(struct api_error *err, int http, const char *code, const char *param, const char *fmt, ...)
{
    error_fill(err, http, code, param);
    va_list args;
    va_start(args, fmt);
    vsnprintf(err->message, sizeof err->message, fmt, args);
    va_end(args);
    err->message[utf8_complete_prefix(err->message, strlen(err->message))] = 0;
}

void api_error_from(struct api_error *err, enum status st, const struct error *cause, const char *param)
{
    error_fill(err, api_status_http(st), api_status_code(st), param);
    const char *message = cause && cause->message[0] ? cause->message : status_text(st);
    snprintf(err->message, sizeof err->message, "%s", message);
}

static void write_member(struct strbuf *out, const char *key, const char *value)
{
    strbuf_printf(out, "\"%s\": ", key);
    if (value && value[0])
        json_write_string(out, value, strlen(value));
    else
        strbuf_puts(out, "null");
}

void api_error_write(const struct api_error *err, struct strbuf *out)
{
    strbuf_puts(out, "{\"error\": {");
    write_member(out, "message", err->message);
    strbuf_puts(out, ", ");
    write_member(out, "type", type_of(err->http));
    strbuf_puts(out, ", ");
    write_member(out, "param", err->param);
    strbuf_puts(out, ", ");
    write_member(out, "code", err->code);
    strbuf_puts(out, "}}");
}

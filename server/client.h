/* Calls to a running server: what `medley adapter` and `medley train --server` share. */
#ifndef SERVER_CLIENT_H
#define SERVER_CLIENT_H

#include "base/json.h"
#include "base/status.h"

struct client_call {
    const char *server;  /* "http://127.0.0.1:8080" */
    const char *api_key; /* NULL: none */
    const char *method;
    const char *name;             /* the adapter, NULL: all */
    const char *action;           /* "rollback": the path's end; NULL: none */
    const char *expected_version; /* NULL: any */
    const char *json;             /* the body; NULL: none, or `upload` */
    const char *upload;           /* an adapter's folder or file, sent with a progress bar; NULL: none */
    const char *path;             /* "/v1/files", in place of the adapter's; NULL: that */
    const char *examples;         /* a file of examples, sent as a form with a progress bar; NULL: none */
    /* Takes an answer of status 2xx line by line, as it comes, without the ends of lines; false ends the
     * call. NULL: the answer is JSON. */
    bool (*on_line)(void *ctx, const char *line, size_t size);
    void *ctx;
};

/* Makes the call. On ST_OK, which is an answer of status 2xx, the caller owes cJSON_Delete (of NULL, with
 * on_line). A server's refusal is told in its own words: ST_NOT_FOUND for 404, ST_CONFLICT for 409, else
 * ST_REJECTED. ST_IO where there is no answer. */
NODISCARD enum status client_call(const struct client_call *c, int *http_out, cJSON **out, struct error *err);

#endif

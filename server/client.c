#include "server/client.h"

#include "base/file.h"
#include "base/strbuf.h"
#include "server/commands.h"

#include <curl/curl.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define ANSWER_BYTES_MAX ((size_t)256 << 20)
#define CONNECT_SECONDS  10L

/* One call under way. */
struct transfer {
    const struct client_call *call;
    CURL *curl;
    struct curl_slist *headers;
    curl_mime *form;
    FILE *file;
    struct strbuf url, answer;
    int cells; /* of the progress bar */
};

/* Hands out the whole lines of the answer so far. */
static bool lines_take(struct transfer *t)
{
    size_t at = 0;
    for (const char *end; (end = memchr(t->answer.data + at, '\n', t->answer.size - at));) {
        size_t n = (size_t)(end - t->answer.data) - at;
        if (!t->call->on_line(t->call->ctx, t->answer.data + at, n)) return false;
        at += n + 1;
    }
    memmove(t->answer.data, t->answer.data + at, t->answer.size - at);
    strbuf_truncate(&t->answer, t->answer.size - at);
    return true;
}

static size_t on_answer(char *bytes, size_t one, size_t n, void *ctx)
{
    struct transfer *t = ctx;
    long http = 0;
    (void)one; /* always 1 */
    strbuf_append(&t->answer, bytes, n);
    if (t->answer.failed || t->answer.size > ANSWER_BYTES_MAX) return 0;
    curl_easy_getinfo(t->curl, CURLINFO_RESPONSE_CODE, &http);
    return t->call->on_line && http / 100 == 2 && !lines_take(t) ? 0 : n;
}

static int on_progress(void *ctx, curl_off_t down_total, curl_off_t down, curl_off_t up_total, curl_off_t up)
{
    struct transfer *t = ctx;
    (void)down_total, (void)down;
    if (up_total > 0) progress_bar("sending", &t->cells, (double)up / (double)up_total);
    return 0;
}

static bool header_add(struct transfer *t, const char *name, const char *value)
{
    struct strbuf line = {0};
    strbuf_printf(&line, "%s: %s", name, value);
    struct curl_slist *longer = line.failed ? NULL : curl_slist_append(t->headers, line.data);
    strbuf_release(&line);
    if (longer) t->headers = longer;
    return longer;
}

/* SERVER/v1/adapters[/NAME[/ACTION]], or SERVER/PATH */
static bool url_make(struct transfer *t)
{
    const struct client_call *c = t->call;
    size_t n = strlen(c->server);
    while (n && c->server[n - 1] == '/') n--;
    strbuf_append(&t->url, c->server, n);
    strbuf_puts(&t->url, c->path ? c->path : "/v1/adapters");
    if (c->name) {
        char *name = curl_easy_escape(t->curl, c->name, 0);
        if (!name) return false;
        strbuf_printf(&t->url, "/%s", name);
        curl_free(name);
    }
    if (c->action) strbuf_printf(&t->url, "/%s", c->action);
    return !t->url.failed;
}

/* A folder's two files as a form. */
static enum status body_of_folder(struct transfer *t, struct error *err)
{
    static const char *const files[] = {"adapter_config.json", "adapter_model.safetensors"};
    t->form = curl_mime_init(t->curl);
    if (!t->form) return error_set(err, ST_NOMEM, "out of memory");
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        struct strbuf path = {0};
        strbuf_printf(&path, "%s/%s", t->call->upload, files[i]);
        curl_mimepart *part = curl_mime_addpart(t->form);
        CURLcode rc = path.failed || !part ? CURLE_OUT_OF_MEMORY : curl_mime_name(part, files[i]);
        if (!rc) rc = curl_mime_filedata(part, path.data);
        enum status st = ST_OK;
        if (rc == CURLE_READ_ERROR)
            st = error_set(err, ST_NOT_FOUND, "cannot read '%s'", path.data);
        else if (rc)
            st = error_set(err, ST_NOMEM, "%s", curl_easy_strerror(rc));
        strbuf_release(&path);
        if (st) return st;
    }
    curl_easy_setopt(t->curl, CURLOPT_MIMEPOST, t->form);
    return ST_OK;
}

static enum status body_of_file(struct transfer *t, curl_off_t size, struct error *err)
{
    t->file = fopen(t->call->upload, "rb");
    if (!t->file) return file_error(err, "open", t->call->upload);
    if (!header_add(t, "Content-Type", "application/octet-stream"))
        return error_set(err, ST_NOMEM, "out of memory");
    curl_easy_setopt(t->curl, CURLOPT_UPLOAD, 1L);
    curl_easy_setopt(t->curl, CURLOPT_READDATA, t->file);
    curl_easy_setopt(t->curl, CURLOPT_INFILESIZE_LARGE, size);
    return ST_OK;
}

/* OpenAI's form of a file. */
static enum status body_of_examples(struct transfer *t, struct error *err)
{
    t->form = curl_mime_init(t->curl);
    curl_mimepart *purpose = t->form ? curl_mime_addpart(t->form) : NULL;
    curl_mimepart *file = purpose ? curl_mime_addpart(t->form) : NULL;
    if (!file || curl_mime_name(purpose, "purpose") ||
        curl_mime_data(purpose, "fine-tune", CURL_ZERO_TERMINATED) || curl_mime_name(file, "file"))
        return error_set(err, ST_NOMEM, "out of memory");
    if (curl_mime_filedata(file, t->call->examples))
        return error_set(err, ST_NOT_FOUND, "cannot read '%s'", t->call->examples);
    curl_easy_setopt(t->curl, CURLOPT_MIMEPOST, t->form);
    return ST_OK;
}

static enum status body_make(struct transfer *t, struct error *err)
{
    const struct client_call *c = t->call;
    struct stat info;
    if (c->json) {
        curl_easy_setopt(t->curl, CURLOPT_POSTFIELDS, c->json);
        return header_add(t, "Content-Type", "application/json") ? ST_OK
                                                                 : error_set(err, ST_NOMEM, "out of memory");
    }
    if (!c->upload && !c->examples) return ST_OK;
    if (c->upload && stat(c->upload, &info)) return file_error(err, "open", c->upload);
    curl_easy_setopt(t->curl, CURLOPT_NOPROGRESS, 0L);
    curl_easy_setopt(t->curl, CURLOPT_XFERINFOFUNCTION, on_progress);
    curl_easy_setopt(t->curl, CURLOPT_XFERINFODATA, t);
    if (c->examples) return body_of_examples(t, err);
    return S_ISDIR(info.st_mode) ? body_of_folder(t, err) : body_of_file(t, info.st_size, err);
}

static enum status request_make(struct transfer *t, struct error *err)
{
    const struct client_call *c = t->call;
    struct strbuf etag = {0}, bearer = {0};
    enum status st = body_make(t, err);
    if (st) return st;
    bool ok = url_make(t);
    if (c->expected_version) strbuf_printf(&etag, "\"%s\"", c->expected_version);
    if (c->expected_version) ok = ok && !etag.failed && header_add(t, "If-Match", etag.data);
    if (c->api_key) strbuf_printf(&bearer, "Bearer %s", c->api_key);
    if (c->api_key) ok = ok && !bearer.failed && header_add(t, "Authorization", bearer.data);
    strbuf_release(&etag);
    strbuf_release(&bearer);
    if (!ok) return error_set(err, ST_NOMEM, "out of memory");
    curl_easy_setopt(t->curl, CURLOPT_URL, t->url.data);
    curl_easy_setopt(t->curl, CURLOPT_CUSTOMREQUEST, c->method);
    curl_easy_setopt(t->curl, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(t->curl, CURLOPT_HTTPHEADER, t->headers);
    curl_easy_setopt(t->curl, CURLOPT_CONNECTTIMEOUT, CONNECT_SECONDS);
    curl_easy_setopt(t->curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(t->curl, CURLOPT_WRITEFUNCTION, on_answer);
    curl_easy_setopt(t->curl, CURLOPT_WRITEDATA, t);
    return ST_OK;
}

/* A refusal in the server's words. */
static enum status refused(long http, const cJSON *body, struct error *err)
{
    const cJSON *error = cJSON_IsObject(body) ? json_get(body, "error") : NULL;
    const char *message = NULL;
    enum status st = http == 404 ? ST_NOT_FOUND : http == 409 ? ST_CONFLICT : ST_REJECTED;
    if (!cJSON_IsObject(error) || json_get_string(error, "message", &message, NULL))
        return error_set(err, st, "the server answered with status %ld and no explanation", http);
    return error_set(err, st, "the server refuses: %s", message);
}

static enum status answer_read(struct transfer *t, int *http_out, cJSON **out, struct error *err)
{
    long http = 0;
    cJSON *body = NULL;
    curl_easy_getinfo(t->curl, CURLINFO_RESPONSE_CODE, &http);
    bool lines = t->call->on_line && http / 100 == 2; /* which were handed out as they came */
    enum status parsed =
        lines ? ST_OK : json_parse(t->answer.data ? t->answer.data : "", t->answer.size, &body, NULL);
    enum status st = http / 100 != 2 ? refused(http, body, err)
                     : parsed ? error_set(err, ST_BAD_FORMAT, "'%s' does not answer as a Medley server does",
                                          t->call->server)
                              : ST_OK;
    if (st) {
        cJSON_Delete(body);
        return st;
    }
    *http_out = (int)http;
    *out = body;
    return ST_OK;
}

enum status client_call(const struct client_call *c, int *http_out, cJSON **out, struct error *err)
{
    struct transfer t = {.call = c, .cells = -1};
    enum status st = ST_OK;
    if (curl_global_init(CURL_GLOBAL_DEFAULT)) return error_set(err, ST_IO, "libcurl cannot start");
    t.curl = curl_easy_init();
    st = t.curl ? request_make(&t, err) : error_set(err, ST_NOMEM, "out of memory");
    if (!st) {
        CURLcode rc = curl_easy_perform(t.curl);
        st = rc ? error_set(err, ST_IO, "no answer from %s: %s", c->server, curl_easy_strerror(rc))
                : answer_read(&t, http_out, out, err);
    }
    curl_mime_free(t.form);
    curl_slist_free_all(t.headers);
    curl_easy_cleanup(t.curl);
    curl_global_cleanup();
    if (t.file) fclose(t.file);
    strbuf_release(&t.url);
    strbuf_release(&t.answer);
    return st;
}

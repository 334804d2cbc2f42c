#include "api/parse.h"

#include "api/completion.h"
#include "api/scan.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool parse_body(const char *text, size_t size, cJSON **out, struct api_error *err)
{
    struct error cause = {0};
    cJSON *body = NULL;
    enum status st = json_parse(text, size, &body, &cause);
    if (st) {
        api_error_from(err, st, &cause, NULL);
        if (st == ST_BAD_FORMAT) err->code = "invalid_json";
        return false;
    }
    if (!cJSON_IsObject(body)) {
        api_error_set(err, 400, "invalid_json", NULL, "the body must be a JSON object");
        cJSON_Delete(body);
        return false;
    }
    *out = body;
    return true;
}

void parse_fail(struct parse *p, enum status st, const char *param, const char *fmt, ...)
{
    if (p->failed) return;
    p->failed = true;
    struct error e = {.status = st};
    va_list args;
    va_start(args, fmt);
    vsnprintf(e.message, sizeof e.message, fmt, args);
    va_end(args);
    api_error_set(p->err, api_status_http(st), api_status_code(st), param, "%s", e.message);
}

/* Missing is fine; anything else that failed is the client's to hear. */
static void parse_check(struct parse *p, const char *key, enum status st, const struct error *cause)
{
    if (st && st != ST_NOT_FOUND) parse_fail(p, st, key, "%s", cause->message);
}

void parse_bool(struct parse *p, const char *key, bool *out)
{
    struct error e = {0};
    if (!p->failed) parse_check(p, key, json_get_bool(p->body, key, out, &e), &e);
}

void parse_int(struct parse *p, const char *key, int min, int max, int *out)
{
    struct error e = {0};
    int64_t v;
    if (p->failed) return;
    enum status st = json_get_i64(p->body, key, min, max, &v, &e);
    if (!st) *out = (int)v;
    parse_check(p, key, st, &e);
}

void parse_f64(struct parse *p, const char *key, double min, double max, double *out)
{
    struct error e = {0};
    if (!p->failed) parse_check(p, key, json_get_f64(p->body, key, min, max, out, &e), &e);
}

void parse_string(struct parse *p, const char *key, const char **out)
{
    struct error e = {0};
    if (!p->failed) parse_check(p, key, json_get_string(p->body, key, out, &e), &e);
}

bool parse_seed(struct parse *p, const char *text, size_t size, uint64_t *out)
{
    enum status st = p->failed ? ST_NOT_FOUND : scan_integer(text, size, "seed", out);
    if (st == ST_NOMEM)
        parse_fail(p, st, NULL, "out of memory");
    else if (st && st != ST_NOT_FOUND)
        parse_fail(p, ST_INVALID, "seed", "'seed' must be a whole number from -2^63 to 2^64 - 1");
    return !st;
}

void *parse_alloc(struct parse *p, size_t count, size_t size)
{
    if (p->failed || !count) return NULL;
    void *m = calloc(count, size);
    if (!m) parse_fail(p, ST_NOMEM, NULL, "out of memory");
    return m;
}

void parse_strings(struct parse *p, const char *key, size_t max, const char ***out, size_t *count_out)
{
    const cJSON *v = json_get(p->body, key);
    if (p->failed || !v) return;
    size_t count = cJSON_IsArray(v) ? (size_t)cJSON_GetArraySize(v) : 1;
    if (count > max) {
        parse_fail(p, ST_INVALID, key, "'%s' has %zu entries; at most %zu are allowed", key, count, max);
        return;
    }
    const char **strings = parse_alloc(p, count, sizeof *strings);
    if (!strings) return;
    size_t i = 0;
    for (const cJSON *e = cJSON_IsArray(v) ? v->child : v; e && i < count; e = e->next) {
        if (!cJSON_IsString(e))
            parse_fail(p, ST_INVALID, key, "'%s' must be a string or an array of strings", key);
        else
            strings[i++] = e->valuestring;
    }
    *out = strings;
    *count_out = i;
}

bool json_token_id(const cJSON *v, int32_t *out)
{
    if (!cJSON_IsNumber(v) || !(v->valuedouble >= 0 && v->valuedouble <= INT32_MAX)) return false;
    int32_t id = (int32_t)v->valuedouble;
    if (id != v->valuedouble) return false;
    *out = id;
    return true;
}

/* ------------------------------------------------------------------ messages */

static bool role_known(struct parse *p, const cJSON *m, const char **role_out)
{
    const cJSON *v = json_get(m, "role");
    const char *role = cJSON_IsString(v) ? v->valuestring : "";
    if (!strcmp(role, "developer")) role = "system"; /* OpenAI's newer name for it */
    if (strcmp(role, "system") && strcmp(role, "user") && strcmp(role, "assistant")) {
        parse_fail(p, strcmp(role, "tool") && strcmp(role, "function") ? ST_INVALID : ST_UNSUPPORTED,
                   "messages", "'messages': role '%.40s' is not one of system, developer, user, assistant",
                   role);
        return false;
    }
    *role_out = role;
    return true;
}

/* Text parts are joined with a newline. */
static void parts_join(struct parse *p, const cJSON *parts, struct strbuf *out)
{
    for (const cJSON *part = parts->child; part; part = part->next) {
        const cJSON *type = json_get(part, "type"), *text = json_get(part, "text");
        if (!cJSON_IsString(type) || strcmp(type->valuestring, "text") != 0 || !cJSON_IsString(text)) {
            parse_fail(p, ST_UNSUPPORTED, "messages",
                       "'messages': content parts must be {\"type\": \"text\", \"text\": \"...\"}; "
                       "images, audio and files are not supported");
            return;
        }
        if (part != parts->child) strbuf_putc(out, '\n');
        strbuf_puts(out, text->valuestring);
    }
}

static void parse_message(struct parse *p, const cJSON *m, struct message *out)
{
    if (!role_known(p, m, &out->role)) return;
    const cJSON *calls = json_get(m, "tool_calls");
    if (calls && cJSON_GetArraySize(calls) > 0)
        parse_fail(p, ST_UNSUPPORTED, "messages", "'messages': tool calls are not supported");
    const cJSON *content = json_get(m, "content");
    struct strbuf text = {0};
    strbuf_puts(&text, "");
    if (cJSON_IsString(content))
        strbuf_puts(&text, content->valuestring);
    else if (cJSON_IsArray(content))
        parts_join(p, content, &text);
    else
        parse_fail(p, ST_INVALID, "messages",
                   "'messages': each message needs a content: a string or an array of text parts");
    out->content = strbuf_take(&text);
    if (!out->content) parse_fail(p, ST_NOMEM, "messages", "out of memory");
    strbuf_release(&text);
}

void parse_messages(struct parse *p, struct message **out, size_t *count_out)
{
    const cJSON *v = json_get(p->body, "messages");
    if (p->failed) return;
    size_t count = cJSON_IsArray(v) ? (size_t)cJSON_GetArraySize(v) : 0;
    if (count == 0 || count > COMPLETION_MESSAGES_MAX) {
        parse_fail(p, ST_INVALID, "messages", "'messages' must be an array of 1 to %d messages",
                   COMPLETION_MESSAGES_MAX);
        return;
    }
    struct message *messages = parse_alloc(p, count, sizeof *messages);
    if (!messages) return;
    size_t i = 0;
    for (const cJSON *m = v->child; m && !p->failed; m = m->next) parse_message(p, m, &messages[i++]);
    *out = messages;
    *count_out = i;
}

void messages_free(struct message *messages, size_t count)
{
    for (size_t i = 0; i < count; i++) free(messages[i].content);
    free(messages);
}

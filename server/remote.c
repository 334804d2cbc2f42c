/* `medley adapter push`, `list`, `rollback` and `rm`: against a running server. */
#include "base/strbuf.h"
#include "server/client.h"
#include "server/commands.h"

#include <stdio.h>
#include <string.h>

static struct client_call call_of(const struct config *c, const char *method, const char *name)
{
    return (struct client_call){.server = c->server,
                                .api_key = c->api_key,
                                .method = method,
                                .name = name,
                                .expected_version = c->expected_version};
}

static const char *text_of(const cJSON *object, const char *key)
{
    const char *text = "?";
    (void)json_get_string(object, key, &text, NULL);
    return text;
}

static double number_of(const cJSON *object, const char *key)
{
    double number = 0;
    (void)json_get_f64(object, key, 0, 1e18, &number, NULL);
    return number;
}

int push_run(const struct config *c)
{
    struct client_call call = call_of(c, "PUT", c->words.items[0]);
    struct error err = {0};
    cJSON *answer = NULL;
    int http;
    call.upload = c->words.items[1];
    if (client_call(&call, &http, &answer, &err)) return command_failed(&err);
    printf("%s@%s: %s, rank %.0f, %.0f experts, %.0f parameters%s\n", call.name, text_of(answer, "version"),
           text_of(answer, "format"), number_of(answer, "rank"), number_of(answer, "experts"),
           number_of(answer, "parameters"), http == 201 ? " (new)" : "");
    cJSON_Delete(answer);
    return 0;
}

static double current_bytes(const cJSON *adapter)
{
    const cJSON *versions = json_get(adapter, "versions");
    return cJSON_IsArray(versions) && versions->child ? number_of(versions->child, "bytes") : 0;
}

int list_run(const struct config *c)
{
    struct client_call call = call_of(c, "GET", NULL);
    struct error err = {0};
    cJSON *answer = NULL;
    int http;
    if (client_call(&call, &http, &answer, &err)) return command_failed(&err);
    const cJSON *data = cJSON_IsObject(answer) ? json_get(answer, "data") : NULL;
    printf("%-32s %-16s %-12s %5s %7s %8s %9s\n", "NAME", "VERSION", "FORMAT", "RANK", "EXPERTS", "VERSIONS",
           "MIB");
    for (const cJSON *a = data ? data->child : NULL; a; a = a->next)
        printf("%-32s %-16s %-12s %5.0f %7.0f %8d %9.1f\n", text_of(a, "name"), text_of(a, "version"),
               text_of(a, "format"), number_of(a, "rank"), number_of(a, "experts"),
               cJSON_GetArraySize(json_get(a, "versions")), current_bytes(a) / (1 << 20));
    cJSON_Delete(answer);
    return 0;
}

int rollback_run(const struct config *c)
{
    struct client_call call = call_of(c, "POST", c->words.items[0]);
    struct strbuf body = {0};
    struct error err = {0};
    cJSON *answer = NULL;
    int http;
    strbuf_puts(&body, "{\"version\": ");
    json_write_string(&body, c->words.items[1], strlen(c->words.items[1]));
    strbuf_putc(&body, '}');
    call.action = "rollback";
    call.json = body.data;
    enum status st =
        body.failed ? error_set(&err, ST_NOMEM, "out of memory") : client_call(&call, &http, &answer, &err);
    strbuf_release(&body);
    if (st) return command_failed(&err);
    printf("%s@%s is current\n", call.name, text_of(answer, "version"));
    cJSON_Delete(answer);
    return 0;
}

int remove_run(const struct config *c)
{
    struct client_call call = call_of(c, "DELETE", c->words.items[0]);
    struct error err = {0};
    cJSON *answer = NULL;
    int http;
    if (client_call(&call, &http, &answer, &err)) return command_failed(&err);
    printf("%s is removed, with all its versions\n", call.name);
    cJSON_Delete(answer);
    return 0;
}

/* GET /v1/openapi.json: what calls there are, from the table of routes, and what a training run can be told,
 * from the trainer's. The members of other bodies are described in docs/http.md. */
#include "server/handlers.h"
#include "server/routes.h"
#include "server/training.h"

#include <ctype.h>
#include <string.h>

static void put_string(struct strbuf *out, const char *text) { json_write_string(out, text, strlen(text)); }

static bool is_first_of_path(size_t at)
{
    for (size_t i = 0; i < at; i++)
        if (!strcmp(server_routes[i].path, server_routes[at].path)) return false;
    return true;
}

/* The path's parameter, if it has one. */
static void put_parameters(struct strbuf *out, const char *path)
{
    const char *open = strchr(path, '{');
    if (!open) return;
    strbuf_printf(out,
                  ", \"parameters\": [{\"name\": \"%.*s\", \"in\": \"path\", \"required\": true, \"schema\": "
                  "{\"type\": \"string\"}}]",
                  (int)strcspn(open + 1, "}"), open + 1);
}

static void put_body(struct strbuf *out, const struct route *r)
{
    bool trains = strstr(r->path, "/train") != NULL;
    if (r->body == BODY_NONE) return;
    strbuf_puts(out, ", \"requestBody\": {\"required\": true, \"content\": {");
    if (r->body == BODY_STREAM)
        strbuf_puts(out, "\"multipart/form-data\": {\"schema\": {\"type\": \"object\"}}");
    else
        strbuf_printf(out, "\"application/json\": {\"schema\": {%s}}",
                      trains ? "\"$ref\": \"#/components/schemas/TrainingSettings\""
                             : "\"type\": \"object\"");
    strbuf_puts(out, "}}");
}

static void put_method(struct strbuf *out, const struct route *r)
{
    strbuf_putc(out, '"');
    for (const char *c = r->method; *c; c++) strbuf_putc(out, (char)tolower((unsigned char)*c));
    strbuf_puts(out, "\": {\"summary\": ");
    put_string(out, r->summary);
    put_parameters(out, r->path);
    put_body(out, r);
    strbuf_puts(out, ", \"responses\": {\"200\": {\"description\": \"done\"}, \"default\": {\"$ref\": "
                     "\"#/components/responses/Error\"}}}");
}

static void put_paths(struct strbuf *out)
{
    bool any = false;
    for (size_t i = 0; i < server_route_count; i++) {
        const struct route *r = &server_routes[i];
        if (!is_first_of_path(i)) continue;
        strbuf_printf(out, "%s\"%s\": {", any ? ", " : "", r->path);
        put_method(out, r);
        for (size_t j = i + 1; j < server_route_count; j++) {
            if (strcmp(server_routes[j].path, r->path) != 0) continue;
            strbuf_puts(out, ", ");
            put_method(out, &server_routes[j]);
        }
        strbuf_putc(out, '}');
        any = true;
    }
}

/* "a|b|c" as ["a", "b", "c"]. */
static void put_choices(struct strbuf *out, const char *choices)
{
    strbuf_puts(out, "\"enum\": [\"");
    for (const char *c = choices; *c; c++)
        if (*c == '|')
            strbuf_puts(out, "\", \"");
        else
            strbuf_putc(out, *c);
    strbuf_puts(out, "\"]");
}

static void put_setting(struct strbuf *out, const struct train_setting *t)
{
    put_string(out, t->name);
    strbuf_puts(out, ": {\"description\": ");
    put_string(out, t->help);
    strbuf_puts(out, ", ");
    switch (t->kind) {
    case SETTING_INT:
    case SETTING_REAL:
        strbuf_printf(out, "\"type\": \"%s\", \"minimum\": %.9g, \"maximum\": %.9g, \"default\": %.9g",
                      t->kind == SETTING_INT ? "integer" : "number", t->min, t->max, t->otherwise);
        break;
    case SETTING_SEED: strbuf_puts(out, "\"type\": \"integer\", \"default\": 0"); break;
    case SETTING_CHOICE: put_choices(out, t->choices); break;
    }
    strbuf_putc(out, '}');
}

void openapi_get(struct exchange *x)
{
    struct strbuf out = {0};
    strbuf_puts(&out,
                "{\"openapi\": \"3.1.0\", \"info\": {\"title\": \"Medley\", \"version\": \"" MEDLEY_VERSION
                "\"}, \"paths\": {");
    put_paths(&out);
    strbuf_puts(
        &out,
        "}, \"components\": {\"schemas\": {\"TrainingSettings\": {\"type\": \"object\", \"properties\": {");
    for (size_t i = 0; i < train_setting_count; i++) {
        if (i) strbuf_puts(&out, ", ");
        put_setting(&out, &train_setting_table[i]);
    }
    strbuf_puts(&out,
                "}}}, \"responses\": {\"Error\": {\"description\": \"what went wrong\", \"content\": "
                "{\"application/json\": {\"schema\": {\"type\": \"object\", \"required\": [\"error\"], "
                "\"properties\": {\"error\": {\"type\": \"object\", \"required\": [\"message\", \"type\", "
                "\"param\", \"code\"]}}}}}}}}}");
    exchange_reply(x, 200, "application/json", &out);
}

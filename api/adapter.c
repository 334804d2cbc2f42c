#include "api/adapter.h"

#include "api/parse.h"

#include <string.h>

static void parse_needed(struct parse *p, const char *key, const char **out)
{
    parse_string(p, key, out);
    if (!p->failed && (!*out || !**out)) parse_fail(p, ST_INVALID, key, "'%s' is needed", key);
}

/* What cannot be changed must not look as if it had been. */
static void parse_change(struct parse *p, struct adapter_request *r)
{
    for (const cJSON *m = p->body->child; m; m = m->next)
        if (strcmp(m->string, "description") && strcmp(m->string, "pinned") &&
            strcmp(m->string, "keep_versions"))
            parse_fail(p, ST_INVALID, m->string,
                       "'%.64s' cannot be changed; 'description', 'pinned' and 'keep_versions' can",
                       m->string);
    parse_string(p, "description", &r->description);
    r->has_pinned = json_get(p->body, "pinned");
    parse_bool(p, "pinned", &r->pinned);
    r->has_keep_versions = cJSON_HasObjectItem(p->body, "keep_versions");
    parse_int(p, "keep_versions", 1, ADAPTER_KEEP_MAX, &r->keep_versions);
}

bool adapter_request_parse(enum adapter_request_kind kind, const char *text, size_t size,
                           struct adapter_request *out, struct api_error *err)
{
    struct adapter_request r = {0};
    struct parse p = {.err = err};
    if (!parse_body(text, size, &r.body, err)) return false;
    p.body = r.body;
    switch (kind) {
    case ADAPTER_ROLLBACK:
        parse_needed(&p, "version", &r.version);
        parse_string(&p, "expected_version", &r.expected_version);
        break;
    case ADAPTER_CHANGE: parse_change(&p, &r); break;
    case ADAPTER_LOAD:
        parse_needed(&p, "lora_path", &r.path);
        parse_bool(&p, "load_inplace", &r.in_place);
        parse_needed(&p, "lora_name", &r.name);
        break;
    case ADAPTER_UNLOAD: parse_needed(&p, "lora_name", &r.name); break;
    }
    if (p.failed) {
        adapter_request_release(&r);
        return false;
    }
    *out = r;
    return true;
}

void adapter_request_release(struct adapter_request *r)
{
    cJSON_Delete(r->body);
    *r = (struct adapter_request){0};
}

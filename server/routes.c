#include "server/routes.h"

#include "server/handlers.h"
#include "server/intake.h"

#include <string.h>

#define MIB ((size_t)1 << 20)

const struct route server_routes[] = {
    {"GET", "/health", .handle = health_get, .open = true},
    {"GET", "/ready", .handle = ready_get, .open = true},
    {"GET", "/v1/models", .handle = models_get},
    {"GET", "/v1/models/{name}", .handle = model_get},
    {"POST", "/v1/completions", BODY_JSON, 32 * MIB, completions_post},
    {"POST", "/v1/chat/completions", BODY_JSON, 32 * MIB, chat_post},
    {"POST", "/tokenize", BODY_JSON, 8 * MIB, tokenize_post},
    {"POST", "/detokenize", BODY_JSON, 8 * MIB, detokenize_post},
    {"GET", "/v1/adapters", .handle = adapters_get},
    {"GET", "/v1/adapters/{name}", .handle = adapter_get},
    {"PUT", "/v1/adapters/{name}", BODY_STREAM, SIZE_MAX, intake_end, adapter_put_begin, intake_data},
    {"PATCH", "/v1/adapters/{name}", BODY_JSON, MIB, adapter_change},
    {"DELETE", "/v1/adapters/{name}", .handle = adapter_delete},
    {"POST", "/v1/adapters/{name}/rollback", BODY_JSON, MIB, adapter_rollback},
    {"GET", "/v1/adapters/{name}/download", .handle = adapter_download},
    {"POST", "/v1/adapters", BODY_JSON, MIB, adapters_post},
    {"GET", "/metrics", .handle = metrics_get},
    {"GET", "/lora-adapters", .handle = lora_adapters_get},
    {"POST", "/lora-adapters", .handle = lora_adapters_post},
    {"POST", "/v1/load_lora_adapter", BODY_JSON, MIB, lora_load_post},
    {"POST", "/v1/unload_lora_adapter", BODY_JSON, MIB, lora_unload_post},
};
const size_t server_route_count = sizeof server_routes / sizeof *server_routes;

/* Segment by segment; {..} takes any non-empty segment. */
static bool path_matches(const char *pattern, const char *path, char *param, size_t param_size)
{
    param[0] = 0;
    while (*pattern) {
        if (*pattern != '{') {
            if (*pattern++ != *path++) return false;
            continue;
        }
        size_t n = strcspn(path, "/");
        if (n == 0 || n >= param_size) return false;
        memcpy(param, path, n);
        param[n] = 0;
        path += n;
        pattern += strcspn(pattern, "}") + 1;
    }
    return !*path;
}

static void allow_add(char *allow, size_t size, const char *method)
{
    size_t n = strlen(allow);
    snprintf(allow + n, size - n, "%s%s", n ? ", " : "", method);
}

const struct route *route_find(const struct route *routes, size_t count, const char *method, const char *path,
                               char *param, size_t param_size, char *allow, size_t allow_size)
{
    const char *wanted = strcmp(method, "HEAD") ? method : "GET";
    allow[0] = 0;
    for (size_t i = 0; i < count; i++) {
        if (!path_matches(routes[i].path, path, param, param_size)) continue;
        if (!strcmp(routes[i].method, wanted)) return &routes[i];
        allow_add(allow, allow_size, routes[i].method);
        if (!strcmp(routes[i].method, "GET")) allow_add(allow, allow_size, "HEAD");
    }
    return NULL;
}

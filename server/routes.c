#include "server/routes.h"

#include "server/handlers.h"
#include "server/intake.h"

#include <string.h>

#define MIB ((size_t)1 << 20)

const struct route server_routes[] = {
    {"GET", "/health", .handle = health_get, .open = true, .summary = "Alive, or still loading"},
    {"GET", "/ready", .handle = ready_get, .open = true, .summary = "Takes requests"},
    {"GET", "/v1/models", .handle = models_get, .summary = "The base model and all adapters"},
    {"GET", "/v1/models/{name}", .handle = model_get, .summary = "One of them"},
    {"POST", "/v1/completions", BODY_JSON, 32 * MIB, completions_post, .summary = "Continue a text"},
    {"POST", "/v1/chat/completions", BODY_JSON, 32 * MIB, chat_post, .summary = "Answer messages"},
    {"POST", "/tokenize", BODY_JSON, 8 * MIB, tokenize_post, .summary = "Text to token ids"},
    {"POST", "/detokenize", BODY_JSON, 8 * MIB, detokenize_post, .summary = "Token ids to text"},
    {"GET", "/v1/adapters", .handle = adapters_get, .summary = "All adapters"},
    {"GET", "/v1/adapters/{name}", .handle = adapter_get, .summary = "An adapter and its versions"},
    {"PUT", "/v1/adapters/{name}", BODY_STREAM, SIZE_MAX, intake_end, adapter_put_begin, intake_data,
     .summary = "Upload an adapter, or a new version of one"},
    {"PATCH", "/v1/adapters/{name}", BODY_JSON, MIB, adapter_change,
     .summary = "Change its description, pin or number of versions kept"},
    {"DELETE", "/v1/adapters/{name}", .handle = adapter_delete, .summary = "Forget an adapter"},
    {"POST", "/v1/adapters/{name}/rollback", BODY_JSON, MIB, adapter_rollback,
     .summary = "Make an earlier version the current one"},
    {"GET", "/v1/adapters/{name}/download", .handle = adapter_download, .summary = "The files of a version"},
    {"POST", "/v1/adapters", BODY_JSON, MIB, adapters_post,
     .summary = "Make a new adapter, which changes nothing until it is trained"},
    {"POST", "/v1/adapters/{name}/train", BODY_JSON, 64 * MIB, adapter_train,
     .summary = "Train an adapter on examples"},
    {"GET", "/v1/adapters/{name}/jobs", .handle = adapter_jobs_get, .summary = "Training jobs of an adapter"},
    {"POST", "/v1/adapters/{name}/forward_backward", BODY_JSON, 64 * MIB, adapter_forward_backward,
     .summary = "Add the gradients of examples, step by step"},
    {"POST", "/v1/adapters/{name}/optim_step", BODY_JSON, MIB, adapter_optim_step,
     .summary = "Use the gradients"},
    {"POST", "/v1/adapters/{name}/publish", BODY_JSON, MIB, adapter_publish,
     .summary = "Publish what was learnt step by step, or the result of a job"},
    {"DELETE", "/v1/adapters/{name}/session", .handle = adapter_session_delete,
     .summary = "Forget what was learnt step by step"},
    {"GET", "/v1/adapters/{name}/routing", .handle = adapter_routing,
     .summary = "Who the experts are chosen by, in training and in serving"},
    {"POST", "/v1/files", BODY_STREAM, SIZE_MAX, intake_end, files_post_begin, intake_data,
     .summary = "Upload a file of examples"},
    {"GET", "/v1/files", .handle = files_get, .summary = "All files"},
    {"GET", "/v1/files/{id}", .handle = file_get, .summary = "A file"},
    {"DELETE", "/v1/files/{id}", .handle = file_delete, .summary = "Delete a file"},
    {"GET", "/v1/files/{id}/content", .handle = file_content_get, .summary = "The bytes of a file"},
    {"POST", "/v1/fine_tuning/jobs", BODY_JSON, MIB, tuning_post,
     .summary = "Train an adapter, as OpenAI does"},
    {"GET", "/v1/fine_tuning/jobs", .handle = tunings_get, .summary = "All training jobs"},
    {"GET", "/v1/fine_tuning/jobs/{id}", .handle = tuning_get, .summary = "A training job"},
    {"DELETE", "/v1/fine_tuning/jobs/{id}", .handle = tuning_delete,
     .summary = "Forget a training job that has ended"},
    {"POST", "/v1/fine_tuning/jobs/{id}/cancel", .handle = tuning_cancel, .summary = "Cancel a training job"},
    {"GET", "/v1/fine_tuning/jobs/{id}/events", .handle = tuning_events_get,
     .summary = "What happened in a training job, the newest first"},
    {"GET", "/v1/fine_tuning/jobs/{id}/checkpoints", .handle = tuning_checkpoints_get,
     .summary = "States a training job can go on from"},
    {"GET", "/metrics", .handle = metrics_get, .summary = "Counters in Prometheus' text format"},
    {"GET", "/v1/openapi.json", .handle = openapi_get, .summary = "This description"},
    {"GET", "/lora-adapters", .handle = lora_adapters_get, .summary = "llama.cpp's list of adapters"},
    {"POST", "/lora-adapters", .handle = lora_adapters_post,
     .summary = "llama.cpp's scales for all requests: refused"},
    {"POST", "/v1/load_lora_adapter", BODY_JSON, MIB, lora_load_post,
     .summary = "vLLM's call: load an adapter from a folder of the server's"},
    {"POST", "/v1/unload_lora_adapter", BODY_JSON, MIB, lora_unload_post,
     .summary = "vLLM's call: forget an adapter"},
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

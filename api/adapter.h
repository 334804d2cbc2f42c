/* The JSON bodies of calls about adapters as one plain struct. */
#ifndef API_ADAPTER_H
#define API_ADAPTER_H

#include "api/error.h"
#include "base/json.h"

#include <stdbool.h>
#include <stddef.h>

enum adapter_request_kind {
    ADAPTER_ROLLBACK, /* {"version", "expected_version"?} */
    ADAPTER_CHANGE,   /* {"description"?, "pinned"?, "keep_versions"?: number or null} */
    ADAPTER_LOAD,     /* vLLM's {"lora_name", "lora_path", "load_inplace"?} */
    ADAPTER_UNLOAD,   /* vLLM's {"lora_name"} */
};

#define ADAPTER_KEEP_MAX 1000000

/* Strings live in `body`; NULL where they were not given and need not be. */
struct adapter_request {
    cJSON *body; /* owned */
    const char *version, *expected_version;
    const char *description;
    bool has_pinned, pinned, has_keep_versions;
    int keep_versions; /* null is 0 */
    const char *name, *path;
    bool in_place;
};

/* On success the caller owes adapter_request_release. On failure err is filled and *out untouched. */
NODISCARD bool adapter_request_parse(enum adapter_request_kind kind, const char *text, size_t size,
                                     struct adapter_request *out, struct api_error *err);
void adapter_request_release(struct adapter_request *r);

#endif

/* What a format's reader gets, and the table it stands in. Only this folder includes it. */
#ifndef ADAPTERS_READER_INT_H
#define ADAPTERS_READER_INT_H

#include "adapters/parts.h"
#include "adapters/reader.h"
#include "base/json.h"
#include "base/safetensors.h"

struct adapter_source {
    const cJSON *config;   /* an object */
    const char *peft_type; /* "" where the configuration has none */
    const struct safetensors *tensors;
    const struct adapter_base *base; /* may be NULL */
};

struct adapter_format {
    const char *name; /* of its bundles */
    bool (*recognise)(const struct adapter_source *src);
    enum status (*read)(const struct adapter_source *src, const char *format, struct adapter_bundle **out,
                        struct error *err);
};

extern const struct adapter_format format_moelora, format_peft_lora;

/* The answer to a tensor that no site can use. */
enum status tensor_unclaimed(const struct safetensor *t, struct error *err);

/* Memory that lives as long as the bundle; NULL where there is none left. */
void *bundle_alloc(struct adapter_bundle *b, size_t count, size_t size);

#endif

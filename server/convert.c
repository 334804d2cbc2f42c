/* `medley adapter convert`. */
#include "server/commands.h"

#include "adapters/convert.h"
#include "base/file.h"
#include "base/gguf.h"
#include "base/strbuf.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define HEADS_MAX (1u << 20) /* any more is refused by what they are compared with */

static enum status head_number(const struct gguf *file, const char *key, uint64_t otherwise, int *out,
                               struct error *err)
{
    uint64_t n = otherwise;
    enum status st = gguf_get_u64(file, key, &n, err);
    if (st && !(st == ST_NOT_FOUND && otherwise)) return st;
    if (n < 1 || n > HEADS_MAX)
        return error_set(err, ST_BAD_FORMAT, "the model's '%s' is %llu", key, (unsigned long long)n);
    *out = (int)n;
    return ST_OK;
}

static enum status heads_of(const struct gguf *file, struct convert_heads *out, struct error *err)
{
    int width = 0;
    enum status st = head_number(file, "llama.attention.head_count", 0, &out->heads, err);
    if (!st) st = head_number(file, "llama.embedding_length", 0, &width, err);
    if (st) return st;
    st = head_number(file, "llama.attention.head_count_kv", (uint64_t)out->heads, &out->kv_heads, err);
    if (st) return st;
    return head_number(file, "llama.attention.key_length", (uint64_t)(width / out->heads), &out->head_dim,
                       err);
}

static enum status heads_read(const char *model, struct convert_heads *out, struct error *err)
{
    struct file_map map = {0};
    struct gguf *file = NULL;
    enum status st = file_map(model, &map, err);
    if (st) return st;
    st = gguf_parse(map.data, map.size, &file, err);
    if (!st) st = heads_of(file, out, err);
    gguf_free(file);
    file_unmap(&map);
    return st;
}

/* Both files, or neither where one is there and may not be replaced. */
static enum status files_put(const struct config *c, const struct strbuf *config,
                             const struct strbuf *tensors, struct error *err)
{
    struct strbuf paths[2] = {{0}, {0}};
    const char *folder = c->words.items[1];
    strbuf_printf(&paths[0], "%s/adapter_model.safetensors", folder);
    strbuf_printf(&paths[1], "%s/adapter_config.json", folder);
    enum status st = paths[0].failed || paths[1].failed ? error_set(err, ST_NOMEM, "out of memory") : ST_OK;
    for (int i = 0; i < 2 && !st && !c->force; i++)
        if (access(paths[i].data, F_OK) == 0)
            st = error_set(err, ST_INVALID, "'%s' is there already; --force replaces it", paths[i].data);
    if (!st) st = file_make_folders(folder, err);
    if (!st) st = file_replace(paths[0].data, tensors->data, tensors->size, err);
    if (!st) st = file_replace(paths[1].data, config->data, config->size, err);
    for (int i = 0; i < 2; i++) strbuf_release(&paths[i]);
    return st;
}

int convert_run(const struct config *c)
{
    struct strbuf config = {0}, tensors = {0};
    struct convert_heads heads = {0};
    struct error err = {0};
    enum convert_format format = !c->format                       ? CONVERT_ANY
                                 : strcmp(c->format, "peft") == 0 ? CONVERT_PEFT
                                                                  : CONVERT_MOELORA;
    enum status st = c->model ? heads_read(c->model, &heads, &err) : ST_OK;
    if (!st) st = adapter_convert(c->words.items[0], format, &heads, &config, &tensors, &err);
    if (!st) st = files_put(c, &config, &tensors, &err);
    strbuf_release(&config);
    strbuf_release(&tensors);
    return st ? command_failed(&err) : 0;
}

#include "training/publish.h"

#include "adapters/convert.h"
#include "adapters/package.h"
#include "base/file.h"
#include "base/strbuf.h"

#include <fcntl.h>
#include <unistd.h>

static enum status no_memory(struct error *err) { return error_set(err, ST_NOMEM, "out of memory"); }

enum status bundle_write(const struct adapter_bundle *b, const struct adapter_base *base, const char *folder,
                         struct error *err)
{
    const struct convert_heads heads = {base->heads, base->kv_heads, base->head_dim};
    struct strbuf config = {0}, tensors = {0}, paths[2] = {{0}, {0}};
    strbuf_printf(&paths[0], "%s/" PACKAGE_CONFIG, folder);
    strbuf_printf(&paths[1], "%s/" PACKAGE_TENSORS, folder);
    enum status st = paths[0].failed || paths[1].failed ? no_memory(err) : ST_OK;
    if (!st) st = bundle_convert(b, CONVERT_ANY, &heads, &config, &tensors, err);
    if (!st) st = file_replace(paths[0].data, config.data, config.size, err);
    if (!st) st = file_replace(paths[1].data, tensors.data, tensors.size, err);
    strbuf_release(&config);
    strbuf_release(&tensors);
    for (int i = 0; i < 2; i++) strbuf_release(&paths[i]);
    return st;
}

/* One file of a folder into another folder. */
static enum status copy(const char *from, const char *to, const char *name, struct error *err)
{
    struct strbuf paths[2] = {{0}, {0}};
    struct file_map map = {0};
    strbuf_printf(&paths[0], "%s/%s", from, name);
    strbuf_printf(&paths[1], "%s/%s", to, name);
    enum status st = paths[0].failed || paths[1].failed ? no_memory(err) : ST_OK;
    if (!st) st = file_map(paths[0].data, &map, err);
    if (!st) st = file_replace(paths[1].data, map.data, map.size, err);
    file_unmap(&map);
    for (int i = 0; i < 2; i++) strbuf_release(&paths[i]);
    return st;
}

static enum status put(struct registry *r, const char *tenant, const char *name, struct upload *u,
                       const char *expected_version, struct put_result *out, struct error *err)
{
    upload_set_source(u, VERSION_TRAIN);
    return registry_put(r, tenant, name, u, expected_version, out, err);
}

enum status folder_publish(struct registry *r, const char *tenant, const char *name, const char *folder,
                           const char *expected_version, struct put_result *out, struct error *err)
{
    struct upload *u = NULL;
    enum status st = upload_open(r, &u, err);
    if (!st) st = copy(folder, upload_path(u), PACKAGE_CONFIG, err);
    if (!st) st = copy(folder, upload_path(u), PACKAGE_TENSORS, err);
    if (!st) st = put(r, tenant, name, u, expected_version, out, err);
    upload_close(u);
    return st;
}

enum status bundle_publish(struct registry *r, const char *tenant, const char *name,
                           const struct adapter_bundle *b, const struct adapter_base *base,
                           const char *expected_version, struct put_result *out, struct error *err)
{
    struct upload *u = NULL;
    enum status st = upload_open(r, &u, err);
    if (!st) st = bundle_write(b, base, upload_path(u), err);
    if (!st) st = put(r, tenant, name, u, expected_version, out, err);
    upload_close(u);
    return st;
}

#include "server/local_adapters.h"

#include "adapters/registry.h"
#include "base/file.h"
#include "server/commands.h"
#include "server/service.h"

#include <ftw.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

struct local_adapters {
    char folder[256];
    struct registry *registry;
    struct lease *leases[OPTION_LIST_MAX];
    size_t count;
};

static int remove_entry(const char *path, const struct stat *s, int type, struct FTW *w)
{
    (void)s;
    (void)type;
    (void)w;
    return remove(path);
}

/* from_folder/from to to_folder/to; from "" is from_folder itself. */
static enum status copy(const char *from_folder, const char *from, const char *to_folder, const char *to,
                        struct error *err)
{
    char *source = NULL, *target = NULL;
    struct file_map map = {0};
    enum status st = ST_NOMEM;
    if (asprintf(&source, "%s%s%s", from_folder, *from ? "/" : "", from) < 0) source = NULL;
    if (asprintf(&target, "%s/%s", to_folder, to) < 0) target = NULL;
    if (source && target) st = file_map(source, &map, err);
    if (!st) {
        st = file_replace(target, map.data, map.size, err);
        file_unmap(&map);
    }
    free(source);
    free(target);
    return st;
}

static enum status copy_pair(const char *folder, const char *tensors, const char *to, struct error *err)
{
    enum status st = copy(folder, "adapter_config.json", to, "adapter_config.json", err);
    return st ? st : copy(folder, tensors, to, "adapter_model.safetensors", err);
}

static enum status copy_package(const char *path, const char *to, struct error *err)
{
    struct stat s;
    if (stat(path, &s) == 0 && S_ISDIR(s.st_mode))
        return copy_pair(path, "adapter_model.safetensors", to, err);
    const char *dot = strrchr(path, '.');
    if (!dot || strcmp(dot, ".safetensors") != 0) return copy(path, "", to, "body", err);
    char *for_folder = strdup(path), *for_name = strdup(path);
    enum status st =
        for_folder && for_name ? copy_pair(dirname(for_folder), basename(for_name), to, err) : ST_NOMEM;
    free(for_folder);
    free(for_name);
    return st;
}

static enum status add(struct local_adapters *a, const char *path, struct error *err)
{
    struct upload *u = NULL;
    struct put_result result;
    char name[16];
    snprintf(name, sizeof name, "adapter%zu", a->count);
    enum status st = upload_open(a->registry, &u, err);
    if (!st) st = copy_package(path, upload_path(u), err);
    if (!st) st = registry_put(a->registry, TENANT, name, u, NULL, &result, err);
    if (!st) st = registry_lease(a->registry, TENANT, name, NULL, &a->leases[a->count], err);
    if (!st) a->count++;
    if (u) upload_close(u);
    return st;
}

enum status local_adapters_open(const struct config *c, const struct engine *e, struct device *device,
                                struct local_adapters **out, struct error *err)
{
    struct local_adapters *a = calloc(1, sizeof *a);
    struct registry_config config;
    enum status st = ST_OK;
    if (!a) return error_set(err, ST_NOMEM, "out of memory");
    if (c->adapters.count) {
        const char *temporary = getenv("TMPDIR");
        snprintf(a->folder, sizeof a->folder, "%s/medley-XXXXXX",
                 temporary && *temporary ? temporary : "/tmp");
        if (!mkdtemp(a->folder)) {
            st = file_error(err, "make a temporary folder", a->folder);
            a->folder[0] = 0;
        }
        registry_config_fill(c, e, device, a->folder, &config);
        if (!st) st = registry_open(&config, &a->registry, err);
    }
    for (size_t i = 0; i < c->adapters.count && !st; i++) st = add(a, c->adapters.items[i], err);
    if (st) {
        local_adapters_close(a);
        return st;
    }
    *out = a;
    return ST_OK;
}

void local_adapters_close(struct local_adapters *a)
{
    if (!a) return;
    for (size_t i = 0; i < a->count; i++) lease_release(a->leases[i]);
    registry_close(a->registry);
    if (a->folder[0]) nftw(a->folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    free(a);
}

size_t local_adapters_members(const struct local_adapters *a, struct lr_member *members)
{
    for (size_t i = 0; i < a->count; i++) members[i] = (struct lr_member){&lease_view(a->leases[i])->lr, 1};
    return a->count;
}

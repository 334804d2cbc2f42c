#include "server/pack_path.h"

#include <limits.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DIGEST_BYTES crypto_generichash_BYTES_MIN

/* Models of one name in several folders must not take turns in one file: the name gets a digest of where the
 * model is. One that moves leaves its file behind; the folder may be emptied at any time. */
static char *path_in_folder(const char *folder, const char *below, const char *model)
{
    char real[PATH_MAX];
    const char *full = realpath(model, real) ? real : model;
    unsigned char digest[DIGEST_BYTES];
    crypto_generichash(digest, sizeof digest, (const unsigned char *)full, strlen(full), NULL, 0);
    char hex[17];
    sodium_bin2hex(hex, sizeof hex, digest, 8);
    const char *slash = strrchr(full, '/');
    char *path;
    return asprintf(&path, "%s%s/%s-%s.pack", folder, below, slash ? slash + 1 : full, hex) < 0 ? NULL : path;
}

static char *path_in_cache(const char *model, bool *none)
{
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    *none = false;
    if (cache && cache[0]) return path_in_folder(cache, "/medley/packs", model);
    if (home && home[0]) return path_in_folder(home, "/.cache/medley/packs", model);
    *none = true;
    return NULL;
}

enum status pack_path_resolve(const char *model, const char *choice, char *out[PACK_PATHS], struct error *err)
{
    char *first = NULL, *second = NULL;
    bool no_cache = true;
    if (choice && !strcmp(choice, "off")) return ST_OK;
    if (choice)
        first = path_in_folder(choice, "", model);
    else if (asprintf(&first, "%s.pack", model) < 0)
        first = NULL;
    if (!choice) second = path_in_cache(model, &no_cache);
    if (!first || (!second && !no_cache)) {
        free(first);
        free(second);
        return error_set(err, ST_NOMEM, "out of memory");
    }
    out[0] = first;
    out[1] = second;
    return ST_OK;
}

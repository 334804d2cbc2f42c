#include "adapters/package.h"

#include "base/strbuf.h"

#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char *path_join(const char *folder, const char *name)
{
    struct strbuf b = {0};
    strbuf_printf(&b, "%s/%s", folder, name);
    return strbuf_take(&b);
}

static enum status no_memory(struct error *err) { return error_set(err, ST_NOMEM, "out of memory"); }

/* A new file of the folder; then member_close is owed. */
static enum status member_make(const char *folder, const char *name, char **path_out, int *fd_out,
                               struct error *err)
{
    char *path = path_join(folder, name);
    if (!path) return no_memory(err);
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) {
        enum status st = file_error(err, "make", path);
        free(path);
        return st;
    }
    *path_out = path;
    *fd_out = fd;
    return ST_OK;
}

static enum status member_close(char *path, int fd, enum status st, struct error *err)
{
    if (close(fd) && !st) st = file_error(err, "write", path);
    free(path);
    return st;
}

/* --- archives --- */

struct extraction {
    struct archive *archive;
    const char *folder;
    size_t bytes_left;
    char *inner_folder; /* where in the archive the first of the two files was found; owned */
    bool has_config, has_tensors;
    bool has_pickle;
};

static enum status archive_failed(struct extraction *x, struct error *err)
{
    const char *reason = archive_error_string(x->archive);
    if (archive_errno(x->archive) == ENOMEM) return no_memory(err);
    return error_set(err, ST_BAD_FORMAT, "the archive cannot be read: %.200s",
                     reason ? reason : "it is damaged");
}

/* Reads the current entry to its end; what it holds goes to fd, or nowhere if that is negative. */
static enum status entry_read(struct extraction *x, int fd, const char *path, struct error *err)
{
    char buffer[65536];
    for (;;) {
        la_ssize_t n = archive_read_data(x->archive, buffer, sizeof buffer);
        if (n == 0) return ST_OK;
        if (n < 0) return archive_failed(x, err);
        if ((size_t)n > x->bytes_left)
            return error_set(err, ST_TOO_LARGE, "the archive unpacks to more bytes than an upload may have");
        x->bytes_left -= (size_t)n;
        if (fd >= 0 && !file_write_all(fd, buffer, (size_t)n)) return file_error(err, "write", path);
    }
}

static enum status entry_write(struct extraction *x, const char *name, struct error *err)
{
    char *path = NULL;
    int fd = -1;
    enum status st = member_make(x->folder, name, &path, &fd, err);
    if (st) return st;
    st = entry_read(x, fd, path, err);
    return member_close(path, fd, st, err);
}

/* One of the two files: must be a plain file, beside the other, and the only one of its name. */
static enum status member_take(struct extraction *x, struct archive_entry *entry, const char *path,
                               const char *name, bool *has, struct error *err)
{
    if (archive_entry_filetype(entry) != AE_IFREG || archive_entry_hardlink(entry))
        return error_set(err, ST_REJECTED, "'%.200s' in the archive is not a plain file", path);
    char *inner = strndup(path, (size_t)(name - path));
    if (!inner) return no_memory(err);
    if (*has || (x->inner_folder && strcmp(x->inner_folder, inner) != 0)) {
        free(inner);
        return error_set(
            err, ST_REJECTED,
            "the archive holds more than one adapter ('%.200s' is the second); send one at a time", path);
    }
    free(x->inner_folder);
    x->inner_folder = inner;
    *has = true;
    return entry_write(x, name, err);
}

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), k = strlen(end);
    return n >= k && strcmp(s + n - k, end) == 0;
}

static enum status entry_take(struct extraction *x, struct archive_entry *entry, struct error *err)
{
    const char *path = archive_entry_pathname_utf8(entry);
    if (!path) path = archive_entry_pathname(entry);
    if (!path) path = "";
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    if (strcmp(name, PACKAGE_CONFIG) == 0) return member_take(x, entry, path, name, &x->has_config, err);
    if (strcmp(name, PACKAGE_TENSORS) == 0) return member_take(x, entry, path, name, &x->has_tensors, err);
    /* Trainers leave pickles beside the adapter; they are never opened. */
    x->has_pickle |= ends_with(name, ".bin") || ends_with(name, ".pt") || ends_with(name, ".pth") ||
                     ends_with(name, ".pkl");
    return entry_read(x, -1, path, err);
}

static enum status member_missing(const char *name, bool has_pickle, struct error *err)
{
    if (has_pickle && strcmp(name, PACKAGE_TENSORS) == 0)
        return error_set(
            err, ST_UNSUPPORTED,
            "the weights are a pickle (.bin or .pt), which can run code when it is read; save the adapter "
            "as " PACKAGE_TENSORS " (PEFT: save_pretrained(..., safe_serialization=True))");
    return error_set(err, ST_REJECTED, "there is no %s in the upload", name);
}

static enum status entries_take(struct extraction *x, struct error *err)
{
    enum status st = ST_OK;
    for (int count = 0; !st; count++) {
        struct archive_entry *entry;
        int rc = archive_read_next_header(x->archive, &entry);
        if (rc == ARCHIVE_EOF) break;
        if (rc != ARCHIVE_OK && rc != ARCHIVE_WARN) return archive_failed(x, err);
        if (count == PACKAGE_ENTRIES_MAX)
            return error_set(err, ST_REJECTED, "the archive has more than %d entries", PACKAGE_ENTRIES_MAX);
        st = entry_take(x, entry, err);
    }
    if (st) return st;
    if (!x->has_config) return member_missing(PACKAGE_CONFIG, x->has_pickle, err);
    return x->has_tensors ? ST_OK : member_missing(PACKAGE_TENSORS, x->has_pickle, err);
}

/* --- single files --- */

/* The first bytes of a file; what it lacks of them is 0. */
#define HEAD_BYTES 10
static enum status head_read(const char *path, char head[HEAD_BYTES], struct error *err)
{
    memset(head, 0, HEAD_BYTES);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return file_error(err, "open", path);
    ssize_t n = read(fd, head, HEAD_BYTES);
    enum status st = n < 0 ? file_error(err, "read", path) : ST_OK;
    close(fd);
    return st;
}

static enum status file_put(const char *folder, const char *name, const void *data, size_t size,
                            struct error *err)
{
    char *path = NULL;
    int fd = -1;
    enum status st = member_make(folder, name, &path, &fd, err);
    if (st) return st;
    if (!file_write_all(fd, data, size)) st = file_error(err, "write", path);
    return member_close(path, fd, st, err);
}

/* An adapter in a GGUF file takes the place of the tensors. It holds its own configuration. */
static enum status gguf_take(const char *path, const char *folder, size_t bytes_max, struct error *err)
{
    struct file_map map;
    enum status st = file_map(path, &map, err);
    if (st) return st;
    st = map.size > bytes_max
             ? error_set(err, ST_TOO_LARGE, "the adapter has %zu bytes; at most %zu are allowed", map.size,
                         bytes_max)
             : file_put(folder, PACKAGE_TENSORS, map.data, map.size, err);
    file_unmap(&map);
    return st ? st : file_put(folder, PACKAGE_CONFIG, "{}\n", 3, err);
}

/* What a file that is no archive seems to be. */
static enum status not_an_archive(const char *path, struct error *err)
{
    char head[HEAD_BYTES];
    enum status st = head_read(path, head, err);
    if (st) return st;
    if (head[8] == '{')
        return error_set(err, ST_REJECTED,
                         "this is a safetensors file alone; send " PACKAGE_CONFIG
                         " with it (as multipart/form-data or in a tar)");
    return error_set(err, ST_BAD_FORMAT,
                     "this is not an archive; expected tar (also gzip or zstd) or zip with " PACKAGE_CONFIG
                     " and " PACKAGE_TENSORS ", or a GGUF file");
}

static enum status archive_take(const char *archive, const char *folder, size_t bytes_max, struct error *err)
{
    struct extraction x = {.folder = folder, .bytes_left = bytes_max, .archive = archive_read_new()};
    if (!x.archive) return no_memory(err);
    archive_read_support_filter_gzip(x.archive);
    archive_read_support_filter_zstd(x.archive);
    archive_read_support_format_tar(x.archive);
    archive_read_support_format_zip(x.archive);

    enum status st;
    if (archive_read_open_filename(x.archive, archive, 65536) != ARCHIVE_OK)
        st = not_an_archive(archive, err);
    else
        st = entries_take(&x, err);
    /* Formats are told apart at the first entry. */
    if (st == ST_BAD_FORMAT && archive_format(x.archive) == 0) st = not_an_archive(archive, err);
    free(x.inner_folder);
    archive_read_free(x.archive);
    return st;
}

enum status package_extract(const char *path, const char *folder, size_t bytes_max, struct error *err)
{
    char head[HEAD_BYTES];
    enum status st = head_read(path, head, err);
    if (st) return st;
    return memcmp(head, "GGUF", 4) == 0 ? gguf_take(path, folder, bytes_max, err)
                                        : archive_take(path, folder, bytes_max, err);
}

/* --- folders --- */

static enum status body_unpack(const char *folder, size_t bytes_max, struct error *err)
{
    char *body = path_join(folder, PACKAGE_BODY);
    if (!body) return no_memory(err);
    enum status st = ST_OK;
    if (access(body, F_OK) == 0) {
        st = package_extract(body, folder, bytes_max, err);
        unlink(body);
    }
    free(body);
    return st;
}

static enum status member_map(const char *path, const char *name, struct file_map *out, struct error *err)
{
    if (!path) return no_memory(err);
    enum status st = file_map(path, out, err);
    return st == ST_NOT_FOUND ? member_missing(name, false, err) : st;
}

enum status package_map(const char *folder, const char *tensors_path, size_t bytes_max, struct package *out,
                        struct error *err)
{
    struct package p = {
        .config_path = path_join(folder, PACKAGE_CONFIG),
        .tensors_path = tensors_path ? strdup(tensors_path) : path_join(folder, PACKAGE_TENSORS),
    };
    enum status st = member_map(p.config_path, PACKAGE_CONFIG, &p.config, err);
    if (!st) st = member_map(p.tensors_path, PACKAGE_TENSORS, &p.tensors, err);
    if (!st && (p.config.size > bytes_max || p.tensors.size > bytes_max - p.config.size))
        st = error_set(err, ST_TOO_LARGE, "the adapter has %zu bytes; at most %zu are allowed",
                       p.config.size + p.tensors.size, bytes_max);
    if (st) {
        package_close(&p);
        return st;
    }
    *out = p;
    return ST_OK;
}

enum status package_open(const char *folder, size_t bytes_max, struct package *out, struct error *err)
{
    enum status st = body_unpack(folder, bytes_max, err);
    return st ? st : package_map(folder, NULL, bytes_max, out, err);
}

/* Needs no memory, so that nothing is left behind where there is none. */
static void members_remove(const char *folder)
{
    static const char *const names[] = {PACKAGE_CONFIG, PACKAGE_TENSORS};
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) unlinkat(fd, names[i], 0);
    close(fd);
    rmdir(folder);
}

static enum status archive_map(const char *path, char *folder, struct package *out, struct error *err)
{
    if (!mkdtemp(folder)) return file_error(err, "make the folder", folder);
    enum status st = package_extract(path, folder, SIZE_MAX / 2, err);
    if (!st) st = package_map(folder, NULL, SIZE_MAX / 2, out, err);
    members_remove(folder); /* what is mapped stays until it is unmapped */
    return st;
}

static bool names_safetensors(const char *path)
{
    size_t n = strlen(path);
    return n > 12 && strcmp(path + n - 12, ".safetensors") == 0;
}

enum status package_map_path(const char *path, struct package *out, struct error *err)
{
    struct stat info;
    char copy[PATH_MAX];
    if (stat(path, &info)) return file_error(err, "open", path);
    if (S_ISDIR(info.st_mode)) return package_map(path, NULL, SIZE_MAX / 2, out, err);
    if (names_safetensors(path)) {
        snprintf(copy, sizeof copy, "%s", path);
        return package_map(dirname(copy), path, SIZE_MAX / 2, out, err);
    }
    const char *temporary = getenv("TMPDIR");
    snprintf(copy, sizeof copy, "%s/medley-XXXXXX", temporary && *temporary ? temporary : "/tmp");
    return archive_map(path, copy, out, err);
}

void package_close(struct package *p)
{
    file_unmap(&p->config);
    file_unmap(&p->tensors);
    free(p->config_path);
    free(p->tensors_path);
    *p = (struct package){0};
}

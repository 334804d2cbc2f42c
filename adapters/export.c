#include "adapters/export.h"

#include "adapters/package.h"
#include "base/strbuf.h"

#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define READ_BYTES ((size_t)256 << 10)

struct export
{
    struct version_files files;
    struct archive *archive; /* NULL: a GGUF file, which was uploaded alone, stays alone */
    struct strbuf *out;      /* where the archive's bytes go, during export_read */
    int part;                /* 0: configuration, 1: tensors, 2: the end */
    bool begun;              /* the part's header is written */
    char *buffer;            /* [READ_BYTES], owned */
};

static la_ssize_t archive_out(struct archive *a, void *ctx, const void *bytes, size_t n)
{
    struct export *e = ctx;
    strbuf_append(e->out, bytes, n);
    if (!e->out->failed) return (la_ssize_t)n;
    archive_set_error(a, ENOMEM, "out of memory");
    return -1;
}

/* libarchive gives no reason where it had no memory for its filters. */
static enum status archive_failed(struct export *e, struct error *err)
{
    const char *why = archive_error_string(e->archive);
    if (!why || archive_errno(e->archive) == ENOMEM) return error_set(err, ST_NOMEM, "out of memory");
    return error_set(err, ST_IO, "cannot write the archive: %s", why);
}

static enum status tar_open(struct export *e, struct error *err)
{
    e->archive = archive_write_new();
    if (!e->archive) return error_set(err, ST_NOMEM, "out of memory");
    if (archive_write_set_format_pax_restricted(e->archive) != ARCHIVE_OK ||
        archive_write_set_bytes_per_block(e->archive, 0) != ARCHIVE_OK ||
        archive_write_open(e->archive, e, NULL, archive_out, NULL) != ARCHIVE_OK)
        return archive_failed(e, err);
    return ST_OK;
}

static bool is_gguf(int fd)
{
    char head[4];
    return pread(fd, head, sizeof head, 0) == sizeof head && memcmp(head, "GGUF", sizeof head) == 0;
}

enum status export_open(struct registry *r, const char *tenant, const char *name, const char *version,
                        struct export **out, struct error *err)
{
    struct export *e = calloc(1, sizeof *e);
    if (!e) return error_set(err, ST_NOMEM, "out of memory");
    e->files.config_fd = e->files.tensors_fd = -1;
    e->buffer = malloc(READ_BYTES);
    enum status st = e->buffer ? registry_open_files(r, tenant, name, version, &e->files, err)
                               : error_set(err, ST_NOMEM, "out of memory");
    if (!st && !is_gguf(e->files.tensors_fd))
        st = tar_open(e, err);
    else
        e->part = 1; /* the configuration beside it is ours */
    if (st) {
        export_close(e);
        return st;
    }
    *out = e;
    return ST_OK;
}

void export_close(struct export *e)
{
    if (!e) return;
    struct strbuf dropped = {0};
    e->out = &dropped; /* an unfinished archive's last bytes */
    if (e->archive) archive_write_free(e->archive);
    strbuf_release(&dropped);
    if (e->files.config_fd >= 0) close(e->files.config_fd);
    if (e->files.tensors_fd >= 0) close(e->files.tensors_fd);
    free(e->buffer);
    free(e);
}

const char *export_version(const struct export *e) { return e->files.record.version; }
const char *export_type(const struct export *e)
{
    return e->archive ? "application/x-tar" : "application/octet-stream";
}
const char *export_extension(const struct export *e) { return e->archive ? "tar" : "gguf"; }

static enum status part_begin(struct export *e, int fd, struct error *err)
{
    struct stat info;
    e->begun = true;
    if (!e->archive) return ST_OK;
    if (fstat(fd, &info)) return file_error(err, "look at", PACKAGE_TENSORS);
    struct archive_entry *entry = archive_entry_new();
    if (!entry) return error_set(err, ST_NOMEM, "out of memory");
    archive_entry_set_pathname(entry, e->part ? PACKAGE_TENSORS : PACKAGE_CONFIG);
    archive_entry_set_filetype(entry, AE_IFREG);
    archive_entry_set_perm(entry, 0644);
    archive_entry_set_size(entry, info.st_size);
    archive_entry_set_mtime(entry, e->files.record.created, 0);
    int rc = archive_write_header(e->archive, entry);
    archive_entry_free(entry);
    return rc == ARCHIVE_OK ? ST_OK : archive_failed(e, err);
}

/* A step on: the header of a part, some of its bytes, or the end of it. */
static enum status export_step(struct export *e, struct error *err)
{
    int fd = e->part ? e->files.tensors_fd : e->files.config_fd;
    if (!e->begun) return part_begin(e, fd, err);
    ssize_t n = read(fd, e->buffer, READ_BYTES);
    if (n < 0) return errno == EINTR ? ST_OK : file_error(err, "read", PACKAGE_TENSORS);
    if (n == 0) {
        e->part++;
        e->begun = false;
        if (e->part == 2 && e->archive && archive_write_close(e->archive) != ARCHIVE_OK)
            return archive_failed(e, err);
        return ST_OK;
    }
    if (!e->archive)
        strbuf_append(e->out, e->buffer, (size_t)n);
    else if (archive_write_data(e->archive, e->buffer, (size_t)n) != n)
        return archive_failed(e, err);
    return ST_OK;
}

enum status export_read(struct export *e, size_t bytes_wanted, struct strbuf *out, struct error *err)
{
    size_t before = out->size;
    enum status st = ST_OK;
    e->out = out;
    while (!st && e->part < 2 && out->size - before < bytes_wanted) st = export_step(e, err);
    if (!st && out->failed) st = error_set(err, ST_NOMEM, "out of memory");
    return st;
}

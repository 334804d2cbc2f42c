/* Files of examples: received, listed, handed out. */
#include "training/jobs_int.h"

#include "base/file.h"
#include "base/utf8.h"
#include "training/dataset_int.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct train_upload {
    struct jobs *jobs;
    char tenant[TENANT_MAX];
    char id[TRAIN_ID_MAX];
    struct train_path path; /* in staging */
    int fd;
    size_t bytes, held; /* of this one; of the tenant's other files */
};

static enum status read_sum(void *ctx, sqlite3_stmt *row)
{
    *(size_t *)ctx = (size_t)sqlite3_column_int64(row, 0);
    return ST_OK;
}

static enum status tenant_bytes(struct jobs *j, const char *tenant, size_t *out, struct error *err)
{
    return db_run(j->db, err, read_sum, out, "SELECT coalesce(sum(bytes), 0) FROM file WHERE tenant = ?1",
                  "t", tenant);
}

/* --- receiving --- */

enum status train_upload_open(struct jobs *j, const char *tenant, struct train_upload **out,
                              struct error *err)
{
    if (strlen(tenant) >= TENANT_MAX) return error_set(err, ST_INVALID, "the tenant's name is too long");
    struct train_upload *u = calloc(1, sizeof *u);
    if (!u) return jobs_no_memory(err);
    u->jobs = j;
    snprintf(u->tenant, sizeof u->tenant, "%s", tenant);
    jobs_new_id("file", u->id);
    u->path = jobs_path(j, "staging/%s", u->id);
    enum status st = tenant_bytes(j, tenant, &u->held, err);
    u->fd = st ? -1 : open(u->path.text, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (!st && u->fd < 0) st = file_error(err, "make", u->path.text);
    if (st)
        free(u);
    else
        *out = u;
    return st;
}

static enum status check_bytes(const struct train_upload *u, size_t bytes, size_t held, struct error *err)
{
    const struct jobs_config *c = &u->jobs->config;
    if (bytes > c->file_bytes_max)
        return error_set(err, ST_TOO_LARGE, "a file may have %zu bytes at most", c->file_bytes_max);
    if (bytes > c->tenant_bytes_max || held > c->tenant_bytes_max - bytes)
        return error_set(err, ST_FULL, "all files together may have %zu bytes: delete some",
                         c->tenant_bytes_max);
    return ST_OK;
}

enum status train_upload_write(struct train_upload *u, const void *bytes, size_t size, struct error *err)
{
    enum status st = check_bytes(u, u->bytes + size, u->held, err);
    if (st) return st;
    if (!file_write_all(u->fd, bytes, size)) return file_error(err, "write", u->path.text);
    u->bytes += size;
    return ST_OK;
}

static void upload_free(struct train_upload *u)
{
    if (u->fd >= 0) close(u->fd);
    unlink(u->path.text); /* moved away where it was kept */
    free(u);
}

static enum status check_names(const char *name, const char *purpose, struct error *err)
{
    if (!*name || strlen(name) >= TRAIN_FILE_NAME_MAX || !utf8_valid(name, strlen(name)))
        return error_set(err, ST_INVALID, "a file's name must have 1 to %d bytes of UTF-8",
                         TRAIN_FILE_NAME_MAX - 1);
    if (strcmp(purpose, "fine-tune") != 0)
        return error_set(err, ST_INVALID, "purpose: '%.64s' is not known here, only fine-tune is", purpose);
    return ST_OK;
}

static enum status keep(struct train_upload *u, const struct train_file *f, struct error *err)
{
    struct db *db = u->jobs->db;
    struct train_path kept = jobs_path(u->jobs, "files/%s", u->id);
    size_t held = 0;
    enum status st = file_move(u->path.text, kept.text, err);
    if (st) return st;
    st = db_begin(db, err);
    if (!st) {
        st = tenant_bytes(u->jobs, u->tenant, &held, err); /* others may have come meanwhile */
        if (!st) st = check_bytes(u, u->bytes, held, err);
        if (!st)
            st = db_run(db, err, NULL, NULL,
                        "INSERT INTO file (id, tenant, name, purpose, created, bytes) VALUES (?1, ?2, ?3, "
                        "?4, ?5, ?6)",
                        "ttttii", f->id, u->tenant, f->name, f->purpose, f->created, (int64_t)f->bytes);
        st = db_end(db, st, err);
    }
    if (st) unlink(kept.text);
    return st;
}

enum status train_upload_finish(struct train_upload *u, const char *name, const char *purpose,
                                struct train_file *out, struct error *err)
{
    struct train_file f = {.created = jobs_now(), .bytes = u->bytes};
    enum status st = check_names(name, purpose, err);
    if (!st) {
        memcpy(f.id, u->id, sizeof f.id);
        snprintf(f.name, sizeof f.name, "%s", name);
        snprintf(f.purpose, sizeof f.purpose, "%s", purpose);
        st = keep(u, &f, err);
    }
    upload_free(u);
    if (!st) *out = f;
    return st;
}

void train_upload_drop(struct train_upload *u)
{
    if (u) upload_free(u);
}

/* --- asking --- */

struct file_list {
    struct train_file *file;
    size_t count, capacity;
    int64_t serial; /* of the last one */
};

static enum status file_add(void *ctx, sqlite3_stmt *row)
{
    struct file_list *l = ctx;
    if (array_grow((void **)&l->file, &l->capacity, l->count, sizeof *l->file)) return ST_NOMEM;
    struct train_file *f = &l->file[l->count++];
    l->serial = sqlite3_column_int64(row, 0);
    *f = (struct train_file){.created = sqlite3_column_int64(row, 4),
                             .bytes = (size_t)sqlite3_column_int64(row, 5)};
    db_text(row, 1, f->id, sizeof f->id);
    db_text(row, 2, f->name, sizeof f->name);
    db_text(row, 3, f->purpose, sizeof f->purpose);
    return ST_OK;
}

#define FILE_COLUMNS "serial, id, name, purpose, created, bytes"

static enum status find(struct jobs *j, const char *tenant, const char *id, struct train_file *out,
                        int64_t *serial, struct error *err)
{
    struct file_list l = {0};
    enum status st =
        db_run(j->db, err, file_add, &l, "SELECT " FILE_COLUMNS " FROM file WHERE tenant = ?1 AND id = ?2",
               "tt", tenant, id);
    if (!st && l.count == 0) st = error_set(err, ST_NOT_FOUND, "there is no file '%.64s'", id);
    if (!st) {
        *out = l.file[0];
        *serial = l.serial;
    }
    free(l.file);
    return st;
}

enum status jobs_file_get(struct jobs *j, const char *tenant, const char *id, struct train_file *out,
                          struct error *err)
{
    int64_t serial;
    return find(j, tenant, id, out, &serial, err);
}

enum status jobs_file_list(struct jobs *j, const char *tenant, const char *after, size_t limit,
                           struct train_file **out, size_t *count_out, bool *more, struct error *err)
{
    struct file_list l = {0};
    struct train_file last;
    int64_t before = INT64_MAX;
    enum status st = after ? find(j, tenant, after, &last, &before, err) : ST_OK;
    if (!st)
        st = db_run(j->db, err, file_add, &l,
                    "SELECT " FILE_COLUMNS
                    " FROM file WHERE tenant = ?1 AND serial < ?2 ORDER BY serial DESC LIMIT ?3",
                    "tii", tenant, before, (int64_t)limit + 1);
    if (st) {
        free(l.file);
        return st;
    }
    *more = l.count > limit;
    *count_out = *more ? limit : l.count;
    *out = l.file;
    return ST_OK;
}

enum status jobs_file_content(struct jobs *j, const char *tenant, const char *id, int *fd_out,
                              size_t *bytes_out, struct error *err)
{
    struct train_file f;
    enum status st = jobs_file_get(j, tenant, id, &f, err);
    if (st) return st;
    struct train_path path = jobs_path(j, "files/%s", f.id);
    int fd = open(path.text, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return file_error(err, "open", path.text);
    *fd_out = fd;
    *bytes_out = f.bytes;
    return ST_OK;
}

enum status jobs_file_delete(struct jobs *j, const char *tenant, const char *id, struct error *err)
{
    struct train_file f;
    enum status st = jobs_file_get(j, tenant, id, &f, err);
    if (!st)
        st = db_run(j->db, err, NULL, NULL, "DELETE FROM file WHERE tenant = ?1 AND id = ?2", "tt", tenant,
                    f.id);
    if (!st) unlink(jobs_path(j, "files/%s", f.id).text);
    return st;
}

#include "base/file.h"

#include "base/memory.h"
#include "base/strbuf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum status file_error(struct error *err, const char *what, const char *path)
{
    int e = errno;
    enum status st = e == ENOENT || e == ENOTDIR  ? ST_NOT_FOUND
                     : e == ENOSPC || e == EDQUOT ? ST_NO_SPACE
                     : e == ENOMEM                ? ST_NOMEM
                                                  : ST_IO;
    char reason[128];
    return error_set(err, st, "cannot %s '%s': %s", what, path, strerror_r(e, reason, sizeof reason));
}

enum status file_map(const char *path, struct file_map *out, struct error *err)
{
    enum status st = ST_OK;
    struct file_map m = {0};
    /* Without blocking, lest a FIFO wait for its writer. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return file_error(err, "open", path);

    if (fstat(fd, &m.info)) {
        st = file_error(err, "read the size of", path);
    } else if (!S_ISREG(m.info.st_mode)) {
        st = error_set(err, ST_IO, "cannot read '%s': it is not a regular file", path);
    } else if (m.info.st_size > 0) {
        m.size = (size_t)m.info.st_size;
        void *data = mmap(NULL, m.size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (data == MAP_FAILED) st = file_error(err, "map", path);
        m.data = data;
    }
    close(fd);
    if (!st) *out = m;
    return st;
}

void file_unmap(struct file_map *m)
{
    if (m->data) munmap((void *)m->data, m->size);
    *m = (struct file_map){0};
}

bool file_write_all(int fd, const void *bytes, size_t size)
{
    const char *data = bytes;
    while (size) {
        ssize_t n = write(fd, data, size);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return false;
        data += n;
        size -= (size_t)n;
    }
    return true;
}

enum status file_sync_folder_of(const char *path, struct error *err)
{
    const char *slash = strrchr(path, '/');
    char *folder = !slash ? strdup(".") : strndup(path, slash == path ? 1 : (size_t)(slash - path));
    if (!folder) return error_set(err, ST_NOMEM, "cannot sync the folder of '%s': out of memory", path);

    enum status st = ST_OK;
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || fsync(fd)) st = file_error(err, "sync", folder);
    if (fd >= 0) close(fd);
    free(folder);
    return st;
}

enum status file_replace(const char *path, const void *data, size_t size, struct error *err)
{
    struct strbuf name = {0};
    strbuf_printf(&name, "%s.XXXXXX", path);
    char *temporary = strbuf_take(&name);
    if (!temporary) return error_set(err, ST_NOMEM, "cannot write '%s': out of memory", path);

    enum status st = ST_OK;
    int fd = mkostemp(temporary, O_CLOEXEC);
    if (fd < 0) {
        st = file_error(err, "make a temporary file beside", path);
        goto done;
    }
    if (!file_write_all(fd, data, size) || fsync(fd)) st = file_error(err, "write", temporary);
    if (close(fd) && !st) st = file_error(err, "write", temporary);
    if (!st && rename(temporary, path)) st = file_error(err, "replace", path);
    if (st)
        unlink(temporary);
    else
        st = file_sync_folder_of(path, err);
done:
    free(temporary);
    return st;
}

enum status file_move(const char *from, const char *to, struct error *err)
{
    int fd = open(from, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return file_error(err, "open", from);
    enum status st = fsync(fd) ? file_error(err, "sync", from) : ST_OK;
    close(fd);
    if (!st && rename(from, to)) st = file_error(err, "rename", from);
    return st ? st : file_sync_folder_of(to, err);
}

enum status file_make_folders(const char *path, struct error *err)
{
    char *copy = strdup(path);
    if (!copy) return error_set(err, ST_NOMEM, "cannot make the folder '%s': out of memory", path);

    enum status st = ST_OK;
    for (char *p = copy; !st && *p;) {
        p += strspn(p, "/");
        p += strcspn(p, "/");
        char rest = *p;
        *p = '\0';
        struct stat info;
        if (mkdir(copy, 0700) && errno != EEXIST)
            st = file_error(err, "make the folder", copy);
        else if (stat(copy, &info))
            st = file_error(err, "look at", copy);
        else if (!S_ISDIR(info.st_mode))
            st = error_set(err, ST_IO, "cannot make the folder '%s': a file is in the way", copy);
        *p = rest;
    }
    free(copy);
    return st;
}

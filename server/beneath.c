#include "server/beneath.h"

#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PATH_BYTES_MAX 4096
#define COPY_BYTES     ((size_t)1 << 20)

static enum status step_failed(const char *name, struct error *err)
{
    if (errno == ELOOP)
        return error_set(err, ST_INVALID, "'%.200s' is a symbolic link, which is not followed", name);
    return file_error(err, "open", name);
}

/* One name further down; `folder` stays open. */
static enum status step(int folder, const char *name, int *fd_out, struct error *err)
{
    /* Non-blocking, so that a pipe does not hold us up before we see that it is one. */
    int fd = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return step_failed(name, err);
    *fd_out = fd;
    return ST_OK;
}

/* The part of path below root. */
static enum status inside(const char *root, const char *path, const char **out, struct error *err)
{
    size_t n = strlen(root);
    while (n > 1 && root[n - 1] == '/') n--;
    if (strlen(path) >= PATH_BYTES_MAX) return error_set(err, ST_INVALID, "the path is too long");
    *out = path;
    if (path[0] != '/') return ST_OK;
    if (strncmp(path, root, n) != 0 || (path[n] && path[n] != '/'))
        return error_set(err, ST_INVALID, "'%.200s' is not below the folder that this server may read", path);
    *out = path + n;
    return ST_OK;
}

static enum status walk(int fd, const char *path, int *fd_out, struct error *err)
{
    char copy[PATH_BYTES_MAX], *rest;
    enum status st = ST_OK;
    snprintf(copy, sizeof copy, "%s", path);
    for (char *name = strtok_r(copy, "/", &rest); name && !st; name = strtok_r(NULL, "/", &rest)) {
        int next = -1;
        if (!strcmp(name, "..")) {
            st = error_set(err, ST_INVALID, "the path may not have '..' in it");
        } else if (strcmp(name, ".") != 0 && !(st = step(fd, name, &next, err))) {
            close(fd);
            fd = next;
        }
    }
    if (st)
        close(fd);
    else
        *fd_out = fd;
    return st;
}

enum status beneath_open(const char *root, const char *path, struct beneath *out, struct error *err)
{
    struct stat info;
    struct beneath b = {.fd = -1};
    enum status st = inside(root, path, &path, err);
    if (st) return st;
    int top = open(root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (top < 0) return file_error(err, "open the folder", root);
    st = walk(top, path, &b.fd, err);
    if (st) return st;
    if (fstat(b.fd, &info))
        st = file_error(err, "look at", path);
    else if (!S_ISDIR(info.st_mode) && !S_ISREG(info.st_mode))
        st = error_set(err, ST_INVALID, "'%.200s' is neither a folder nor a plain file", path);
    b.is_folder = !st && S_ISDIR(info.st_mode);
    if (st)
        close(b.fd);
    else
        *out = b;
    return st;
}

enum status beneath_open_file(int folder, const char *name, int *fd_out, struct error *err)
{
    struct stat info;
    int fd = -1;
    enum status st = step(folder, name, &fd, err);
    if (st) return st;
    if (fstat(fd, &info) || !S_ISREG(info.st_mode)) {
        close(fd);
        return error_set(err, ST_INVALID, "'%s' is not a plain file", name);
    }
    *fd_out = fd;
    return ST_OK;
}

enum status beneath_copy(int from, const char *folder, const char *name, size_t bytes_max, struct error *err)
{
    char *path = NULL, *buffer = malloc(COPY_BYTES);
    size_t total = 0;
    int to = -1;
    enum status st = ST_OK;
    if (!buffer || asprintf(&path, "%s/%s", folder, name) < 0) {
        free(buffer);
        return error_set(err, ST_NOMEM, "out of memory");
    }
    to = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (to < 0) st = file_error(err, "make", path);
    for (ssize_t n = 1; !st && n > 0;) {
        n = read(from, buffer, COPY_BYTES);
        total += n > 0 ? (size_t)n : 0;
        if (n < 0)
            st = file_error(err, "read", name);
        else if (total > bytes_max)
            st = error_set(err, ST_TOO_LARGE, "'%s' is larger than %zu bytes, the most this server takes",
                           name, bytes_max);
        else if (!file_write_all(to, buffer, (size_t)n))
            st = file_error(err, "write", path);
    }
    if (to >= 0) close(to);
    free(buffer);
    free(path);
    return st;
}

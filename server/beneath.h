/* Files that a client may name by path: those below one folder, and nothing that a link or ".." reaches from
 * there. All calls block. */
#ifndef SERVER_BENEATH_H
#define SERVER_BENEATH_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>

struct beneath {
    int fd; /* the caller closes it */
    bool is_folder;
};
/* path is relative to root, or absolute and spelled so that it begins with root. ST_NOT_FOUND; ST_INVALID for
 * a path that leaves root, a symbolic link, or what is neither a folder nor a plain file. */
NODISCARD enum status beneath_open(const char *root, const char *path, struct beneath *out,
                                   struct error *err);
/* A plain file of a folder. */
NODISCARD enum status beneath_open_file(int folder, const char *name, int *fd_out, struct error *err);
/* Copies an open file to folder/name, which is new. ST_TOO_LARGE beyond bytes_max. */
NODISCARD enum status beneath_copy(int from, const char *folder, const char *name, size_t bytes_max,
                                   struct error *err);

#endif

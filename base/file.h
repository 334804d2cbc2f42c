/* Whole files: mapped for reading, or replaced atomically. */
#ifndef BASE_FILE_H
#define BASE_FILE_H

#include "base/status.h"

#include <stddef.h>

struct file_map {
    const void *data; /* NULL for an empty file */
    size_t size;
};

/* Maps path read-only. On ST_OK the caller owes one file_unmap. ST_NOT_FOUND, ST_IO. */
NODISCARD enum status file_map(const char *path, struct file_map *out, struct error *err);
void file_unmap(struct file_map *m);

/* Writes a temporary file beside path, syncs it, renames it over path and syncs the folder: after
 * a crash either the old bytes or the new ones are there. ST_NO_SPACE, ST_IO. */
NODISCARD enum status file_replace(const char *path, const void *data, size_t size, struct error *err);

/* mkdir -p, mode 0700 for folders it makes. */
NODISCARD enum status file_make_folders(const char *path, struct error *err);

#endif

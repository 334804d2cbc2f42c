/* Whole files: mapped for reading, or replaced atomically. */
#ifndef BASE_FILE_H
#define BASE_FILE_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <sys/stat.h>

struct file_map {
    const void *data; /* NULL for an empty file */
    size_t size;
    struct stat info; /* of the file as it was opened */
};

/* Maps path read-only. On ST_OK the caller owes one file_unmap. ST_NOT_FOUND, ST_IO. */
NODISCARD enum status file_map(const char *path, struct file_map *out, struct error *err);
void file_unmap(struct file_map *m);

/* Writes a temporary file beside path, syncs it, renames it over path and syncs the folder: after
 * a crash either the old bytes or the new ones are there. ST_NO_SPACE, ST_IO. */
NODISCARD enum status file_replace(const char *path, const void *data, size_t size, struct error *err);

/* Syncs a finished file, renames it over `to` on the same file system and syncs the folder of `to`. */
NODISCARD enum status file_move(const char *from, const char *to, struct error *err);

/* Writes all bytes, however many calls that takes. False (errno says why) when it cannot. */
bool file_write_all(int fd, const void *bytes, size_t size);

/* Makes the names in path's folder durable. */
NODISCARD enum status file_sync_folder_of(const char *path, struct error *err);

/* The status of errno, with the message "cannot <what> '<path>': <reason>". */
enum status file_error(struct error *err, const char *what, const char *path);

/* mkdir -p, mode 0700 for folders it makes. */
NODISCARD enum status file_make_folders(const char *path, struct error *err);

#endif

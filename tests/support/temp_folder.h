/* A folder of a test's own, gone afterwards. */
#ifndef TESTS_SUPPORT_TEMP_FOLDER_H
#define TESTS_SUPPORT_TEMP_FOLDER_H

#include <stdbool.h>
#include <stddef.h>

struct temp_folder {
    char path[256];
};
void temp_folder_make(struct temp_folder *t);
void temp_folder_remove(struct temp_folder *t);

/* path/name, in one of a few static buffers. */
const char *path_in(const char *folder, const char *name);
void file_write(const char *folder, const char *name, const void *data, size_t size);
void file_remove(const char *folder, const char *name); /* if it is there */
bool file_exists(const char *folder, const char *name);
/* Plain files in a folder and all below it. */
int file_count(const char *folder);

#endif

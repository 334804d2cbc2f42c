#include "tests/support/temp_folder.h"

#include "base/status.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

void temp_folder_make(struct temp_folder *t)
{
    const char *root = getenv("TMPDIR");
    /* In memory where that is to be had: tests that sync a lot then take seconds, not minutes. */
    if (!root || !*root) root = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    snprintf(t->path, sizeof t->path, "%s/medley-test-XXXXXX", root);
    CHECK(mkdtemp(t->path));
}

static int remove_entry(const char *path, const struct stat *info, int type, struct FTW *where)
{
    (void)info, (void)type, (void)where;
    return remove(path);
}

void temp_folder_remove(struct temp_folder *t)
{
    CHECK(nftw(t->path, remove_entry, 16, FTW_DEPTH | FTW_PHYS) == 0);
}

const char *path_in(const char *folder, const char *name)
{
    static _Thread_local char buffers[4][512];
    static _Thread_local unsigned next;
    char *path = buffers[next++ % 4];
    CHECK(snprintf(path, sizeof buffers[0], "%s/%s", folder, name) < (int)sizeof buffers[0]);
    return path;
}

void file_write(const char *folder, const char *name, const void *data, size_t size)
{
    FILE *f = fopen(path_in(folder, name), "wb");
    CHECK(f && fwrite(data, 1, size, f) == size && fclose(f) == 0);
}

void file_remove(const char *folder, const char *name) { (void)unlink(path_in(folder, name)); }

bool file_exists(const char *folder, const char *name) { return access(path_in(folder, name), F_OK) == 0; }

static _Thread_local int files_seen;

static int count_entry(const char *path, const struct stat *info, int type, struct FTW *where)
{
    (void)path, (void)info, (void)where;
    files_seen += type == FTW_F;
    return 0;
}

int file_count(const char *folder)
{
    files_seen = 0;
    CHECK(nftw(folder, count_entry, 16, FTW_PHYS) == 0);
    return files_seen;
}

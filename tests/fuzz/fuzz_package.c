/* Damaged uploads: archives of every accepted kind. Whatever they say, nothing but the two files may
 * appear in the folder. */
#include "adapters/package.h"
#include "tests/support/fuzz.h"
#include "tests/support/temp_folder.h"

#include <archive.h>
#include <archive_entry.h>
#include <stdlib.h>
#include <string.h>

#define ARCHIVE_BYTES_MAX 65536
#define UNPACKED_MAX      ((size_t)1 << 20)

static struct temp_folder root;

static void add_member(struct archive *a, const char *path, const void *data, size_t size)
{
    struct archive_entry *e = archive_entry_new();
    archive_entry_set_pathname(e, path);
    archive_entry_set_perm(e, 0644);
    archive_entry_set_filetype(e, AE_IFREG);
    archive_entry_set_size(e, (la_int64_t)size);
    CHECK(archive_write_header(a, e) == ARCHIVE_OK);
    CHECK(archive_write_data(a, data, size) == (la_ssize_t)size);
    archive_entry_free(e);
}

/* A malloc'd archive of that format and compression. */
static void *make_archive(int format, int filter, size_t *size)
{
    static const char tensors[300] = "not empty";
    void *bytes = malloc(ARCHIVE_BYTES_MAX);
    struct archive *a = archive_write_new();
    CHECK(bytes && a);
    CHECK(archive_write_set_format(a, format) == ARCHIVE_OK &&
          archive_write_add_filter(a, filter) == ARCHIVE_OK);
    archive_write_set_bytes_in_last_block(a, 1);
    CHECK(archive_write_open_memory(a, bytes, ARCHIVE_BYTES_MAX, size) == ARCHIVE_OK);
    add_member(a, "run/README.md", "# hello", 7);
    add_member(a, "run/" PACKAGE_CONFIG, "{}", 2);
    add_member(a, "run/" PACKAGE_TENSORS, tensors, sizeof tensors);
    CHECK(archive_write_close(a) == ARCHIVE_OK);
    archive_write_free(a);
    return bytes;
}

static enum status read_archive(const struct mutate_source *source, const uint8_t *data, size_t size,
                                struct error *err)
{
    (void)source;
    struct package p;
    file_write(root.path, PACKAGE_BODY, data, size);
    enum status st = package_open(root.path, UNPACKED_MAX, &p, err);
    if (!st) {
        CHECK(p.config.size <= UNPACKED_MAX && p.tensors.size <= UNPACKED_MAX);
        package_close(&p);
    }
    /* Beyond the two files only the body may be left, where it was refused. */
    CHECK(file_count(root.path) <= 3);
    file_remove(root.path, PACKAGE_BODY);
    file_remove(root.path, PACKAGE_CONFIG);
    file_remove(root.path, PACKAGE_TENSORS);
    CHECK(file_count(root.path) == 0);
    return st;
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int format, filter;
    } kinds[] = {
        {"tar", ARCHIVE_FORMAT_TAR_PAX_RESTRICTED, ARCHIVE_FILTER_NONE},
        {"tar.gz", ARCHIVE_FORMAT_TAR_PAX_RESTRICTED, ARCHIVE_FILTER_GZIP},
        {"tar.zst", ARCHIVE_FORMAT_TAR_PAX_RESTRICTED, ARCHIVE_FILTER_ZSTD},
        {"zip", ARCHIVE_FORMAT_ZIP, ARCHIVE_FILTER_NONE},
    };
    enum { COUNT = sizeof kinds / sizeof *kinds };
    struct mutate_source sources[COUNT];
    for (int i = 0; i < COUNT; i++) {
        sources[i] = (struct mutate_source){.name = kinds[i].name};
        sources[i].data = make_archive(kinds[i].format, kinds[i].filter, &sources[i].size);
    }
    temp_folder_make(&root);
    int failed = fuzz_main(argc, argv, sources, COUNT, read_archive);
    temp_folder_remove(&root);
    for (int i = 0; i < COUNT; i++) free((void *)sources[i].data);
    return failed;
}

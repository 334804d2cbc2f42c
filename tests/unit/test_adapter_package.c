/* Archives and folders: the two files come out, everything else stays out. */
#include "adapters/inspect.h"
#include "adapters/package.h"
#include "base/strbuf.h"
#include "tests/support/adapter_maker.h"
#include "tests/support/temp_folder.h"

#include <archive.h>
#include <archive_entry.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <setjmp.h>

#include <cmocka.h>

#define CONFIG "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":3,\"target_modules\":[\"q_proj\",\"v_proj\"]}"
#define LIMIT  ((size_t)1 << 20)

enum kind { TAR, TAR_GZIP, TAR_ZSTD, ZIP };

struct member {
    const char *path;
    const char *data; /* NULL: a symbolic link to /etc/passwd */
    size_t size;
};

static void archive_make(const char *file, enum kind kind, const struct member *members, size_t count)
{
    struct archive *a = archive_write_new();
    if (kind == ZIP)
        archive_write_set_format_zip(a);
    else
        archive_write_set_format_pax_restricted(a);
    if (kind == TAR_GZIP) archive_write_add_filter_gzip(a);
    if (kind == TAR_ZSTD) archive_write_add_filter_zstd(a);
    assert_int_equal(archive_write_open_filename(a, file), ARCHIVE_OK);
    for (size_t i = 0; i < count; i++) {
        struct archive_entry *e = archive_entry_new();
        archive_entry_set_pathname(e, members[i].path);
        archive_entry_set_perm(e, 0777);
        archive_entry_set_filetype(e, members[i].data ? AE_IFREG : AE_IFLNK);
        if (members[i].data)
            archive_entry_set_size(e, (la_int64_t)members[i].size);
        else
            archive_entry_set_symlink(e, "/etc/passwd");
        assert_int_equal(archive_write_header(a, e), ARCHIVE_OK);
        if (members[i].data)
            assert_int_equal(archive_write_data(a, members[i].data, members[i].size), members[i].size);
        archive_entry_free(e);
    }
    assert_int_equal(archive_write_close(a), ARCHIVE_OK);
    archive_write_free(a);
}

#define MEMBER(path, text)           \
    {                                \
        path, text, sizeof(text) - 1 \
    }

struct fixture {
    struct temp_folder folder;
};

static int set_up(void **state)
{
    struct fixture *f = malloc(sizeof *f);
    temp_folder_make(&f->folder);
    *state = f;
    return 0;
}

static int tear_down(void **state)
{
    struct fixture *f = *state;
    temp_folder_remove(&f->folder);
    free(f);
    return 0;
}

static void every_kind_of_archive_unpacks(void **state)
{
    struct fixture *f = *state;
    static const struct member members[] = {
        MEMBER("run/checkpoint-9/README.md", "# hello"),
        MEMBER("run/checkpoint-9/training_args.bin", "pickle"),
        MEMBER("run/checkpoint-9/adapter_config.json", CONFIG),
        MEMBER("run/checkpoint-9/adapter_model.safetensors", "tensors"),
        MEMBER("run/checkpoint-9/tokenizer.json", "{}"),
    };
    for (int kind = TAR; kind <= ZIP; kind++) {
        struct temp_folder into;
        temp_folder_make(&into);
        archive_make(path_in(into.path, "body"), (enum kind)kind, members, 5);
        struct package p;
        struct error err = {0};
        if (package_open(into.path, LIMIT, &p, &err)) fail_msg("kind %d: %s", kind, err.message);
        assert_int_equal(p.config.size, strlen(CONFIG));
        assert_memory_equal(p.config.data, CONFIG, strlen(CONFIG));
        assert_int_equal(p.tensors.size, 7);
        assert_memory_equal(p.tensors.data, "tensors", 7);
        package_close(&p);
        assert_int_equal(file_count(into.path), 2);
        temp_folder_remove(&into);
    }
    (void)f;
}

static void expect_refusal(struct fixture *f, const char *name, size_t limit, enum status want,
                           const char *text)
{
    struct temp_folder into;
    temp_folder_make(&into);
    struct error err = {0};
    enum status st = package_extract(path_in(f->folder.path, name), into.path, limit, &err);
    if (st != want) fail_msg("%s: %s: %s", name, status_text(st), err.message);
    if (!strstr(err.message, text)) fail_msg("%s: '%s' is not in: %s", name, text, err.message);
    temp_folder_remove(&into);
}

static void gguf_file_is_the_tensors(void **state)
{
    struct fixture *f = *state;
    struct temp_folder into;
    struct package p;
    struct error err = {0};
    (void)f;
    temp_folder_make(&into);
    file_write(into.path, "body", "GGUF-bytes", 10);
    if (package_open(into.path, LIMIT, &p, &err)) fail_msg("%s", err.message);
    assert_int_equal(p.tensors.size, 10);
    assert_memory_equal(p.tensors.data, "GGUF-bytes", 10);
    assert_int_equal(p.config.size, 3);
    assert_memory_equal(p.config.data, "{}\n", 3);
    package_close(&p);
    assert_int_equal(file_count(into.path), 2);
    temp_folder_remove(&into);
}

static void paths_lead_nowhere(void **state)
{
    struct fixture *f = *state;
    static const struct member members[] = {
        MEMBER("../../adapter_config.json", CONFIG),
        MEMBER("../../adapter_model.safetensors", "x"),
        MEMBER("/etc/medley-test", "x"),
    };
    archive_make(path_in(f->folder.path, "a.tar"), TAR, members, 3);
    struct temp_folder into;
    temp_folder_make(&into);
    assert_int_equal(package_extract(path_in(f->folder.path, "a.tar"), into.path, LIMIT, NULL), ST_OK);
    assert_true(file_exists(into.path, "adapter_config.json"));
    assert_int_equal(file_count(into.path), 2);
    temp_folder_remove(&into);

    static const struct member links[] = {{"adapter_config.json", NULL, 0},
                                          MEMBER("adapter_model.safetensors", "x")};
    archive_make(path_in(f->folder.path, "link.tar"), TAR, links, 2);
    expect_refusal(f, "link.tar", LIMIT, ST_REJECTED, "is not a plain file");
}

static void incomplete_archives_are_refused(void **state)
{
    struct fixture *f = *state;
    static const struct member members[] = {
        MEMBER("adapter_config.json", CONFIG),          MEMBER("adapter_model.bin", "pickle"),
        MEMBER("other/adapter_model.safetensors", "x"), MEMBER("adapter_model.safetensors", "x"),
        MEMBER("adapter_model.safetensors", "x"),
    };
    archive_make(path_in(f->folder.path, "config.tar"), TAR, members, 1);
    expect_refusal(f, "config.tar", LIMIT, ST_REJECTED, "no adapter_model.safetensors");
    archive_make(path_in(f->folder.path, "tensors.zip"), ZIP, members + 3, 1);
    expect_refusal(f, "tensors.zip", LIMIT, ST_REJECTED, "no adapter_config.json");
    archive_make(path_in(f->folder.path, "pickle.tar"), TAR, members, 2);
    expect_refusal(f, "pickle.tar", LIMIT, ST_UNSUPPORTED, "pickle");
    archive_make(path_in(f->folder.path, "apart.tar"), TAR, members, 3);
    expect_refusal(f, "apart.tar", LIMIT, ST_REJECTED, "more than one adapter");
    archive_make(path_in(f->folder.path, "twice.tar"), TAR, members + 3, 2);
    expect_refusal(f, "twice.tar", LIMIT, ST_REJECTED, "more than one adapter");
    archive_make(path_in(f->folder.path, "empty.tar"), TAR, members, 0);
    expect_refusal(f, "empty.tar", LIMIT, ST_REJECTED, "no adapter_config.json");
}

static void bombs_are_refused(void **state)
{
    struct fixture *f = *state;
    size_t size = 8 * LIMIT;
    char *zeros = calloc(1, size);
    struct member members[] = {{"padding.txt", zeros, size}, MEMBER("adapter_config.json", CONFIG)};
    archive_make(path_in(f->folder.path, "ignored.tar.gz"), TAR_GZIP, members, 2);
    expect_refusal(f, "ignored.tar.gz", LIMIT, ST_TOO_LARGE, "unpacks to more bytes");
    members[0].path = "adapter_model.safetensors";
    archive_make(path_in(f->folder.path, "member.zip"), ZIP, members, 2);
    expect_refusal(f, "member.zip", LIMIT, ST_TOO_LARGE, "unpacks to more bytes");
    free(zeros);

    struct member *many = calloc(PACKAGE_ENTRIES_MAX + 1, sizeof *many);
    for (int i = 0; i <= PACKAGE_ENTRIES_MAX; i++) many[i] = (struct member){"note.txt", "", 0};
    archive_make(path_in(f->folder.path, "many.tar.zst"), TAR_ZSTD, many, PACKAGE_ENTRIES_MAX + 1);
    expect_refusal(f, "many.tar.zst", LIMIT, ST_REJECTED, "more than 4096 entries");
    free(many);
}

static void other_files_are_named(void **state)
{
    struct fixture *f = *state;
    const char *folder = f->folder.path;
    file_write(folder, "gguf", "GGUF\3\0\0\0\0\0\0\0", 12);
    expect_refusal(f, "gguf", 11, ST_TOO_LARGE, "12 bytes");
    file_write(folder, "safetensors", "\2\0\0\0\0\0\0\0{}", 10);
    expect_refusal(f, "safetensors", LIMIT, ST_REJECTED, "send adapter_config.json with it");
    file_write(folder, "text", "hello, this is no archive at all", 32);
    expect_refusal(f, "text", LIMIT, ST_BAD_FORMAT, "not an archive");
    file_write(folder, "nothing", "", 0);
    expect_refusal(f, "nothing", LIMIT, ST_BAD_FORMAT, "not an archive");
}

static void sizes_are_limited(void **state)
{
    struct fixture *f = *state;
    struct package p;
    struct error err = {0};
    file_write(f->folder.path, "adapter_config.json", CONFIG, strlen(CONFIG));
    assert_int_equal(package_open(f->folder.path, LIMIT, &p, &err), ST_REJECTED);
    file_write(f->folder.path, "adapter_model.safetensors", "12345678", 8);
    assert_int_equal(package_open(f->folder.path, strlen(CONFIG) + 7, &p, &err), ST_TOO_LARGE);
    assert_int_equal(package_open(f->folder.path, strlen(CONFIG) + 8, &p, &err), ST_OK);
    package_close(&p);
}

static void inspect_reads_what_people_have(void **state)
{
    struct fixture *f = *state;
    const char *folder = f->folder.path;
    struct adapter_maker m = {0};
    struct strbuf bytes = {0}, text = {0};
    maker_lora(&m, 2, 1);
    maker_write(&m, &bytes);
    file_write(folder, "adapter_config.json", CONFIG, strlen(CONFIG));
    file_write(folder, "adapter_model.safetensors", bytes.data, bytes.size);
    const struct member members[] = {MEMBER("x/adapter_config.json", CONFIG),
                                     {"x/adapter_model.safetensors", bytes.data, bytes.size}};
    archive_make(path_in(folder, "x.zip"), ZIP, members, 2);

    struct error err = {0};
    if (adapter_inspect(folder, &text, &err)) fail_msg("%s", err.message);
    assert_non_null(strstr(text.data, "format      peft-lora\n"));
    assert_non_null(strstr(text.data, "sites       4, in 2 layers (0 to 1)\n"));
    assert_non_null(strstr(text.data, "targets     q_proj, v_proj\n"));
    assert_non_null(strstr(text.data, "rank        2\n"));
    char *expected = strbuf_take(&text);
    static const char *const ways[] = {"adapter_model.safetensors", "x.zip"};
    for (int i = 0; i < 2; i++) {
        if (adapter_inspect(path_in(folder, ways[i]), &text, &err)) fail_msg("%s", err.message);
        assert_string_equal(text.data, expected);
        strbuf_release(&text);
    }
    assert_int_equal(adapter_inspect(path_in(folder, "absent"), &text, &err), ST_NOT_FOUND);
    assert_int_equal(text.size, 0);
    free(expected);
    strbuf_release(&bytes);
    maker_release(&m);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(every_kind_of_archive_unpacks),
        TEST(gguf_file_is_the_tensors),
        TEST(paths_lead_nowhere),
        TEST(incomplete_archives_are_refused),
        TEST(bombs_are_refused),
        TEST(other_files_are_named),

        TEST(sizes_are_limited),
        TEST(inspect_reads_what_people_have),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* The file of packed weights: what is taken for a good one, and what becomes of one that is written. */
#include "engine/pack_file.h"

#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"
#include "tests/support/random.h"
#include "tests/support/rig.h"
#include "tests/support/temp_folder.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define HEADER_BYTES 136 /* that mean something; the data follow at a page's start */
#define DATA_OFFSET  4096
#define DATA_BYTES   ((size_t)5 << 20) /* two pieces, the second a short one */
#define MODEL_BYTES  100000

struct stage {
    struct temp_folder folder;
    struct device *device;
    char model_path[300], path[300], part[320];
    struct file_map model;
    struct pack_spec spec;
    unsigned char *data; /* DATA_BYTES, aligned */
    atomic_bool stop;
};

static void model_write(struct stage *s, uint64_t seed)
{
    static unsigned char bytes[MODEL_BYTES];
    struct test_random random = {seed};
    random_bytes(&random, bytes, sizeof bytes);
    FILE *f = fopen(s->model_path, "r+b"); /* in place, as who edits a file does */
    if (!f) f = fopen(s->model_path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, sizeof bytes, f), sizeof bytes);
    fclose(f);
}

static void model_map(struct stage *s)
{
    file_unmap(&s->model);
    assert_int_equal(file_map(s->model_path, &s->model, NULL), ST_OK);
}

static enum status write_at(struct stage *s, const char *path, struct error *err)
{
    return pack_file_write(path, &s->spec, s->data, &s->stop, err);
}

/* Whether the file holds the stage's data; if not, the reason. */
static enum status open_with(struct stage *s, const struct pack_spec *spec, struct error *err)
{
    struct file_map map;
    const void *data;
    enum status st = pack_file_open(s->path, spec, s->device, &map, &data, err);
    if (st) return st;
    assert_int_equal((uintptr_t)data % 64, 0);
    assert_memory_equal(data, s->data, spec->bytes);
    file_unmap(&map);
    return ST_OK;
}

static void refuse(struct stage *s, const struct pack_spec *spec, const char *word)
{
    struct error err = {0};
    enum status st = open_with(s, spec, &err);
    assert_true(st && st != ST_NOT_FOUND);
    assert_refused(st, st, err, word);
}

static void accept(struct stage *s)
{
    struct error err;
    assert_ok(open_with(s, &s->spec, &err), err);
}

static void flip(const char *path, off_t at)
{
    int fd = open(path, O_RDWR);
    unsigned char byte;
    assert_int_equal(pread(fd, &byte, 1, at), 1);
    byte ^= 0x40;
    assert_int_equal(pwrite(fd, &byte, 1, at), 1);
    close(fd);
}

static int setup(void **state)
{
    static struct stage s;
    s = (struct stage){0};
    temp_folder_make(&s.folder);
    snprintf(s.model_path, sizeof s.model_path, "%s/model.gguf", s.folder.path);
    snprintf(s.path, sizeof s.path, "%s/model.gguf.pack", s.folder.path);
    snprintf(s.part, sizeof s.part, "%s.part", s.path);
    s.device = rig_device(CPU_REFERENCE, 2);
    model_write(&s, 1);
    model_map(&s);
    s.data = aligned_alloc(64, DATA_BYTES);
    struct test_random random = {2};
    random_bytes(&random, s.data, DATA_BYTES);
    s.spec = (struct pack_spec){.bytes = DATA_BYTES, .model = &s.model, .model_path = s.model_path};
    random_bytes(&random, s.spec.plan, sizeof s.spec.plan);
    struct error err;
    assert_ok(write_at(&s, s.path, &err), err);
    *state = &s;
    return 0;
}

static int teardown(void **state)
{
    struct stage *s = *state;
    file_unmap(&s->model);
    s->device->ops->close(s->device);
    free(s->data);
    temp_folder_remove(&s->folder);
    return 0;
}

/* --- reading --- */

static void what_was_written_is_read(void **state)
{
    struct stage *s = *state;
    accept(s);
    assert_false(file_exists(s->folder.path, "model.gguf.pack.part"));
    assert_int_equal(unlink(s->path), 0);
    struct error err;
    assert_int_equal(open_with(s, &s->spec, &err), ST_NOT_FOUND);
}

static void every_byte_of_the_header_counts(void **state)
{
    struct stage *s = *state;
    for (off_t at = 0; at < HEADER_BYTES; at++) {
        flip(s->path, at);
        refuse(s, &s->spec, s->path);
        flip(s->path, at);
    }
    accept(s);
}

static void damaged_data_are_found(void **state)
{
    struct stage *s = *state;
    struct test_random random = {3};
    for (int i = 0; i < 50; i++) {
        off_t at = DATA_OFFSET + (off_t)random_below(&random, DATA_BYTES);
        flip(s->path, at);
        refuse(s, &s->spec, "damaged contents");
        flip(s->path, at);
    }
    const off_t edges[] = {DATA_OFFSET, DATA_OFFSET + DATA_BYTES - 1};
    for (int i = 0; i < 2; i++) {
        flip(s->path, edges[i]);
        refuse(s, &s->spec, "damaged contents");
        flip(s->path, edges[i]);
    }
    accept(s);
}

static void other_lengths_are_refused(void **state)
{
    struct stage *s = *state;
    const off_t lengths[] = {
        DATA_OFFSET + DATA_BYTES + 1, DATA_OFFSET + DATA_BYTES - 1, DATA_OFFSET, HEADER_BYTES, 7, 0};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        assert_int_equal(truncate(s->path, lengths[i]), 0);
        refuse(s, &s->spec, "bytes, where this model takes");
    }
}

/* Whole files with right checksums, that are of something else. */
static void files_of_others_are_refused(void **state)
{
    struct stage *s = *state;
    struct pack_spec other = s->spec;
    other.plan[7] ^= 1;
    refuse(s, &other, "another release");
    other = s->spec;
    other.bytes -= 64;
    refuse(s, &other, "bytes, where this model takes");

    model_write(s, 99); /* of the same length */
    model_map(s);
    refuse(s, &s->spec, "another model");
    struct error err;
    assert_ok(write_at(s, s->path, &err), err); /* in its place */
    accept(s);
    assert_int_equal(file_count(s->folder.path), 2);
}

static void no_plain_file_is_refused(void **state)
{
    struct stage *s = *state;
    assert_int_equal(unlink(s->path), 0);
    assert_int_equal(mkdir(s->path, 0700), 0);
    refuse(s, &s->spec, "regular file");
    assert_int_equal(rmdir(s->path), 0);
    assert_int_equal(mkfifo(s->path, 0600), 0);
    refuse(s, &s->spec, "regular file"); /* and does not wait for a writer */
}

static void files_that_others_may_write_are_refused(void **state)
{
    struct stage *s = *state;
    const mode_t loose[] = {0602, 0620, 0666};
    for (int i = 0; i < 3; i++) {
        assert_int_equal(chmod(s->path, loose[i]), 0);
        refuse(s, &s->spec, "others than this user");
    }
    assert_int_equal(chmod(s->path, 0644), 0);
    accept(s);
    if (geteuid() != 0) return; /* who may not give files away cannot be given any */
    assert_int_equal(chown(s->path, 12345, 12345), 0);
    refuse(s, &s->spec, "others than this user");
}

static void a_private_model_makes_a_private_file(void **state)
{
    struct stage *s = *state;
    const mode_t modes[][2] = {{0600, 0600}, {0644, 0644}, {0666, 0644}, {0440, 0640}};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(chmod(s->model_path, modes[i][0]), 0);
        model_map(s);
        struct error err;
        assert_ok(write_at(s, s->path, &err), err);
        struct stat info;
        assert_int_equal(stat(s->path, &info), 0);
        assert_int_equal(info.st_mode & 0777, modes[i][1]);
    }
}

/* --- the model's dates --- */

/* What the model holds is looked at only where its dates differ: with the same dates, other bytes are not
 * seen. */
static bool model_is_read(struct stage *s)
{
    static const unsigned char other[MODEL_BYTES];
    struct file_map strange = {other, MODEL_BYTES, s->model.info};
    struct pack_spec spec = s->spec;
    spec.model = &strange;
    struct error err;
    return open_with(s, &spec, &err) != ST_OK;
}

static void wait_ms(long ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

/* A file is believed to rest once it has not changed for two seconds. */
static void settle(void) { wait_ms(2100); }

static void the_model_is_read_only_where_its_dates_differ(void **state)
{
    struct stage *s = *state;
    assert_true(model_is_read(s)); /* made this moment, so its dates prove nothing */
    settle();
    accept(s); /* and notes the dates */
    assert_false(model_is_read(s));

    struct timespec times[2];
    times[0] = times[1] = s->model.info.st_mtim;
    model_write(s, 98);
    assert_int_equal(utimensat(AT_FDCWD, s->model_path, times, 0), 0); /* as if nothing had happened */
    model_map(s);
    refuse(s, &s->spec, "another model");
    model_write(s, 1); /* the first contents, at another time */
    model_map(s);
    assert_true(model_is_read(s));
    settle();
    accept(s);
    assert_false(model_is_read(s));
}

static void a_model_that_changes_meanwhile_is_not_kept(void **state)
{
    struct stage *s = *state;
    struct error err = {0};
    assert_int_equal(unlink(s->path), 0);
    wait_ms(50); /* times of files are as coarse as the kernel's tick */
    model_write(s, 5);
    assert_refused(write_at(s, s->path, &err), ST_BUSY, err, "has changed");
    assert_int_equal(file_count(s->folder.path), 1);
}

/* --- writing --- */

static void a_dead_writers_half_is_taken_over(void **state)
{
    struct stage *s = *state;
    assert_int_equal(unlink(s->path), 0);
    file_write(s->folder.path, "model.gguf.pack.part", "half", 4);
    struct error err;
    assert_ok(write_at(s, s->path, &err), err);
    accept(s);
    assert_int_equal(file_count(s->folder.path), 2);
}

static void links_are_not_followed(void **state)
{
    struct stage *s = *state;
    struct error err = {0};
    file_write(s->folder.path, "precious", "data", 4);
    assert_int_equal(symlink(path_in(s->folder.path, "precious"), s->part), 0);
    assert_int_equal(write_at(s, s->path, &err), ST_IO);
    assert_int_equal(unlink(s->part), 0);
    assert_int_equal(link(path_in(s->folder.path, "precious"), s->part), 0);
    assert_refused(write_at(s, s->path, &err), ST_IO, err, "somebody else's");
    struct stat info;
    assert_int_equal(stat(path_in(s->folder.path, "precious"), &info), 0);
    assert_int_equal(info.st_size, 4);
}

static void folders_are_made(void **state)
{
    struct stage *s = *state;
    struct error err = {0};
    assert_ok(write_at(s, path_in(s->folder.path, "a/b/x.pack"), &err), err);
    assert_true(file_exists(s->folder.path, "a/b/x.pack"));
    /* a file where a folder would have to be */
    assert_int_equal(write_at(s, path_in(s->folder.path, "model.gguf/x.pack"), &err), ST_IO);
    assert_true(err.message[0]);
}

static void a_full_disk_leaves_nothing(void **state)
{
    struct stage *s = *state;
    struct rlimit old, small = {0};
    assert_int_equal(unlink(s->path), 0);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    small.rlim_max = old.rlim_max;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    for (rlim_t bytes = 1; bytes < DATA_BYTES; bytes += DATA_BYTES / 3) {
        struct error err = {0};
        small.rlim_cur = bytes;
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
        enum status st = write_at(s, s->path, &err);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
        assert_true(st == ST_IO || st == ST_NO_SPACE);
        assert_int_equal(err.status, st);
        assert_int_equal(file_count(s->folder.path), 1);
    }
    signal(SIGXFSZ, handler);
}

static void writing_can_be_stopped(void **state)
{
    struct stage *s = *state;
    struct error err = {0};
    assert_int_equal(unlink(s->path), 0);
    atomic_store(&s->stop, true);
    assert_int_equal(write_at(s, s->path, &err), ST_CANCELLED);
    assert_int_equal(err.status, ST_CANCELLED);
    assert_int_equal(file_count(s->folder.path), 1);
}

struct rival {
    struct stage *stage;
    pthread_t thread;
    int written, busy, other, bad_reads;
};

/* Locks belong to open files, not to threads: writers of one process are as strange to each other as those of
 * several. What a reader finds is whole at any time. */
static void *rival_main(void *arg)
{
    struct rival *r = arg;
    for (int i = 0; i < 10; i++) {
        enum status st = write_at(r->stage, r->stage->path, NULL);
        r->written += st == ST_OK;
        r->busy += st == ST_BUSY;
        r->other += st != ST_OK && st != ST_BUSY;
        struct file_map map;
        const void *data;
        struct device *d = rig_device(CPU_REFERENCE, 1);
        st = pack_file_open(r->stage->path, &r->stage->spec, d, &map, &data, NULL);
        r->bad_reads += st != ST_OK;
        if (!st) file_unmap(&map);
        d->ops->close(d);
    }
    return NULL;
}

static void one_of_several_writes(void **state)
{
    struct stage *s = *state;
    struct rival rivals[4];
    for (int i = 0; i < 4; i++) {
        rivals[i] = (struct rival){.stage = s};
        assert_int_equal(pthread_create(&rivals[i].thread, NULL, rival_main, &rivals[i]), 0);
    }
    int written = 0, busy = 0;
    for (int i = 0; i < 4; i++) {
        pthread_join(rivals[i].thread, NULL);
        assert_int_equal(rivals[i].other, 0);
        assert_int_equal(rivals[i].bad_reads, 0);
        written += rivals[i].written;
        busy += rivals[i].busy;
    }
    assert_true(written > 0 && written + busy == 40);
    accept(s);
    assert_int_equal(file_count(s->folder.path), 2);
}

/* --- no memory --- */

static enum status attempt_open(void *ctx)
{
    struct stage *s = ctx;
    struct file_map map;
    const void *data;
    enum status st = pack_file_open(s->path, &s->spec, s->device, &map, &data, NULL);
    if (!st) file_unmap(&map);
    return st;
}

static enum status attempt_write(void *ctx)
{
    struct stage *s = ctx;
    return write_at(s, s->path, NULL);
}

static void every_allocation_may_fail(void **state)
{
    struct stage *s = *state;
    if (!alloc_fail_available()) skip();
    assert_true(alloc_fail_sweep(attempt_open, s) >= 2); /* model's and data's pieces */
    assert_true(alloc_fail_sweep(attempt_write, s) >= 3);
    accept(s);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(what_was_written_is_read),
        TEST(every_byte_of_the_header_counts),
        TEST(damaged_data_are_found),
        TEST(other_lengths_are_refused),
        TEST(files_of_others_are_refused),
        TEST(no_plain_file_is_refused),
        TEST(files_that_others_may_write_are_refused),
        TEST(a_private_model_makes_a_private_file),
        TEST(the_model_is_read_only_where_its_dates_differ),
        TEST(a_model_that_changes_meanwhile_is_not_kept),
        TEST(a_dead_writers_half_is_taken_over),
        TEST(links_are_not_followed),
        TEST(folders_are_made),
        TEST(a_full_disk_leaves_nothing),
        TEST(writing_can_be_stopped),
        TEST(one_of_several_writes),
        TEST(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

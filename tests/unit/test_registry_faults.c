/* The disk fills up, or the process is killed, at each of the registry's writes in turn.
 *
 * The functions by which this program and the libraries it links change files are replaced here,
 * counted, and made to fail or to kill. */
#include "adapters/package.h"
#include "adapters/registry.h"
#include "tests/support/adapter_maker.h"
#include "tests/support/temp_folder.h"

#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <setjmp.h>

#include <cmocka.h>

/* --- faults --- */

static enum { OFF, DISK_FULL, KILL } fault;
static atomic_int changes_left; /* until the fault */
static int kills;               /* processes that were killed */

/* Before a change of a file; true where it must fail. */
static bool fault_now(bool needs_space)
{
    if (fault == OFF || atomic_fetch_sub(&changes_left, 1) > 0) return false;
    if (fault == KILL) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    if (!needs_space) return false;
    errno = ENOSPC;
    return true;
}

ssize_t write(int fd, const void *data, size_t size)
{
    return fault_now(true) ? -1 : syscall(SYS_write, fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset)
{
    return fault_now(true) ? -1 : syscall(SYS_pwrite64, fd, data, size, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
    return fault_now(true) ? -1 : syscall(SYS_pwrite64, fd, data, size, offset);
}

int ftruncate(int fd, off_t size) { return fault_now(false) ? -1 : (int)syscall(SYS_ftruncate, fd, size); }
int ftruncate64(int fd, off64_t size)
{
    return fault_now(false) ? -1 : (int)syscall(SYS_ftruncate, fd, size);
}
int fsync(int fd) { return fault_now(false) ? -1 : (int)syscall(SYS_fsync, fd); }
int fdatasync(int fd) { return fault_now(false) ? -1 : (int)syscall(SYS_fdatasync, fd); }
int mkdir(const char *path, mode_t mode)
{
    return fault_now(true) ? -1 : (int)syscall(SYS_mkdir, path, mode);
}
int unlink(const char *path) { return fault_now(false) ? -1 : (int)syscall(SYS_unlink, path); }
int rename(const char *from, const char *to)
{
    return fault_now(false) ? -1 : (int)syscall(SYS_rename, from, to);
}

static void fault_set(int kind, int after)
{
    atomic_store(&changes_left, after);
    fault = kind;
}

/* --- what is done to a registry that has the adapter "keep" --- */

struct fixture {
    struct temp_folder folder;
    struct counting_device device;
    struct registry_config config;
    struct registry *registry;
};

static void open_registry(struct fixture *f)
{
    struct error err = {0};
    counting_device_init(&f->device);
    f->config = (struct registry_config){.data_dir = f->folder.path,
                                         .device = &f->device.device,
                                         .base = small_base(),
                                         .base_fingerprint = "base"};
    if (registry_open(&f->config, &f->registry, &err)) fail_msg("%s", err.message);
}

static enum status put_one(struct registry *r, struct error *err)
{
    struct put_result result;
    return maker_put(r, "t", "a", 2, 1, NULL, &result, err);
}

static enum status put_two(struct registry *r, struct error *err)
{
    struct put_result result;
    return maker_put(r, "t", "a", 3, 2, NULL, &result, err);
}

/* The second version as an archive. */
static enum status put_two_packed(struct registry *r, struct error *err)
{
    struct adapter_maker m = {0};
    struct strbuf bytes = {0};
    struct upload *u;
    struct put_result result;
    static const char config[] = "{\"peft_type\":\"LORA\",\"lora_alpha\":3}";
    enum status st = upload_open(r, &u, err);
    if (st) return st;
    maker_lora(&m, 3, 2);
    maker_write(&m, &bytes);
    const char *names[] = {PACKAGE_CONFIG, PACKAGE_TENSORS}, *data[] = {config, bytes.data};
    size_t size[] = {strlen(config), bytes.size}, used = 0;
    char *tar = malloc(bytes.size + 20480);
    struct archive *a = archive_write_new();
    archive_write_set_format_ustar(a);
    archive_write_open_memory(a, tar, bytes.size + 20480, &used);
    for (int i = 0; i < 2; i++) {
        struct archive_entry *e = archive_entry_new();
        archive_entry_set_pathname(e, names[i]);
        archive_entry_set_filetype(e, AE_IFREG);
        archive_entry_set_size(e, (la_int64_t)size[i]);
        archive_write_header(a, e);
        archive_write_data(a, data[i], size[i]);
        archive_entry_free(e);
    }
    archive_write_free(a);
    file_write(upload_path(u), PACKAGE_BODY, tar, used);
    free(tar);
    st = registry_put(r, "t", "a", u, NULL, &result, err);
    upload_close(u);
    strbuf_release(&bytes);
    maker_release(&m);
    return st;
}

static enum status delete_it(struct registry *r, struct error *err)
{
    return registry_delete(r, "t", "a", NULL, err);
}

static enum status keep_one(struct registry *r, struct error *err)
{
    static const int one = 1;
    return registry_change(r, "t", "a", &(struct adapter_change){.keep_versions = &one}, err);
}

/* The version before the current one. */
static enum status roll_back(struct registry *r, struct error *err)
{
    struct adapter_info info;
    struct put_result result;
    enum status st = registry_get(r, "t", "a", &info, err);
    if (st) return st;
    st = registry_rollback(r, "t", "a", info.versions[info.version_count - 1].record.version, NULL, &result,
                           err);
    adapter_info_release(&info);
    return st;
}

static enum status put_two_of_one(struct registry *r, struct error *err)
{
    enum status st = keep_one(r, err);
    return st ? st : put_two(r, err);
}

/* Of "a". */
struct state {
    int rank; /* of the current version, 0 where there is none */
    int versions;
};

static const struct change {
    const char *name;
    int versions; /* that "a" has before: of rank 2, then of rank 3 */
    enum status (*make)(struct registry *r, struct error *err);
    struct state before, after;
} changes[] = {
    {"put", 0, put_one, {0, 0}, {2, 1}},
    {"replace", 1, put_two, {2, 1}, {3, 2}},
    {"replace from an archive", 1, put_two_packed, {2, 1}, {3, 2}},
    {"replace, keeping one", 1, put_two_of_one, {2, 1}, {3, 1}},
    {"roll back", 2, roll_back, {3, 2}, {2, 2}},
    {"prune", 2, keep_one, {3, 2}, {3, 1}},
    {"delete", 1, delete_it, {2, 1}, {0, 0}},
    {"delete two", 2, delete_it, {3, 2}, {0, 0}},
};
enum { CHANGE_COUNT = sizeof changes / sizeof *changes };

static void folder_prepare(struct fixture *f, const struct change *c)
{
    struct put_result result;
    temp_folder_make(&f->folder);
    open_registry(f);
    assert_int_equal(maker_put(f->registry, "t", "keep", 1, 9, NULL, &result, NULL), ST_OK);
    if (c->versions > 0) assert_int_equal(put_one(f->registry, NULL), ST_OK);
    if (c->versions > 1) assert_int_equal(put_two(f->registry, NULL), ST_OK);
}

/* The rank of an adapter's site as a lease gives it; 0 where there is no such adapter. */
static int rank_of(struct fixture *f, const char *name)
{
    struct lease *l = NULL;
    struct error err = {0};
    enum status st = registry_lease(f->registry, "t", name, NULL, &l, &err);
    if (st == ST_NOT_FOUND) return 0;
    if (st) fail_msg("%s: %s", name, err.message);
    int rank = lease_view(l)->lr.sites[PROJ_Q]->rank;
    lease_release(l);
    return rank;
}

static struct state state_of(struct fixture *f)
{
    struct adapter_info info;
    struct state now = {.rank = rank_of(f, "a")};
    if (registry_get(f->registry, "t", "a", &info, NULL) == ST_OK) {
        now.versions = info.version_count;
        adapter_info_release(&info);
    }
    return now;
}

static bool states_equal(struct state a, struct state b)
{
    return a.rank == b.rank && a.versions == b.versions;
}

/* Files of blobs/: each version's own tensors, and one configuration that they share (the packed
 * one has another). */
static void expect_state(struct fixture *f, const struct change *c, struct state now, int at)
{
    if (!states_equal(now, c->before) && !states_equal(now, c->after))
        fail_msg("%s, change %d: rank %d of %d versions", c->name, at, now.rank, now.versions);
    assert_int_equal(rank_of(f, "keep"), 1);
    assert_int_equal(file_count(path_in(f->folder.path, "staging")), 0);
    int configs = 1 + (now.rank == 3 && c->make == put_two_packed), tensors = 1 + now.versions;
    int files = file_count(path_in(f->folder.path, "blobs"));
    if (files != configs + tensors) fail_msg("%s, change %d: %d files", c->name, at, files);
}

/* --- tests --- */

static void a_full_disk_leaves_what_was(void **state)
{
    (void)state;
    for (const struct change *c = changes; c < changes + CHANGE_COUNT; c++) {
        bool done = false;
        int failures = 0;
        for (int at = 0; !done; at++) {
            assert_true(at < 1000);
            struct fixture f = {0};
            struct error err = {0};
            folder_prepare(&f, c);
            fault_set(DISK_FULL, at);
            enum status st = c->make(f.registry, &err);
            done = atomic_load(&changes_left) > 0;
            fault_set(OFF, 0);
            if (st && st != ST_NO_SPACE) fail_msg("%s, change %d: %s", c->name, at, err.message);
            if (done) assert_int_equal(st, ST_OK);
            failures += st != ST_OK;
            expect_state(&f, c, state_of(&f), at);
            assert_true(states_equal(state_of(&f), st ? c->before : c->after));
            /* and there is no harm done: the same again succeeds */
            if (st) assert_int_equal(c->make(f.registry, NULL), ST_OK);
            registry_close(f.registry);
            open_registry(&f);
            assert_true(states_equal(state_of(&f), c->after));
            registry_close(f.registry);
            temp_folder_remove(&f.folder);
        }
        assert_true(failures > 0);
    }
}

/* Runs a change in a process that is killed at its change number `at` of a file. False if it came to its end.
 */
static bool run_and_kill(struct fixture *f, const struct change *c, int at)
{
    int how = 0;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (registry_open(&f->config, &f->registry, NULL)) _exit(1);
        fault_set(KILL, at);
        _exit(c->make(f->registry, NULL) ? 1 : 0);
    }
    assert_int_equal(waitpid(child, &how, 0), child);
    if (WIFEXITED(how)) assert_int_equal(WEXITSTATUS(how), 0);
    return WIFSIGNALED(how);
}

static void a_kill_leaves_the_old_state_or_the_new(void **state)
{
    (void)state;
    for (const struct change *c = changes; c < changes + CHANGE_COUNT; c++) {
        bool killed = true, saw_old = false, saw_new = false;
        for (int at = 0; killed; at++) {
            assert_true(at < 1000);
            struct fixture f = {0};
            folder_prepare(&f, c);
            registry_close(f.registry);
            killed = run_and_kill(&f, c, at);
            kills += killed;
            open_registry(&f);
            struct state now = state_of(&f);
            expect_state(&f, c, now, at);
            saw_old |= states_equal(now, c->before);
            saw_new |= states_equal(now, c->after);
            if (!killed) assert_true(states_equal(now, c->after));
            registry_close(f.registry);
            temp_folder_remove(&f.folder);
        }
        assert_true(saw_old && saw_new);
    }
    assert_true(kills >= 200); /* those while opening included */
}

/* The very first opening, which makes folders and tables. */
static void a_kill_while_opening_is_mended(void **state)
{
    (void)state;
    int how = 1;
    for (int at = 0; how; at++) {
        assert_true(at < 1000);
        struct fixture f = {0};
        temp_folder_make(&f.folder);
        counting_device_init(&f.device);
        f.config = (struct registry_config){
            .data_dir = f.folder.path, .device = &f.device.device, .base = small_base()};
        pid_t child = fork();
        if (child == 0) {
            fault_set(KILL, at);
            _exit(registry_open(&f.config, &f.registry, NULL) ? 1 : 0);
        }
        assert_int_equal(waitpid(child, &how, 0), child);
        assert_true(WIFSIGNALED(how) || how == 0);
        kills += WIFSIGNALED(how);
        open_registry(&f);
        assert_int_equal(put_one(f.registry, NULL), ST_OK);
        registry_close(f.registry);
        temp_folder_remove(&f.folder);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_kill_while_opening_is_mended),
        cmocka_unit_test(a_kill_leaves_the_old_state_or_the_new),
        cmocka_unit_test(a_full_disk_leaves_what_was),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

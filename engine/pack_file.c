#include "engine/pack_file.h"

#include "base/log.h"
#include "base/memory.h"
#include "base/strbuf.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define DATA_OFFSET 4096
#define VERSION     1

/* Which file the model was, and when it last changed: equal ones spare reading the whole model. The kernel
 * moves ctime with every change, and no program can set it back. The device's number is left out, since it
 * may differ after a reboot. All zero: unknown. */
struct witness {
    uint64_t size, inode;
    int64_t mtime_ns, ctime_ns;
};

/* As it stands in the file, in this machine's byte order: another order has another version. */
struct header {
    char magic[8];
    uint32_t version, bytes; /* of the header */
    unsigned char plan[PACK_HASH_BYTES], model_hash[PACK_HASH_BYTES];
    uint64_t data_bytes, data_checksum;
    struct witness witness;
    uint64_t checksum; /* of all before */
};
_Static_assert(offsetof(struct header, checksum) == 128, "no padding, and whole blocks for checksum_piece");

static const char magic[8] = {'M', 'E', 'D', 'L', 'E', 'Y', 'P', 'K'};

/* --- hashes and checksums ------------------------------------------------------------------------- */

/* Pieces are worked on by all threads; more than one thread's cache, less than anyone waits for. */
#define PIECE_BYTES ((size_t)4 << 20)

static size_t piece_count(size_t bytes) { return (bytes + PIECE_BYTES - 1) / PIECE_BYTES; }
static size_t piece_size(size_t bytes, size_t i)
{
    size_t left = bytes - i * PIECE_BYTES;
    return left < PIECE_BYTES ? left : PIECE_BYTES;
}

#define LANES 8

static uint64_t mix(uint64_t h, uint64_t word)
{
    h = (h ^ word) * 0x9E3779B97F4A7C15u;
    return h << 29 | h >> 35;
}

/* Finds accidents at the memory's speed; it is no secret and stops nobody who means harm, who could as
 * well change the model. bytes: a multiple of 64. */
static uint64_t checksum_piece(const unsigned char *p, size_t bytes)
{
    uint64_t lane[LANES] = {1, 2, 3, 4, 5, 6, 7, 8}, all = 0;
    for (; bytes; bytes -= 8 * LANES, p += 8 * LANES) {
        uint64_t word[LANES];
        memcpy(word, p, sizeof word);
        for (int i = 0; i < LANES; i++) lane[i] = mix(lane[i], word[i]);
    }
    for (int i = 0; i < LANES; i++) all = mix(all, lane[i]);
    return all;
}

/* Work on pieces of some bytes: on the threads of a device, or, without one, on the caller's. */
struct sweep {
    const unsigned char *data;
    size_t bytes;
    const atomic_bool *stop; /* may be NULL */
    atomic_bool unreadable;  /* or stopped */
    uint64_t *checksum;      /* [pieces], or */
    unsigned char *hash;     /* [pieces][PACK_HASH_BYTES] */
};

static void sweep_piece(void *ctx, size_t i, int worker)
{
    (void)worker;
    struct sweep *s = ctx;
    const unsigned char *p = s->data + i * PIECE_BYTES;
    size_t n = piece_size(s->bytes, i);
    if (s->stop && atomic_load(s->stop)) atomic_store(&s->unreadable, true);
    if (atomic_load(&s->unreadable)) return;
    if (s->checksum)
        s->checksum[i] = checksum_piece(p, n);
    else
        crypto_generichash(s->hash + i * PACK_HASH_BYTES, PACK_HASH_BYTES, p, n, NULL, 0);
}

static void sweep_run(struct sweep *s, struct device *d)
{
    size_t count = piece_count(s->bytes);
    if (d) {
        d->ops->host_run(d, count, sweep_piece, s);
        return;
    }
    for (size_t i = 0; i < count; i++) sweep_piece(s, i, 0);
}

/* BLAKE2b of the pieces' BLAKE2b. */
static enum status model_hash(const struct pack_spec *spec, struct device *d, const atomic_bool *stop,
                              unsigned char out[PACK_HASH_BYTES])
{
    size_t count = piece_count(spec->model->size);
    struct sweep s = {.data = spec->model->data, .bytes = spec->model->size, .stop = stop};
    s.hash = malloc(count * PACK_HASH_BYTES);
    if (!s.hash) return ST_NOMEM;
    sweep_run(&s, d);
    if (!s.unreadable) crypto_generichash(out, PACK_HASH_BYTES, s.hash, count * PACK_HASH_BYTES, NULL, 0);
    free(s.hash);
    return s.unreadable ? ST_CANCELLED : ST_OK;
}

static enum status data_checksum(const void *data, size_t bytes, struct device *d, const atomic_bool *stop,
                                 uint64_t *out)
{
    size_t count = piece_count(bytes);
    struct sweep s = {.data = data, .bytes = bytes, .stop = stop};
    s.checksum = calloc(count, sizeof *s.checksum);
    if (!s.checksum) return ST_NOMEM;
    sweep_run(&s, d);
    uint64_t all = bytes;
    for (size_t i = 0; i < count; i++) all = mix(all, s.checksum[i]);
    free(s.checksum);
    if (s.unreadable) return ST_CANCELLED;
    *out = all;
    return ST_OK;
}

static uint64_t header_checksum(const struct header *h)
{
    return checksum_piece((const unsigned char *)h, offsetof(struct header, checksum));
}

/* --- is it the same model ------------------------------------------------------------------------- */

static int64_t nanoseconds(struct timespec t) { return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec; }

/* A file that changed this moment may change again within the clock's tick and keep its times. */
#define SETTLED_NS ((int64_t)2000000000)

static struct witness witness_of(const struct stat *info)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (nanoseconds(now) - nanoseconds(info->st_ctim) < SETTLED_NS) return (struct witness){0};
    return (struct witness){(uint64_t)info->st_size, info->st_ino, nanoseconds(info->st_mtim),
                            nanoseconds(info->st_ctim)};
}

static bool witness_same(const struct witness *a, const struct witness *b)
{
    return a->size && a->size == b->size && a->inode == b->inode && a->mtime_ns == b->mtime_ns &&
           a->ctime_ns == b->ctime_ns;
}

/* The model was copied or touched but is the same: the next start need not read it all. A torn write leaves a
 * header whose checksum is wrong, and a failed one costs time only. */
static void witness_renew(const char *path, const struct header *old, const struct witness *seen)
{
    struct header h = *old;
    h.witness = *seen;
    h.checksum = header_checksum(&h);
    int fd = open(path, O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0 || pwrite(fd, &h, sizeof h, 0) != (ssize_t)sizeof h)
        log_debug("cannot note the model's dates in '%s'", path);
    if (fd >= 0) close(fd);
}

static enum status model_check(const char *path, const struct header *h, const struct pack_spec *spec,
                               struct device *d, struct error *err)
{
    struct witness now = witness_of(&spec->model->info);
    if (witness_same(&h->witness, &now)) return ST_OK;
    unsigned char hash[PACK_HASH_BYTES];
    enum status st = model_hash(spec, d, NULL, hash);
    if (st) return error_set(err, st, "cannot compare '%s' with the model: %s", path, status_text(st));
    if (memcmp(hash, h->model_hash, sizeof hash) != 0)
        return error_set(err, ST_BAD_FORMAT, "'%s' was made of another model", path);
    if (now.size) witness_renew(path, h, &now);
    return ST_OK;
}

/* --- reading -------------------------------------------------------------------------------------- */

/* Weights of somebody else's making would be believed, so the file must be ours, or of those who could as
 * well change the model or the program. */
static bool writers_trusted(const struct stat *file, const struct stat *model)
{
    bool owner = file->st_uid == geteuid() || file->st_uid == 0 || file->st_uid == model->st_uid;
    return owner && !(file->st_mode & (S_IWGRP | S_IWOTH));
}

/* Brings all pages in now: a file that turns out shorter than it was, or a bad block, is an error here, where
 * a plain read would be a SIGBUS. Kernels before 5.14 do not know the advice; there it remains one. */
static bool pages_readable(const struct file_map *map)
{
#ifdef MADV_POPULATE_READ
    return madvise((void *)map->data, map->size, MADV_POPULATE_READ) == 0 || errno == EINVAL;
#else
    (void)map;
    return true;
#endif
}

static enum status header_check(const char *path, const struct header *h, const struct pack_spec *spec,
                                struct error *err)
{
    const char *wrong = NULL;
    if (memcmp(h->magic, magic, sizeof magic) != 0)
        wrong = "holds no packed weights";
    else if (h->version != VERSION || h->bytes != sizeof *h)
        wrong = "has another version of its format";
    else if (h->checksum != header_checksum(h))
        wrong = "has a damaged header";
    else if (memcmp(h->plan, spec->plan, sizeof h->plan) != 0 || h->data_bytes != spec->bytes)
        wrong = "was made by another release, or for another model or processor";
    return wrong ? error_set(err, ST_BAD_FORMAT, "'%s' %s", path, wrong) : ST_OK;
}

static enum status contents_check(const char *path, const struct file_map *map, const struct pack_spec *spec,
                                  struct device *d, struct error *err)
{
    if (!writers_trusted(&map->info, &spec->model->info))
        return error_set(err, ST_BAD_FORMAT,
                         "'%s' can be written by others than this user and the model's owner", path);
    if (map->size != DATA_OFFSET + spec->bytes)
        return error_set(err, ST_BAD_FORMAT, "'%s' has %zu bytes, where this model takes %zu", path,
                         map->size, DATA_OFFSET + spec->bytes);
    if (!pages_readable(map)) return error_set(err, ST_BAD_FORMAT, "'%s' cannot be read to its end", path);

    struct header h;
    memcpy(&h, map->data, sizeof h);
    enum status st = header_check(path, &h, spec, err);
    if (st) return st;
    uint64_t checksum;
    st = data_checksum((const char *)map->data + DATA_OFFSET, spec->bytes, d, NULL, &checksum);
    if (st) return error_set(err, st, "cannot check '%s': %s", path, status_text(st));
    if (checksum != h.data_checksum) return error_set(err, ST_BAD_FORMAT, "'%s' has damaged contents", path);
    return model_check(path, &h, spec, d, err);
}

enum status pack_file_open(const char *path, const struct pack_spec *spec, struct device *d,
                           struct file_map *out, const void **data_out, struct error *err)
{
    struct file_map map;
    enum status st = file_map(path, &map, err);
    if (st) return st;
    st = contents_check(path, &map, spec, d, err);
    if (st) {
        file_unmap(&map);
        return st;
    }
    *out = map;
    *data_out = (const char *)map.data + DATA_OFFSET;
    return ST_OK;
}

/* --- writing -------------------------------------------------------------------------------------- */

/* The half-made file has one name, so that a killed process leaves at most one, which the next one takes
 * over. Whoever holds its lock writes. A name that is no longer the locked file's has just been renamed by
 * its writer. */
static enum status part_open(const char *path, int *fd_out, struct error *err)
{
    int fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
    if (fd < 0) return file_error(err, "make", path);

    struct stat file, name;
    enum status st = ST_OK;
    if (flock(fd, LOCK_EX | LOCK_NB) || fstat(fd, &file) || lstat(path, &name) ||
        file.st_ino != name.st_ino || file.st_dev != name.st_dev)
        st = error_set(err, ST_BUSY, "another process is writing '%s'", path);
    else if (!S_ISREG(file.st_mode) || file.st_uid != geteuid() || file.st_nlink != 1)
        st = error_set(err, ST_IO, "'%s' is somebody else's", path);
    else if (ftruncate(fd, 0))
        st = file_error(err, "empty", path);
    if (st)
        close(fd);
    else
        *fd_out = fd;
    return st;
}

static enum status part_fill(int fd, const char *path, const struct pack_spec *spec, const struct header *h,
                             const void *data, const atomic_bool *stop, struct error *err)
{
    static const char zero[DATA_OFFSET - sizeof(struct header)];
    /* Room for all of it is asked for first: no half of a file ever fills a disk. */
    if (fallocate(fd, 0, 0, (off_t)(DATA_OFFSET + spec->bytes)) && errno != EOPNOTSUPP)
        return file_error(err, "find room for", path);
    if (fchmod(fd, S_IRUSR | S_IWUSR | (spec->model->info.st_mode & (S_IRGRP | S_IROTH))))
        return file_error(err, "set the mode of", path);
    if (!file_write_all(fd, h, sizeof *h) || !file_write_all(fd, zero, sizeof zero))
        return file_error(err, "write", path);
    for (size_t i = 0; i < piece_count(spec->bytes); i++) {
        if (atomic_load(stop)) return error_set(err, ST_CANCELLED, "writing '%s' was given up", path);
        if (!file_write_all(fd, (const char *)data + i * PIECE_BYTES, piece_size(spec->bytes, i)))
            return file_error(err, "write", path);
    }
    return ST_OK;
}

/* Of the model that is mapped, which must still be the file's contents: a model that was changed in place
 * after its weights were packed would hash to something they are not made of. */
static enum status header_make(const struct pack_spec *spec, const void *data, const atomic_bool *stop,
                               struct header *out, struct error *err)
{
    struct header h = {.version = VERSION, .bytes = sizeof h, .data_bytes = spec->bytes};
    h.witness = witness_of(&spec->model->info);
    memcpy(h.magic, magic, sizeof magic);
    memcpy(h.plan, spec->plan, sizeof h.plan);
    enum status st = model_hash(spec, NULL, stop, h.model_hash);
    if (!st) st = data_checksum(data, spec->bytes, NULL, stop, &h.data_checksum);
    if (st) return error_set(err, st, "packed weights cannot be summed up: %s", status_text(st));

    const struct stat *then = &spec->model->info;
    struct stat now;
    if (stat(spec->model_path, &now) || now.st_ino != then->st_ino || now.st_dev != then->st_dev ||
        now.st_size != then->st_size || nanoseconds(now.st_ctim) != nanoseconds(then->st_ctim))
        return error_set(err, ST_BUSY, "'%s' has changed while its weights were packed", spec->model_path);
    h.checksum = header_checksum(&h);
    *out = h;
    return ST_OK;
}

static enum status folder_make(const char *path, struct error *err)
{
    const char *slash = strrchr(path, '/');
    if (!slash || slash == path) return ST_OK;
    char *folder = strndup(path, (size_t)(slash - path));
    enum status st = folder ? file_make_folders(folder, err)
                            : error_set(err, ST_NOMEM, "cannot write '%s': out of memory", path);
    free(folder);
    return st;
}

enum status pack_file_write(const char *path, const struct pack_spec *spec, const void *data,
                            const atomic_bool *stop, struct error *err)
{
    struct strbuf name = {0};
    strbuf_printf(&name, "%s.part", path);
    if (name.failed) return error_set(err, ST_NOMEM, "cannot write '%s': out of memory", path);

    int fd = -1;
    struct header h;
    enum status st = folder_make(path, err);
    if (!st) st = part_open(name.data, &fd, err);
    if (st) goto done;
    st = header_make(spec, data, stop, &h, err);
    if (!st) st = part_fill(fd, name.data, spec, &h, data, stop, err);
    if (!st) st = file_move(name.data, path, err);
    if (st) unlink(name.data);
done:
    if (fd >= 0) close(fd); /* and with it the lock */
    strbuf_release(&name);
    return st;
}

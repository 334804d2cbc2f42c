#include "training/checkpoint.h"

#include "base/file.h"
#include "base/memory.h"
#include "base/strbuf.h"

#include <fcntl.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* head, then the vectors one after the other, then a BLAKE2b hash of all that. In the machine's byte order.
 */
#define MAGIC "medley checkpoint 1"
struct head {
    char magic[24];
    uint64_t count; /* of each vector */
    struct checkpoint_state state;
};
#define HASH_BYTES   32
#define PIECE_FLOATS ((size_t)1 << 20)

static size_t file_bytes(size_t count)
{
    size_t vectors = size_mul(size_mul(count, LEARNER_VECTORS), sizeof(float));
    return size_add(sizeof(struct head), size_add(vectors, HASH_BYTES));
}

/* --- writing --- */

struct writer {
    int fd;
    crypto_generichash_state hash;
};

static bool put(struct writer *w, const void *bytes, size_t size)
{
    crypto_generichash_update(&w->hash, bytes, size);
    return file_write_all(w->fd, bytes, size);
}

static enum status write_vectors(struct writer *w, struct learner *l, float *piece, const char *path,
                                 struct error *err)
{
    size_t count = l->params->count;
    for (int v = 0; v < LEARNER_VECTORS; v++) {
        for (size_t at = 0; at < count; at += PIECE_FLOATS) {
            size_t n = count - at < PIECE_FLOATS ? count - at : PIECE_FLOATS;
            enum status st = learner_read(l, (enum learner_vector)v, at, n, piece);
            if (st) return error_set(err, st, "the device cannot be had: %s", status_text(st));
            if (!put(w, piece, n * sizeof *piece)) return file_error(err, "write", path);
        }
    }
    return ST_OK;
}

static enum status write_all(struct writer *w, struct learner *l, const struct checkpoint_state *s,
                             const char *path, struct error *err)
{
    struct head head;
    unsigned char hash[HASH_BYTES];
    memset(&head, 0, sizeof head); /* padding too: these bytes are hashed */
    strcpy(head.magic, MAGIC);
    head.count = l->params->count;
    head.state = *s;
    float *piece = malloc(PIECE_FLOATS * sizeof *piece);
    if (!piece) return error_set(err, ST_NOMEM, "out of memory");
    crypto_generichash_init(&w->hash, NULL, 0, HASH_BYTES);
    enum status st = put(w, &head, sizeof head) ? ST_OK : file_error(err, "write", path);
    if (!st) st = write_vectors(w, l, piece, path, err);
    crypto_generichash_final(&w->hash, hash, HASH_BYTES);
    if (!st && !file_write_all(w->fd, hash, HASH_BYTES)) st = file_error(err, "write", path);
    free(piece);
    return st;
}

enum status checkpoint_write(struct learner *l, const struct checkpoint_state *s, const char *path,
                             struct error *err)
{
    struct strbuf name = {0};
    strbuf_printf(&name, "%s.part", path);
    if (name.failed) return error_set(err, ST_NOMEM, "out of memory");
    struct writer w = {.fd = open(name.data, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600)};
    enum status st = w.fd < 0 ? file_error(err, "make", name.data) : write_all(&w, l, s, name.data, err);
    if (w.fd >= 0 && close(w.fd) && !st) st = file_error(err, "write", name.data);
    if (!st) st = file_move(name.data, path, err);
    if (st) unlink(name.data);
    strbuf_release(&name);
    return st;
}

/* --- reading --- */

static enum status check(const struct file_map *map, const struct learner *l, const char *run,
                         const char *path, struct head *out, struct error *err)
{
    unsigned char hash[HASH_BYTES];
    struct head head;
    if (map->size < sizeof head + HASH_BYTES)
        return error_set(err, ST_BAD_FORMAT, "'%s' is no checkpoint: it is too short", path);
    memcpy(&head, map->data, sizeof head);
    if (memcmp(head.magic, MAGIC, sizeof MAGIC) != 0)
        return error_set(err, ST_BAD_FORMAT, "'%s' is no checkpoint of this program", path);
    size_t hashed = map->size - HASH_BYTES;
    crypto_generichash(hash, HASH_BYTES, map->data, hashed, NULL, 0);
    if (memcmp(hash, (const char *)map->data + hashed, HASH_BYTES) != 0)
        return error_set(err, ST_BAD_FORMAT, "the checkpoint '%s' is damaged", path);
    head.state.run[CHECKPOINT_RUN_MAX - 1] = '\0';
    if (head.count != l->params->count || map->size != file_bytes(head.count))
        return error_set(err, ST_REJECTED, "the checkpoint '%s' is of an adapter of %llu parameters, not %zu",
                         path, (unsigned long long)head.count, l->params->count);
    if (run && strcmp(run, head.state.run) != 0)
        return error_set(err, ST_REJECTED,
                         "the checkpoint '%s' is of a run with other examples, settings or another adapter",
                         path);
    *out = head;
    return ST_OK;
}

static enum status load_vectors(struct learner *l, const struct file_map *map)
{
    enum status st = ST_OK;
    size_t count = l->params->count;
    const char *at = (const char *)map->data + sizeof(struct head);
    float *piece = malloc(PIECE_FLOATS * sizeof *piece);
    if (!piece) return ST_NOMEM;
    for (int v = 0; v < LEARNER_VECTORS && !st; v++) {
        for (size_t first = 0; first < count && !st; first += PIECE_FLOATS) {
            size_t n = count - first < PIECE_FLOATS ? count - first : PIECE_FLOATS;
            memcpy(piece, at, n * sizeof *piece);
            at += n * sizeof *piece;
            st = learner_write(l, (enum learner_vector)v, first, n, piece);
        }
    }
    free(piece);
    return st;
}

enum status checkpoint_read(struct learner *l, const char *path, const char *run,
                            struct checkpoint_state *out, struct error *err)
{
    struct file_map map;
    struct head head;
    enum status st = file_map(path, &map, err);
    if (st) return st;
    st = check(&map, l, run, path, &head, err);
    if (!st) {
        st = load_vectors(l, &map);
        if (st) error_set(err, st, "the checkpoint '%s' cannot be loaded: %s", path, status_text(st));
    }
    file_unmap(&map);
    if (st) return st;
    l->optim_steps = head.state.optim_steps;
    *out = head.state;
    return ST_OK;
}

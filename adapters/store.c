#include "adapters/store.h"

#include "base/file.h"
#include "base/log.h"
#include "base/strbuf.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <pthread.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

/* What makes each version of the schema from the one before; each sets user_version and is a transaction of
 * its own. */
static const char *const migrations[] = {
    "BEGIN IMMEDIATE;"
    "CREATE TABLE adapter (id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL,"
    " current TEXT NOT NULL, UNIQUE (tenant, name));"
    "CREATE TABLE version (id INTEGER PRIMARY KEY,"
    " adapter INTEGER NOT NULL REFERENCES adapter (id) ON DELETE CASCADE,"
    " version TEXT NOT NULL, hash TEXT NOT NULL, config_blob TEXT NOT NULL, tensors_blob TEXT NOT NULL,"
    " base TEXT NOT NULL, created INTEGER NOT NULL, bytes INTEGER NOT NULL, format TEXT NOT NULL,"
    " targets TEXT NOT NULL, rank INTEGER NOT NULL, experts INTEGER NOT NULL, top_k INTEGER NOT NULL,"
    " sites INTEGER NOT NULL, parameters INTEGER NOT NULL,"
    " UNIQUE (adapter, hash), UNIQUE (adapter, version));"
    "CREATE INDEX version_config ON version (config_blob);"
    "CREATE INDEX version_tensors ON version (tensors_blob);"
    "PRAGMA user_version = 1;"
    "COMMIT",
    /* The order of publication replaces the name of the current version. */
    "BEGIN IMMEDIATE;"
    "ALTER TABLE adapter ADD COLUMN description TEXT NOT NULL DEFAULT '';"
    "ALTER TABLE adapter ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0;"
    "ALTER TABLE adapter ADD COLUMN keep_versions INTEGER NOT NULL DEFAULT 0;"
    "ALTER TABLE version ADD COLUMN serial INTEGER NOT NULL DEFAULT 0;"
    "ALTER TABLE version ADD COLUMN published INTEGER NOT NULL DEFAULT 0;"
    "ALTER TABLE version ADD COLUMN source INTEGER NOT NULL DEFAULT 0;"
    "UPDATE version SET serial = id, published = created;"
    "UPDATE version SET serial = (SELECT max(id) + 1 FROM version) WHERE version ="
    " (SELECT current FROM adapter WHERE id = version.adapter);"
    "ALTER TABLE adapter DROP COLUMN current;"
    "PRAGMA user_version = 2;"
    "COMMIT",
    /* The number of a deleted adapter is not given out again. */
    "BEGIN IMMEDIATE;"
    "CREATE TABLE adapter_number (last INTEGER NOT NULL);"
    "INSERT INTO adapter_number SELECT coalesce(max(id), 0) FROM adapter;"
    "CREATE TRIGGER adapter_numbered AFTER INSERT ON adapter BEGIN"
    " UPDATE adapter_number SET last = max(last, new.id); END;"
    "PRAGMA user_version = 3;"
    "COMMIT",
};
#define BLOB_COMPARE_MAX ((size_t)64 << 10)

#define SCHEMA_VERSION (int)(sizeof migrations / sizeof *migrations)

/* name, text. Where there are several, parameter 1 is the tenant and 2 the name. */
#define ADAPTER_ID "(SELECT id FROM adapter WHERE tenant = ?1 AND name = ?2)"
#define STATEMENT_TABLE(X)                                                                                  \
    X(BEGIN, "BEGIN IMMEDIATE")                                                                             \
    X(COMMIT, "COMMIT")                                                                                     \
    X(ROLLBACK, "ROLLBACK")                                                                                 \
    X(VISIT, "SELECT a.tenant, a.name, a.id, a.description, a.pinned, a.keep_versions, v.version, v.hash,"  \
             " v.config_blob, v.tensors_blob, v.base, v.created, v.published, v.source, v.bytes, v.format," \
             " v.targets, v.rank, v.experts, v.top_k, v.sites, v.parameters"                                \
             " FROM version v JOIN adapter a ON a.id = v.adapter ORDER BY a.tenant, a.name, v.serial")      \
    X(ADAPTER_ADD, "INSERT INTO adapter (id, tenant, name)"                                                 \
                   " VALUES ((SELECT last + 1 FROM adapter_number), ?1, ?2)"                                \
                   " ON CONFLICT (tenant, name) DO UPDATE SET name = name RETURNING id")                    \
    X(VERSION_ADD, "INSERT INTO version (adapter, version, hash, config_blob, tensors_blob, base, created," \
                   " bytes, format, targets, rank, experts, top_k, sites, parameters)"                      \
                   " SELECT id, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16"              \
                   " FROM adapter WHERE tenant = ?1 AND name = ?2"                                          \
                   " ON CONFLICT (adapter, hash) DO NOTHING")                                               \
    X(MAKE_CURRENT, "UPDATE version SET published = ?4, source = ?5,"                                       \
                    " serial = (SELECT max(serial) + 1 FROM version WHERE adapter = " ADAPTER_ID ")"        \
                    " WHERE adapter = " ADAPTER_ID " AND version = ?3")                                     \
    X(PRUNE, "DELETE FROM version WHERE adapter = " ADAPTER_ID " AND ?3 > 0 AND serial NOT IN"              \
             " (SELECT serial FROM version WHERE adapter = " ADAPTER_ID                                     \
             " ORDER BY serial DESC LIMIT ?3) RETURNING config_blob, tensors_blob")                         \
    X(SET, "UPDATE adapter SET description = ?3, pinned = ?4, keep_versions = ?5"                           \
           " WHERE tenant = ?1 AND name = ?2")                                                              \
    X(VERSIONS_REMOVE,                                                                                      \
      "DELETE FROM version WHERE adapter = " ADAPTER_ID " RETURNING config_blob, tensors_blob")             \
    X(ADAPTER_REMOVE, "DELETE FROM adapter WHERE tenant = ?1 AND name = ?2")                                \
    X(BLOB_NAMED, "SELECT 1 FROM version WHERE config_blob = ?1 UNION ALL"                                  \
                  " SELECT 1 FROM version WHERE tensors_blob = ?1 LIMIT 1")

enum statement {
#define X(name, text) STATEMENT_##name,
    STATEMENT_TABLE(X)
#undef X
        STATEMENT_COUNT
};

struct store {
    char *data_dir;
    int lock_fd;
    pthread_mutex_t mutex; /* everything below */
    sqlite3 *db;
    sqlite3_stmt *statement[STATEMENT_COUNT];
};

/* --- paths --- */

static char *path_format(const char *data_dir, const char *fmt, ...) PRINTF_LIKE(2, 3);
static char *path_format(const char *data_dir, const char *fmt, ...)
{
    char tail[128];
    va_list args;
    va_start(args, fmt);
    vsnprintf(tail, sizeof tail, fmt, args);
    va_end(args);
    struct strbuf b = {0};
    strbuf_printf(&b, "%s/%s", data_dir, tail);
    return strbuf_take(&b);
}

char *store_blob_path(const struct store *s, const char *hash)
{
    return path_format(s->data_dir, "blobs/%.2s/%s", hash, hash);
}

static enum status no_memory(struct error *err) { return error_set(err, ST_NOMEM, "out of memory"); }

static int remove_entry(const char *path, const struct stat *info, int type, struct FTW *where)
{
    (void)info, (void)type, (void)where;
    if (remove(path) && errno != ENOENT) log_warn("cannot remove '%s': errno %d", path, errno);
    return 0;
}

void remove_all(const char *path) { (void)nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS); }

enum status store_stage(struct store *s, char **path_out, struct error *err)
{
    char *path = path_format(s->data_dir, "staging/XXXXXX");
    if (!path) return no_memory(err);
    if (!mkdtemp(path)) {
        enum status st = file_error(err, "make a folder in", path);
        free(path);
        return st;
    }
    *path_out = path;
    return ST_OK;
}

/* --- SQLite --- */

static enum status db_error(const struct store *s, struct error *err)
{
    int rc = sqlite3_errcode(s->db);
    enum status st = rc == SQLITE_FULL || sqlite3_system_errno(s->db) == ENOSPC ? ST_NO_SPACE
                     : rc == SQLITE_NOMEM                                       ? ST_NOMEM
                     : rc == SQLITE_CONSTRAINT                                  ? ST_CONFLICT
                     : rc == SQLITE_CORRUPT || rc == SQLITE_NOTADB              ? ST_BAD_FORMAT
                                                                                : ST_IO;
    return error_set(err, st, "%s/medley.db: %s", s->data_dir, sqlite3_errmsg(s->db));
}

static void column_text(sqlite3_stmt *q, int column, char *out, size_t size)
{
    const unsigned char *text = sqlite3_column_text(q, column);
    snprintf(out, size, "%s", text ? (const char *)text : "");
}

static sqlite3_stmt *statement_begin(struct store *s, enum statement which)
{
    sqlite3_stmt *q = s->statement[which];
    sqlite3_reset(q);
    sqlite3_clear_bindings(q);
    return q;
}

/* A statement about one adapter. */
static sqlite3_stmt *statement_about(struct store *s, enum statement which, const char *tenant,
                                     const char *name)
{
    sqlite3_stmt *q = statement_begin(s, which);
    sqlite3_bind_text(q, 1, tenant, -1, SQLITE_STATIC);
    sqlite3_bind_text(q, 2, name, -1, SQLITE_STATIC);
    return q;
}

/* Runs a statement that answers no rows. */
static enum status statement_run(struct store *s, sqlite3_stmt *q, struct error *err)
{
    enum status st = sqlite3_step(q) == SQLITE_DONE ? ST_OK : db_error(s, err);
    sqlite3_reset(q);
    return st;
}

/* Runs a deletion of versions and appends the hashes of their files. */
static enum status statement_orphan(struct store *s, sqlite3_stmt *q, struct strbuf *orphans,
                                    struct error *err)
{
    int rc;
    while ((rc = sqlite3_step(q)) == SQLITE_ROW) {
        for (int column = 0; column < 2; column++) {
            char hash[HASH_HEX_SIZE] = "";
            column_text(q, column, hash, sizeof hash);
            strbuf_append(orphans, hash, sizeof hash);
        }
    }
    enum status st = rc != SQLITE_DONE ? db_error(s, err) : orphans->failed ? no_memory(err) : ST_OK;
    sqlite3_reset(q);
    return st;
}

static enum status db_exec(struct store *s, const char *sql, struct error *err)
{
    return sqlite3_exec(s->db, sql, NULL, NULL, NULL) == SQLITE_OK ? ST_OK : db_error(s, err);
}

static enum status schema_check(struct store *s, struct error *err)
{
    sqlite3_stmt *q = NULL;
    int version = -1;
    if (sqlite3_prepare_v2(s->db, "PRAGMA user_version", -1, &q, NULL) == SQLITE_OK &&
        sqlite3_step(q) == SQLITE_ROW)
        version = sqlite3_column_int(q, 0);
    sqlite3_finalize(q);
    if (version < 0) return db_error(s, err);
    if (version > SCHEMA_VERSION)
        return error_set(err, ST_UNSUPPORTED,
                         "%s/medley.db has schema version %d; this program knows up to %d: use the later "
                         "program that wrote it, or another data folder",
                         s->data_dir, version, SCHEMA_VERSION);
    enum status st = ST_OK;
    for (; version < SCHEMA_VERSION && !st; version++) st = db_exec(s, migrations[version], err);
    return st;
}

static enum status db_open(struct store *s, struct error *err)
{
    static const char *const texts[STATEMENT_COUNT] = {
#define X(name, text) [STATEMENT_##name] = text,
        STATEMENT_TABLE(X)
#undef X
    };
    char *path = path_format(s->data_dir, "medley.db");
    if (!path) return no_memory(err);
    int rc =
        sqlite3_open_v2(path, &s->db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX, NULL);
    free(path);
    if (rc != SQLITE_OK) return db_error(s, err);
    enum status st =
        db_exec(s, "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON", err);
    if (!st) st = schema_check(s, err);
    for (int i = 0; i < STATEMENT_COUNT && !st; i++)
        if (sqlite3_prepare_v3(s->db, texts[i], -1, SQLITE_PREPARE_PERSISTENT, &s->statement[i], NULL) !=
            SQLITE_OK)
            st = db_error(s, err);
    return st;
}

/* --- blobs --- */

static enum status blob_named(struct store *s, const char *hash, bool *out, struct error *err)
{
    sqlite3_stmt *q = statement_begin(s, STATEMENT_BLOB_NAMED);
    sqlite3_bind_text(q, 1, hash, -1, SQLITE_STATIC);
    int rc = sqlite3_step(q);
    enum status st = rc == SQLITE_ROW || rc == SQLITE_DONE ? ST_OK : db_error(s, err);
    sqlite3_reset(q);
    if (!st) *out = rc == SQLITE_ROW;
    return st;
}

/* Removes a file of blobs/ unless a version names it. Failing to is no error: the next open tries again. */
static void blob_collect(struct store *s, const char *hash)
{
    bool named = true;
    char *path = store_blob_path(s, hash);
    if (path && blob_named(s, hash, &named, NULL) == ST_OK && !named) remove_all(path);
    free(path);
}

/* A crash can leave files that no version names: whatever stands there besides. */
static enum status blobs_sweep(struct store *s, const char *folder, struct error *err)
{
    DIR *dir = opendir(folder);
    if (!dir) return file_error(err, "list", folder);
    enum status st = ST_OK;
    for (struct dirent *e; !st && (e = readdir(dir));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        struct strbuf path = {0};
        strbuf_printf(&path, "%s/%s", folder, e->d_name);
        bool named = false;
        if (path.failed)
            st = no_memory(err);
        else if (strlen(e->d_name) == 2)
            st = blobs_sweep(s, path.data, err);
        else if (!(st = blob_named(s, e->d_name, &named, err)) && !named)
            remove_all(path.data);
        strbuf_release(&path);
    }
    closedir(dir);
    return st;
}

enum status store_sync(const char *path, struct error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return file_error(err, "open", path);
    enum status st = fsync(fd) ? file_error(err, "sync", path) : ST_OK;
    close(fd);
    return st;
}

static enum status blob_move(struct store *s, const char *from, const char *path, const char *hash,
                             struct error *err)
{
    enum status st = ST_OK;
    char *shard = path_format(s->data_dir, "blobs/%.2s", hash);
    if (!shard)
        st = no_memory(err);
    else if (mkdir(shard, 0700) == 0)
        st = file_sync_folder_of(shard, err);
    else if (errno != EEXIST)
        st = file_error(err, "make the folder", shard);
    /* The same content again replaces itself, which also mends a damaged file. */
    if (!st && rename(from, path)) st = file_error(err, "rename", from);
    if (!st) st = file_sync_folder_of(path, err);
    free(shard);
    return st;
}

/* Whether the path is a small file of that content: versions of an adapter mostly share their configuration,
 * and what is read costs less than two syncs. */
static bool blob_is(const char *path, const char *hash)
{
    struct file_map map;
    if (file_map(path, &map, NULL)) return false;
    bool same = map.size <= BLOB_COMPARE_MAX && hash_matches(map.data, map.size, hash);
    file_unmap(&map);
    return same;
}

static enum status blob_add(struct store *s, const char *from, const char *hash, bool synced,
                            struct error *err)
{
    bool named = false;
    char *path = store_blob_path(s, hash);
    enum status st = path ? blob_named(s, hash, &named, err) : no_memory(err);
    if (st || (named && blob_is(path, hash))) goto done; /* what a version names is durable */
    if (!synced) st = store_sync(from, err);
    if (!st) st = blob_move(s, from, path, hash, err);
done:
    free(path);
    return st;
}

/* --- opening --- */

static enum status lock_take(struct store *s, struct error *err)
{
    char *path = path_format(s->data_dir, "lock");
    if (!path) return no_memory(err);
    enum status st = ST_OK;
    s->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (s->lock_fd < 0)
        st = file_error(err, "open", path);
    else if (flock(s->lock_fd, LOCK_EX | LOCK_NB))
        st = error_set(err, ST_BUSY, "another process uses the data folder '%s'", s->data_dir);
    free(path);
    return st;
}

static enum status folders_make(struct store *s, struct error *err)
{
    enum status st = file_make_folders(s->data_dir, err);
    if (!st) st = lock_take(s, err);
    if (st) return st;
    char *staging = path_format(s->data_dir, "staging"), *blobs = path_format(s->data_dir, "blobs");
    st = staging && blobs ? ST_OK : no_memory(err);
    if (!st) {
        remove_all(staging);
        st = file_make_folders(staging, err);
    }
    if (!st) st = file_make_folders(blobs, err);
    if (!st) st = file_sync_folder_of(blobs, err);
    if (!st) st = db_open(s, err);
    if (!st) st = blobs_sweep(s, blobs, err);
    free(staging);
    free(blobs);
    return st;
}

enum status store_open(const char *data_dir, struct store **out, struct error *err)
{
    struct store *s = calloc(1, sizeof *s);
    if (!s) return no_memory(err);
    s->lock_fd = -1;
    pthread_mutex_init(&s->mutex, NULL);
    s->data_dir = strdup(data_dir);
    enum status st = s->data_dir ? folders_make(s, err) : no_memory(err);
    if (st) {
        store_close(s);
        return st;
    }
    *out = s;
    return ST_OK;
}

void store_close(struct store *s)
{
    if (!s) return;
    for (int i = 0; i < STATEMENT_COUNT; i++) sqlite3_finalize(s->statement[i]);
    sqlite3_close(s->db);
    if (s->lock_fd >= 0) close(s->lock_fd); /* and with it the lock */
    pthread_mutex_destroy(&s->mutex);
    free(s->data_dir);
    free(s);
}

/* --- rows --- */

static void adapter_from_row(sqlite3_stmt *q, struct adapter_record *a)
{
    a->tenant = (const char *)sqlite3_column_text(q, 0);
    a->name = (const char *)sqlite3_column_text(q, 1);
    a->number = sqlite3_column_int64(q, 2);
    column_text(q, 3, a->settings.description, sizeof a->settings.description);
    a->settings.pinned = sqlite3_column_int(q, 4);
    a->settings.keep_versions = sqlite3_column_int(q, 5);
}

static void version_from_row(sqlite3_stmt *q, struct version_record *v)
{
    column_text(q, 6, v->version, sizeof v->version);
    column_text(q, 7, v->hash, sizeof v->hash);
    column_text(q, 8, v->config_blob, sizeof v->config_blob);
    column_text(q, 9, v->tensors_blob, sizeof v->tensors_blob);
    column_text(q, 10, v->base, sizeof v->base);
    v->created = sqlite3_column_int64(q, 11);
    v->published = sqlite3_column_int64(q, 12);
    int source = sqlite3_column_int(q, 13);
    v->source = source > 0 && source < VERSION_SOURCE_COUNT ? (enum version_source)source : VERSION_UPLOAD;
    v->bytes = (size_t)sqlite3_column_int64(q, 14);
    column_text(q, 15, v->format, sizeof v->format);
    column_text(q, 16, v->targets, sizeof v->targets);
    v->rank = sqlite3_column_int(q, 17);
    v->experts = sqlite3_column_int(q, 18);
    v->top_k = sqlite3_column_int(q, 19);
    v->sites = sqlite3_column_int(q, 20);
    v->parameters = (size_t)sqlite3_column_int64(q, 21);
}

enum status store_visit(struct store *s,
                        enum status (*visit)(void *ctx, const struct adapter_record *a,
                                             const struct version_record *v),
                        void *ctx, struct error *err)
{
    pthread_mutex_lock(&s->mutex);
    sqlite3_stmt *q = statement_begin(s, STATEMENT_VISIT);
    enum status st = ST_OK;
    int rc = SQLITE_DONE;
    while (!st && (rc = sqlite3_step(q)) == SQLITE_ROW) {
        struct adapter_record a = {0};
        struct version_record v = {0};
        adapter_from_row(q, &a);
        version_from_row(q, &v);
        st = visit(ctx, &a, &v);
    }
    if (!st && rc != SQLITE_DONE) st = db_error(s, err);
    sqlite3_reset(q);
    pthread_mutex_unlock(&s->mutex);
    return st;
}

/* Adds the adapter unless it is there. */
static enum status adapter_add(struct store *s, const char *tenant, const char *name, int64_t *number_out,
                               struct error *err)
{
    sqlite3_stmt *q = statement_about(s, STATEMENT_ADAPTER_ADD, tenant, name);
    enum status st = ST_OK;
    if (sqlite3_step(q) == SQLITE_ROW)
        *number_out = sqlite3_column_int64(q, 0);
    else
        st = db_error(s, err);
    if (!st) st = statement_run(s, q, err);
    sqlite3_reset(q);
    return st;
}

static enum status version_add(struct store *s, const char *tenant, const char *name,
                               const struct version_record *v, struct error *err)
{
    sqlite3_stmt *q = statement_about(s, STATEMENT_VERSION_ADD, tenant, name);
    const char *text[] = {v->version, v->hash, v->config_blob, v->tensors_blob, v->base};
    for (int i = 0; i < 5; i++) sqlite3_bind_text(q, i + 3, text[i], -1, SQLITE_STATIC);
    sqlite3_bind_int64(q, 8, v->created);
    sqlite3_bind_int64(q, 9, (sqlite3_int64)v->bytes);
    sqlite3_bind_text(q, 10, v->format, -1, SQLITE_STATIC);
    sqlite3_bind_text(q, 11, v->targets, -1, SQLITE_STATIC);
    sqlite3_bind_int(q, 12, v->rank);
    sqlite3_bind_int(q, 13, v->experts);
    sqlite3_bind_int(q, 14, v->top_k);
    sqlite3_bind_int(q, 15, v->sites);
    sqlite3_bind_int64(q, 16, (sqlite3_int64)v->parameters);
    return statement_run(s, q, err);
}

static enum status version_make_current(struct store *s, const char *tenant, const char *name,
                                        const struct version_record *v, struct error *err)
{
    sqlite3_stmt *q = statement_about(s, STATEMENT_MAKE_CURRENT, tenant, name);
    sqlite3_bind_text(q, 3, v->version, -1, SQLITE_STATIC);
    sqlite3_bind_int64(q, 4, v->published);
    sqlite3_bind_int(q, 5, v->source);
    enum status st = statement_run(s, q, err);
    if (!st && sqlite3_changes(s->db) == 0)
        st = error_set(err, ST_NOT_FOUND, "the adapter '%s' has no version '%s'", name, v->version);
    return st;
}

static enum status versions_prune(struct store *s, const char *tenant, const char *name, int keep,
                                  struct strbuf *orphans, struct error *err)
{
    sqlite3_stmt *q = statement_about(s, STATEMENT_PRUNE, tenant, name);
    sqlite3_bind_int(q, 3, keep);
    return statement_orphan(s, q, orphans, err);
}

static enum status transaction_begin(struct store *s, struct error *err)
{
    return statement_run(s, statement_begin(s, STATEMENT_BEGIN), err);
}

/* Ends a transaction: commits if st is ST_OK and returns what came of it. */
static enum status transaction_end(struct store *s, enum status st, struct error *err)
{
    if (!st) st = statement_run(s, statement_begin(s, STATEMENT_COMMIT), err);
    if (st && !sqlite3_get_autocommit(s->db))
        (void)statement_run(s, statement_begin(s, STATEMENT_ROLLBACK), NULL);
    return st;
}

enum status store_publish(struct store *s, const char *tenant, const char *name,
                          const struct version_record *v, const char *config_path, const char *tensors_path,
                          int keep, int64_t *number_out, struct strbuf *orphans, struct error *err)
{
    int64_t number = 0;
    pthread_mutex_lock(&s->mutex);
    enum status st = blob_add(s, config_path, v->config_blob, false, err);
    if (!st) st = blob_add(s, tensors_path, v->tensors_blob, true, err);
    if (!st) st = transaction_begin(s, err);
    if (!st) {
        st = adapter_add(s, tenant, name, &number, err);
        if (!st) st = version_add(s, tenant, name, v, err);
        if (!st) st = version_make_current(s, tenant, name, v, err);
        if (!st) st = versions_prune(s, tenant, name, keep, orphans, err);
        st = transaction_end(s, st, err);
    }
    if (st) {
        blob_collect(s, v->config_blob);
        blob_collect(s, v->tensors_blob);
    } else {
        *number_out = number;
    }
    pthread_mutex_unlock(&s->mutex);
    return st;
}

enum status store_make_current(struct store *s, const char *tenant, const char *name,
                               const struct version_record *v, struct error *err)
{
    pthread_mutex_lock(&s->mutex);
    enum status st = version_make_current(s, tenant, name, v, err);
    pthread_mutex_unlock(&s->mutex);
    return st;
}

enum status store_set(struct store *s, const char *tenant, const char *name,
                      const struct adapter_settings *settings, int keep, struct strbuf *orphans,
                      struct error *err)
{
    pthread_mutex_lock(&s->mutex);
    enum status st = transaction_begin(s, err);
    if (!st) {
        sqlite3_stmt *q = statement_about(s, STATEMENT_SET, tenant, name);
        sqlite3_bind_text(q, 3, settings->description, -1, SQLITE_STATIC);
        sqlite3_bind_int(q, 4, settings->pinned);
        sqlite3_bind_int(q, 5, settings->keep_versions);
        st = statement_run(s, q, err);
        if (!st) st = versions_prune(s, tenant, name, keep, orphans, err);
        st = transaction_end(s, st, err);
    }
    pthread_mutex_unlock(&s->mutex);
    return st;
}

enum status store_delete(struct store *s, const char *tenant, const char *name, struct strbuf *orphans,
                         struct error *err)
{
    pthread_mutex_lock(&s->mutex);
    enum status st = transaction_begin(s, err);
    if (!st) {
        st = statement_orphan(s, statement_about(s, STATEMENT_VERSIONS_REMOVE, tenant, name), orphans, err);
        if (!st) st = statement_run(s, statement_about(s, STATEMENT_ADAPTER_REMOVE, tenant, name), err);
        if (!st && sqlite3_changes(s->db) == 0)
            st = error_set(err, ST_NOT_FOUND, "there is no adapter '%s'", name);
        st = transaction_end(s, st, err);
    }
    pthread_mutex_unlock(&s->mutex);
    return st;
}

void store_collect(struct store *s, const struct strbuf *orphans)
{
    pthread_mutex_lock(&s->mutex);
    for (size_t at = 0; at < orphans->size; at += HASH_HEX_SIZE) blob_collect(s, orphans->data + at);
    pthread_mutex_unlock(&s->mutex);
}

#include "training/db.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

struct db {
    pthread_mutex_t lock; /* recursive: a transaction holds it */
    sqlite3 *sqlite;
    char *path;
};

static enum status db_error(const struct db *d, struct error *err)
{
    int rc = sqlite3_errcode(d->sqlite) & 0xff;
    enum status st = rc == SQLITE_FULL || sqlite3_system_errno(d->sqlite) == ENOSPC ? ST_NO_SPACE
                     : rc == SQLITE_NOMEM                                           ? ST_NOMEM
                     : rc == SQLITE_CONSTRAINT                                      ? ST_CONFLICT
                     : rc == SQLITE_CORRUPT || rc == SQLITE_NOTADB                  ? ST_BAD_FORMAT
                                                                                    : ST_IO;
    return error_set(err, st, "%s: %s", d->path, sqlite3_errmsg(d->sqlite));
}

/* --- statements --- */

static bool bind_all(sqlite3_stmt *q, const char *types, va_list values)
{
    int rc = SQLITE_OK;
    for (int i = 1; *types && rc == SQLITE_OK; i++, types++) {
        if (*types == 't') {
            rc = sqlite3_bind_text(q, i, va_arg(values, const char *), -1, SQLITE_TRANSIENT);
        } else if (*types == 'i') {
            rc = sqlite3_bind_int64(q, i, va_arg(values, int64_t));
        } else {
            double v = va_arg(values, double);
            rc = isnan(v) ? sqlite3_bind_null(q, i) : sqlite3_bind_double(q, i, v);
        }
    }
    return rc == SQLITE_OK;
}

static enum status step_all(struct db *d, sqlite3_stmt *q, db_row row, void *ctx, struct error *err)
{
    int rc;
    while ((rc = sqlite3_step(q)) == SQLITE_ROW) {
        enum status st = row ? row(ctx, q) : ST_OK;
        if (st) return error_set(err, st, "%s", status_text(st));
    }
    return rc == SQLITE_DONE ? ST_OK : db_error(d, err);
}

enum status db_run(struct db *d, struct error *err, db_row row, void *ctx, const char *sql, const char *types,
                   ...)
{
    sqlite3_stmt *q = NULL;
    va_list values;
    va_start(values, types);
    pthread_mutex_lock(&d->lock);
    bool ready = sqlite3_prepare_v2(d->sqlite, sql, -1, &q, NULL) == SQLITE_OK && bind_all(q, types, values);
    enum status st = ready ? step_all(d, q, row, ctx, err) : db_error(d, err);
    sqlite3_finalize(q);
    pthread_mutex_unlock(&d->lock);
    va_end(values);
    return st;
}

static enum status exec(struct db *d, const char *sql, struct error *err)
{
    return sqlite3_exec(d->sqlite, sql, NULL, NULL, NULL) == SQLITE_OK ? ST_OK : db_error(d, err);
}

enum status db_begin(struct db *d, struct error *err)
{
    pthread_mutex_lock(&d->lock);
    enum status st = exec(d, "PRAGMA synchronous = FULL", err);
    if (!st) st = exec(d, "BEGIN IMMEDIATE", err);
    if (st) pthread_mutex_unlock(&d->lock);
    return st;
}

enum status db_end(struct db *d, enum status st, struct error *err)
{
    if (!st) st = exec(d, "COMMIT", err);
    if (st) (void)exec(d, "ROLLBACK", NULL);
    (void)exec(d, "PRAGMA synchronous = NORMAL", NULL);
    pthread_mutex_unlock(&d->lock);
    return st;
}

/* --- opening --- */

static enum status read_version(void *ctx, sqlite3_stmt *row)
{
    *(int *)ctx = sqlite3_column_int(row, 0);
    return ST_OK;
}

static enum status migrate(struct db *d, const char *const *migrations, int count, struct error *err)
{
    int version = 0;
    enum status st =
        exec(d, "PRAGMA journal_mode = WAL; PRAGMA foreign_keys = ON; PRAGMA synchronous = NORMAL", err);
    if (!st) st = db_run(d, err, read_version, &version, "PRAGMA user_version", "");
    if (!st && version > count)
        st = error_set(
            err, ST_UNSUPPORTED,
            "%s has schema version %d; this program knows up to %d: use the later program that wrote it, or "
            "another data folder",
            d->path, version, count);
    for (int v = version; v < count && !st; v++) {
        char done[64];
        snprintf(done, sizeof done, "PRAGMA user_version = %d", v + 1);
        st = db_begin(d, err);
        if (st) return st;
        st = exec(d, migrations[v], err);
        if (!st) st = exec(d, done, err);
        st = db_end(d, st, err);
    }
    return st;
}

enum status db_open(const char *path, const char *const *migrations, int count, struct db **out,
                    struct error *err)
{
    struct db *d = calloc(1, sizeof *d);
    pthread_mutexattr_t recursive;
    if (!d) return error_set(err, ST_NOMEM, "out of memory");
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&d->lock, &recursive);
    pthread_mutexattr_destroy(&recursive);
    enum status st = ST_NOMEM;
    int flags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX;
    if (asprintf(&d->path, "%s", path) < 0) {
        d->path = NULL;
        error_set(err, st, "out of memory");
    } else if (sqlite3_open_v2(path, &d->sqlite, flags, NULL) != SQLITE_OK) {
        st = d->sqlite ? db_error(d, err) : error_set(err, st, "out of memory");
    } else {
        st = migrate(d, migrations, count, err);
    }
    if (st)
        db_close(d);
    else
        *out = d;
    return st;
}

void db_close(struct db *d)
{
    if (!d) return;
    sqlite3_close(d->sqlite);
    pthread_mutex_destroy(&d->lock);
    free(d->path);
    free(d);
}

/* --- columns --- */

void db_text(sqlite3_stmt *row, int column, char *out, size_t size)
{
    const unsigned char *text = sqlite3_column_text(row, column);
    snprintf(out, size, "%s", text ? (const char *)text : "");
}

double db_real(sqlite3_stmt *row, int column)
{
    return sqlite3_column_type(row, column) == SQLITE_NULL ? NAN : sqlite3_column_double(row, column);
}

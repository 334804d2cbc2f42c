/* SQLite, for tables that training keeps: statements with their values in one call.
 *
 * Thread-safe: calls take turns, and between db_begin and db_end the others wait. */
#ifndef TRAINING_DB_H
#define TRAINING_DB_H

#include "base/status.h"

#include <sqlite3.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct db;

/* migrations [count]: each makes the schema of its number from the one before. ST_UNSUPPORTED: a later
 * program wrote it. */
NODISCARD enum status db_open(const char *path, const char *const *migrations, int count, struct db **out,
                              struct error *err);
void db_close(struct db *d);

/* Called for each row of an answer; a status ends it and is returned. */
typedef enum status (*db_row)(void *ctx, sqlite3_stmt *row);
/* Runs one statement. types has a letter per value: t text (NULL is null), i int64_t, d double (NAN is null).
 * row may be NULL. Outside a transaction it is one of its own, kept if the process ends, but maybe not if the
 * machine does. ST_CONFLICT: a constraint. */
enum status db_run(struct db *d, struct error *err, db_row row, void *ctx, const char *sql, const char *types,
                   ...);

/* A transaction; what it did is on the disk once db_end has answered ST_OK. db_end with a status undoes it,
 * and answers that status. */
NODISCARD enum status db_begin(struct db *d, struct error *err);
NODISCARD enum status db_end(struct db *d, enum status st, struct error *err);

/* Of a column: text into an array, cut to its size; a number, NAN where it is null. */
void db_text(sqlite3_stmt *row, int column, char *out, size_t size);
double db_real(sqlite3_stmt *row, int column);

#endif

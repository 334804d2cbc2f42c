/* What a JSON tree would spoil, taken from a body's text before it becomes one.
 *
 * Arrays of token ids may hold a hundred thousand numbers, each of which would cost a tree node;
 * 64-bit seeds would be rounded to doubles. Both are read here from top-level members of the body.
 * What is not as expected is left alone: the parser that follows says what is wrong with it. */
#ifndef API_SCAN_H
#define API_SCAN_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Rows of token ids, end to end. */
struct token_rows {
    int32_t *ids; /* owned */
    size_t *end;  /* [rows], owned: row i is ids[end[i-1] .. end[i]) */
    size_t rows;
    bool nested; /* written [[..], ..], not [..] */
};
void token_rows_release(struct token_rows *t);

/* If member `key` is a non-empty array of integers in [0, 2^31), or an array of such arrays, moves
 * it to *out and overwrites its text with a number of the same length in bytes, so that a parser sees a valid
 * document. Otherwise leaves both untouched, with ST_NOT_FOUND. ST_NOMEM. */
NODISCARD enum status scan_take_tokens(char *text, size_t size, const char *key, struct token_rows *out);

/* If member `key` is an array, moves its elements to *out, one a line (a caller's strbuf, appended to), and
 * overwrites its text as above. The elements' own line breaks become spaces; what they are is left to who
 * reads them. ST_NOT_FOUND, with both untouched, where it is missing or no array. ST_NOMEM. */
struct strbuf;
NODISCARD enum status scan_take_lines(char *text, size_t size, const char *key, struct strbuf *out);

/* Member `key` as an integer in [-2^63, 2^64), negative ones in two's complement. ST_NOT_FOUND where
 * it is missing or null, ST_INVALID where it is anything else. ST_NOMEM. */
NODISCARD enum status scan_integer(const char *text, size_t size, const char *key, uint64_t *out);

#endif

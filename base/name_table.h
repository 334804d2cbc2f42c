/* Names to indices: the hash table behind containers whose names come from files.
 *
 * The hash is keyed with random bytes (SipHash), so that nobody can write a file whose names all
 * collide. Sized once, never grown; names are not owned and must outlive the table. */
#ifndef BASE_NAME_TABLE_H
#define BASE_NAME_TABLE_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct name_slot;

struct name_table {
    struct name_slot *slots; /* owned */
    size_t mask;             /* slots - 1, a power of two minus one */
    size_t count, capacity;
    unsigned char key[16];
};

#define NAME_NONE SIZE_MAX

/* Room for `capacity` names. ST_NOMEM. */
NODISCARD enum status name_table_init(struct name_table *t, size_t capacity);
void name_table_release(struct name_table *t); /* a zeroed table is fine */

/* False if the name is already there. At most `capacity` names. */
bool name_table_add(struct name_table *t, const char *name, size_t size, size_t index);
/* The index given with the name, or NAME_NONE. */
size_t name_table_find(const struct name_table *t, const char *name, size_t size);

#endif

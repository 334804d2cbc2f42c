#include "base/name_table.h"

#include "base/memory.h"

#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

struct name_slot {
    const char *name; /* NULL: free */
    size_t size, index;
};

enum status name_table_init(struct name_table *t, size_t capacity)
{
    struct name_table made = {.capacity = capacity};
    _Static_assert(sizeof made.key == crypto_shorthash_KEYBYTES, "SipHash's key");

    /* At most half full, so that chains stay short. */
    size_t slots = 2;
    while (slots < size_mul(capacity, 2)) slots = size_mul(slots, 2);
    if (slots == SIZE_MAX || getentropy(made.key, sizeof made.key)) return ST_NOMEM;
    made.slots = calloc(slots, sizeof *made.slots);
    if (!made.slots) return ST_NOMEM;
    made.mask = slots - 1;
    *t = made;
    return ST_OK;
}

void name_table_release(struct name_table *t)
{
    free(t->slots);
    *t = (struct name_table){0};
}

/* The slot that holds the name, or the free one where it belongs. */
static struct name_slot *slot_for(const struct name_table *t, const char *name, size_t size)
{
    unsigned char hash[crypto_shorthash_BYTES];
    crypto_shorthash(hash, (const unsigned char *)name, size, t->key);
    size_t i;
    memcpy(&i, hash, sizeof i);
    for (;; i++) {
        struct name_slot *s = &t->slots[i & t->mask];
        if (!s->name || (s->size == size && !memcmp(s->name, name, size))) return s;
    }
}

bool name_table_add(struct name_table *t, const char *name, size_t size, size_t index)
{
    CHECK(t->count < t->capacity);
    struct name_slot *s = slot_for(t, name, size);
    if (s->name) return false;
    *s = (struct name_slot){name, size, index};
    t->count++;
    return true;
}

size_t name_table_find(const struct name_table *t, const char *name, size_t size)
{
    if (!t->slots) return NAME_NONE;
    const struct name_slot *s = slot_for(t, name, size);
    return s->name ? s->index : NAME_NONE;
}

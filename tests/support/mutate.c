#include "tests/support/mutate.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A copy in the making; room for what mutations insert. */
struct draft {
    uint8_t *data;
    size_t size, capacity;
    const struct mutate_source *source;
    struct test_random *random;
};

#define INSERT_BYTES_MAX 512
#define MUTATIONS_MAX    4

static void *alloc_or_stop(size_t n)
{
    void *p = malloc(n);
    if (p) return p;
    fputs("mutate: out of memory\n", stderr);
    exit(2);
}

/* An offset that leaves at least n bytes; the draft has them. */
static size_t random_offset(struct draft *d, size_t n)
{
    size_t last = d->size - n, head = d->source->head;
    if (head && head < last && random_below(d->random, 4)) last = head;
    return (size_t)random_below(d->random, (uint64_t)last + 1);
}

static void cut_end(struct draft *d) { d->size = random_offset(d, 0); }

static void flip_bits(struct draft *d)
{
    for (uint64_t n = 1 + random_below(d->random, 8); n && d->size; n--)
        d->data[random_offset(d, 1)] ^= (uint8_t)(1u << random_below(d->random, 8));
}

static void overwrite_run(struct draft *d)
{
    size_t n = 1 + (size_t)random_below(d->random, 32);
    if (n > d->size) return;
    random_bytes(d->random, d->data + random_offset(d, n), n);
}

static void remove_run(struct draft *d)
{
    size_t n = 1 + (size_t)random_below(d->random, 32);
    if (n > d->size) return;
    size_t at = random_offset(d, n);
    memmove(d->data + at, d->data + at + n, d->size - at - n);
    d->size -= n;
}

static void insert(struct draft *d, const void *bytes, size_t n)
{
    if (n > INSERT_BYTES_MAX || d->capacity - d->size < n) return;
    size_t at = random_offset(d, 0);
    memmove(d->data + at + n, d->data + at, d->size - at);
    memcpy(d->data + at, bytes, n);
    d->size += n;
}

/* A piece of the draft once more, somewhere else. */
static void splice(struct draft *d)
{
    uint8_t piece[64];
    size_t n = 1 + (size_t)random_below(d->random, sizeof piece);
    if (n > d->size) return;
    memcpy(piece, d->data + random_offset(d, n), n);
    if (random_below(d->random, 2))
        insert(d, piece, n);
    else
        memcpy(d->data + random_offset(d, n), piece, n);
}

/* Four or eight bytes become a number that a careless reader of lengths would trust. */
static void lie_about_length(struct draft *d)
{
    size_t n = random_below(d->random, 2) ? 4 : 8;
    if (n > d->size) return;
    size_t at = random_offset(d, n);
    uint64_t now = 0;
    for (size_t i = 0; i < n; i++) now |= (uint64_t)d->data[at + i] << (8 * i);
    const uint64_t lies[] = {
        0,          1,          now + 1,        now - 1,
        now * 2,    d->size,    d->size - at,   d->size - at - n,
        0x7F,       0xFF,       0xFFFF,         0x7FFFFFFF,
        0x80000000, 0xFFFFFFFF, 0x100000000,    1ull << 61,
        INT64_MAX,  1ull << 63, UINT64_MAX - 7, UINT64_MAX,
    };
    uint64_t lie = lies[random_below(d->random, sizeof lies / sizeof *lies)];
    for (size_t i = 0; i < n; i++) d->data[at + i] = (uint8_t)(lie >> (8 * i));
}

static void insert_word(struct draft *d)
{
    if (!d->source->word_count) return;
    const char *word = d->source->words[random_below(d->random, d->source->word_count)];
    insert(d, word, strlen(word));
}

uint8_t *mutate_copy(const struct mutate_source *source, struct test_random *r, size_t *size_out)
{
    static void (*const mutations[])(struct draft *) = {cut_end,          flip_bits,       overwrite_run,
                                                        remove_run,       insert_word,     splice,
                                                        lie_about_length, lie_about_length};
    struct draft d = {.size = source->size,
                      .capacity = source->size + MUTATIONS_MAX * INSERT_BYTES_MAX,
                      .source = source,
                      .random = r};
    d.data = alloc_or_stop(d.capacity);
    if (source->size) memcpy(d.data, source->data, source->size);
    /* One in two copies has a single fault, which gets deeper into a reader than several do. */
    for (uint64_t n = random_below(r, 2) ? 1 : 1 + random_below(r, MUTATIONS_MAX); n; n--)
        mutations[random_below(r, sizeof mutations / sizeof *mutations)](&d);

    const struct mutate_source mutated = {.data = d.data, .size = d.size};
    uint8_t *exact = mutate_truncate(&mutated, d.size);
    free(d.data);
    *size_out = d.size;
    return exact;
}

uint8_t *mutate_truncate(const struct mutate_source *source, size_t n)
{
    uint8_t *copy = alloc_or_stop(n ? n : 1);
    if (n) memcpy(copy, source->data, n);
    return copy;
}

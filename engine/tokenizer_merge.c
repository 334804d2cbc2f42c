#include "engine/tokenizer_int.h"

#include "base/memory.h"

struct merge_candidate {
    uint64_t order; /* priority in the high half, index of the left symbol in the low one */
    uint32_t right; /* index of the right symbol */
    uint32_t size;  /* of both together when the candidate was made */
    int32_t id;     /* what they become */
};

void merge_space_release(struct merge_space *s)
{
    free(s->symbols);
    free(s->heap);
    *s = (struct merge_space){0};
}

enum status merge_space_reserve(struct merge_space *s, size_t n)
{
    s->count = s->heap_count = 0;
    if (n <= s->capacity) return ST_OK;

    size_t capacity = s->capacity ? s->capacity : 64;
    while (capacity < n) capacity *= 2;
    merge_space_release(s);
    s->symbols = calloc(capacity, sizeof *s->symbols);
    s->heap = calloc(size_mul(capacity, 2), sizeof *s->heap);
    if (!s->symbols || !s->heap) {
        merge_space_release(s);
        return ST_NOMEM;
    }
    s->capacity = capacity;
    return ST_OK;
}

void merge_add(struct merge_space *s, uint32_t start, uint32_t size, int32_t id)
{
    CHECK(s->count < s->capacity);
    int32_t i = (int32_t)s->count++;
    s->symbols[i] = (struct merge_symbol){.start = start, .size = size, .id = id, .next = -1, .prev = i - 1};
    if (i > 0) s->symbols[i - 1].next = i;
}

static void heap_push(struct merge_space *s, struct merge_candidate c)
{
    /* n - 1 candidates at first, and each merge takes one and adds at most two. */
    CHECK(s->heap_count < 2 * s->capacity);
    size_t i = s->heap_count++;
    while (i > 0 && s->heap[(i - 1) / 2].order > c.order) {
        s->heap[i] = s->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    s->heap[i] = c;
}

static struct merge_candidate heap_pop(struct merge_space *s)
{
    struct merge_candidate *heap = s->heap, top = heap[0], last = heap[--s->heap_count];
    size_t n = s->heap_count, i = 0;
    for (size_t child = 1; child < n; child = 2 * i + 1) {
        if (child + 1 < n && heap[child + 1].order < heap[child].order) child++;
        if (heap[child].order >= last.order) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

static void consider(struct merge_space *s, const struct tokenizer *t, const char *text, merge_rule *rule,
                     int32_t left, int32_t right)
{
    if (left < 0 || right < 0) return;
    const struct merge_symbol *l = &s->symbols[left], *r = &s->symbols[right];
    uint32_t priority = 0;
    int32_t id = rule(t, text, l, r, &priority);
    if (id < 0) return;
    heap_push(s, (struct merge_candidate){.order = (uint64_t)priority << 32 | (uint32_t)left,
                                          .right = (uint32_t)right,
                                          .size = l->size + r->size,
                                          .id = id});
}

void merge_run(struct merge_space *s, const struct tokenizer *t, const char *text, merge_rule *rule)
{
    for (int32_t i = 1; i < (int32_t)s->count; i++) consider(s, t, text, rule, i - 1, i);

    while (s->heap_count > 0) {
        struct merge_candidate c = heap_pop(s);
        int32_t left = (int32_t)(uint32_t)c.order, right = (int32_t)c.right;
        struct merge_symbol *l = &s->symbols[left], *r = &s->symbols[right];
        /* Stale if either was merged since. Symbols keep their start and only grow to the right,
         * so two living ones of the same total size are the two that were considered. */
        if (l->size == 0 || r->size == 0 || l->size + r->size != c.size) continue;

        l->size += r->size;
        l->id = c.id;
        l->next = r->next;
        r->size = 0;
        if (l->next >= 0) s->symbols[l->next].prev = left;
        consider(s, t, text, rule, l->prev, left);
        consider(s, t, text, rule, left, l->next);
    }
}

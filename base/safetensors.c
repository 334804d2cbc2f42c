#include "base/safetensors.h"

#include "base/json.h"
#include "base/json_scan.h"
#include "base/memory.h"
#include "base/name_table.h"
#include "base/reader.h"
#include "base/strbuf.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define DIMS_MAX       4
#define WORD_BYTES_MAX 32

struct entry {
    struct safetensor tensor;  /* its name is set last, when `names` no longer moves */
    size_t name_at, name_size; /* in `names` */
    uint64_t begin, end;       /* from the start of all data */
};

struct safetensors {
    struct entry *entries; /* file order */
    size_t count, capacity;
    struct strbuf names; /* each followed by a NUL */
    struct name_table by_name;
};

/* A header being read: faults of grammar stay in `scan`, others go to `failed` and `err` at once. */
struct header {
    struct json_scan scan;
    struct safetensors *table;
    enum status failed;
    struct error *err;
};

static bool fail_nomem(struct header *h)
{
    h->failed =
        error_set(h->err, ST_NOMEM, "safetensors: out of memory for a header of %zu bytes", h->scan.size);
    return false;
}

/* A string that names a field or a type; none that is known is longer than WORD_BYTES_MAX. */
static bool scan_word(struct header *h, char word[WORD_BYTES_MAX + 1])
{
    struct strbuf text = {0};
    bool ok = json_scan_string(&h->scan, &text);
    strbuf_putc(&text, '\0');
    if (text.failed) {
        ok = fail_nomem(h);
    } else if (ok) {
        size_t n = strnlen(text.data, WORD_BYTES_MAX);
        memcpy(word, text.data, n);
        word[n] = '\0';
    }
    strbuf_release(&text);
    return ok;
}

/* [1, 2, 3], at most `max` of them. */
static bool scan_u64_list(struct header *h, uint64_t *list, int max, int *count)
{
    *count = 0;
    if (!json_scan_expect(&h->scan, '[', "a list is expected here")) return false;
    if (json_scan_take(&h->scan, ']')) return true;
    do {
        if (*count == max) return json_scan_fail(&h->scan, "the list has too many numbers");
        if (!json_scan_u64(&h->scan, &list[(*count)++])) return false;
    } while (json_scan_take(&h->scan, ','));
    return json_scan_expect(&h->scan, ']', "',' or ']' is expected here");
}

static bool scan_dtype(struct header *h, struct entry *e)
{
    static const enum dtype types[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
    char word[WORD_BYTES_MAX + 1];
    if (!scan_word(h, word)) return false;
    for (int i = 0; i < 3; i++) {
        e->tensor.type = types[i];
        if (!strcmp(word, dtype_name(types[i]))) return true;
    }
    h->failed =
        error_set(h->err, ST_UNSUPPORTED, "safetensors: tensor '%.100s' is of type %s, not F32, F16 or BF16",
                  h->table->names.data + e->name_at, word);
    return false;
}

static bool scan_offsets(struct header *h, struct entry *e)
{
    uint64_t offsets[2] = {0};
    int count;
    if (!scan_u64_list(h, offsets, 2, &count)) return false;
    if (count != 2 || offsets[0] > offsets[1])
        return json_scan_fail(&h->scan, "data_offsets must be [begin, end] with begin <= end");
    e->begin = offsets[0];
    e->end = offsets[1];
    return true;
}

/* {"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}, the three in any order. */
static bool scan_record(struct header *h, struct entry *e)
{
    enum { DTYPE = 1, SHAPE = 2, OFFSETS = 4, ALL = 7 } field;
    int seen = 0;
    for (int i = 0; i < DIMS_MAX; i++) e->tensor.dim[i] = 1;
    if (!json_scan_expect(&h->scan, '{', "a tensor's record is expected here")) return false;
    do {
        char word[WORD_BYTES_MAX + 1];
        if (!scan_word(h, word)) return false;
        field = !strcmp(word, "dtype") ? DTYPE : !strcmp(word, "shape") ? SHAPE : OFFSETS;
        if ((field == OFFSETS && strcmp(word, "data_offsets")) || (seen & field))
            return json_scan_fail(&h->scan,
                                  "a tensor has dtype, shape and data_offsets, each once, and no more");
        seen |= field;
        if (!json_scan_expect(&h->scan, ':', "':' is expected here")) return false;
        bool ok = field == DTYPE   ? scan_dtype(h, e)
                  : field == SHAPE ? scan_u64_list(h, e->tensor.dim, DIMS_MAX, &e->tensor.dim_count)
                                   : scan_offsets(h, e);
        if (!ok) return false;
    } while (json_scan_take(&h->scan, ','));
    if (!json_scan_expect(&h->scan, '}', "',' or '}' is expected here")) return false;
    return seen == ALL || json_scan_fail(&h->scan, "a tensor lacks dtype, shape or data_offsets");
}

/* "__metadata__": {"key": "text", ...}: checked, and of no use here. */
static bool scan_metadata(struct header *h)
{
    struct strbuf text = {0};
    bool ok = json_scan_expect(&h->scan, '{', "__metadata__ must be an object of strings");
    if (ok && !json_scan_take(&h->scan, '}')) {
        do {
            strbuf_clear(&text);
            ok = json_scan_string(&h->scan, &text) &&
                 json_scan_expect(&h->scan, ':', "':' is expected here") && json_scan_string(&h->scan, &text);
        } while (ok && json_scan_take(&h->scan, ','));
        ok = ok && json_scan_expect(&h->scan, '}', "',' or '}' is expected here");
    }
    strbuf_release(&text);
    return ok;
}

static bool grow_entries(struct safetensors *s)
{
    if (s->count < s->capacity) return true;
    size_t capacity = s->capacity ? s->capacity * 2 : 64;
    struct entry *entries = reallocarray(s->entries, capacity, sizeof *entries);
    if (!entries) return false;
    s->entries = entries;
    s->capacity = capacity;
    return true;
}

/* "name": {record} */
static bool scan_member(struct header *h, bool *metadata_seen)
{
    struct safetensors *s = h->table;
    struct entry e = {.name_at = s->names.size};
    if (!json_scan_string(&h->scan, &s->names)) return false;
    e.name_size = s->names.size - e.name_at;
    strbuf_putc(&s->names, '\0');
    if (s->names.failed) return fail_nomem(h);
    if (!json_scan_expect(&h->scan, ':', "':' is expected here")) return false;

    if (!strcmp(s->names.data + e.name_at, "__metadata__")) {
        if (*metadata_seen) return json_scan_fail(&h->scan, "__metadata__ appears twice");
        *metadata_seen = true;
        strbuf_truncate(&s->names, e.name_at);
        return scan_metadata(h);
    }
    if (s->count == SAFETENSORS_TENSORS_MAX) return json_scan_fail(&h->scan, "there are too many tensors");
    if (!scan_record(h, &e)) return false;
    if (!grow_entries(s)) return fail_nomem(h);
    s->entries[s->count++] = e;
    return true;
}

static bool scan_members(struct header *h)
{
    bool metadata_seen = false;
    if (!json_scan_expect(&h->scan, '{', "the header must be a JSON object")) return false;
    if (!json_scan_take(&h->scan, '}')) {
        do {
            if (!scan_member(h, &metadata_seen)) return false;
        } while (json_scan_take(&h->scan, ','));
        if (!json_scan_expect(&h->scan, '}', "',' or '}' is expected here")) return false;
    }
    json_scan_peek(&h->scan);
    return h->scan.at == h->scan.size || json_scan_fail(&h->scan, "there is more after the header's object");
}

static enum status read_header(struct safetensors *s, const void *text, size_t size, struct error *err)
{
    struct header h = {.scan = {.text = text, .size = size}, .table = s, .err = err};
    if (scan_members(&h)) return ST_OK;
    return h.failed ? h.failed : json_scan_error(&h.scan, "safetensors header", err);
}

/* Final names, the table over them, and no name twice. */
static enum status index_names(struct safetensors *s, struct error *err)
{
    if (name_table_init(&s->by_name, s->count))
        return error_set(err, ST_NOMEM, "safetensors: out of memory for %zu tensors", s->count);
    for (size_t i = 0; i < s->count; i++) {
        struct entry *e = &s->entries[i];
        e->tensor.name = s->names.data + e->name_at;
        if (!name_table_add(&s->by_name, e->tensor.name, e->name_size, i))
            return error_set(err, ST_BAD_FORMAT, "safetensors: tensor '%.100s' appears twice",
                             e->tensor.name);
    }
    return ST_OK;
}

static size_t tensor_bytes(const struct safetensor *t)
{
    size_t bytes = dtype_block_bytes(t->type);
    for (int i = 0; i < DIMS_MAX; i++) bytes = size_mul(bytes, t->dim[i]);
    return bytes;
}

static int compare_ranges(const void *a, const void *b)
{
    const struct entry *x = *(const struct entry *const *)a, *y = *(const struct entry *const *)b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

/* In order of their place the tensors must cover all data, without overlap or hole. */
static enum status check_ranges(struct entry *const *sorted, size_t count, size_t data_size,
                                struct error *err)
{
    uint64_t covered = 0;
    for (size_t i = 0; i < count; i++) {
        const struct entry *e = sorted[i];
        if (e->begin != covered)
            return error_set(err, ST_BAD_FORMAT,
                             "safetensors: the data of tensor '%.100s' begins at %" PRIu64
                             ", where the tensors before it end at %" PRIu64 ": they overlap or leave a hole",
                             e->tensor.name, e->begin, covered);
        if (e->end - e->begin != tensor_bytes(&e->tensor))
            return error_set(err, ST_BAD_FORMAT,
                             "safetensors: tensor '%.100s' has %" PRIu64
                             " bytes, which is not its shape times its type %s",
                             e->tensor.name, e->end - e->begin, dtype_name(e->tensor.type));
        covered = e->end;
    }
    if (covered != data_size)
        return error_set(err, ST_BAD_FORMAT,
                         "safetensors: the tensors take %" PRIu64
                         " bytes, but %zu follow the header; the file is %s",
                         covered, data_size, covered > data_size ? "truncated" : "damaged");
    return ST_OK;
}

static enum status place_tensors(struct safetensors *s, const uint8_t *data, size_t data_size,
                                 struct error *err)
{
    struct entry **sorted = calloc(s->count + 1, sizeof *sorted);
    if (!sorted) return error_set(err, ST_NOMEM, "safetensors: out of memory for %zu tensors", s->count);
    for (size_t i = 0; i < s->count; i++) sorted[i] = &s->entries[i];
    qsort(sorted, s->count, sizeof *sorted, compare_ranges);
    enum status st = check_ranges(sorted, s->count, data_size, err);
    free(sorted);

    for (size_t i = 0; !st && i < s->count; i++) {
        struct entry *e = &s->entries[i];
        e->tensor.data = data + e->begin;
        e->tensor.bytes = (size_t)(e->end - e->begin);
    }
    return st;
}

enum status safetensors_parse(const void *data, size_t size, struct safetensors **out, struct error *err)
{
    struct reader r = reader_of(data, size);
    uint64_t header_size = reader_u64(&r);
    if (r.bad || header_size > reader_left(&r) || header_size > SAFETENSORS_HEADER_BYTES_MAX)
        return error_set(err, ST_BAD_FORMAT,
                         "not a safetensors file, or a truncated one: its header has %" PRIu64
                         " bytes, the file %zu (a header's limit is %u)",
                         header_size, size, SAFETENSORS_HEADER_BYTES_MAX);
    const void *header = reader_take(&r, header_size);

    struct safetensors *s = calloc(1, sizeof *s);
    if (!s) return error_set(err, ST_NOMEM, "safetensors: out of memory");
    enum status st = read_header(s, header, (size_t)header_size, err);
    if (!st) st = index_names(s, err);
    if (!st) st = place_tensors(s, r.data + r.offset, reader_left(&r), err);
    if (!st) {
        *out = s;
        s = NULL; /* ownership moved to the caller */
    }
    safetensors_free(s);
    return st;
}

void safetensors_free(struct safetensors *s)
{
    if (!s) return;
    name_table_release(&s->by_name);
    strbuf_release(&s->names);
    free(s->entries);
    free(s);
}

size_t safetensors_count(const struct safetensors *s) { return s->count; }

const struct safetensor *safetensors_at(const struct safetensors *s, size_t i)
{
    CHECK(i < s->count);
    return &s->entries[i].tensor;
}

const struct safetensor *safetensors_find(const struct safetensors *s, const char *name)
{
    size_t i = name_table_find(&s->by_name, name, strlen(name));
    return i == NAME_NONE ? NULL : &s->entries[i].tensor;
}

static void write_record(struct strbuf *out, const struct safetensor *t, size_t begin)
{
    json_write_string(out, t->name, strlen(t->name));
    strbuf_printf(out, ":{\"dtype\":\"%s\",\"shape\":[", dtype_name(t->type));
    for (int i = 0; i < t->dim_count; i++) strbuf_printf(out, "%s%" PRIu64, i ? "," : "", t->dim[i]);
    strbuf_printf(out, "],\"data_offsets\":[%zu,%zu]}", begin, begin + t->bytes);
}

void safetensors_write(const struct safetensor *tensors, size_t count, struct strbuf *out)
{
    struct strbuf header = {0};
    size_t begin = 0;
    for (size_t i = 0; i < count; i++) {
        strbuf_putc(&header, i ? ',' : '{');
        write_record(&header, &tensors[i], begin);
        begin += tensors[i].bytes;
    }
    strbuf_puts(&header, count ? "}" : "{}");
    while ((header.size % 8) && !header.failed) strbuf_putc(&header, ' '); /* aligns the data */

    for (int i = 0; i < 8; i++) strbuf_putc(out, (char)((uint64_t)header.size >> (8 * i)));
    strbuf_append(out, header.data, header.size);
    for (size_t i = 0; i < count; i++) strbuf_append(out, tensors[i].data, tensors[i].bytes);
    if (header.failed) out->failed = true;
    strbuf_release(&header);
}

#include "base/gguf.h"

#include "base/memory.h"
#include "base/name_table.h"
#include "base/reader.h"
#include "base/utf8.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define GGUF_MAGIC             0x46554747u /* "GGUF" */
#define GGUF_KEYS_MAX          65536
#define GGUF_TENSORS_MAX       65536
#define GGUF_NAME_BYTES_MAX    65535
#define GGUF_ARRAY_DEPTH_MAX   4
#define GGUF_ALIGNMENT_DEFAULT 32
#define GGUF_ALIGNMENT_MAX     (1u << 20)

/* The fewest bytes a record can take: what a count must be checked against before it is believed. */
#define KEY_BYTES_MIN    (8 + 1 + 4 + 1)
#define TENSOR_BYTES_MIN (8 + 1 + 4 + 8 + 4 + 8)

/* A metadata value, still in the file's bytes. */
struct gguf_value {
    struct gguf_string key;
    enum gguf_type type;
    enum gguf_type element_type; /* of an array */
    uint64_t count;              /* of an array */
    const uint8_t *data;         /* a scalar, a string's bytes, or an array's first element */
    size_t bytes;
};

struct gguf {
    struct gguf_value *values;
    struct gguf_tensor *tensors;
    size_t value_count, tensor_count;
    struct name_table value_names, tensor_names;
};

/* For "%.*s": names are checked to be text, and long ones are cut. */
#define NAME_SHOWN_MAX 100
#define SHOWN(s)       (int)((s).size < NAME_SHOWN_MAX ? (s).size : NAME_SHOWN_MAX), (s).data

static const char *type_name(enum gguf_type t)
{
    static const char *const names[GGUF_TYPE_COUNT] = {
        "uint8", "int8",   "uint16", "int16",  "uint32", "int32",   "float32",
        "bool",  "string", "array",  "uint64", "int64",  "float64",
    };
    return names[t];
}

/* 0 for strings and arrays. */
static size_t scalar_bytes(enum gguf_type t)
{
    static const uint8_t bytes[GGUF_TYPE_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return bytes[t];
}

static struct gguf_string read_string(struct reader *r)
{
    uint64_t n = reader_u64(r);
    const char *data = reader_take(r, n);
    return (struct gguf_string){data, data ? (size_t)n : 0};
}

static enum status truncated(const struct reader *r, const char *what, uint64_t index, struct error *err)
{
    return error_set(err, ST_BAD_FORMAT,
                     "GGUF: the file ends inside %s %" PRIu64 " (size %zu bytes); it is truncated or damaged",
                     what, index, r->size);
}

/* Keys and tensor names: text, so that they can be looked up and shown. */
static enum status check_name(struct gguf_string name, const char *what, uint64_t index, struct error *err)
{
    if (name.size == 0 || name.size > GGUF_NAME_BYTES_MAX)
        return error_set(err, ST_BAD_FORMAT, "GGUF: the name of %s %" PRIu64 " has %zu bytes, not 1 to %d",
                         what, index, name.size, GGUF_NAME_BYTES_MAX);
    if (memchr(name.data, 0, name.size) || !utf8_valid(name.data, name.size))
        return error_set(err, ST_BAD_FORMAT, "GGUF: the name of %s %" PRIu64 " is not valid UTF-8 text", what,
                         index);
    return ST_OK;
}

static bool read_elements(struct reader *r, enum gguf_type type, uint64_t count, int depth);

/* An array's header and elements; false where the type is unknown or arrays nest too deep. */
static bool read_array(struct reader *r, struct gguf_value *v, int depth)
{
    uint32_t type = reader_u32(r);
    v->count = reader_u64(r);
    if (type >= GGUF_TYPE_COUNT || depth > GGUF_ARRAY_DEPTH_MAX) return false;
    v->element_type = (enum gguf_type)type;
    size_t begin = r->offset;
    v->data = r->data + begin;
    if (!read_elements(r, v->element_type, v->count, depth)) return false;
    v->bytes = r->offset - begin;
    return true;
}

/* Steps over `count` elements. A count beyond the bytes ends at the reader's sticky error. */
static bool read_elements(struct reader *r, enum gguf_type type, uint64_t count, int depth)
{
    if (scalar_bytes(type)) {
        reader_take(r, size_mul((size_t)count, scalar_bytes(type)));
        return true;
    }
    for (uint64_t i = 0; i < count && !r->bad; i++) {
        struct gguf_value nested;
        if (type == GGUF_STRING)
            read_string(r);
        else if (!read_array(r, &nested, depth + 1))
            return false;
    }
    return true;
}

static enum status read_value(struct reader *r, uint64_t index, struct gguf_value *v, struct error *err)
{
    v->key = read_string(r);
    uint32_t type = reader_u32(r);
    if (r->bad) return truncated(r, "metadata key", index, err);
    enum status st = check_name(v->key, "metadata key", index, err);
    if (st) return st;
    if (type >= GGUF_TYPE_COUNT)
        return error_set(err, ST_BAD_FORMAT, "GGUF: metadata key '%.*s' has the unknown type %" PRIu32,
                         SHOWN(v->key), type);
    v->type = (enum gguf_type)type;

    bool readable = true;
    if (v->type == GGUF_STRING) {
        struct gguf_string s = read_string(r);
        v->data = (const uint8_t *)s.data;
        v->bytes = s.size;
    } else if (v->type == GGUF_ARRAY) {
        readable = read_array(r, v, 1);
    } else {
        v->bytes = scalar_bytes(v->type);
        v->data = reader_take(r, v->bytes);
    }
    if (r->bad) return truncated(r, "metadata key", index, err);
    if (!readable)
        return error_set(err, ST_BAD_FORMAT,
                         "GGUF: the array '%.*s' has elements of an unknown type or nests deeper than %d",
                         SHOWN(v->key), GGUF_ARRAY_DEPTH_MAX);
    return ST_OK;
}

static enum status read_values(struct gguf *g, struct reader *r, struct error *err)
{
    for (size_t i = 0; i < g->value_count; i++) {
        struct gguf_value *v = &g->values[i];
        enum status st = read_value(r, i, v, err);
        if (st) return st;
        if (!name_table_add(&g->value_names, v->key.data, v->key.size, i))
            return error_set(err, ST_BAD_FORMAT, "GGUF: metadata key '%.*s' appears twice", SHOWN(v->key));
    }
    return ST_OK;
}

static enum status read_dims(struct reader *r, uint64_t index, struct gguf_tensor *t, struct error *err)
{
    uint32_t dim_count = reader_u32(r);
    if (r->bad) return truncated(r, "tensor", index, err);
    if (dim_count < 1 || dim_count > 4)
        return error_set(err, ST_BAD_FORMAT, "GGUF: tensor '%.*s' has %" PRIu32 " dimensions, not 1 to 4",
                         SHOWN(t->name), dim_count);
    t->dim_count = (int)dim_count;
    for (int i = 0; i < 4; i++) {
        t->dim[i] = i < t->dim_count ? reader_u64(r) : 1;
        if (!r->bad && t->dim[i] == 0)
            return error_set(err, ST_BAD_FORMAT, "GGUF: dimension %d of tensor '%.*s' is 0", i,
                             SHOWN(t->name));
    }
    return ST_OK;
}

/* The bytes of a tensor from its type and dimensions; SIZE_MAX if they overflow or a row is not
 * whole blocks. */
static size_t tensor_bytes(const struct gguf_tensor *t)
{
    size_t bytes = dtype_row_bytes(t->type, t->dim[0]);
    for (int i = 1; i < 4; i++) bytes = size_mul(bytes, t->dim[i]);
    return bytes;
}

/* One tensor record; *offset is where its data starts, from the start of all data. */
static enum status read_tensor(struct reader *r, uint64_t index, struct gguf_tensor *t, uint64_t *offset,
                               struct error *err)
{
    t->name = read_string(r);
    if (r->bad) return truncated(r, "tensor", index, err);
    enum status st = check_name(t->name, "tensor", index, err);
    if (!st) st = read_dims(r, index, t, err);
    if (st) return st;
    uint32_t type = reader_u32(r);
    *offset = reader_u64(r);
    if (r->bad) return truncated(r, "tensor", index, err);

    if (!dtype_known(type))
        return error_set(err, ST_UNSUPPORTED,
                         "GGUF: tensor '%.*s' has element type number %" PRIu32
                         "; convert the model to one of"
#define X(name, number, elems, bytes) " " #name
                         DTYPE_TABLE(X),
#undef X
                         SHOWN(t->name), type);
    t->type = (enum dtype)type;
    t->bytes = tensor_bytes(t);
    if (t->bytes == SIZE_MAX)
        return error_set(err, ST_BAD_FORMAT,
                         "GGUF: tensor '%.*s' (%" PRIu64 " x %" PRIu64 " x %" PRIu64 " x %" PRIu64
                         ") is too large, or its rows are not whole blocks of %zu elements of %s",
                         SHOWN(t->name), t->dim[0], t->dim[1], t->dim[2], t->dim[3],
                         dtype_block_elems(t->type), dtype_name(t->type));
    return ST_OK;
}

static enum status read_tensors(struct gguf *g, struct reader *r, uint64_t *offsets, struct error *err)
{
    for (size_t i = 0; i < g->tensor_count; i++) {
        struct gguf_tensor *t = &g->tensors[i];
        enum status st = read_tensor(r, i, t, &offsets[i], err);
        if (st) return st;
        if (!name_table_add(&g->tensor_names, t->name.data, t->name.size, i))
            return error_set(err, ST_BAD_FORMAT, "GGUF: tensor '%.*s' appears twice", SHOWN(t->name));
    }
    return ST_OK;
}

static enum status read_alignment(const struct gguf *g, size_t *out, struct error *err)
{
    uint64_t alignment = GGUF_ALIGNMENT_DEFAULT;
    enum status st = gguf_get_u64(g, "general.alignment", &alignment, err);
    if (st && st != ST_NOT_FOUND) return st;
    if (alignment == 0 || alignment > GGUF_ALIGNMENT_MAX || (alignment & (alignment - 1)))
        return error_set(err, ST_BAD_FORMAT,
                         "GGUF: general.alignment is %" PRIu64 ", not a power of two up to %u", alignment,
                         GGUF_ALIGNMENT_MAX);
    *out = (size_t)alignment;
    return ST_OK;
}

/* Data follows the records at the next multiple of the alignment; points every tensor at its own. */
static enum status place_tensors(struct gguf *g, const struct reader *r, const uint64_t *offsets,
                                 struct error *err)
{
    size_t alignment = 0;
    enum status st = read_alignment(g, &alignment, err);
    if (st) return st;

    size_t start = size_round_up(r->offset, alignment);
    for (size_t i = 0; i < g->tensor_count; i++) {
        struct gguf_tensor *t = &g->tensors[i];
        size_t begin = size_add(start, offsets[i]);
        size_t end = size_add(begin, t->bytes);
        if (offsets[i] % alignment)
            return error_set(err, ST_BAD_FORMAT,
                             "GGUF: tensor '%.*s' starts at %" PRIu64 ", which is not a multiple of %zu",
                             SHOWN(t->name), offsets[i], alignment);
        if (end == SIZE_MAX || end > r->size)
            return error_set(err, ST_BAD_FORMAT,
                             "GGUF: tensor '%.*s' (%zu bytes at %" PRIu64
                             " of the data) reaches beyond the file's %zu bytes; it is truncated or damaged",
                             SHOWN(t->name), t->bytes, offsets[i], r->size);
        t->data = r->data + begin;
    }
    return ST_OK;
}

/* Magic, version and the two counts, which are checked against what can possibly follow. */
static enum status read_header(struct gguf *g, struct reader *r, struct error *err)
{
    uint32_t magic = reader_u32(r), version = reader_u32(r);
    uint64_t tensor_count = reader_u64(r), value_count = reader_u64(r);
    if (r->bad || magic != GGUF_MAGIC)
        return error_set(err, ST_BAD_FORMAT, "not a GGUF file: it does not start with a GGUF header");
    if (version != 2 && version != 3)
        return error_set(err, ST_UNSUPPORTED,
                         version >> 16 ? "GGUF version 0x%08" PRIx32 ": big-endian files are not supported"
                                       : "GGUF version %" PRIu32
                                         " is not supported; convert the file to version 3",
                         version);
    if (tensor_count > GGUF_TENSORS_MAX || tensor_count > reader_left(r) / TENSOR_BYTES_MIN)
        return error_set(err, ST_BAD_FORMAT,
                         "GGUF: %" PRIu64 " tensors cannot fit (limits: %d, and %zu bytes)", tensor_count,
                         GGUF_TENSORS_MAX, r->size);
    if (value_count > GGUF_KEYS_MAX || value_count > reader_left(r) / KEY_BYTES_MIN)
        return error_set(err, ST_BAD_FORMAT,
                         "GGUF: %" PRIu64 " metadata keys cannot fit (limits: %d, and %zu bytes)",
                         value_count, GGUF_KEYS_MAX, r->size);
    g->tensor_count = (size_t)tensor_count;
    g->value_count = (size_t)value_count;
    return ST_OK;
}

/* What the header's counts ask for. calloc'd one element more, as zero may answer NULL. */
static enum status make_tables(struct gguf *g, uint64_t **offsets, struct error *err)
{
    g->values = calloc(g->value_count + 1, sizeof *g->values);
    g->tensors = calloc(g->tensor_count + 1, sizeof *g->tensors);
    *offsets = calloc(g->tensor_count + 1, sizeof **offsets);
    if (!g->values || !g->tensors || !*offsets || name_table_init(&g->value_names, g->value_count) ||
        name_table_init(&g->tensor_names, g->tensor_count))
        return error_set(err, ST_NOMEM, "GGUF: out of memory for %zu tensors and %zu metadata keys",
                         g->tensor_count, g->value_count);
    return ST_OK;
}

enum status gguf_parse(const void *data, size_t size, struct gguf **out, struct error *err)
{
    struct reader r = reader_of(data, size);
    uint64_t *offsets = NULL;
    struct gguf *g = calloc(1, sizeof *g);
    if (!g) return error_set(err, ST_NOMEM, "GGUF: out of memory");

    enum status st = read_header(g, &r, err);
    if (!st) st = make_tables(g, &offsets, err);
    if (!st) st = read_values(g, &r, err);
    if (!st) st = read_tensors(g, &r, offsets, err);
    if (!st) st = place_tensors(g, &r, offsets, err);
    if (!st) {
        *out = g;
        g = NULL; /* ownership moved to the caller */
    }
    free(offsets);
    gguf_free(g);
    return st;
}

void gguf_free(struct gguf *g)
{
    if (!g) return;
    name_table_release(&g->value_names);
    name_table_release(&g->tensor_names);
    free(g->values);
    free(g->tensors);
    free(g);
}

size_t gguf_tensor_count(const struct gguf *g) { return g->tensor_count; }

const struct gguf_tensor *gguf_tensor_at(const struct gguf *g, size_t i)
{
    CHECK(i < g->tensor_count);
    return &g->tensors[i];
}

const struct gguf_tensor *gguf_tensor_find(const struct gguf *g, const char *name)
{
    size_t i = name_table_find(&g->tensor_names, name, strlen(name));
    return i == NAME_NONE ? NULL : &g->tensors[i];
}

/* NULL, and ST_NOT_FOUND in *err, where the key is missing. */
static const struct gguf_value *find_value(const struct gguf *g, const char *key, struct error *err)
{
    size_t i = name_table_find(&g->value_names, key, strlen(key));
    if (i != NAME_NONE) return &g->values[i];
    error_set(err, ST_NOT_FOUND, "GGUF: metadata key '%s' is missing", key);
    return NULL;
}

static enum status wrong_type(const struct gguf_value *v, const char *wanted, struct error *err)
{
    bool array = v->type == GGUF_ARRAY;
    return error_set(err, ST_BAD_FORMAT, "GGUF: metadata key '%.*s' is of type %s%s, not %s", SHOWN(v->key),
                     array ? "array of " : "", type_name(array ? v->element_type : v->type), wanted);
}

/* A scalar integer as sign and magnitude; false for other kinds. */
static bool integer_of(const struct gguf_value *v, bool *negative, uint64_t *magnitude)
{
    bool is_signed = v->type == GGUF_I8 || v->type == GGUF_I16 || v->type == GGUF_I32 || v->type == GGUF_I64;
    bool is_unsigned =
        v->type == GGUF_U8 || v->type == GGUF_U16 || v->type == GGUF_U32 || v->type == GGUF_U64;
    if (!is_signed && !is_unsigned) return false;

    uint64_t bits = 0;
    for (size_t i = 0; i < v->bytes; i++) bits |= (uint64_t)v->data[i] << (8 * i);
    *negative = is_signed && v->data[v->bytes - 1] & 0x80;
    if (*negative && v->bytes < 8) bits |= UINT64_MAX << (8 * v->bytes); /* extend the sign */
    *magnitude = *negative ? 0 - bits : bits;
    return true;
}

enum status gguf_get_u64(const struct gguf *g, const char *key, uint64_t *out, struct error *err)
{
    const struct gguf_value *v = find_value(g, key, err);
    if (!v) return ST_NOT_FOUND;
    bool negative;
    uint64_t magnitude;
    if (!integer_of(v, &negative, &magnitude)) return wrong_type(v, "an integer", err);
    if (negative)
        return error_set(err, ST_BAD_FORMAT, "GGUF: metadata key '%s' is -%" PRIu64 ", not 0 or more", key,
                         magnitude);
    *out = magnitude;
    return ST_OK;
}

enum status gguf_get_f64(const struct gguf *g, const char *key, double *out, struct error *err)
{
    const struct gguf_value *v = find_value(g, key, err);
    if (!v) return ST_NOT_FOUND;
    struct reader r = reader_of(v->data, v->bytes);
    bool negative;
    uint64_t magnitude;
    if (v->type == GGUF_F32)
        *out = reader_f32(&r);
    else if (v->type == GGUF_F64)
        *out = reader_f64(&r);
    else if (integer_of(v, &negative, &magnitude))
        *out = negative ? -(double)magnitude : (double)magnitude;
    else
        return wrong_type(v, "a number", err);
    return ST_OK;
}

enum status gguf_get_bool(const struct gguf *g, const char *key, bool *out, struct error *err)
{
    const struct gguf_value *v = find_value(g, key, err);
    if (!v) return ST_NOT_FOUND;
    if (v->type != GGUF_BOOL) return wrong_type(v, "bool", err);
    if (v->data[0] > 1)
        return error_set(err, ST_BAD_FORMAT, "GGUF: metadata key '%s' is a bool of value %d, not 0 or 1", key,
                         v->data[0]);
    *out = v->data[0];
    return ST_OK;
}

enum status gguf_get_string(const struct gguf *g, const char *key, struct gguf_string *out, struct error *err)
{
    const struct gguf_value *v = find_value(g, key, err);
    if (!v) return ST_NOT_FOUND;
    if (v->type != GGUF_STRING) return wrong_type(v, "string", err);
    *out = (struct gguf_string){(const char *)v->data, v->bytes};
    return ST_OK;
}

enum status gguf_get_array(const struct gguf *g, const char *key, struct gguf_array *out, struct error *err)
{
    const struct gguf_value *v = find_value(g, key, err);
    if (!v) return ST_NOT_FOUND;
    if (v->type != GGUF_ARRAY || v->element_type == GGUF_ARRAY)
        return wrong_type(v, "an array of scalars or strings", err);
    *out = (struct gguf_array){v->element_type, v->count, v->data};
    return ST_OK;
}

enum status gguf_get_strings(const struct gguf *g, const char *key, struct gguf_string **out,
                             size_t *count_out, struct error *err)
{
    const struct gguf_value *v = find_value(g, key, err);
    if (!v) return ST_NOT_FOUND;
    if (v->type != GGUF_ARRAY || v->element_type != GGUF_STRING)
        return wrong_type(v, "an array of strings", err);

    size_t count = (size_t)v->count; /* each took at least 8 bytes of the file, so it fits */
    struct gguf_string *strings = calloc(count + 1, sizeof *strings);
    if (!strings)
        return error_set(err, ST_NOMEM, "GGUF: out of memory for the %zu strings of '%s'", count, key);
    struct reader r = reader_of(v->data, v->bytes);
    for (size_t i = 0; i < count; i++) strings[i] = read_string(&r);
    *out = strings;
    *count_out = count;
    return ST_OK;
}

/* The canonical text of a Jinja template: a list of tokens that leaves out what has no effect.
 *
 * A token is written as a letter, its length and its bytes, so that different lists never look alike:
 *   t  text between tags      b, p  a tag begins: {% or {{      s  string      w  any other token */
#include "engine/chat_int.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#define SOURCE_BYTES_MAX 65536

#define SYSTEM_OPEN  "<|im_start|>system\n"
#define SYSTEM_CLOSE "<|im_end|>\n"

struct source {
    const char *text;
    size_t n, at;
    struct strbuf out;
    struct strbuf pending;      /* text between tags, not yet written */
    const char *default_system; /* known: leave it out */
    char *found;                /* not known: the first one met; owned */
    bool bad;                   /* not a template, or one with escapes that are not understood */
    bool failed;                /* out of memory */
    bool last_was_word;         /* a subscript may follow */
};

static void emit(struct source *s, char kind, const char *bytes, size_t n)
{
    strbuf_printf(&s->out, "%c%zu:", kind, n);
    strbuf_append(&s->out, bytes, n);
}

static bool at_text(const struct source *s, size_t at, const char *what)
{
    size_t n = strlen(what);
    return at <= s->n && s->n - at >= n && memcmp(s->text + at, what, n) == 0;
}

/* --- strings --- */

static bool has_prefix(const struct strbuf *b, const char *prefix)
{
    return b->size >= strlen(prefix) && memcmp(b->data, prefix, strlen(prefix)) == 0;
}

static bool has_suffix(const struct strbuf *b, const char *suffix)
{
    size_t n = strlen(suffix);
    return b->size >= n && memcmp(b->data + b->size - n, suffix, n) == 0;
}

/* Writes a string token, the default system text in it (alone, or as a whole ChatML turn) replaced by a
 * token of another kind. */
static void emit_string(struct source *s, const struct strbuf *value)
{
    size_t open = strlen(SYSTEM_OPEN), around = open + strlen(SYSTEM_CLOSE);
    bool turn = value->size > around && has_prefix(value, SYSTEM_OPEN) && has_suffix(value, SYSTEM_CLOSE);
    const char *inner = turn ? value->data + open : value->data;
    size_t inner_size = turn ? value->size - around : value->size;
    if (turn && !s->default_system && !s->found) {
        s->found = strndup(inner, inner_size);
        s->failed = s->failed || !s->found;
    }

    bool known = s->default_system && strlen(s->default_system) == inner_size &&
                 memcmp(s->default_system, inner, inner_size) == 0;
    if (known)
        emit(s, turn ? 'd' : 'e', "", 0);
    else
        emit(s, 's', value->data ? value->data : "", value->size);
}

/* The string that begins at s->at, its escapes replaced. False if it does not end, or has an escape other
 * than the common ones. */
static bool string_read(struct source *s, struct strbuf *value)
{
    char quote = s->text[s->at++];
    while (s->at < s->n && s->text[s->at] != quote) {
        char c = s->text[s->at++];
        if (c == '\\') {
            static const char from[] = "nrt\\'\"", to[] = "\n\r\t\\'\"";
            const char *escape = s->at < s->n && s->text[s->at] ? strchr(from, s->text[s->at++]) : NULL;
            if (!escape) return false;
            c = to[escape - from];
        }
        strbuf_putc(value, c);
    }
    return s->at++ < s->n;
}

static bool is_word(char c) { return isalnum((unsigned char)c) || c == '_'; }

static void skip_spaces(struct source *s)
{
    while (s->at < s->n && isspace((unsigned char)s->text[s->at])) s->at++;
}

/* ['role'] behind a value is the same as .role; anything else leaves s where it is. */
static bool subscript_read(struct source *s)
{
    size_t start = s->at++;
    struct strbuf name = {0};
    skip_spaces(s);
    bool ok = s->at < s->n && (s->text[s->at] == '\'' || s->text[s->at] == '"') && string_read(s, &name);
    for (size_t i = 0; ok && i < name.size; i++) ok = is_word(name.data[i]);
    skip_spaces(s);
    ok = ok && name.size > 0 && !isdigit((unsigned char)name.data[0]) && at_text(s, s->at, "]");
    if (ok) {
        s->at++;
        emit(s, 'w', ".", 1);
        emit(s, 'w', name.data, name.size);
    } else {
        s->at = start;
    }
    s->failed = s->failed || name.failed;
    strbuf_release(&name);
    return ok;
}

/* --- tags --- */

static void token_read(struct source *s)
{
    char c = s->text[s->at];
    if (c == '\'' || c == '"') {
        struct strbuf value = {0};
        s->bad = s->bad || !string_read(s, &value);
        emit_string(s, &value);
        s->failed = s->failed || value.failed;
        strbuf_release(&value);
        s->last_was_word = false;
        return;
    }
    if (c == '[' && s->last_was_word && subscript_read(s)) return;
    size_t start = s->at++;
    while (is_word(c) && s->at < s->n && is_word(s->text[s->at])) s->at++;
    emit(s, 'w', s->text + start, s->at - start);
    s->last_was_word = is_word(c) || c == ')' || c == ']';
}

/* The tokens of a tag up to its end, which is stepped over. Returns whether it ends with a '-'. */
static bool tag_read(struct source *s, const char *end)
{
    s->last_was_word = false;
    for (skip_spaces(s); s->at < s->n && !s->bad; skip_spaces(s)) {
        bool dash = s->text[s->at] == '-' && at_text(s, s->at + 1, end);
        if (dash || at_text(s, s->at, end)) {
            s->at += dash + strlen(end);
            return dash;
        }
        token_read(s);
    }
    s->bad = true;
    return false;
}

static bool comment_skip(struct source *s)
{
    const char *end = memmem(s->text + s->at, s->n - s->at, "#}", 2);
    s->bad = s->bad || !end;
    if (s->bad) return false;
    bool dash = end > s->text + s->at && end[-1] == '-';
    s->at = (size_t)(end - s->text) + 2;
    return dash;
}

/* --- text between tags --- */

static size_t tag_find(const struct source *s)
{
    size_t at = s->at;
    while (at < s->n && !at_text(s, at, "{{") && !at_text(s, at, "{%") && !at_text(s, at, "{#")) at++;
    return at;
}

/* How much of the text that ends at `end` is left when a tag of this kind follows ('\0': the template ends).
 */
static size_t text_end(const struct source *s, size_t begin, size_t end, char kind, bool dash)
{
    if (dash) {
        while (end > begin && isspace((unsigned char)s->text[end - 1])) end--;
    } else if (kind == '%' || kind == '#') { /* lstrip_blocks: the indentation before it */
        size_t line = end;
        while (line > begin && (s->text[line - 1] == ' ' || s->text[line - 1] == '\t')) line--;
        bool starts = line == 0 || s->text[line - 1] == '\n';
        if (starts) end = line;
    } else if (kind == '\0' && end > begin && s->text[end - 1] == '\n') {
        end--; /* Jinja drops one newline at the end of a template */
    }
    return end;
}

static void text_flush(struct source *s)
{
    if (s->pending.size > 0) emit(s, 't', s->pending.data, s->pending.size);
    s->failed = s->failed || s->pending.failed;
    strbuf_clear(&s->pending);
}

static void source_read(struct source *s)
{
    bool dash = false; /* did the last tag end with a '-'? */
    char kind = '\0';  /* of the last tag: % { # */
    while (!s->bad && !s->failed) {
        if (dash)
            skip_spaces(s);
        else if ((kind == '%' || kind == '#') && at_text(s, s->at, "\n"))
            s->at++; /* trim_blocks */

        size_t begin = s->at, end = tag_find(s);
        kind = end < s->n ? s->text[end + 1] : '\0';
        dash = kind && at_text(s, end + 2, "-");
        size_t keep = text_end(s, begin, end, kind, dash);
        if (keep > begin) strbuf_append(&s->pending, s->text + begin, keep - begin);
        if (!kind) break;

        s->at = end + 2 + dash;
        if (kind == '#') {
            dash = comment_skip(s);
        } else {
            text_flush(s);
            emit(s, kind == '%' ? 'b' : 'p', "", 0);
            dash = tag_read(s, kind == '%' ? "%}" : "}}");
        }
    }
    text_flush(s);
    s->failed = s->failed || s->out.failed;
}

static uint64_t fingerprint_of(const struct strbuf *b)
{
    uint64_t h = 0xCBF29CE484222325u; /* FNV-1a */
    for (size_t i = 0; i < b->size; i++) h = (h ^ (uint8_t)b->data[i]) * 0x100000001B3u;
    return h;
}

enum status chat_source_fingerprint(const char *source, size_t n, uint64_t *fingerprint,
                                    char **default_system)
{
    if (n == 0 || n > SOURCE_BYTES_MAX || memchr(source, '\0', n)) return ST_UNSUPPORTED;

    /* The default system text may stand in the template before the turn that it is recognised by. */
    struct source first = {.text = source, .n = n};
    source_read(&first);
    struct source second = {.text = source, .n = n, .default_system = first.found};
    if (first.found && !first.failed) source_read(&second);

    const struct source *last = first.found ? &second : &first;
    enum status st = first.failed || second.failed ? ST_NOMEM : last->bad ? ST_UNSUPPORTED : ST_OK;
    if (st == ST_OK) {
        *fingerprint = fingerprint_of(&last->out);
        *default_system = first.found;
        first.found = NULL;
    }
    strbuf_release(&first.out);
    strbuf_release(&first.pending);
    strbuf_release(&second.out);
    strbuf_release(&second.pending);
    free(first.found);
    return st;
}

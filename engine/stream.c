#include "engine/stream.h"

#include "base/strbuf.h"
#include "base/utf8.h"

#include <stdlib.h>
#include <string.h>

/* A stop string and how much of it the text's end matches (Knuth, Morris and Pratt). */
struct matcher {
    char *text; /* owned */
    int size;
    int *border; /* [size + 1], owned: longest proper border of each prefix, see matcher_build */
    int matched;
};

struct stream {
    const struct tokenizer *tokenizer;
    unsigned flags;
    bool include_stop;
    struct strbuf partial; /* bytes that do not yet make whole characters */
    struct strbuf text;    /* whole characters; [0, certain) may be given out */
    size_t taken, certain; /* [0, taken) has been given out */
    size_t matcher_count;
    struct matcher *matcher;
    const char *stopped_by;
};

/* --- stop strings ------------------------------------------------------------------------------ */

static bool matcher_build(struct matcher *m, const char *text)
{
    m->size = (int)strlen(text);
    m->text = strdup(text);
    m->border = calloc((size_t)m->size + 1, sizeof *m->border);
    if (!m->text || !m->border) return false;
    m->border[0] = -1;
    for (int i = 0, k = -1; i < m->size;) {
        while (k >= 0 && text[i] != text[k]) k = m->border[k];
        m->border[++i] = ++k;
    }
    return true;
}

/* Whether the string ends with this byte. */
static bool matcher_feed(struct matcher *m, char byte)
{
    while (m->matched >= 0 && m->text[m->matched] != byte) m->matched = m->border[m->matched];
    return ++m->matched == m->size;
}

struct stream *stream_new(const struct tokenizer *t, const struct sampling *sampling)
{
    struct stream *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->tokenizer = t;
    s->flags = sampling->skip_special ? DETOKENIZE_SKIP_SPECIAL : 0;
    s->include_stop = sampling->include_stop;
    if (sampling->stop_count == 0) return s;

    s->matcher = calloc(sampling->stop_count, sizeof *s->matcher);
    bool ok = s->matcher != NULL;
    for (size_t i = 0; ok && i < sampling->stop_count; i++) {
        s->matcher_count++;
        ok = matcher_build(&s->matcher[i], sampling->stop[i]);
    }
    if (!ok) {
        stream_free(s);
        return NULL;
    }
    return s;
}

void stream_free(struct stream *s)
{
    if (!s) return;
    for (size_t i = 0; i < s->matcher_count; i++) {
        free(s->matcher[i].text);
        free(s->matcher[i].border);
    }
    free(s->matcher);
    strbuf_release(&s->partial);
    strbuf_release(&s->text);
    free(s);
}

/* --- text -------------------------------------------------------------------------------------- */

/* Removes the first n bytes; the terminating NUL moves along. */
static void front_drop(struct strbuf *b, size_t n)
{
    if (n == 0) return;
    memmove(b->data, b->data + n, b->size - n + 1);
    b->size -= n;
}

/* Moves n bytes of partial to text, broken ones as U+FFFD. */
static void characters_move(struct stream *s, size_t n)
{
    const char *p = s->partial.data;
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        size_t length = utf8_decode(p + i, n - i, &cp);
        if (cp == UINT32_MAX) strbuf_puts(&s->text, "\xEF\xBF\xBD");
        else strbuf_append(&s->text, p + i, length);
        i += length;
    }
    front_drop(&s->partial, n);
}

/* Feeds text from `at` on to the matchers and finds out how much of it is certain. */
static void stops_search(struct stream *s, size_t at)
{
    for (; at < s->text.size; at++) {
        const struct matcher *hit = NULL;
        for (size_t i = 0; i < s->matcher_count; i++) {
            struct matcher *m = &s->matcher[i];
            if (matcher_feed(m, s->text.data[at]) && (!hit || m->size > hit->size)) hit = m;
        }
        if (!hit) continue;
        s->stopped_by = hit->text;
        s->certain = at + 1 - (s->include_stop ? 0 : (size_t)hit->size);
        return;
    }
    int held = 0;
    for (size_t i = 0; i < s->matcher_count; i++)
        if (s->matcher[i].matched > held) held = s->matcher[i].matched;
    s->certain = s->text.size - (size_t)held;
}

/* Gives back the room of text that has been taken. */
static void taken_drop(struct stream *s)
{
    front_drop(&s->text, s->taken);
    s->certain -= s->taken;
    s->taken = 0;
}

enum status stream_push(struct stream *s, int32_t token, bool can_stop)
{
    CHECK(!s->stopped_by);
    taken_drop(s);
    size_t size;
    const char *piece = tokenizer_piece(s->tokenizer, token, s->flags, false, &size);
    strbuf_append(&s->partial, piece, size);
    if (s->partial.failed) return ST_NOMEM;
    if (s->partial.size == 0) return ST_OK;

    size_t at = s->text.size;
    characters_move(s, utf8_complete_prefix(s->partial.data, s->partial.size));
    if (s->text.failed) return ST_NOMEM;
    if (can_stop) stops_search(s, at);
    else s->certain = s->text.size;
    return ST_OK;
}

enum status stream_finish(struct stream *s)
{
    if (s->stopped_by) return ST_OK;
    taken_drop(s);
    if (s->partial.size > 0) characters_move(s, s->partial.size);
    if (s->text.failed) return ST_NOMEM;
    s->certain = s->text.size;
    return ST_OK;
}

const char *stream_take(struct stream *s, size_t *size_out)
{
    const char *text = s->text.data ? s->text.data + s->taken : "";
    *size_out = s->certain - s->taken;
    s->taken = s->certain;
    return text;
}

const char *stream_stopped_by(const struct stream *s) { return s->stopped_by; }

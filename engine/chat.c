#include "engine/chat_int.h"

#include "base/utf8.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* --- recognising --- */

void chat_template_release(struct chat_template *t)
{
    free(t->default_system);
    *t = (struct chat_template){0};
}

static const struct chat_form *form_of_name(const char *source, size_t n)
{
    for (int f = 0; f < CHAT_FAMILY_COUNT; f++)
        if (strlen(chat_family_names[f]) == n && memcmp(chat_family_names[f], source, n) == 0)
            return chat_form_of_family((enum chat_family)f);
    return NULL;
}

static enum status refuse_unknown(uint64_t fingerprint, struct error *err)
{
    struct strbuf names = {0};
    for (int f = 0; f < CHAT_FAMILY_COUNT; f++)
        strbuf_printf(&names, f ? ", %s" : "%s", chat_family_names[f]);
    enum status st =
        error_set(err, ST_UNSUPPORTED,
                  "chat template (fingerprint %016" PRIx64 ") is none of the known ones; name the "
                  "family that it belongs to, if it is one of %s",
                  fingerprint, names.data ? names.data : "");
    strbuf_release(&names);
    return st;
}

enum status chat_template_recognise(const char *source, size_t n, struct chat_template *out,
                                    struct error *err)
{
    char *default_system = NULL;
    uint64_t fingerprint = 0;
    const struct chat_form *form = form_of_name(source, n);
    if (!form) {
        enum status st = chat_source_fingerprint(source, n, &fingerprint, &default_system);
        if (st == ST_NOMEM) return error_set(err, st, "chat template: out of memory");
        form = st ? NULL : chat_form_find(fingerprint);
    }
    if (!form) {
        free(default_system);
        return refuse_unknown(fingerprint, err);
    }
    if (!default_system && form->default_system) {
        default_system = strdup(form->default_system);
        if (!default_system) return error_set(err, ST_NOMEM, "chat template: out of memory");
    }
    *out = (struct chat_template){.family = form->family, .form = form, .default_system = default_system};
    return ST_OK;
}

/* --- checking the conversation --- */

static const char *const role_names[ROLE_COUNT] = {"system", "user", "assistant"};

static enum status roles_read(const struct chat_message *messages, size_t count, enum chat_role *roles,
                              struct error *err)
{
    for (size_t i = 0; i < count; i++) {
        int role = 0;
        while (role < ROLE_COUNT && strcmp(messages[i].role, role_names[role]) != 0) role++;
        if (role == ROLE_COUNT)
            return error_set(err, ST_INVALID, "message %zu: role '%.64s' is not system, user or assistant", i,
                             messages[i].role);
        roles[i] = (enum chat_role)role;
    }
    return ST_OK;
}

static enum status order_check(const struct chat_form *form, const enum chat_role *roles, size_t count,
                               struct error *err)
{
    const char *family = chat_family_names[form->family];
    size_t start = roles[0] == ROLE_SYSTEM;
    if (start && form->system == SYSTEM_REFUSED)
        return error_set(err, ST_INVALID, "message 0: this model's %s template has no system messages",
                         family);
    if (start == count && (form->system == SYSTEM_IN_USER || form->system == SYSTEM_IN_LAST))
        return error_set(err, ST_INVALID, "messages: the %s template needs a user message after the system's",
                         family);
    for (size_t i = start; i < count; i++) {
        if (roles[i] == ROLE_SYSTEM && form->system != SYSTEM_ANYWHERE)
            return error_set(err, ST_INVALID,
                             "message %zu: the %s template takes a system message only as the first", i,
                             family);
        enum chat_role expected = (i - start) % 2 ? ROLE_ASSISTANT : ROLE_USER;
        if (form->alternate && roles[i] != expected)
            return error_set(
                err, ST_INVALID,
                "message %zu: role is '%s', but the %s template needs user and assistant messages in "
                "turn, the user's first",
                i, role_names[roles[i]], family);
    }
    return ST_OK;
}

/* --- rendering --- */

struct render {
    const struct chat_template *t;
    const struct chat_options *options;
    const struct chat_message *messages;
    const enum chat_role *roles;
    size_t count;
    struct strbuf *out;
};

static void append_date(struct strbuf *out, const char *today)
{
    static const char *const months[] = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                         "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
    if (today) {
        strbuf_puts(out, today);
        return;
    }
    time_t now = time(NULL);
    struct tm utc = {0};
    gmtime_r(&now, &utc);
    strbuf_printf(out, "%02d %s %d", utc.tm_mday, months[utc.tm_mon], utc.tm_year + 1900);
}

/* A form's text with its placeholders replaced. */
static void append_form(const struct render *r, const char *text)
{
    for (const char *brace; text && *text; text = brace + 1) {
        brace = strchrnul(text, '{');
        strbuf_append(r->out, text, (size_t)(brace - text));
        const char *end = *brace ? strchr(brace, '}') : NULL;
        if (!end) return;
        if (strncmp(brace, "{bos}", 5) == 0)
            strbuf_puts(r->out, r->options->bos ? r->options->bos : "");
        else if (strncmp(brace, "{eos}", 5) == 0)
            strbuf_puts(r->out, r->options->eos ? r->options->eos : "");
        else
            append_date(r->out, r->options->today);
        brace = end;
    }
}

/* White space as Python's str.strip() knows it. */
static bool is_space(uint32_t cp)
{
    return (cp >= 0x09 && cp <= 0x0D) || (cp >= 0x1C && cp <= 0x20) || cp == 0x85 || cp == 0xA0 ||
           cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200A) || cp == 0x2028 || cp == 0x2029 || cp == 0x202F ||
           cp == 0x205F || cp == 0x3000;
}

static void append_trimmed(struct strbuf *out, const char *text, size_t n)
{
    size_t begin = n, end = 0;
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        size_t size = utf8_decode(text + i, n - i, &cp);
        if (!is_space(cp)) {
            if (begin == n) begin = i;
            end = i + size;
        }
        i += size;
    }
    if (end > begin) strbuf_append(out, text + begin, end - begin);
}

static void append_content(const struct render *r, enum chat_role role, const char *text, size_t n)
{
    if (r->t->form->trim[role])
        append_trimmed(r->out, text, n);
    else
        strbuf_append(r->out, text, n);
}

/* The content of the user's message i, the system text before it where it belongs there. */
static void append_user(const struct render *r, size_t i, const char *system)
{
    const struct chat_form *form = r->t->form;
    bool first = form->system == SYSTEM_IN_USER && (i == 0 || r->roles[i - 1] == ROLE_SYSTEM);
    bool last = form->system == SYSTEM_IN_LAST && i + 1 == r->count;
    const char *content = r->messages[i].content;
    if (!system || !(first || last)) {
        append_content(r, ROLE_USER, content, strlen(content));
        return;
    }
    struct strbuf both = {0};
    strbuf_puts(&both, form->open[ROLE_SYSTEM]);
    strbuf_puts(&both, system);
    strbuf_puts(&both, form->close[ROLE_SYSTEM]);
    strbuf_puts(&both, content);
    if (both.failed)
        r->out->failed = true;
    else
        append_content(r, ROLE_USER, both.data, both.size);
    strbuf_release(&both);
}

static void append_system(const struct render *r, const char *system, bool open_ended)
{
    const struct chat_form *form = r->t->form;
    if (form->system == SYSTEM_IN_USER || form->system == SYSTEM_IN_LAST) return;
    if (form->empty_system_dropped && !*system) return;
    append_form(r, form->open[ROLE_SYSTEM]);
    append_content(r, ROLE_SYSTEM, system, strlen(system));
    if (!open_ended) append_form(r, form->close[ROLE_SYSTEM]);
}

/* Where an assistant's turn that begins at `start` is the model's own: the generation prompt opens it. */
static size_t span_begin(const struct chat_form *form, size_t start)
{
    size_t n = form->generation ? strlen(form->generation) : 0;
    return n && strncmp(form->open[ROLE_ASSISTANT], form->generation, n) == 0 ? start + n : start;
}

static void render_turn(const struct render *r, size_t i, const char *system)
{
    const struct chat_form *form = r->t->form;
    bool open_ended = r->options->continue_final_message && i + 1 == r->count;
    enum chat_role role = r->roles[i];
    size_t start = r->out->size;
    if (role == ROLE_SYSTEM) {
        append_system(r, r->messages[i].content, open_ended);
    } else {
        append_form(r, form->open[role]);
        if (role == ROLE_USER)
            append_user(r, i, system);
        else
            append_content(r, role, r->messages[i].content, strlen(r->messages[i].content));
        if (!open_ended) append_form(r, form->close[role]);
    }
    if (!r->options->spans) return;
    size_t end = r->out->size;
    r->options->spans[i] = (struct chat_span){role == ROLE_ASSISTANT ? span_begin(form, start) : end, end};
}

static void render_all(const struct render *r)
{
    const struct chat_form *form = r->t->form;
    const char *system = r->roles[0] == ROLE_SYSTEM ? r->messages[0].content : r->t->default_system;
    append_form(r, form->begin);
    if (system && r->roles[0] != ROLE_SYSTEM) append_system(r, system, false);
    for (size_t i = 0; i < r->count; i++) render_turn(r, i, system);
    if (r->options->continue_final_message) return;
    append_form(r,
                r->options->add_generation_prompt || form->generation_always ? form->generation : form->end);
}

enum status chat_render(const struct chat_template *t, const struct chat_message *messages, size_t count,
                        const struct chat_options *options, struct strbuf *out, struct error *err)
{
    if (count == 0) return error_set(err, ST_INVALID, "messages: there are none");
    if (options->add_generation_prompt && options->continue_final_message)
        return error_set(err, ST_INVALID,
                         "add_generation_prompt and continue_final_message exclude each other");

    enum chat_role *roles = calloc(count, sizeof *roles);
    if (!roles) return error_set(err, ST_NOMEM, "chat: out of memory");
    enum status st = roles_read(messages, count, roles, err);
    if (!st) st = order_check(t->form, roles, count, err);
    if (!st) {
        size_t size = out->size;
        const struct render r = {t, options, messages, roles, count, out};
        render_all(&r);
        if (out->failed) {
            strbuf_truncate(out, size);
            st = error_set(err, ST_NOMEM, "chat: out of memory");
        }
    }
    free(roles);
    return st;
}

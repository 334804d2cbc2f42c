/* What the chat files share. Nothing outside engine/chat*.c includes this. */
#ifndef ENGINE_CHAT_INT_H
#define ENGINE_CHAT_INT_H

#include "engine/chat.h"

#include <stdint.h>

enum chat_role { ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_COUNT };

/* What becomes of system messages. */
enum chat_system {
    SYSTEM_ANYWHERE, /* a turn like the others */
    SYSTEM_FIRST,    /* a turn, before all others only */
    SYSTEM_IN_USER,  /* the first message only; written into the first user turn, before its content */
    SYSTEM_IN_LAST,  /* the same with the last message, if that is a user's; otherwise it is not written */
    SYSTEM_REFUSED   /* the template has no place for one */
};

/* One way to render. In its texts {bos}, {eos} and {date} are replaced. */
struct chat_form {
    enum chat_family family;
    enum chat_system system;
    bool alternate;         /* user, assistant, user, ... after the system message */
    bool trim[ROLE_COUNT];  /* contents lose white space at both ends */
    bool generation_always; /* the generation prompt is written whether it is asked for or not */
    bool empty_system_dropped;
    const char *default_system; /* inserted where none is given and the template's text has none; or NULL */
    const char *begin;
    const char *open[ROLE_COUNT], *close[ROLE_COUNT]; /* around the content */
    const char *generation;                           /* opening of an assistant turn */
    const char *end;                                  /* written where no generation prompt is */
};

/* --- chat_forms.c --- */

extern const char *const chat_family_names[CHAT_FAMILY_COUNT];
/* By the fingerprint of a template's canonical text; NULL if it is not a known one. */
const struct chat_form *chat_form_find(uint64_t fingerprint);
/* The form that a family's bare name stands for. */
const struct chat_form *chat_form_of_family(enum chat_family family);

/* --- chat_source.c --- */

/* A number that equal programs share: layout inside tags, white space that Jinja strips (with trim_blocks
 * and lstrip_blocks, as transformers sets them), comments, the kind of quotes, and m['role'] against m.role
 * make no difference, nor does the default system text, which is cut out: on ST_OK *default_system is a
 * malloc'd string, or NULL if the template has none. ST_UNSUPPORTED for what is not a template. */
NODISCARD enum status chat_source_fingerprint(const char *source, size_t n, uint64_t *fingerprint,
                                              char **default_system);

#endif

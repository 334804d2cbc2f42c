/* Messages to a prompt, by the chat template families known here.
 *
 * Templates in model files are Jinja programs. They are recognised, not run: a template that is, but for
 * its layout and its default system text, one of the published ones that chat_forms.c lists is rendered
 * by that one's form, which is checked against the real Jinja output. Any other is ST_UNSUPPORTED
 * with a message that names the known families and the template's fingerprint: likeness is no proof.
 * Where a template would drop a message in silence, or write it where the model was not trained to see
 * one, rendering refuses instead. */
#ifndef ENGINE_CHAT_H
#define ENGINE_CHAT_H

#include "base/status.h"
#include "base/strbuf.h"

#include <stdbool.h>
#include <stddef.h>

enum chat_family {
    CHAT_CHATML, CHAT_LLAMA2, CHAT_LLAMA3, CHAT_MISTRAL, CHAT_GEMMA, CHAT_PHI3, CHAT_ZEPHYR,
    CHAT_FAMILY_COUNT
};

struct chat_message {
    const char *role;    /* system, user, assistant */
    const char *content; /* NUL-terminated UTF-8, no NUL inside */
};

struct chat_form;

struct chat_template {
    enum chat_family family;
    const struct chat_form *form; /* how this one renders; static */
    char *default_system; /* owned; the system text the template inserts when none is given, or NULL */
};
void chat_template_release(struct chat_template *t);

/* source: the template's text, or the bare name of a family: chatml, llama-2, llama-3, mistral, gemma,
 * phi-3 or zephyr. */
NODISCARD enum status chat_template_recognise(const char *source, size_t n,
                                              struct chat_template *out, struct error *err);

/* Bytes begin .. end of a rendering. */
struct chat_span {
    size_t begin, end;
};

struct chat_options {
    bool add_generation_prompt;  /* end with the opening of an assistant turn */
    bool continue_final_message; /* leave the last message open; excludes add_generation_prompt */
    const char *bos, *eos;       /* text of those tokens, for families that write them; NULL: none */
    const char *today;           /* "26 Jul 2024", for Llama 3.2, which writes it; NULL: today's in UTC */
    /* NULL, or [count]: filled in with what the model itself would have written of each assistant's message: without
     * the generation prompt, with what closes the turn. Empty for the other messages. */
    struct chat_span *spans;
};
/* Appends the prompt, to be tokenized with TOKENIZE_PARSE_SPECIAL and without TOKENIZE_ADD_SPECIAL
 * (the rendering writes its own bos, where the family has one).
 * ST_INVALID: no messages, an unknown role, roles in an order the family refuses. */
NODISCARD enum status chat_render(const struct chat_template *t, const struct chat_message *messages,
                                  size_t count, const struct chat_options *options,
                                  struct strbuf *out, struct error *err);

#endif

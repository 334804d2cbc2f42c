/* Texts and messages to token ids, as requests ask for it. Safe on any thread. */
#ifndef SERVER_PROMPT_H
#define SERVER_PROMPT_H

#include "api/completion.h"
#include "engine/engine.h"

struct chat_prompt {
    const struct message *messages;
    size_t count;
    const char *chat_template; /* NULL: the model's own */
    bool add_generation_prompt, continue_final_message;
};

/* Appends the tokens of the rendered messages. */
NODISCARD enum status prompt_render(const struct engine *e, const struct chat_prompt *c, unsigned flags,
                                    struct token_list *out, struct error *err);

#endif

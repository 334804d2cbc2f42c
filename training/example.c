/* One line of examples to tokens and weights. */
#include "training/dataset_int.h"

#include "base/json.h"
#include "base/memory.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static enum status no_memory(struct error *err) { return error_set(err, ST_NOMEM, "out of memory"); }

void example_space_release(struct example_space *s)
{
    for (int i = 0; i < 2; i++) {
        token_list_release(&s->draft[i].tokens);
        free(s->draft[i].weight);
        free(s->draft[i].old);
    }
    strbuf_release(&s->text);
    *s = (struct example_space){0};
}

enum status array_grow(void **array, size_t *capacity, size_t count, size_t size)
{
    if (count < *capacity) return ST_OK;
    size_t wanted = *capacity ? size_mul(*capacity, 2) : 64;
    void *grown = realloc(*array, size_mul(wanted, size));
    if (!grown) return ST_NOMEM;
    *array = grown;
    *capacity = wanted;
    return ST_OK;
}

/* --- drafts --- */

static void draft_clear(struct draft *d) { d->tokens.count = d->weight_count = d->old_count = 0; }

/* Gives the tokens that have no weight yet this one. */
static enum status draft_weigh(struct draft *d, float weight, struct error *err)
{
    while (d->weight_count < d->tokens.count) {
        if (array_grow((void **)&d->weight, &d->weight_capacity, d->weight_count, sizeof *d->weight))
            return no_memory(err);
        d->weight[d->weight_count++] = weight;
    }
    return ST_OK;
}

/* Appends a text's tokens. Texts are encoded as the server does it: the names of special tokens stand for
 * these. */
static enum status draft_encode(struct draft *d, const struct dataset_rules *r, const char *text, size_t size,
                                unsigned flags, float weight, struct error *err)
{
    enum status st = tokenizer_encode(r->tokenizer, text, size, flags | TOKENIZE_PARSE_SPECIAL, &d->tokens);
    if (st) return error_set(err, st, "a text cannot be tokenized: %s", status_text(st));
    return draft_weigh(d, weight, err);
}

/* The end token, unless the text has brought it along. */
static enum status draft_end(struct draft *d, const struct dataset_rules *r, struct error *err)
{
    int32_t eos = tokenizer_eos(r->tokenizer);
    size_t n = d->tokens.count;
    if (eos < 0 || (n && tokenizer_is_end(r->tokenizer, d->tokens.ids[n - 1]))) return ST_OK;
    return token_list_push(&d->tokens, eos) ? no_memory(err) : draft_weigh(d, 1, err);
}

/* --- prompt and completion, text --- */

/* A string that must be there. */
static enum status text_of(const cJSON *object, const char *key, const char **out, struct error *err)
{
    enum status st = json_get_string(object, key, out, err);
    return st == ST_NOT_FOUND ? error_set(err, ST_INVALID, "'%s' is missing", key) : st;
}

static enum status draft_completion(struct draft *d, const struct dataset_rules *r, const char *text,
                                    struct error *err)
{
    if (!*text) return error_set(err, ST_INVALID, "the completion is empty: there is nothing to learn");
    enum status st = draft_encode(d, r, text, strlen(text), TOKENIZE_CONTINUES, 1, err);
    return st ? st : draft_end(d, r, err);
}

static enum status read_completion(const struct dataset_rules *r, const cJSON *object,
                                   struct example_space *space, struct error *err)
{
    const char *prompt, *completion;
    struct draft *d = &space->draft[0];
    enum status st = text_of(object, "prompt", &prompt, err);
    if (!st) st = text_of(object, "completion", &completion, err);
    if (!st) st = draft_encode(d, r, prompt, strlen(prompt), TOKENIZE_ADD_SPECIAL, 0, err);
    return st ? st : draft_completion(d, r, completion, err);
}

static enum status read_text(const struct dataset_rules *r, const cJSON *object, struct example_space *space,
                             struct error *err)
{
    const char *text;
    enum status st = text_of(object, "text", &text, err);
    if (!st && !*text) st = error_set(err, ST_INVALID, "'text' is empty");
    if (!st) st = draft_encode(&space->draft[0], r, text, strlen(text), TOKENIZE_ADD_SPECIAL, 1, err);
    return st ? st : draft_end(&space->draft[0], r, err);
}

/* --- tokens --- */

/* The next number of an array of exactly `count`; `what` names it in messages. */
static enum status number_of(const cJSON *element, size_t index, const char *what, double min, double max,
                             double *out, struct error *err)
{
    double v = cJSON_IsNumber(element) ? element->valuedouble : NAN;
    if (!(v >= min && v <= max))
        return error_set(err, ST_INVALID, "%s[%zu] must be a number from %g to %g", what, index, min, max);
    *out = v;
    return ST_OK;
}

static enum status array_of(const cJSON *object, const char *key, size_t count, const cJSON **out,
                            struct error *err)
{
    const cJSON *array = json_get(object, key);
    if (!cJSON_IsArray(array)) return error_set(err, ST_INVALID, "'%s' must be an array of numbers", key);
    size_t n = (size_t)cJSON_GetArraySize(array);
    if (n != count) return error_set(err, ST_INVALID, "'%s' has %zu numbers for %zu tokens", key, n, count);
    *out = array->child;
    return ST_OK;
}

static enum status read_ids(const struct dataset_rules *r, const cJSON *object, struct draft *d,
                            struct error *err)
{
    const cJSON *array = json_get(object, "tokens");
    size_t vocab = tokenizer_vocab_size(r->tokenizer), i = 0;
    if (!cJSON_IsArray(array)) return error_set(err, ST_INVALID, "'tokens' must be an array of token ids");
    for (const cJSON *e = array->child; e; e = e->next, i++) {
        double id = cJSON_IsNumber(e) ? e->valuedouble : -1;
        if (!(id >= 0 && id < (double)vocab) || id != floor(id))
            return error_set(err, ST_INVALID, "tokens[%zu] is no token: the vocabulary has ids 0 to %zu", i,
                             vocab - 1);
        if (token_list_push(&d->tokens, (int32_t)id)) return no_memory(err);
    }
    return ST_OK;
}

static enum status read_weights(const cJSON *object, struct draft *d, struct error *err)
{
    const cJSON *e = NULL;
    if (!json_get(object, "weights")) return draft_weigh(d, 1, err);
    enum status st = array_of(object, "weights", d->tokens.count, &e, err);
    if (!st) st = draft_weigh(d, 0, err);
    for (size_t i = 0; !st && e; e = e->next, i++) {
        double v = 0;
        st = number_of(e, i, "weights", 0, DATASET_WEIGHT_MAX, &v, err);
        if (!st) d->weight[i] = (float)v;
    }
    return st;
}

static enum status read_old(const cJSON *object, struct draft *d, struct error *err)
{
    const cJSON *logprob = NULL, *advantage = NULL;
    enum status st = array_of(object, "logprobs", d->tokens.count, &logprob, err);
    if (!st) st = array_of(object, "advantages", d->tokens.count, &advantage, err);
    for (size_t i = 0; !st && logprob; logprob = logprob->next, advantage = advantage->next, i++) {
        double p = 0, a = 0;
        if (i || !cJSON_IsNull(logprob)) /* servers give null for a first token */
            st = number_of(logprob, i, "logprobs", -1e4, 0, &p, err);
        if (!st) st = number_of(advantage, i, "advantages", -1e6, 1e6, &a, err);
        if (!st && array_grow((void **)&d->old, &d->old_capacity, d->old_count, sizeof *d->old))
            st = no_memory(err);
        if (!st) d->old[d->old_count++] = (struct old_token){(float)p, (float)a};
    }
    return st;
}

static bool needs_old(const struct dataset_rules *r)
{
    return r->loss == LOSS_IMPORTANCE_SAMPLING || r->loss == LOSS_PPO;
}

static enum status read_tokens(const struct dataset_rules *r, const cJSON *object,
                               struct example_space *space, struct error *err)
{
    struct draft *d = &space->draft[0];
    enum status st = read_ids(r, object, d, err);
    if (!st) st = read_weights(object, d, err);
    return st || !needs_old(r) ? st : read_old(object, d, err);
}

/* --- messages --- */

struct conversation {
    size_t count;
    struct chat_message *message; /* owned, as the others */
    struct chat_span *span;
    float *weight; /* of what the assistant writes */
};

static void conversation_release(struct conversation *c)
{
    free(c->message);
    free(c->span);
    free(c->weight);
}

static enum status read_message(const cJSON *e, struct conversation *c, struct error *err)
{
    struct chat_message *m = &c->message[c->count];
    int64_t weight = 1;
    if (!cJSON_IsObject(e))
        return error_set(err, ST_INVALID, "it must be an object with 'role' and 'content'");
    for (const cJSON *k = e->child; k; k = k->next)
        if (strcmp(k->string, "role") != 0 && strcmp(k->string, "content") != 0 &&
            strcmp(k->string, "weight") != 0)
            return error_set(err, ST_INVALID,
                             "'%.64s' is not known here: a message has role, content and weight", k->string);
    enum status st = text_of(e, "role", &m->role, err);
    if (!st) st = text_of(e, "content", &m->content, err);
    if (!st) st = json_get_i64(e, "weight", 0, 1, &weight, err);
    if (st && st != ST_NOT_FOUND) return st;
    c->weight[c->count++] = (float)weight;
    return ST_OK;
}

static enum status read_conversation(const cJSON *object, struct conversation *c, struct error *err)
{
    const cJSON *array = json_get(object, "messages");
    if (!cJSON_IsArray(array) || !array->child)
        return error_set(err, ST_INVALID, "'messages' must be an array of at least one message");
    size_t n = (size_t)cJSON_GetArraySize(array);
    c->message = calloc(n, sizeof *c->message);
    c->span = calloc(n, sizeof *c->span);
    c->weight = calloc(n, sizeof *c->weight);
    if (!c->message || !c->span || !c->weight) return no_memory(err);
    for (const cJSON *e = array->child; e; e = e->next) {
        struct error inner = {0};
        enum status st = read_message(e, c, &inner);
        if (st) return error_set(err, st, "message %zu: %s", c->count, inner.message);
    }
    return ST_OK;
}

/* The bytes of a special token, NUL-terminated; empty where the model has none. */
static void special_text(const struct tokenizer *t, int32_t id, struct strbuf *out)
{
    size_t size;
    const char *piece = tokenizer_piece(t, id, 0, false, &size);
    strbuf_puts(out, "");
    if (piece) strbuf_append(out, piece, size);
}

static enum status render(const struct dataset_rules *r, struct conversation *c, bool generate,
                          struct strbuf *text, struct error *err)
{
    struct strbuf bos = {0}, eos = {0};
    if (!r->chat)
        return error_set(err, ST_INVALID,
                         "this model has no chat template for messages (%s): give prompt and completion",
                         r->chat_problem ? r->chat_problem : "none at all");
    special_text(r->tokenizer, tokenizer_bos(r->tokenizer), &bos);
    special_text(r->tokenizer, tokenizer_eos(r->tokenizer), &eos);
    const struct chat_options options = {
        .add_generation_prompt = generate, .bos = bos.data, .eos = eos.data, .spans = c->span};
    strbuf_clear(text);
    enum status st = bos.failed || eos.failed
                         ? no_memory(err)
                         : chat_render(r->chat, c->message, c->count, &options, text, err);
    strbuf_release(&bos);
    strbuf_release(&eos);
    return st;
}

/* An assistant's turn. What stands after its end token is the template's, which the model never writes. */
static enum status encode_turn(struct draft *d, const struct dataset_rules *r, const char *text, size_t size,
                               float weight, struct error *err)
{
    enum status st = draft_encode(d, r, text, size, TOKENIZE_CONTINUES, weight, err);
    size_t end = d->tokens.count;
    while (end && !tokenizer_is_end(r->tokenizer, d->tokens.ids[end - 1]) && d->weight[end - 1] == weight)
        end--;
    if (st || !end || !tokenizer_is_end(r->tokenizer, d->tokens.ids[end - 1])) return st;
    for (size_t i = end; i < d->tokens.count; i++) d->weight[i] = 0;
    return ST_OK;
}

static enum status encode_conversation(struct draft *d, const struct dataset_rules *r,
                                       const struct conversation *c, const struct strbuf *text,
                                       struct error *err)
{
    enum status st = ST_OK;
    size_t at = 0;
    for (size_t i = 0; !st && i < c->count; i++) {
        const struct chat_span *s = &c->span[i];
        if (s->begin == s->end) continue;
        unsigned continues = at ? TOKENIZE_CONTINUES : 0;
        if (s->begin > at) st = draft_encode(d, r, text->data + at, s->begin - at, continues, 0, err);
        if (!st) st = encode_turn(d, r, text->data + s->begin, s->end - s->begin, c->weight[i], err);
        at = s->end;
    }
    /* Nothing after the last token that counts is of any use. */
    while (d->tokens.count && d->weight[d->tokens.count - 1] == 0) d->tokens.count--;
    d->weight_count = d->tokens.count;
    return st;
}

static enum status read_messages(const struct dataset_rules *r, const cJSON *object,
                                 struct example_space *space, struct error *err)
{
    struct conversation c = {0};
    enum status st = read_conversation(object, &c, err);
    if (!st) st = render(r, &c, false, &space->text, err);
    if (!st) st = encode_conversation(&space->draft[0], r, &c, &space->text, err);
    if (!st && !space->draft[0].tokens.count)
        st = error_set(err, ST_INVALID,
                       "no message of the assistant weighs anything: there is nothing to learn");
    conversation_release(&c);
    return st;
}

/* --- pairs of completions --- */

static enum status encode_prompt(const struct dataset_rules *r, const cJSON *object,
                                 struct example_space *space, struct draft *d, struct error *err)
{
    const char *prompt;
    if (!json_get(object, "messages")) {
        enum status st = text_of(object, "prompt", &prompt, err);
        return st ? st : draft_encode(d, r, prompt, strlen(prompt), TOKENIZE_ADD_SPECIAL, 0, err);
    }
    struct conversation c = {0};
    enum status st = read_conversation(object, &c, err);
    if (!st) st = render(r, &c, true, &space->text, err);
    if (!st) st = draft_encode(d, r, space->text.data, space->text.size, 0, 0, err);
    conversation_release(&c);
    return st;
}

/* prompt: the object that has the prompt or the messages. */
static enum status encode_pair(const struct dataset_rules *r, const cJSON *prompt, const char *const text[2],
                               const char *const names[2], struct example_space *space, struct error *err)
{
    enum status st = ST_OK;
    for (int i = 0; i < 2 && !st; i++) {
        st = encode_prompt(r, prompt, space, &space->draft[i], err);
        if (!st) st = draft_completion(&space->draft[i], r, text[i], err);
    }
    if (!st && strcmp(text[0], text[1]) == 0)
        st = error_set(err, ST_INVALID, "'%s' and '%s' are the same text", names[0], names[1]);
    return st;
}

static enum status read_pair(const struct dataset_rules *r, const cJSON *object, struct example_space *space,
                             struct error *err)
{
    static const char *const keys[2] = {"chosen", "rejected"};
    const char *text[2] = {NULL, NULL};
    enum status st = ST_OK;
    for (int i = 0; i < 2 && !st; i++) st = text_of(object, keys[i], &text[i], err);
    return st ? st : encode_pair(r, object, text, keys, space, err);
}

/* OpenAI's: each output is one message of the assistant's, in an array. */
static enum status read_preference(const struct dataset_rules *r, const cJSON *object,
                                   struct example_space *space, struct error *err)
{
    static const char *const keys[2] = {"preferred_output", "non_preferred_output"};
    const cJSON *input = json_get(object, "input");
    const char *text[2] = {NULL, NULL};
    enum status st = ST_OK;
    if (!json_get(input, "messages"))
        return error_set(err, ST_INVALID, "'input' must be an object with messages");
    if (cJSON_GetArraySize(json_get(input, "tools")) > 0)
        return error_set(err, ST_INVALID, "'tools' are not supported");
    for (int i = 0; i < 2 && !st; i++) {
        const cJSON *output = json_get(object, keys[i]), *m = cJSON_IsArray(output) ? output->child : NULL;
        const cJSON *role = json_get(m, "role");
        if (!m || m->next || !cJSON_IsString(role) || strcmp(role->valuestring, "assistant") != 0)
            return error_set(err, ST_INVALID, "'%s' must be an array of one message of the assistant", keys[i]);
        st = text_of(m, "content", &text[i], err);
    }
    return st ? st : encode_pair(r, input, text, keys, space, err);
}

/* --- forms --- */

struct form {
    const char *mark; /* the key that tells the form */
    const char *keys; /* all it may have, each between spaces */
    const char *text; /* for people */
    bool pair, old;
    enum status (*read)(const struct dataset_rules *r, const cJSON *object, struct example_space *space,
                        struct error *err);
};

static const struct form forms[] = {
    {"chosen", " prompt messages chosen rejected ", "prompt (or messages), chosen and rejected", true, false,
     read_pair},
    {"preferred_output", " input preferred_output non_preferred_output ",
     "input, preferred_output and non_preferred_output", true, false, read_preference},
    {"completion", " prompt completion ", "prompt and completion", false, false, read_completion},
    {"messages", " messages ", "messages", false, false, read_messages},
    {"text", " text ", "text", false, false, read_text},
    {"tokens", " tokens weights logprobs advantages ",
     "tokens and weights (logprobs and advantages with importance_sampling and ppo)", false, true,
     read_tokens},
};
#define FORM_COUNT (sizeof forms / sizeof *forms)

static const struct form *form_find(const cJSON *object)
{
    for (size_t i = 0; i < FORM_COUNT; i++)
        if (json_get(object, forms[i].mark)) return &forms[i];
    return NULL;
}

static enum status check_keys(const struct form *f, const cJSON *object, struct error *err)
{
    for (const cJSON *k = object->child; k; k = k->next) {
        char spaced[80];
        if (strcmp(k->string, "id") == 0 || strcmp(k->string, "metadata") == 0) continue;
        snprintf(spaced, sizeof spaced, " %s ", k->string);
        if (strchr(k->string, ' ') || !strstr(f->keys, spaced))
            return error_set(err, ST_INVALID, "'%.64s' is not known beside '%s': a line of this form has %s",
                             k->string, f->mark, f->text);
    }
    return ST_OK;
}

static enum status check_loss(const struct dataset_rules *r, const struct form *f, struct error *err)
{
    if (f->pair != (r->loss == LOSS_DPO))
        return error_set(err, ST_INVALID,
                         f->pair ? "chosen and rejected are for the loss dpo"
                                 : "the loss dpo needs prompt (or messages), chosen and rejected");
    if (needs_old(r) && !f->old)
        return error_set(err, ST_INVALID, "this loss needs tokens, logprobs and advantages");
    return ST_OK;
}

enum status example_read(const struct dataset_rules *r, const cJSON *object, struct example_space *space,
                         struct error *err)
{
    if (!cJSON_IsObject(object)) return error_set(err, ST_INVALID, "it must be an object: {...}");
    const struct form *f = form_find(object);
    if (!f)
        return error_set(
            err, ST_INVALID,
            "it has no known form: give prompt and completion, messages, text, tokens, or for the loss dpo "
            "prompt, chosen and rejected");
    enum status st = check_keys(f, object, err);
    if (!st) st = check_loss(r, f, err);
    if (!st && !needs_old(r) && f->old && (json_get(object, "logprobs") || json_get(object, "advantages")))
        st = error_set(err, ST_INVALID,
                       "logprobs and advantages are for the losses importance_sampling and ppo");
    for (int i = 0; i < 2; i++) draft_clear(&space->draft[i]);
    return st ? st : f->read(r, object, space, err);
}

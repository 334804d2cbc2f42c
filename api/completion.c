#include "api/completion.h"

#include "api/parse.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

enum { IN_TEXT = 1, IN_CHAT = 2, IN_BOTH = 3 };

#define AT(member) offsetof(struct completion_request, member)

static const struct {
    const char *name;
    int endpoints;
    size_t offset;
} bool_fields[] = {
    {"echo", IN_TEXT, AT(echo)},
    {"stream", IN_BOTH, AT(stream)},
    {"ignore_eos", IN_BOTH, AT(ignore_eos)},
    {"include_stop_str_in_output", IN_BOTH, AT(include_stop)},
    {"add_special_tokens", IN_BOTH, AT(add_special_tokens)},
    {"skip_special_tokens", IN_BOTH, AT(skip_special_tokens)},
    {"return_token_ids", IN_BOTH, AT(return_token_ids)},
    {"return_tokens_as_token_ids", IN_BOTH, AT(tokens_as_ids)},
    {"add_generation_prompt", IN_CHAT, AT(add_generation_prompt)},
    {"continue_final_message", IN_CHAT, AT(continue_final_message)},
};

static const struct {
    const char *name;
    int endpoints;
    size_t offset;
    int min, max;
} int_fields[] = {
    {"max_tokens", IN_TEXT, AT(max_tokens), 0, INT_MAX},
    {"max_tokens", IN_CHAT, AT(max_tokens), 1, INT_MAX},
    {"max_completion_tokens", IN_CHAT, AT(max_tokens), 1, INT_MAX},
    {"min_tokens", IN_BOTH, AT(min_tokens), 0, INT_MAX},
    {"n", IN_BOTH, AT(n), 1, COMPLETION_CHOICES_MAX},
    {"best_of", IN_TEXT, AT(best_of), 1, COMPLETION_CHOICES_MAX},
    {"top_k", IN_BOTH, AT(top_k), -1, INT_MAX},
    {"priority", IN_BOTH, AT(priority), -INT_MAX, INT_MAX},
    {"logprobs", IN_TEXT, AT(logprobs), 0, COMPLETION_LOGPROBS_MAX},
    {"prompt_logprobs", IN_BOTH, AT(prompt_logprobs), 0, COMPLETION_LOGPROBS_MAX},
};

static const struct {
    const char *name;
    size_t offset;
    double min, max;
} f64_fields[] = {
    {"temperature", AT(temperature), 0, 2},
    {"top_p", AT(top_p), 0, 1},
    {"min_p", AT(min_p), 0, 1},
    {"presence_penalty", AT(presence_penalty), -2, 2},
    {"frequency_penalty", AT(frequency_penalty), -2, 2},
    {"repetition_penalty", AT(repetition_penalty), 0.01, 100},
};

#define COUNT(table) (sizeof(table) / sizeof *(table))

static void request_defaults(struct completion_request *r, bool chat)
{
    *r = (struct completion_request){
        .chat = chat,
        .max_tokens = chat ? -1 : 16,
        .n = 1,
        .logprobs = -1,
        .prompt_logprobs = -1,
        .temperature = 1,
        .top_p = 1,
        .repetition_penalty = 1,
        .skip_special_tokens = true,
        .add_special_tokens = !chat,
        .add_generation_prompt = true,
    };
}

static void parse_scalars(struct parse *p, struct completion_request *r)
{
    int here = r->chat ? IN_CHAT : IN_TEXT;
    char *base = (char *)r;
    for (size_t i = 0; i < COUNT(bool_fields); i++)
        if (bool_fields[i].endpoints & here)
            parse_bool(p, bool_fields[i].name, (bool *)(base + bool_fields[i].offset));
    for (size_t i = 0; i < COUNT(int_fields); i++)
        if (int_fields[i].endpoints & here)
            parse_int(p, int_fields[i].name, int_fields[i].min, int_fields[i].max,
                      (int *)(base + int_fields[i].offset));
    for (size_t i = 0; i < COUNT(f64_fields); i++)
        parse_f64(p, f64_fields[i].name, f64_fields[i].min, f64_fields[i].max,
                  (double *)(base + f64_fields[i].offset));
}

static void parse_stop(struct parse *p, struct completion_request *r)
{
    parse_strings(p, "stop", COMPLETION_STOPS_MAX, &r->stop, &r->stop_count);
    for (size_t i = 0; i < r->stop_count; i++)
        if (!r->stop[i][0]) parse_fail(p, ST_INVALID, "stop", "'stop' must not contain an empty string");

    const cJSON *ids = json_get(p->body, "stop_token_ids");
    if (p->failed || !ids) return;
    size_t count = cJSON_IsArray(ids) ? (size_t)cJSON_GetArraySize(ids) : SIZE_MAX;
    if (count > COMPLETION_STOPS_MAX) {
        parse_fail(p, ST_INVALID, "stop_token_ids",
                   "'stop_token_ids' must be an array of at most %d token ids", COMPLETION_STOPS_MAX);
        return;
    }
    r->stop_token_ids = parse_alloc(p, count, sizeof *r->stop_token_ids);
    if (!r->stop_token_ids) return;
    for (const cJSON *v = ids->child; v; v = v->next)
        if (!json_token_id(v, &r->stop_token_ids[r->stop_token_count++]))
            parse_fail(p, ST_INVALID, "stop_token_ids",
                       "'stop_token_ids' must hold token ids, whole numbers from 0");
}

static void parse_bias(struct parse *p, struct completion_request *r)
{
    const cJSON *map = json_get(p->body, "logit_bias");
    if (p->failed || !map) return;
    size_t count = cJSON_IsObject(map) ? (size_t)cJSON_GetArraySize(map) : SIZE_MAX;
    if (count > COMPLETION_BIAS_MAX) {
        parse_fail(
            p, ST_INVALID, "logit_bias",
            "'logit_bias' must be an object of at most %d token ids, each with a bias from -100 to 100",
            COMPLETION_BIAS_MAX);
        return;
    }
    r->bias = parse_alloc(p, count, sizeof *r->bias);
    if (!r->bias) return;
    for (const cJSON *v = map->child; v; v = v->next) {
        char *end;
        unsigned long id = strtoul(v->string, &end, 10);
        bool digits = v->string[0] >= '0' && v->string[0] <= '9' && !*end;
        if (!digits || id > INT32_MAX || !cJSON_IsNumber(v) ||
            !(v->valuedouble >= -100 && v->valuedouble <= 100)) {
            parse_fail(p, ST_INVALID, "logit_bias",
                       "'logit_bias': '%.20s' must be a token id with a bias from -100 to 100", v->string);
            return;
        }
        r->bias[r->bias_count++] = (struct token_bias){(int32_t)id, (float)v->valuedouble};
    }
}

/* Chat's pair of parameters to the one count that completions have. */
static void parse_chat_logprobs(struct parse *p, struct completion_request *r)
{
    bool wanted = false;
    int top = -1;
    parse_bool(p, "logprobs", &wanted);
    parse_int(p, "top_logprobs", 0, COMPLETION_LOGPROBS_MAX, &top);
    if (top > 0 && !wanted)
        parse_fail(p, ST_INVALID, "top_logprobs", "'top_logprobs' needs 'logprobs': true");
    if (wanted) r->logprobs = top > 0 ? top : 0;
}

static void parse_stream_options(struct parse *p, struct completion_request *r)
{
    const cJSON *options = json_get(p->body, "stream_options");
    if (p->failed || !options) return;
    if (!r->stream)
        parse_fail(p, ST_INVALID, "stream_options", "'stream_options' needs 'stream': true");
    else if (!cJSON_IsObject(options))
        parse_fail(p, ST_INVALID, "stream_options", "'stream_options' must be an object");
    struct parse inner = {.body = options, .err = p->err, .failed = p->failed};
    parse_bool(&inner, "include_usage", &r->include_usage);
    p->failed |= inner.failed;
}

/* `prompt`, unless its tokens were taken by the scanner already. */
static void parse_prompt(struct parse *p, struct completion_request *r)
{
    static const char wants[] = "'prompt' must be a string, an array of strings, an array of token ids "
                                "(whole numbers from 0), or an array of such arrays";
    if (r->tokens.rows > COMPLETION_PROMPTS_MAX)
        parse_fail(p, ST_INVALID, "prompt", "'prompt' has %zu prompts; at most %d are allowed",
                   r->tokens.rows, COMPLETION_PROMPTS_MAX);
    for (size_t i = 0, start = 0; i < r->tokens.rows; start = r->tokens.end[i++])
        if (r->tokens.end[i] == start)
            parse_fail(p, ST_INVALID, "prompt", "'prompt' has an empty array of tokens");
    if (p->failed || r->tokens.rows) return;

    const cJSON *v = json_get(p->body, "prompt");
    if (!v)
        parse_fail(p, ST_INVALID, "prompt", "'prompt' is missing");
    else if (!cJSON_IsString(v) && !(cJSON_IsArray(v) && cJSON_IsString(v->child)))
        parse_fail(p, ST_INVALID, "prompt", "%s", wants);
    parse_strings(p, "prompt", COMPLETION_PROMPTS_MAX, &r->texts, &r->text_count);
}

/* Rules that join several parameters. */
static void check_together(struct parse *p, struct completion_request *r)
{
    int best_of = r->best_of ? r->best_of : r->n;
    if (best_of < r->n)
        parse_fail(p, ST_INVALID, "best_of", "'best_of' (%d) must be at least 'n' (%d)", best_of, r->n);
    if (best_of > r->n && r->stream)
        parse_fail(p, ST_INVALID, "best_of", "'best_of' larger than 'n' cannot be streamed");
    r->best_of = best_of;
    if (r->max_tokens == 0 && !r->echo)
        parse_fail(p, ST_INVALID, "max_tokens", "'max_tokens' must be at least 1, or 0 with 'echo': true");
    if (r->max_tokens >= 0 && r->min_tokens > r->max_tokens)
        parse_fail(p, ST_INVALID, "min_tokens", "'min_tokens' (%d) is larger than 'max_tokens' (%d)",
                   r->min_tokens, r->max_tokens);
    if (r->prompt_logprobs >= 0 && r->stream)
        parse_fail(p, ST_INVALID, "prompt_logprobs", "'prompt_logprobs' cannot be streamed");
    if (r->continue_final_message && r->add_generation_prompt && json_get(p->body, "add_generation_prompt"))
        parse_fail(p, ST_INVALID, "continue_final_message",
                   "'continue_final_message' and 'add_generation_prompt' exclude each other");
    if (r->continue_final_message) r->add_generation_prompt = false;
    size_t prompts = r->chat ? 1 : r->tokens.rows + r->text_count;
    if (prompts * (size_t)r->best_of > COMPLETION_PROMPTS_MAX)
        parse_fail(p, ST_INVALID, r->best_of > r->n ? "best_of" : "n",
                   "%zu prompts with %d choices each make more than %d completions", prompts, r->best_of,
                   COMPLETION_PROMPTS_MAX);
}

static void parse_members(struct parse *p, struct completion_request *r, const char *base_name)
{
    parse_refuse_unsupported(p, r->chat);
    parse_adapter_choice(p, base_name, r);
    parse_scalars(p, r);
    parse_string(p, "cache_salt", &r->cache_salt);
    parse_stop(p, r);
    parse_bias(p, r);
    parse_stream_options(p, r);
    if (r->chat) {
        parse_chat_logprobs(p, r);
        parse_string(p, "chat_template", &r->chat_template);
        parse_messages(p, &r->messages, &r->message_count);
    } else {
        parse_prompt(p, r);
    }
    if (!p->failed) check_together(p, r);
}

bool completion_request_parse(char *text, size_t size, bool chat, const char *base_name,
                              struct completion_request *out, struct api_error *err)
{
    struct completion_request r;
    request_defaults(&r, chat);
    struct parse p = {.err = err};

    enum status tokens = chat ? ST_NOT_FOUND : scan_take_tokens(text, size, "prompt", &r.tokens);
    if (tokens && tokens != ST_NOT_FOUND) parse_fail(&p, tokens, "prompt", "out of memory");
    p.failed = p.failed || !parse_body(text, size, &r.body, err);
    p.body = r.body;
    r.has_seed = parse_seed(&p, text, size, &r.seed);
    if (!p.failed) parse_members(&p, &r, base_name);

    if (p.failed) {
        completion_request_release(&r);
        return false;
    }
    *out = r;
    return true;
}

void completion_request_release(struct completion_request *r)
{
    for (size_t i = 0; i < r->adapter_count; i++) {
        free(r->adapters[i].name);
        free(r->adapters[i].version);
    }
    messages_free(r->messages, r->message_count);
    token_rows_release(&r->tokens);
    free(r->texts);
    free(r->stop);
    free(r->stop_token_ids);
    free(r->bias);
    cJSON_Delete(r->body);
    *r = (struct completion_request){0};
}

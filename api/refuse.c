#include "api/parse.h"

#include <string.h>

/* Parameters of other servers that change what is generated. Each is accepted only with the value that means
 * "off". */
struct refused {
    const char *name;
    double off_number;      /* besides null, false, "", [] and {} */
    const char *off_string; /* may be NULL */
    const char *hint;       /* may be NULL */
};

static const struct refused refused[] = {
    {"tools", 0, NULL, NULL},
    {"tool_choice", 0, "none", NULL},
    {"functions", 0, NULL, NULL},
    {"function_call", 0, "none", NULL},
    {"suffix", 0, NULL, NULL},
    {"grammar", 0, NULL, NULL},
    {"json_schema", 0, NULL, NULL},
    {"guided_json", 0, NULL, NULL},
    {"guided_regex", 0, NULL, NULL},
    {"guided_choice", 0, NULL, NULL},
    {"guided_grammar", 0, NULL, NULL},
    {"structured_outputs", 0, NULL, NULL},
    {"logits_processors", 0, NULL, NULL},
    {"audio", 0, NULL, NULL},
    {"web_search_options", 0, NULL, NULL},
    {"reasoning_effort", 0, "none", NULL},
    {"chat_template_kwargs", 0, NULL, NULL},
    {"documents", 0, NULL, NULL},
    {"prompt_embeds", 0, NULL, NULL},
    {"truncate_prompt_tokens", 0, NULL, "shorten the prompt instead"},
    {"bad_words", 0, NULL, "use 'logit_bias'"},
    {"allowed_token_ids", 0, NULL, "use 'logit_bias'"},
    {"use_beam_search", 0, NULL, NULL},
    {"length_penalty", 1, NULL, NULL},
    {"typical_p", 1, NULL, NULL},
    {"tfs_z", 1, NULL, NULL},
    {"top_a", 0, NULL, NULL},
    {"top_n_sigma", 0, NULL, NULL},
    {"mirostat", 0, NULL, NULL},
    {"dry_multiplier", 0, NULL, NULL},
    {"xtc_probability", 0, NULL, NULL},
    {"dynatemp_range", 0, NULL, NULL},
    {"repeat_penalty", 1, NULL, "use 'repetition_penalty'"},
    {"n_predict", -1, NULL, "use 'max_tokens'"},
    {"max_new_tokens", 0, NULL, "use 'max_tokens'"},
};

/* Of the other endpoint: silently ignored they would mislead. */
static const struct refused refused_in_chat[] = {
    {"prompt", 0, NULL, "use 'messages', or POST /v1/completions"},
    {"echo", 0, NULL, "it belongs to /v1/completions"},
    {"best_of", 1, NULL, "it belongs to /v1/completions"},
};
static const struct refused refused_in_completions[] = {
    {"messages", 0, NULL, "use 'prompt', or POST /v1/chat/completions"},
    {"max_completion_tokens", 0, NULL, "it belongs to /v1/chat/completions; use 'max_tokens'"},
    {"top_logprobs", 0, NULL, "it belongs to /v1/chat/completions; use 'logprobs': N"},
    {"chat_template", 0, NULL, "it belongs to /v1/chat/completions"},
};

static bool is_off(const cJSON *v, const struct refused *r)
{
    if (cJSON_IsFalse(v)) return true;
    if (cJSON_IsNumber(v)) return v->valuedouble == r->off_number;
    if (cJSON_IsString(v))
        return !v->valuestring[0] || (r->off_string && !strcmp(v->valuestring, r->off_string));
    return (cJSON_IsArray(v) || cJSON_IsObject(v)) && !v->child;
}

static void refuse_all(struct parse *p, const struct refused *table, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const cJSON *v = json_get(p->body, table[i].name);
        if (!v || is_off(v, &table[i])) continue;
        parse_fail(p, ST_UNSUPPORTED, table[i].name, "'%s' is not supported here%s%s", table[i].name,
                   table[i].hint ? ": " : "", table[i].hint ? table[i].hint : "");
    }
}

static void refuse_response_format(struct parse *p)
{
    const cJSON *v = json_get(p->body, "response_format");
    if (!v) return;
    const cJSON *type = json_get(v, "type");
    if (!cJSON_IsString(type) || strcmp(type->valuestring, "text") != 0)
        parse_fail(p, ST_UNSUPPORTED, "response_format",
                   "'response_format' other than {\"type\": \"text\"} is not supported");
}

static void refuse_modalities(struct parse *p)
{
    const cJSON *v = json_get(p->body, "modalities");
    for (const cJSON *m = v ? v->child : NULL; m; m = m->next) {
        if (!cJSON_IsString(m) || strcmp(m->valuestring, "text") != 0)
            parse_fail(p, ST_UNSUPPORTED, "modalities",
                       "'modalities' other than [\"text\"] are not supported");
    }
}

void parse_refuse_unsupported(struct parse *p, bool chat)
{
    refuse_all(p, refused, sizeof refused / sizeof *refused);
    if (chat)
        refuse_all(p, refused_in_chat, sizeof refused_in_chat / sizeof *refused_in_chat);
    else
        refuse_all(p, refused_in_completions, sizeof refused_in_completions / sizeof *refused_in_completions);
    refuse_response_format(p);
    refuse_modalities(p);
}

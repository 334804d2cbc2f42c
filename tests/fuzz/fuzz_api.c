/* Damaged request bodies of every endpoint that takes JSON. */
#include "api/completion.h"
#include "api/tokenize.h"
#include "api/training.h"
#include "tests/support/fuzz.h"

#include <stdlib.h>
#include <string.h>

enum endpoint { COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE, FRESH, TRAIN, FORWARD, TUNE };

static bool is_setting(const char *name) { return !strcmp(name, "steps") || !strcmp(name, "contrast"); }

static bool parse_training(enum endpoint endpoint, char *text, size_t size, struct api_error *err)
{
    static const struct fresh_limits limits = {64, 16};
    static const struct fine_tuning_limits tuning = {is_setting, 1e-3, 256};
    struct fresh_request fresh;
    struct fine_tuning_request tune;
    struct train_body train;
    bool ok;
    switch (endpoint) {
    case FRESH:
        ok = fresh_request_parse(text, size, &limits, &fresh, err);
        if (ok) fresh_request_release(&fresh);
        return ok;
    case TUNE:
        ok = fine_tuning_parse(text, size, &tuning, &tune, err);
        if (ok) fine_tuning_release(&tune);
        return ok;
    default:
        ok = train_body_parse(endpoint == TRAIN ? TRAIN_BODY_JOB : TRAIN_BODY_FORWARD, text, size, is_setting,
                              &train, err);
        if (ok) train_body_release(&train);
        return ok;
    }
}

static bool parse(enum endpoint endpoint, char *text, size_t size, struct api_error *err)
{
    struct completion_request completion;
    struct tokenize_request tokenize;
    struct token_rows rows;
    bool ok;
    if (endpoint >= FRESH) return parse_training(endpoint, text, size, err);
    switch (endpoint) {
    case TOKENIZE:
        ok = tokenize_request_parse(text, size, &tokenize, err);
        if (ok) tokenize_request_release(&tokenize);
        return ok;
    case DETOKENIZE:
        ok = detokenize_request_parse(text, size, &rows, err);
        if (ok) token_rows_release(&rows);
        return ok;
    default:
        ok = completion_request_parse(text, size, endpoint == CHAT, "base", &completion, err);
        if (ok) completion_request_release(&completion);
        return ok;
    }
}

/* The answer to a refusal must itself be sound: a client error, in JSON. */
static void check_answer(const struct api_error *refusal)
{
    struct strbuf body = {0};
    cJSON *json;
    CHECK(refusal->http >= 400 && refusal->http < 500 && refusal->code);
    api_error_write(refusal, &body);
    CHECK(!body.failed && !json_parse(body.data, body.size, &json, NULL));
    cJSON_Delete(json);
    strbuf_release(&body);
}

static enum status read_body(const struct mutate_source *source, const uint8_t *data, size_t size,
                             struct error *err)
{
    const enum endpoint *endpoint = source->context;
    char *text =
        (char *)mutate_truncate(&(struct mutate_source){.data = data}, size); /* parsers write to it */
    struct api_error refusal = {0};
    bool ok = parse(*endpoint, text, size, &refusal);
    free(text);
    if (ok) return ST_OK;
    check_answer(&refusal);
    return error_set(err, ST_INVALID, "%s", refusal.message);
}

int main(int argc, char **argv)
{
    static const char *const words[] = {
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "\"",
        "\\",
        "\\u0000",
        "null",
        "true",
        "-1",
        "0",
        "1e400",
        "2147483648",
        "1.5",
        "18446744073709551616",
        "-9223372036854775809",
        "[]",
        "{}",
        "[[1],[2]]",
        "\"x\"",
        "\xC3",
        "base:a@1",
        "\"n\":129,",
        "\"stream\":true,",
        "\"top_p\":0,",
        "\"seed\":18446744073709551615,",
        "\"logprobs\":21,",
        "\"stop\":[\"\"],",
        "\"tools\":[{}],",
        "\"logit_bias\":{\"x\":1},",
        "\"max_tokens\":0,",
    };
    static const struct {
        const char *name, *body;
        enum endpoint endpoint;
    } bodies[] = {
        {"completions",
         "{\"model\":\"base\",\"prompt\":[\"Hello\",\"two\"],\"max_tokens\":16,\"temperature\":0.7,\"top_p\":"
         "0.9,\"n\":2,"
         "\"logprobs\":3,\"echo\":true,\"stop\":[\"\\n\",\"END\"],\"logit_bias\":{\"7\":-100,\"8\":1.5},"
         "\"seed\":-5,"
         "\"presence_penalty\":0.5,\"stop_token_ids\":[1,2],\"adapters\":[{\"name\":\"a\",\"weight\":0.5},{"
         "\"name\":\"b\"}]}",
         COMPLETIONS},
        {"tokens", "{\"prompt\": [[1, 2, 3], [4, 5]], \"min_p\": 0.1, \"ignore_eos\": true, \"user\": null}",
         COMPLETIONS},
        {"chat",
         "{\"model\":\"a\",\"messages\":[{\"role\":\"system\",\"content\":\"s\"},{\"role\":\"user\","
         "\"content\":[{\"type\":\"text\","
         "\"text\":\"caf\\u00e9\"}]}],\"max_completion_tokens\":8,\"logprobs\":true,\"top_logprobs\":2,"
         "\"stream\":true,"
         "\"stream_options\":{\"include_usage\":true},\"seed\":18446744073709551615}",
         CHAT},
        {"tokenize", "{\"content\":\"Hello\",\"add_special\":true,\"with_pieces\":true}", TOKENIZE},
        {"tokenize messages",
         "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"add_generation_prompt\":true}", TOKENIZE},
        {"detokenize", "{\"tokens\":[1,2,3,400,50000]}", DETOKENIZE},
        {"fresh",
         "{\"name\":\"a\",\"r\":4,\"num_experts\":8,\"top_k\":2,\"lora_alpha\":8,\"gate\":\"topk\",\"use_"
         "rslora\":true,"
         "\"target_modules\":[\"q_proj\",\"v_proj\"],\"seed\":18446744073709551615,\"description\":\"d\"}",
         FRESH},
        {"train",
         "{\"examples\":[{\"prompt\":\"a\\n]\",\"completion\":\"b\"},{\"messages\":[{\"role\":\"user\","
         "\"content\":\"x\"}]},"
         "{\"tokens\":[1,2],\"weights\":[0,1.5]}],\"steps\":10,\"contrast\":0.01,\"wait\":true,"
         "\"idempotency_key\":\"k\",\"expected_version\":\"\"}",
         TRAIN},
        {"forward", "{\"examples\":[{\"text\":\"a\"}],\"forward_only\":true,\"contrast\":0}", FORWARD},
        {"fine-tuning",
         "{\"model\":\"m\",\"training_file\":\"file-1\",\"validation_file\":null,\"suffix\":\"s\",\"seed\":7,"
         "\"metadata\":{\"a\":\"b\"},\"integrations\":[],\"hyperparameters\":{\"n_epochs\":\"auto\"},"
         "\"method\":{\"type\":\"dpo\",\"dpo\":{\"hyperparameters\":{\"beta\":0.1,\"batch_size\":4,"
         "\"learning_rate_multiplier\":2}}}}",
         TUNE},
    };
    enum { COUNT = sizeof bodies / sizeof *bodies };
    struct mutate_source sources[COUNT];
    for (int i = 0; i < COUNT; i++)
        sources[i] = (struct mutate_source){.name = bodies[i].name,
                                            .data = bodies[i].body,
                                            .size = strlen(bodies[i].body),
                                            .words = words,
                                            .word_count = sizeof words / sizeof *words,
                                            .context = &bodies[i].endpoint};
    return fuzz_main(argc, argv, sources, COUNT, read_body);
}

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "api/completion.h"

#define BASE "base-model"

/* The scanner writes to the text, so literals are copied. */
static bool parse(const char *text, bool chat, struct completion_request *out, struct api_error *err)
{
    char *copy = strdup(text);
    bool ok = completion_request_parse(copy, strlen(text), chat, BASE, out, err);
    free(copy);
    return ok;
}

static struct completion_request must_parse(const char *text, bool chat)
{
    struct completion_request r = {0};
    struct api_error err = {0};
    if (!parse(text, chat, &r, &err)) fail_msg("%s refused: %s", text, err.message);
    return r;
}

/* The message must name the parameter too. */
static void must_refuse(const char *text, bool chat, int http, const char *param)
{
    struct completion_request r = {0};
    struct api_error err = {0};
    if (parse(text, chat, &r, &err)) fail_msg("%s accepted", text);
    if (err.http != http) fail_msg("%s: HTTP %d, not %d (%s)", text, err.http, http, err.message);
    if (strcmp(err.param, param)) fail_msg("%s: param '%s', not '%s'", text, err.param, param);
    if (param[0] && !strstr(err.message, param))
        fail_msg("%s: '%s' does not name %s", text, err.message, param);
}

static void defaults_are_openais(void **state)
{
    (void)state;
    struct completion_request r =
        must_parse("{\"prompt\": \"hi\", \"unknown_but_harmless\": 1, \"user\": \"u\"}", false);
    assert_int_equal(r.text_count, 1);
    assert_string_equal(r.texts[0], "hi");
    assert_int_equal(r.max_tokens, 16);
    assert_int_equal(r.n, 1);
    assert_int_equal(r.best_of, 1);
    assert_int_equal(r.logprobs, -1);
    assert_true(r.temperature == 1 && r.top_p == 1 && r.repetition_penalty == 1);
    assert_true(r.add_special_tokens && r.skip_special_tokens && !r.stream && !r.has_seed);
    assert_int_equal(r.adapter_count, 0);
    completion_request_release(&r);

    r = must_parse("{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}", true);
    assert_int_equal(r.max_tokens, -1);
    assert_true(r.add_generation_prompt && !r.add_special_tokens);
    completion_request_release(&r);
}

static void prompts_come_in_four_forms(void **state)
{
    (void)state;
    struct completion_request r = must_parse("{\"prompt\": [\"a\", \"b\"]}", false);
    assert_int_equal(r.text_count, 2);
    assert_string_equal(r.texts[1], "b");
    completion_request_release(&r);

    r = must_parse("{\"model\": \"base-model\", \"prompt\": [1, 2,\n 2147483647 ] }", false);
    assert_int_equal(r.tokens.rows, 1);
    assert_int_equal(r.tokens.end[0], 3);
    assert_int_equal(r.tokens.ids[2], 2147483647);
    completion_request_release(&r);

    r = must_parse("{\"x\": {\"prompt\": [9]}, \"prompt\": [[1], [2, 3]]}", false);
    assert_int_equal(r.tokens.rows, 2);
    assert_int_equal(r.tokens.end[1], 3);
    assert_int_equal(r.tokens.ids[0], 1);
    completion_request_release(&r);
}

static void bad_prompts_are_refused(void **state)
{
    (void)state;
    static const char *const bad[] = {
        "{}",
        "{\"prompt\": null}",
        "{\"prompt\": 7}",
        "{\"prompt\": []}",
        "{\"prompt\": [[]]}",
        "{\"prompt\": [[1], []]}",
        "{\"prompt\": [1, -1]}",
        "{\"prompt\": [1.5]}",
        "{\"prompt\": [2147483648]}",
        "{\"prompt\": [1, \"a\"]}",
        "{\"prompt\": [\"a\", 1]}",
        "{\"prompt\": [[1], 2]}",
        "{\"prompt\": {\"a\": 1}}",
        "{\"prompt\": [01]}",
        "{\"prompt\": true}",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct completion_request r;
        struct api_error err = {0};
        if (parse(bad[i], false, &r, &err)) fail_msg("%s accepted", bad[i]);
        assert_int_equal(err.http, 400);
    }
    must_refuse("{\"prompt\": [1, 2", false, 400, "");
    must_refuse("{\"prompt\": [1, 2], \"prompt\": [3]}", false, 400, "");
    must_refuse("[1]", false, 400, "");
    must_refuse("", false, 400, "");
}

static void ranges_are_checked(void **state)
{
    (void)state;
    static const struct {
        const char *member, *param;
    } bad[] = {
        {"\"temperature\": -0.1", "temperature"},
        {"\"temperature\": 2.1", "temperature"},
        {"\"temperature\": \"1\"", "temperature"},
        {"\"top_p\": 1.01", "top_p"},
        {"\"min_p\": -1", "min_p"},
        {"\"n\": 0", "n"},
        {"\"n\": 129", "n"},
        {"\"n\": 1.5", "n"},
        {"\"max_tokens\": -1", "max_tokens"},
        {"\"max_tokens\": 0", "max_tokens"},
        {"\"best_of\": 1, \"n\": 2", "best_of"},
        {"\"best_of\": 3, \"stream\": true", "best_of"},
        {"\"logprobs\": 21", "logprobs"},
        {"\"logprobs\": true", "logprobs"},
        {"\"stop\": \"\"", "stop"},
        {"\"stop\": [1]", "stop"},
        {"\"stop\": {}", "stop"},
        {"\"stop_token_ids\": [1.5]", "stop_token_ids"},
        {"\"stop_token_ids\": 3", "stop_token_ids"},
        {"\"seed\": 1.5", "seed"},
        {"\"seed\": \"1\"", "seed"},
        {"\"seed\": 18446744073709551616", "seed"},
        {"\"presence_penalty\": 3", "presence_penalty"},
        {"\"repetition_penalty\": 0", "repetition_penalty"},
        {"\"logit_bias\": {\"a\": 1}", "logit_bias"},
        {"\"logit_bias\": {\"1\": 101}", "logit_bias"},
        {"\"logit_bias\": [1]", "logit_bias"},
        {"\"stream\": 1", "stream"},
        {"\"stream_options\": {\"include_usage\": true}", "stream_options"},
        {"\"min_tokens\": 17", "min_tokens"},
        {"\"prompt_logprobs\": 1, \"stream\": true", "prompt_logprobs"},
        {"\"echo\": \"yes\"", "echo"},
        {"\"top_k\": -2", "top_k"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char body[256];
        snprintf(body, sizeof body, "{\"prompt\": \"x\", %s}", bad[i].member);
        must_refuse(body, false, 400, bad[i].param);
    }
}

static void everything_valid_is_read(void **state)
{
    (void)state;
    struct completion_request r = must_parse(
        "{\"prompt\": \"x\", \"max_tokens\": 5, \"n\": 2, \"best_of\": 3, \"logprobs\": 4, \"echo\": true,"
        " \"stop\": [\"a\", \"b\"], \"stop_token_ids\": [7, 8], \"temperature\": 0.5, \"top_p\": 0.25, "
        "\"top_k\": -1,"
        " \"min_p\": 0.125, \"seed\": 18446744073709551615, \"presence_penalty\": -1, \"frequency_penalty\": "
        "1,"
        " \"repetition_penalty\": 1.5, \"min_tokens\": 2, \"ignore_eos\": true, \"logit_bias\": {\"12\": "
        "-100, \"3\": 2.5},"
        " \"include_stop_str_in_output\": true, \"add_special_tokens\": false, \"skip_special_tokens\": "
        "false,"
        " \"prompt_logprobs\": 3, \"return_token_ids\": true, \"return_tokens_as_token_ids\": true, "
        "\"priority\": -4,"
        " \"cache_salt\": \"s\", \"suffix\": null, \"tools\": [], \"response_format\": {\"type\": \"text\"}}",
        false);
    assert_string_equal(r.cache_salt, "s");
    assert_int_equal(r.max_tokens, 5);
    assert_int_equal(r.best_of, 3);
    assert_int_equal(r.logprobs, 4);
    assert_int_equal(r.stop_count, 2);
    assert_int_equal(r.stop_token_ids[1], 8);
    assert_true(r.seed == UINT64_MAX && r.has_seed);
    assert_int_equal(r.bias_count, 2);
    assert_int_equal(r.bias[0].token, 12);
    assert_true(r.bias[1].bias == 2.5f);
    assert_true(r.echo && r.ignore_eos && r.include_stop && !r.add_special_tokens && !r.skip_special_tokens);
    assert_true(r.return_token_ids && r.tokens_as_ids);
    assert_int_equal(r.priority, -4);
    completion_request_release(&r);

    r = must_parse("{\"prompt\": \"x\", \"seed\": -1}", false);
    assert_true(r.seed == UINT64_MAX);
    completion_request_release(&r);
    r = must_parse("{\"prompt\": \"x\", \"seed\": null, \"stop\": null, \"stream\": true,"
                   " \"stream_options\": {\"include_usage\": true}}",
                   false);
    assert_true(!r.has_seed && r.include_usage);
    completion_request_release(&r);
}

static void what_would_change_the_answer_is_refused(void **state)
{
    (void)state;
    static const struct {
        const char *member, *param;
    } bad[] = {
        {"\"tools\": [{}]", "tools"},
        {"\"suffix\": \"x\"", "suffix"},
        {"\"grammar\": \"root\"", "grammar"},
        {"\"guided_json\": {\"a\": 1}", "guided_json"},
        {"\"response_format\": {\"type\": \"json_object\"}", "response_format"},
        {"\"lora\": [{\"scale\": 1}]", "lora"},
        {"\"lora\": [{\"id\": 1}, {\"id\": 1}]", "lora"},
        {"\"lora\": {\"id\": 1}", "lora"},
        {"\"use_beam_search\": true", "use_beam_search"},
        {"\"mirostat\": 2", "mirostat"},
        {"\"typical_p\": 0.9", "typical_p"},
        {"\"n_predict\": 5", "n_predict"},
        {"\"messages\": [1]", "messages"},
        {"\"top_logprobs\": 3", "top_logprobs"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char body[256];
        snprintf(body, sizeof body, "{\"prompt\": \"x\", %s}", bad[i].member);
        must_refuse(body, false, 400, bad[i].param);
    }
    struct completion_request r =
        must_parse("{\"prompt\": \"x\", \"tools\": null, \"suffix\": \"\", \"mirostat\": 0,"
                   " \"typical_p\": 1, \"tool_choice\": \"none\", \"use_beam_search\": false}",
                   false);
    completion_request_release(&r);
    must_refuse("{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"echo\": true}", true, 400,
                "echo");
}

static void messages_are_read(void **state)
{
    (void)state;
    struct completion_request r = must_parse(
        "{\"messages\": [{\"role\": \"developer\", \"content\": \"s\"}, {\"role\": \"user\", \"content\":"
        " [{\"type\": \"text\", \"text\": \"a\"}, {\"type\": \"text\", \"text\": \"b\"}]}],"
        " \"max_completion_tokens\": 9, \"logprobs\": true, \"top_logprobs\": 2}",
        true);
    assert_int_equal(r.message_count, 2);
    assert_string_equal(r.messages[0].role, "system");
    assert_string_equal(r.messages[1].content, "a\nb");
    assert_int_equal(r.max_tokens, 9);
    assert_int_equal(r.logprobs, 2);
    completion_request_release(&r);

    r = must_parse(
        "{\"messages\": [{\"role\": \"assistant\", \"content\": \"so\"}], \"continue_final_message\": true}",
        true);
    assert_true(r.continue_final_message && !r.add_generation_prompt);
    completion_request_release(&r);

    static const char *const bad[] = {
        "{}",
        "{\"messages\": []}",
        "{\"messages\": \"hi\"}",
        "{\"messages\": [1]}",
        "{\"messages\": [{\"role\": \"user\"}]}",
        "{\"messages\": [{\"content\": \"x\"}]}",
        "{\"messages\": [{\"role\": \"robot\", \"content\": \"x\"}]}",
        "{\"messages\": [{\"role\": \"tool\", \"content\": \"x\"}]}",
        "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}]}",
        "{\"messages\": [{\"role\": \"assistant\", \"content\": \"\", \"tool_calls\": [{}]}]}",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) must_refuse(bad[i], true, 400, "messages");
    must_refuse("{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"top_logprobs\": 2}", true, 400,
                "top_logprobs");
}

static void adapters_are_chosen_in_several_ways(void **state)
{
    (void)state;
    struct completion_request r =
        must_parse("{\"prompt\": \"x\", \"model\": \"fr@0123456789abcdef\"}", false);
    assert_int_equal(r.adapter_count, 1);
    assert_string_equal(r.adapters[0].name, "fr");
    assert_string_equal(r.adapters[0].version, "0123456789abcdef");
    assert_string_equal(r.adapter_param, "model");
    completion_request_release(&r);

    r = must_parse("{\"prompt\": \"x\", \"model\": \"base-model:fr\", \"adapter_id\": \"fr\"}", false);
    assert_int_equal(r.adapter_count, 1);
    assert_string_equal(r.adapter_param, "adapter_id");
    completion_request_release(&r);

    r = must_parse(
        "{\"prompt\": \"x\", \"model\": \"base-model\", \"adapters\": [{\"name\": \"a\", \"weight\": 0.5},"
        " {\"name\": \"b\", \"version\": \"v\"}, \"c@w\"]}",
        false);
    assert_int_equal(r.adapter_count, 3);
    assert_true(r.adapters[0].weight == 0.5f && r.adapters[1].weight == 1);
    assert_string_equal(r.adapters[1].version, "v");
    assert_string_equal(r.adapters[2].version, "w");
    completion_request_release(&r);

    must_refuse("{\"prompt\": \"x\", \"model\": \"a\", \"adapter_id\": \"b\"}", false, 400, "model");
    must_refuse("{\"prompt\": \"x\", \"adapters\": [{\"name\": \"a\"}], \"adapter_id\": \"b\"}", false, 400,
                "adapter_id");
    must_refuse("{\"prompt\": \"x\", \"adapters\": [{\"name\": \"a\"}, {\"name\": \"a\"}]}", false, 400,
                "adapters");
    must_refuse("{\"prompt\": \"x\", \"adapters\": [{}]}", false, 400, "adapters");
    must_refuse("{\"prompt\": \"x\", \"adapters\": [{\"name\": \"a\", \"weight\": 1000}]}", false, 400,
                "weight");
    must_refuse("{\"prompt\": \"x\", \"adapters\": {}}", false, 400, "adapters");
    must_refuse("{\"prompt\": \"x\", \"adapters\": [\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\"]}",
                false, 400, "adapters");
}

/* xorshift: the same mutations in each run. */
static uint32_t next_random(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

static size_t mutate(char *text, size_t size, uint32_t *random)
{
    static const char interesting[] = "{}[]\",:\\0123456789.-eE \x80\xff\x01";
    size_t changes = 1 + next_random(random) % 4;
    for (size_t i = 0; i < changes && size; i++) {
        size_t at = next_random(random) % size;
        switch (next_random(random) % 4) {
        case 0: text[at] ^= (char)(1 << next_random(random) % 8); break;
        case 1: text[at] = interesting[next_random(random) % (sizeof interesting - 1)]; break;
        case 2:
            memmove(text + at, text + at + 1, size - at - 1);
            size--;
            break;
        default:
            if (next_random(random) % 8 == 0) size = at;
        }
    }
    return size;
}

/* Any bytes end in a request or an error with all its members; the sanitizers watch the rest. */
static void mutated_bodies_never_crash(void **state)
{
    (void)state;
    static const char *const seeds[] = {
        "{\"model\": \"fr@12\", \"prompt\": [[1, 2, 3], [40000, 5]], \"seed\": 12345678901234567890, \"n\": "
        "2}",
        "{\"prompt\": [\"a\\u00e9\", \"\\ud83d\\ude00\"], \"stop\": [\"x\", \"y\"], \"logit_bias\": {\"1\": "
        "2, \"30\": -4},"
        " \"adapters\": [{\"name\": \"a\", \"weight\": 0.5}, {\"name\": \"b\"}], \"stop_token_ids\": [1, 2]}",
        "{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", \"content\": "
        "[{\"type\": \"text\","
        " \"text\": \"hello\"}]}], \"stream\": true, \"stream_options\": {\"include_usage\": true}, "
        "\"top_logprobs\": 3,"
        " \"logprobs\": true}",
    };
    uint32_t random = 20240229;
    int refused = 0;
    for (int i = 0; i < 6000; i++) {
        const char *seed = seeds[i % 3];
        size_t size = strlen(seed);
        char *text = malloc(size); /* exactly: a read past the end is seen */
        memcpy(text, seed, size);
        size = mutate(text, size, &random);
        struct completion_request r;
        struct api_error err = {0};
        if (completion_request_parse(text, size, i % 3 == 2, BASE, &r, &err)) {
            completion_request_release(&r);
        } else {
            refused++;
            assert_true(err.http >= 400 && err.code && err.message[0]);
        }
        free(text);
    }
    assert_true(refused > 1000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults_are_openais),
        cmocka_unit_test(prompts_come_in_four_forms),
        cmocka_unit_test(bad_prompts_are_refused),
        cmocka_unit_test(ranges_are_checked),
        cmocka_unit_test(everything_valid_is_read),
        cmocka_unit_test(what_would_change_the_answer_is_refused),
        cmocka_unit_test(messages_are_read),
        cmocka_unit_test(adapters_are_chosen_in_several_ways),
        cmocka_unit_test(mutated_bodies_never_crash),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

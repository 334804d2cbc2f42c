#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <math.h>

#include "api/response.h"
#include "api/tokenize.h"
#include "base/json.h"

static const char *piece(const void *ctx, int32_t id, size_t *size_out)
{
    (void)ctx;
    static const char *const pieces[] = {"<s>", "a", "\xc3", "\xa9", "\"", "\n"};
    *size_out = strlen(pieces[id]);
    return pieces[id];
}

static struct response_head head(bool chat)
{
    return (struct response_head){.id = "id-1",
                                  .created = 5,
                                  .model = "m\"1",
                                  .fingerprint = "f",
                                  .chat = chat,
                                  .text = {.piece = piece}};
}

static void expect(struct strbuf *out, const char *text)
{
    assert_false(out->failed);
    assert_string_equal(out->data, text);
    strbuf_clear(out);
}

static void errors_have_all_members(void **state)
{
    (void)state;
    struct strbuf out = {0};
    struct api_error err = {0};
    api_error_set(&err, 404, "model_not_found", "model", "no '%s'", "x\"\n");
    api_error_write(&err, &out);
    expect(&out, "{\"error\": {\"message\": \"no 'x\\\"\\n'\", \"type\": \"invalid_request_error\", "
                 "\"param\": \"model\", \"code\": \"model_not_found\"}}");
    api_error_from(&err, ST_FULL, NULL, NULL);
    api_error_write(&err, &out);
    expect(&out, "{\"error\": {\"message\": \"capacity exhausted\", \"type\": \"rate_limit_error\", "
                 "\"param\": null, \"code\": \"queue_full\"}}");
    strbuf_release(&out);
}

static void every_status_is_an_http_status(void **state)
{
    (void)state;
    for (int st = ST_OK + 1; st < ST_COUNT; st++) {
        int http = api_status_http(st);
        assert_true(http >= 400 && http < 600);
        assert_string_not_equal(api_status_code(st), "internal_error");
    }
    assert_int_equal(api_status_http(ST_COUNT), 500);
}

static void whole_bodies(void **state)
{
    (void)state;
    struct strbuf out = {0};
    struct response_head h = head(false);
    struct response_choice c = {.index = 1, .text = "hi\n", .text_size = 3, .finish = "stop"};
    response_write(&out, &h, &c, 1, (struct response_usage){2, 3, 1});
    expect(&out, "{\"id\": \"id-1\", \"object\": \"text_completion\", \"created\": 5, \"model\": \"m\\\"1\", "
                 "\"system_fingerprint\": \"f\", \"choices\": [{\"index\": 1, \"text\": \"hi\\n\", "
                 "\"logprobs\": null, "
                 "\"finish_reason\": \"stop\"}], \"usage\": {\"prompt_tokens\": 2, \"completion_tokens\": 3, "
                 "\"total_tokens\": 5, \"prompt_tokens_details\": {\"cached_tokens\": 1}}}");
    h = head(true);
    int32_t ids[] = {1, 2};
    c.with_ids = true;
    c.token_ids = ids;
    c.token_count = 2;
    response_write(&out, &h, &c, 1, (struct response_usage){0});
    assert_non_null(strstr(
        out.data, "\"message\": {\"role\": \"assistant\", \"content\": \"hi\\n\", \"refusal\": null}"));
    assert_non_null(strstr(out.data, "\"token_ids\": [1, 2]"));
    strbuf_release(&out);
}

static void chunks_are_sse(void **state)
{
    (void)state;
    struct strbuf out = {0};
    struct response_head h = head(true);
    struct response_choice c = {.text = "a", .text_size = 1, .first = true};
    sse_write_chunk(&out, &h, &c, true);
    expect(&out,
           "data: {\"id\": \"id-1\", \"object\": \"chat.completion.chunk\", \"created\": 5, \"model\": "
           "\"m\\\"1\", "
           "\"system_fingerprint\": \"f\", \"choices\": [{\"index\": 0, \"delta\": {\"role\": \"assistant\", "
           "\"content\": \"a\"}, \"logprobs\": null, \"finish_reason\": null}], \"usage\": null}\n\n");
    c = (struct response_choice){.text = "", .finish = "length"};
    sse_write_chunk(&out, &h, &c, false);
    assert_non_null(
        strstr(out.data, "\"delta\": {}, \"logprobs\": null, \"finish_reason\": \"length\"}]}\n\n"));
    strbuf_clear(&out);
    sse_write_usage(&out, &h, (struct response_usage){1, 2});
    assert_non_null(strstr(out.data, "\"choices\": [], \"usage\": {\"prompt_tokens\": 1"));
    strbuf_clear(&out);
    struct api_error err = {0};
    api_error_set(&err, 500, "device_error", NULL, "line one\nline two");
    sse_write_error(&out, &err);
    assert_null(strchr(out.data + 6, '\n') + 2 < out.data + out.size ? "a newline inside" : NULL);
    strbuf_clear(&out);
    sse_write_done(&out);
    sse_write_ping(&out);
    expect(&out, "data: [DONE]\n\n: ping\n\n");
    strbuf_release(&out);
}

static struct logprob_list some_logprobs(void)
{
    struct logprob_list l = {0};
    assert_null(logprob_list_push(&l, 0, NAN, 0, 0));
    struct logprob_alternative *top = logprob_list_push(&l, 2, -0.5f, 0, 2);
    top[0] = (struct logprob_alternative){2, -0.5f};
    top[1] = (struct logprob_alternative){1, -INFINITY};
    top = logprob_list_push(&l, 3, -2, 4, 1);
    top[0] = (struct logprob_alternative){4, -1};
    return l;
}

static void logprobs_in_three_shapes(void **state)
{
    (void)state;
    struct logprob_list l = some_logprobs();
    struct token_text t = {.piece = piece};
    struct strbuf out = {0};
    logprobs_write_completion(&out, (struct logprob_range){&l, 0, 3}, &t, 10);
    expect(
        &out,
        "{\"tokens\": [\"<s>\", \"bytes:\\\\xc3\", \"bytes:\\\\xa9\"], \"token_logprobs\": [null, -0.5, -2], "
        "\"top_logprobs\": [null, {\"bytes:\\\\xc3\": -0.5, \"a\": -9999}, {\"\\\"\": -1, \"bytes:\\\\xa9\": "
        "-2}], "
        "\"text_offset\": [10, 13, 14]}");
    logprobs_write_chat(&out, (struct logprob_range){&l, 2, 1}, &t);
    expect(
        &out,
        "{\"content\": [{\"token\": \"bytes:\\\\xa9\", \"logprob\": -2, \"bytes\": [169], \"top_logprobs\": "
        "[{\"token\": \"\\\"\", \"logprob\": -1, \"bytes\": [34]}]}], \"refusal\": null}");
    t.as_ids = true;
    logprobs_write_chat(&out, (struct logprob_range){&l, 2, 1}, &t);
    assert_non_null(strstr(out.data, "\"token\": \"token_id:3\""));
    strbuf_clear(&out);
    logprob_list_release(&l);

    logprob_list_push(&l, 2, -2, 7, 1)[0] = (struct logprob_alternative){1, -1};
    t.as_ids = false;
    logprobs_write_prompt(&out, &l, &t);
    expect(&out, "[null, {\"2\": {\"logprob\": -2, \"rank\": 8, \"decoded_token\": \"bytes:\\\\xc3\"}, "
                 "\"1\": {\"logprob\": -1, \"rank\": 1, \"decoded_token\": \"a\"}}]");
    logprob_list_release(&l);
    strbuf_release(&out);
}

static void listings(void **state)
{
    (void)state;
    struct strbuf out = {0};
    struct model_entry models[] = {{.id = "base", .created = 1, .context_length = 99},
                                   {.id = "fr", .parent = "base", .created = 2, .context_length = 99}};
    models_write(&out, models, 2);
    expect(&out,
           "{\"object\": \"list\", \"data\": [{\"id\": \"base\", \"object\": \"model\", \"created\": 1, "
           "\"owned_by\": "
           "\"medley\", \"root\": \"base\", \"parent\": null, \"max_model_len\": 99}, {\"id\": \"fr\", "
           "\"object\": "
           "\"model\", \"created\": 2, \"owned_by\": \"medley\", \"root\": \"fr\", \"parent\": \"base\", "
           "\"max_model_len\": 99}]}");
    struct adapter_version_entry v = {.version = "v1",
                                      .hash = "h",
                                      .source = "rollback",
                                      .created = 3,
                                      .published = 5,
                                      .bytes = 4,
                                      .current = true};
    struct adapter_entry a = {.name = "fr",
                              .number = 6,
                              .description = "d",
                              .format = "moelora",
                              .targets = "q_proj",
                              .rank = 4,
                              .experts = 8,
                              .top_k = 2,
                              .sites = 30,
                              .parameters = 7,
                              .versions = &v,
                              .version_count = 1};
    adapter_write(&out, &a);
    expect(&out,
           "{\"name\": \"fr\", \"object\": \"adapter\", \"id\": 6, \"version\": \"v1\", "
           "\"description\": \"d\", \"pinned\": false, \"keep_versions\": null, \"format\": \"moelora\", "
           "\"targets\": \"q_proj\", \"rank\": 4, \"experts\": 8, \"top_k\": 2, \"sites\": 30, "
           "\"parameters\": 7, \"versions\": [{\"version\": \"v1\", \"hash\": \"h\", "
           "\"source\": \"rollback\", \"created\": 3, \"published\": 5, \"bytes\": 4, \"current\": true, "
           "\"resident\": false, \"leases\": 0}]}");
    strbuf_release(&out);
}

static struct tokenize_request must_tokenize(const char *body)
{
    struct tokenize_request r = {0};
    struct api_error err = {0};
    if (!tokenize_request_parse(body, strlen(body), &r, &err)) fail_msg("%s: %s", body, err.message);
    return r;
}

static void tokenize_dialects(void **state)
{
    (void)state;
    struct strbuf out = {0};
    struct token_piece tokens[] = {{1, "a", 1}, {2, "\xc3", 1}};
    struct tokenize_request r = must_tokenize("{\"content\": \"a\", \"with_pieces\": true}");
    assert_false(r.add_special);
    tokenize_write(&out, &r, tokens, 2, 64);
    expect(&out, "{\"tokens\": [{\"id\": 1, \"piece\": \"a\"}, {\"id\": 2, \"piece\": [195]}]}");
    tokenize_request_release(&r);

    r = must_tokenize("{\"prompt\": \"a\", \"model\": \"m\"}");
    assert_true(r.add_special);
    tokenize_write(&out, &r, tokens, 2, 64);
    expect(&out, "{\"count\": 2, \"max_model_len\": 64, \"tokens\": [1, 2], \"token_strs\": null}");
    tokenize_request_release(&r);

    r = must_tokenize("{\"inputs\": \"a\"}");
    tokenize_write(&out, &r, tokens, 1, 64);
    expect(&out, "[{\"id\": 1, \"text\": \"a\", \"start\": 0, \"stop\": 1}]");
    tokenize_request_release(&r);

    r = must_tokenize("{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}");
    assert_int_equal(r.message_count, 1);
    tokenize_request_release(&r);

    struct api_error err = {0};
    const char *both = "{\"prompt\": \"a\", \"content\": \"b\"}";
    assert_false(tokenize_request_parse(both, strlen(both), &r, &err));
    assert_int_equal(err.http, 400);
    assert_false(tokenize_request_parse("{}", 2, &r, &err));
    strbuf_release(&out);
}

static void detokenize_bodies(void **state)
{
    (void)state;
    struct token_rows rows = {0};
    struct api_error err = {0};
    char good[] = "{\"tokens\": [5, 6]}";
    assert_true(detokenize_request_parse(good, strlen(good), &rows, &err));
    assert_int_equal(rows.ids[1], 6);
    token_rows_release(&rows);
    char empty[] = "{\"tokens\": []}";
    assert_true(detokenize_request_parse(empty, strlen(empty), &rows, &err));
    assert_int_equal(rows.rows, 0);
    const char *const bad[] = {
        "{}", "{\"tokens\": [[1]]}", "{\"tokens\": [-1]}", "{\"tokens\": \"1\"}", "{\"tokens\": [1", "1"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char *text = strdup(bad[i]);
        assert_false(detokenize_request_parse(text, strlen(text), &rows, &err));
        assert_int_equal(err.http, 400);
        free(text);
    }
    struct strbuf out = {0};
    detokenize_write(&out, "x", 1);
    expect(&out, "{\"prompt\": \"x\", \"content\": \"x\"}");
    strbuf_release(&out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(errors_have_all_members),
        cmocka_unit_test(every_status_is_an_http_status),
        cmocka_unit_test(whole_bodies),
        cmocka_unit_test(chunks_are_sse),
        cmocka_unit_test(logprobs_in_three_shapes),
        cmocka_unit_test(listings),
        cmocka_unit_test(tokenize_dialects),
        cmocka_unit_test(detokenize_bodies),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Bodies of calls about adapters. */
#include "api/adapter.h"
#include "tests/support/check.h"

#include <string.h>

static struct adapter_request must_parse(enum adapter_request_kind kind, const char *body)
{
    struct adapter_request r = {0};
    struct api_error err = {0};
    if (!adapter_request_parse(kind, body, strlen(body), &r, &err)) fail_msg("%s: %s", body, err.message);
    return r;
}

static void must_refuse(enum adapter_request_kind kind, const char *body, const char *param)
{
    struct adapter_request r = {0};
    struct api_error err = {0};
    if (adapter_request_parse(kind, body, strlen(body), &r, &err)) fail_msg("%s was taken", body);
    assert_int_equal(err.http, 400);
    assert_string_equal(err.param, param);
}

static void rollbacks(void **state)
{
    (void)state;
    struct adapter_request r =
        must_parse(ADAPTER_ROLLBACK, "{\"version\": \"ab\", \"expected_version\": \"cd\"}");
    assert_string_equal(r.version, "ab");
    assert_string_equal(r.expected_version, "cd");
    adapter_request_release(&r);
    must_refuse(ADAPTER_ROLLBACK, "{}", "version");
    must_refuse(ADAPTER_ROLLBACK, "{\"version\": \"\"}", "version");
    must_refuse(ADAPTER_ROLLBACK, "{\"version\": 5}", "version");
    must_refuse(ADAPTER_ROLLBACK, "[]", "");
}

static void changes(void **state)
{
    (void)state;
    struct adapter_request r = must_parse(ADAPTER_CHANGE, "{}");
    assert_null(r.description);
    assert_false(r.has_pinned || r.has_keep_versions);
    adapter_request_release(&r);
    r = must_parse(ADAPTER_CHANGE, "{\"description\": \"\", \"pinned\": false, \"keep_versions\": 7}");
    assert_string_equal(r.description, "");
    assert_true(r.has_pinned && !r.pinned && r.has_keep_versions && r.keep_versions == 7);
    adapter_request_release(&r);
    r = must_parse(ADAPTER_CHANGE, "{\"keep_versions\": null}");
    assert_true(r.has_keep_versions && r.keep_versions == 0);
    adapter_request_release(&r);
    must_refuse(ADAPTER_CHANGE, "{\"keep_versions\": 0}", "keep_versions");
    must_refuse(ADAPTER_CHANGE, "{\"keep_versions\": 1e9}", "keep_versions");
    must_refuse(ADAPTER_CHANGE, "{\"pinned\": 1}", "pinned");
    must_refuse(ADAPTER_CHANGE, "{\"weight\": 1}", "weight");
}

static void loads(void **state)
{
    (void)state;
    struct adapter_request r =
        must_parse(ADAPTER_LOAD, "{\"lora_name\": \"a\", \"lora_path\": \"b\", \"load_inplace\": true}");
    assert_string_equal(r.name, "a");
    assert_string_equal(r.path, "b");
    assert_true(r.in_place);
    adapter_request_release(&r);
    r = must_parse(ADAPTER_UNLOAD, "{\"lora_name\": \"a\", \"lora_int_id\": 3}");
    assert_string_equal(r.name, "a");
    adapter_request_release(&r);
    must_refuse(ADAPTER_LOAD, "{\"lora_name\": \"a\"}", "lora_path");
    must_refuse(ADAPTER_LOAD, "{\"lora_path\": \"a\"}", "lora_name");
    must_refuse(ADAPTER_UNLOAD, "{}", "lora_name");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rollbacks),
        cmocka_unit_test(changes),
        cmocka_unit_test(loads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Bodies of calls about training. */
#include "api/training.h"
#include "tests/support/check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct fresh_limits limits = {64, 16};

static bool is_setting(const char *name)
{
    return !strcmp(name, "steps") || !strcmp(name, "learning_rate") || !strcmp(name, "contrast") ||
           !strcmp(name, "seed") || !strcmp(name, "loss") || !strcmp(name, "epochs");
}
static const struct fine_tuning_limits tuning = {is_setting, 0.5, 100};

/* ------------------------------------------------------------------ fresh adapters */

static struct fresh_request fresh(const char *body)
{
    struct fresh_request r = {0};
    struct api_error err = {0};
    if (!fresh_request_parse(body, strlen(body), &limits, &r, &err)) fail_msg("%s: %s", body, err.message);
    return r;
}

static void refuse_fresh(const char *body, const char *param)
{
    struct fresh_request r = {0};
    struct api_error err = {0};
    if (fresh_request_parse(body, strlen(body), &limits, &r, &err)) fail_msg("%s was taken", body);
    assert_int_equal(err.http, 400);
    assert_string_equal(err.param, param);
}

static void fresh_adapters(void **state)
{
    (void)state;
    struct fresh_request r = fresh("{\"name\": \"a\"}");
    assert_string_equal(r.name, "a");
    assert_null(r.description);
    assert_int_equal(r.rank, 8);
    assert_true(r.experts == 1 && r.top_k == 1 && !r.rslora && r.target_count == 0 && r.seed == 0);
    assert_true(r.alpha == 16);
    assert_string_equal(r.gate, "topk");
    fresh_request_release(&r);

    r = fresh("{\"name\": \"a\", \"r\": 4, \"num_experts\": 8, \"lora_alpha\": 3.5, \"gate\": \"dense\", "
              "\"use_rslora\": true, \"target_modules\": [\"q_proj\", \"v_proj\"], \"seed\": "
              "18446744073709551615, \"description\": \"d\"}");
    assert_true(r.rank == 4 && r.experts == 8 && r.top_k == 2 && r.rslora && r.alpha == 3.5);
    assert_true(r.target_count == 2 && !strcmp(r.targets[1], "v_proj") && r.seed == UINT64_MAX);
    assert_string_equal(r.gate, "dense");
    fresh_request_release(&r);
    r = fresh("{\"name\": \"a\", \"target_modules\": \"all-linear\", \"top_k\": 1}");
    assert_int_equal(r.target_count, 0);
    fresh_request_release(&r);
}

static void fresh_refusals(void **state)
{
    (void)state;
    refuse_fresh("[]", "");
    refuse_fresh("{}", "name");
    refuse_fresh("{\"name\": \"\"}", "name");
    refuse_fresh("{\"name\": \"a\", \"r\": 65}", "r");
    refuse_fresh("{\"name\": \"a\", \"r\": 0}", "r");
    refuse_fresh("{\"name\": \"a\", \"r\": 1.5}", "r");
    refuse_fresh("{\"name\": \"a\", \"num_experts\": 17}", "num_experts");
    refuse_fresh("{\"name\": \"a\", \"num_experts\": 4, \"top_k\": 5}", "top_k");
    refuse_fresh("{\"name\": \"a\", \"lora_alpha\": 0}", "lora_alpha");
    refuse_fresh("{\"name\": \"a\", \"gate\": \"threshold\"}", "gate");
    refuse_fresh("{\"name\": \"a\", \"target_modules\": []}", "target_modules");
    refuse_fresh("{\"name\": \"a\", \"target_modules\": [1]}", "target_modules");
    refuse_fresh("{\"name\": \"a\", \"seed\": 18446744073709551616}", "seed");
    refuse_fresh("{\"name\": \"a\", \"rank\": 8}", "rank");
}

/* ------------------------------------------------------------------ training */

static bool train(enum train_body_kind kind, const char *body, struct train_body *out, struct api_error *err)
{
    char *text = strdup(body); /* parsers write to it */
    assert_non_null(text);
    bool ok = train_body_parse(kind, text, strlen(text), is_setting, out, err);
    free(text);
    return ok;
}

static struct train_body must_train(enum train_body_kind kind, const char *body)
{
    struct train_body b = {0};
    struct api_error err = {0};
    if (!train(kind, body, &b, &err)) fail_msg("%s: %s", body, err.message);
    return b;
}

static void refuse_train(enum train_body_kind kind, const char *body, const char *param)
{
    struct train_body b = {0};
    struct api_error err = {0};
    if (train(kind, body, &b, &err)) fail_msg("%s was taken", body);
    assert_int_equal(err.http, 400);
    assert_string_equal(err.param, param);
}

static void jobs(void **state)
{
    (void)state;
    struct train_body b = must_train(
        TRAIN_BODY_JOB, "{\"steps\": 5, \"examples\": [ {\"text\": \"a\\nb]\"},\n {\"tokens\":\n[1,\r 2]} "
                        "], \"wait\": true, \"idempotency_key\": \"k\"}");
    assert_true(b.has_examples && b.wait && !b.stream);
    assert_string_equal(b.examples.data, "{\"text\": \"a\\nb]\"}\n{\"tokens\": [1,  2]}\n");
    assert_string_equal(b.idempotency_key, "k");
    assert_true(json_get(b.body, "steps")->valuedouble == 5);
    train_body_release(&b);
    b = must_train(TRAIN_BODY_JOB,
                   "{\"training_file\": \"file-1\", \"validation_file\": \"file-2\", \"stream\": "
                   "true, \"expected_version\": \"\"}");
    assert_true(!b.has_examples && b.stream);
    assert_string_equal(b.expected_version, "");
    train_body_release(&b);
}

static void job_refusals(void **state)
{
    (void)state;
    refuse_train(TRAIN_BODY_JOB, "{}", "examples");
    refuse_train(TRAIN_BODY_JOB, "{\"examples\": []}", "examples");
    refuse_train(TRAIN_BODY_JOB, "{\"examples\": {}}", "examples");
    refuse_train(TRAIN_BODY_JOB, "{\"examples\": [1], \"training_file\": \"f\"}", "examples");
    refuse_train(TRAIN_BODY_JOB, "{\"examples\": [1], \"step\": 5}", "step");
    refuse_train(TRAIN_BODY_JOB, "{\"examples\": [1], \"wait\": 1}", "wait");
    refuse_train(TRAIN_BODY_JOB, "{\"examples\": [1], \"wait\": true, \"stream\": true}", "stream");
    refuse_train(TRAIN_BODY_JOB, "{\"examples\": [1], \"idempotency_key\": \"\"}", "idempotency_key");
    refuse_train(TRAIN_BODY_JOB, "{\"examples\": [1], \"examples\": [2]}", "");
    refuse_train(TRAIN_BODY_JOB, "{\"examples\": [1,]}", "");
    refuse_train(TRAIN_BODY_JOB, "{\"examples\": [,1]}", "");
    refuse_train(TRAIN_BODY_JOB, "{\"examples\": [1", "");
    refuse_train(TRAIN_BODY_JOB, "{\"examples\": [1, {\"a\": }]}", "");
    refuse_train(TRAIN_BODY_JOB, "{\"examples\": [\"x\ty\"]}", "");
}

static void steps_by_hand(void **state)
{
    (void)state;
    struct train_body b =
        must_train(TRAIN_BODY_FORWARD, "{\"examples\": [1], \"forward_only\": true, \"contrast\": 0}");
    assert_true(b.forward_only && b.has_examples);
    train_body_release(&b);
    b = must_train(TRAIN_BODY_OPTIM, "{\"learning_rate\": 0.1}");
    train_body_release(&b);
    b = must_train(TRAIN_BODY_PUBLISH, "{\"job\": \"ftjob-1\", \"expected_version\": \"ab\"}");
    assert_string_equal(b.job, "ftjob-1");
    train_body_release(&b);
    refuse_train(TRAIN_BODY_FORWARD, "{}", "examples");
    refuse_train(TRAIN_BODY_FORWARD, "{\"examples\": [1], \"wait\": true}", "wait");
    refuse_train(TRAIN_BODY_OPTIM, "{\"examples\": [1]}", "examples");
    refuse_train(TRAIN_BODY_PUBLISH, "{\"version\": \"a\"}", "version");
}

/* ------------------------------------------------------------------ fine-tuning jobs */

static struct fine_tuning_request tune(const char *body)
{
    struct fine_tuning_request r = {0};
    struct api_error err = {0};
    if (!fine_tuning_parse(body, strlen(body), &tuning, &r, &err)) fail_msg("%s: %s", body, err.message);
    return r;
}

static void refuse_tune(const char *members, const char *param)
{
    char body[512];
    struct fine_tuning_request r = {0};
    struct api_error err = {0};
    snprintf(body, sizeof body, "{\"model\": \"m\", \"training_file\": \"f\", %s}", members);
    if (fine_tuning_parse(body, strlen(body), &tuning, &r, &err)) fail_msg("%s was taken", body);
    assert_int_equal(err.http, 400);
    assert_string_equal(err.param, param);
}

static double setting(const struct fine_tuning_request *r, const char *name)
{
    const cJSON *v = json_get(r->settings, name);
    return cJSON_IsNumber(v) ? v->valuedouble : -1;
}

static void fine_tuning(void **state)
{
    (void)state;
    struct fine_tuning_request r = tune("{\"model\": \"m\", \"training_file\": \"f\"}");
    assert_string_equal(r.model, "m");
    assert_null(r.suffix);
    assert_int_equal(cJSON_GetArraySize(r.settings), 0);
    fine_tuning_release(&r);

    r = tune(
        "{\"model\": \"m\", \"training_file\": \"f\", \"suffix\": \"s\", \"seed\": 7, \"contrast\": 0.25, "
        "\"hyperparameters\": {\"n_epochs\": 2, \"batch_size\": \"auto\", \"learning_rate_multiplier\": 3}, "
        "\"integrations\": [], \"metadata\": {\"a\": \"b\"}}");
    assert_true(setting(&r, "epochs") == 2 && setting(&r, "batch_tokens") == -1);
    assert_true(setting(&r, "learning_rate") == 1.5 && setting(&r, "seed") == 7 &&
                setting(&r, "contrast") == 0.25);
    assert_non_null(strstr(r.kept.data, "\"metadata\": {\"a\":\"b\"}"));
    assert_non_null(strstr(r.kept.data, "\"batch_size\":\"auto\""));
    fine_tuning_release(&r);

    r = tune(
        "{\"model\": \"m\", \"training_file\": \"f\", \"method\": {\"type\": \"dpo\", \"dpo\": "
        "{\"hyperparameters\": {\"beta\": 0.5, \"batch_size\": 4, \"steps\": 9}}, \"supervised\": null}}");
    assert_true(setting(&r, "dpo_beta") == 0.5 && setting(&r, "batch_tokens") == 400 &&
                setting(&r, "steps") == 9);
    assert_string_equal(json_get(r.settings, "loss")->valuestring, "dpo");
    fine_tuning_release(&r);
}

static void fine_tuning_refusals(void **state)
{
    (void)state;
    refuse_tune("\"n_epochs\": 2", "n_epochs");
    refuse_tune("\"hyperparameters\": 3", "hyperparameters");
    refuse_tune("\"hyperparameters\": {\"n_epochs\": 0}", "n_epochs");
    refuse_tune("\"hyperparameters\": {\"n_epochs\": \"many\"}", "n_epochs");
    refuse_tune("\"hyperparameters\": {\"batch_size\": 257}", "batch_size");
    refuse_tune("\"hyperparameters\": {\"warp\": 1}", "warp");
    refuse_tune("\"method\": \"dpo\"", "method");
    refuse_tune("\"method\": {\"type\": \"reinforcement\"}", "method");
    refuse_tune("\"method\": {\"type\": \"dpo\", \"supervised\": {}}", "method");
    refuse_tune("\"integrations\": [{\"type\": \"wandb\"}]", "integrations");
    refuse_tune("\"metadata\": {\"a\": 1}", "metadata");
    refuse_tune("\"metadata\": []", "metadata");
    refuse_tune("\"suffix\": \"0123456789012345678901234567890123456789012345678901234567890123456789\"",
                "suffix");
    refuse_tune("\"model\": 3", "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fresh_adapters),
        cmocka_unit_test(fresh_refusals),
        cmocka_unit_test(jobs),
        cmocka_unit_test(job_refusals),
        cmocka_unit_test(steps_by_hand),
        cmocka_unit_test(fine_tuning),
        cmocka_unit_test(fine_tuning_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Settings: from requests and the command line, there and back, with their ranges; the learning rate's
 * course. */
#include "tests/support/check.h"
#include "training/settings.h"

#include <stdio.h>

static enum status read_text(const char *text, struct train_settings *s, struct error *err)
{
    cJSON *json;
    assert_int_equal(json_parse(text, strlen(text), &json, NULL), ST_OK);
    enum status st = train_settings_read(json, s, err);
    cJSON_Delete(json);
    return st;
}

static void refused(const char *text, const char *message)
{
    struct train_settings s, before;
    struct error err = {0};
    train_settings_default(&s);
    before = s;
    assert_refused(read_text(text, &s, &err), ST_INVALID, err, message);
    assert_memory_equal(&s, &before, sizeof s); /* all or nothing */
}

static void requests_set_what_they_name(void **state)
{
    (void)state;
    struct train_settings s;
    struct error err;
    train_settings_default(&s);
    assert_ok(
        read_text(
            "{\"steps\": 10, \"learning_rate\": 2e-4, \"schedule\": \"cosine\", \"seed\": 9007199254740992, "
            "\"publish\": \"manual\", \"clip\": null, \"other\": true}",
            &s, &err),
        err);
    assert_int_equal(s.steps, 10);
    assert_true(s.learning_rate == 2e-4 && s.clip == 1 && s.batch_tokens == 2048);
    assert_int_equal(s.schedule, SCHEDULE_COSINE);
    assert_int_equal(s.publish, PUBLISH_MANUAL);
    assert_true(s.seed == (uint64_t)TRAIN_SEED_MAX);
    assert_non_null(train_setting_find("beta2"));
    assert_null(train_setting_find("other"));
}

static void ranges_are_kept(void **state)
{
    (void)state;
    refused("{\"steps\": 3, \"learning_rate\": -1}", "learning_rate: must be a number from 0 to 10");
    refused("{\"steps\": 1.5}", "steps: must be a whole number");
    refused("{\"steps\": -1}", "steps: must be");
    refused("{\"steps\": \"3\"}", "steps: must be");
    refused("{\"beta1\": 1}", "beta1: must be");
    refused("{\"batch_tokens\": 1}", "batch_tokens: must be a whole number from 2");
    refused("{\"schedule\": \"warm\"}", "schedule: 'warm' is none of constant|cosine|linear");
    refused("{\"schedule\": \"cos\"}", "schedule");
    refused("{\"schedule\": 1}", "schedule");
    refused("{\"seed\": -1}", "seed");
    refused("{\"seed\": 1.5}", "seed");
}

static void every_setting_goes_there_and_back(void **state)
{
    (void)state;
    struct train_settings s, back;
    struct strbuf text = {0};
    struct error err;
    train_settings_default(&s);
    s.steps = 12345;
    s.learning_rate = 1.0 / 3;
    s.eps = 1e-11;
    s.seed = (uint64_t)TRAIN_SEED_MAX - 1;
    s.loss = LOSS_PPO;
    s.reduction = REDUCTION_SUM;
    train_settings_write(&s, &text);
    train_settings_default(&back);
    assert_ok(read_text(text.data, &back, &err), err);
    assert_memory_equal(&s, &back, sizeof s);
    for (size_t i = 0; i < train_setting_count; i++) {
        char key[64];
        snprintf(key, sizeof key, "\"%s\":", train_setting_table[i].name);
        assert_non_null(strstr(text.data, key));
    }
    assert_true(train_setting_count <= TRAIN_SETTINGS_MAX);
    strbuf_release(&text);
}

static void texts_are_read_as_well(void **state)
{
    (void)state;
    static const char *const bad[][2] = {{"steps", ""},
                                         {"steps", "1x"},
                                         {"steps", "1e99"},
                                         {"eps", "nan"},
                                         {"seed", "-1"},
                                         {"seed", " 1"},
                                         {"seed", "9007199254740993"},
                                         {"loss", "x"},
                                         {"none", "1"}};
    struct train_settings s;
    struct error err;
    train_settings_default(&s);
    assert_ok(train_settings_set(&s, "warmup_steps", "7", &err), err);
    assert_ok(train_settings_set(&s, "eps", "1e-6", &err), err);
    assert_ok(train_settings_set(&s, "loss", "dpo", &err), err);
    assert_ok(train_settings_set(&s, "seed", "42", &err), err);
    assert_true(s.warmup_steps == 7 && s.eps == 1e-6 && s.loss == LOSS_DPO && s.seed == 42);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_refused(train_settings_set(&s, bad[i][0], bad[i][1], &err), ST_INVALID, err, bad[i][0]);
}

static void the_rate_warms_up_and_falls(void **state)
{
    (void)state;
    struct train_settings s;
    train_settings_default(&s);
    s.learning_rate = 1;
    assert_true(train_rate(&s, 1, 10) == 1 && train_rate(&s, 10, 10) == 1);
    s.warmup_steps = 4;
    assert_true(train_rate(&s, 1, 10) == 0.25 && train_rate(&s, 4, 10) == 1 && train_rate(&s, 5, 10) == 1);
    static const int falling[] = {SCHEDULE_LINEAR, SCHEDULE_COSINE};
    for (int k = 0; k < 2; k++) {
        s.schedule = falling[k];
        assert_true(train_rate(&s, 4, 10) == 1);
        for (int64_t step = 5; step <= 10; step++) {
            assert_true(train_rate(&s, step, 10) < train_rate(&s, step - 1, 10));
            assert_true(train_rate(&s, step, 10) > 0); /* the last step still moves */
        }
    }
    s.schedule = SCHEDULE_LINEAR;
    assert_float_equal(train_rate(&s, 10, 10), 1.0 / 7, 1e-12);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(requests_set_what_they_name),       cmocka_unit_test(ranges_are_kept),
        cmocka_unit_test(every_setting_goes_there_and_back), cmocka_unit_test(texts_are_read_as_well),
        cmocka_unit_test(the_rate_warms_up_and_falls),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Chat templates against what transformers renders from them (tests/fixtures/chat, make_chat.py). */
#include "engine/chat.h"

#include "base/json.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"

#include <stdio.h>
#include <stdlib.h>

#define MESSAGES_MAX 16

static char *read_template(const char *name, size_t *n)
{
    char file[128];
    snprintf(file, sizeof file, "chat/%s.jinja", name);
    return fixture_read(file, n);
}

static struct chat_template recognise(const char *source, size_t n)
{
    struct chat_template t;
    struct error err;
    if (chat_template_recognise(source, n, &t, &err)) fail_msg("%s", err.message);
    return t;
}

static struct chat_template recognise_fixture(const char *name)
{
    size_t n;
    char *source = read_template(name, &n);
    struct chat_template t;
    struct error err;
    if (chat_template_recognise(source, n, &t, &err)) fail_msg("%s: %s", name, err.message);
    free(source);
    return t;
}

/* --- the reference --- */

static cJSON *read_cases(void)
{
    size_t n;
    char *text = fixture_read("chat/cases.json", &n);
    cJSON *cases;
    struct error err;
    if (json_parse(text, n, &cases, &err)) fail_msg("%s", err.message);
    free(text);
    return cases;
}

static const char *string_of(const cJSON *object, const char *key)
{
    const char *text;
    assert_int_equal(json_get_string(object, key, &text, NULL), ST_OK);
    return text;
}

static size_t messages_of(const cJSON *conversation, struct chat_message *out)
{
    size_t count = 0;
    const cJSON *m;
    cJSON_ArrayForEach(m, conversation)
    {
        assert_true(count < MESSAGES_MAX);
        out[count++] = (struct chat_message){string_of(m, "role"), string_of(m, "content")};
    }
    return count;
}

/* What Jinja renders and we refuse: messages that the template drops, or writes into a place that no
 * conversation it was made for has. */
static const struct {
    const char *template, *conversation;
} refused[] = {
    {"llama-2-chat", "system-alone"},
    {"llama-2-chat", "system-answer-late"},
    {"llama-2-chat", "system-late"},
    {"llama-3.1", "system-late"},
    {"llama-3.1", "system-twice"},
    {"llama-3.1", "system-answer-late"},
    {"llama-3.2", "system-late"},
    {"llama-3.2", "system-twice"},
    {"llama-3.2", "system-answer-late"},
    {"mistral-system", "system-alone"},
    {"mistral-v0.3", "system-alone"},
    {"gemma", "system-late"},
    {"gemma-first", "system-late"},
    {"phi-3-first", "*"},
    {"phi-3-medium", "*"},
};

static bool may_refuse(const char *template, const char *conversation, const struct chat_message *messages,
                       size_t n)
{
    bool system = false;
    for (size_t i = 0; i < n; i++) system = system || strcmp(messages[i].role, "system") == 0;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        if (strcmp(refused[i].template, template) == 0 &&
            (strcmp(refused[i].conversation, conversation) == 0 ||
             (system && *refused[i].conversation == '*')))
            return true;
    return false;
}

static bool check_case(const cJSON *all, const cJSON *c)
{
    const char *name = string_of(c, "template"), *conversation = string_of(c, "conversation"),
               *expected = NULL;
    struct chat_message messages[MESSAGES_MAX];
    size_t count = messages_of(json_get(json_get(all, "conversations"), conversation), messages);
    const cJSON *tokens = json_get(json_get(all, "tokens"), name);
    struct chat_options options = {.today = string_of(all, "today"),
                                   .bos = cJSON_GetArrayItem(tokens, 0)->valuestring,
                                   .eos = cJSON_GetArrayItem(tokens, 1)->valuestring};
    (void)json_get_bool(c, "add_generation_prompt", &options.add_generation_prompt, NULL);
    (void)json_get_bool(c, "continue_final_message", &options.continue_final_message, NULL);
    (void)json_get_string(c, "expected", &expected, NULL);

    struct chat_template t = recognise_fixture(name);
    struct strbuf out = {0};
    struct error err = {0};
    enum status st = chat_render(&t, messages, count, &options, &out, &err);
    bool right = st == ST_INVALID
                     ? !expected || may_refuse(name, conversation, messages, count)
                     : st == ST_OK && expected && strcmp(expected, out.data ? out.data : "") == 0;
    if (!right)
        print_message("%s, %s%s%s: %s %s\n  is '%s'\nnot '%s'\n", name, conversation,
                      options.add_generation_prompt ? ", generation" : "",
                      options.continue_final_message ? ", continued" : "", status_text(st), err.message,
                      out.data ? out.data : "", expected ? expected : "(refused)");
    strbuf_release(&out);
    chat_template_release(&t);
    return right;
}

static void test_prompts_equal_the_reference(void **state)
{
    (void)state;
    cJSON *all = read_cases();
    int wrong = 0, count = 0;
    const cJSON *c;
    cJSON_ArrayForEach(c, json_get(all, "cases"))
    {
        wrong += !check_case(all, c);
        count++;
    }
    cJSON_Delete(all);
    assert_true(count > 500);
    assert_int_equal(wrong, 0);
}

/* --- recognition --- */

static void test_families_and_default_systems(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        enum chat_family family;
        const char *default_system;
    } expected[] = {
        {"chatml-openhermes", CHAT_CHATML, NULL},
        {"chatml-yi", CHAT_CHATML, NULL},
        {"chatml-smollm2", CHAT_CHATML,
         "You are a helpful AI assistant named SmolLM, trained by Hugging Face"},
        {"chatml-qwen2", CHAT_CHATML, "You are a helpful assistant."},
        {"chatml-qwen2.5", CHAT_CHATML,
         "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
        {"llama-2-chat", CHAT_LLAMA2, NULL},
        {"llama-3", CHAT_LLAMA3, NULL},
        {"llama-3.1", CHAT_LLAMA3, ""},
        {"mistral-v0.3", CHAT_MISTRAL, NULL},
        {"gemma", CHAT_GEMMA, NULL},
        {"phi-3-mini", CHAT_PHI3, NULL},
        {"zephyr", CHAT_ZEPHYR, NULL},
    };
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        struct chat_template t = recognise_fixture(expected[i].name);
        assert_int_equal(t.family, expected[i].family);
        if (expected[i].default_system)
            assert_string_equal(t.default_system, expected[i].default_system);
        else
            assert_null(t.default_system);
        chat_template_release(&t);
    }
}

static void test_bare_names(void **state)
{
    (void)state;
    static const char *const names[] = {"chatml", "llama-2", "llama-3", "mistral",
                                        "gemma",  "phi-3",   "zephyr"};
    assert_int_equal(sizeof names / sizeof *names, CHAT_FAMILY_COUNT);
    for (int f = 0; f < CHAT_FAMILY_COUNT; f++) {
        struct chat_template t = recognise(names[f], strlen(names[f]));
        assert_int_equal(t.family, f);
        chat_template_release(&t);
    }
}

/* text with every `from` replaced by `to`; the caller frees. */
static char *replaced(const char *text, size_t n, const char *from, const char *to, size_t *size_out)
{
    struct strbuf b = {0};
    for (size_t i = 0; i < n;) {
        bool here = n - i >= strlen(from) && memcmp(text + i, from, strlen(from)) == 0;
        if (here)
            strbuf_puts(&b, to);
        else
            strbuf_putc(&b, text[i]);
        i += here ? strlen(from) : 1;
    }
    *size_out = b.size;
    char *result = strbuf_take(&b);
    assert_non_null(result);
    return result;
}

static bool is_recognised(const char *name, const char *from, const char *to)
{
    size_t n, size;
    char *source = read_template(name, &n);
    char *changed = replaced(source, n, from, to, &size);
    assert_true(size != n || memcmp(source, changed, n) != 0); /* it is there to be replaced */
    struct chat_template t;
    struct error err;
    enum status st = chat_template_recognise(changed, size, &t, &err);
    assert_true(st == ST_OK || st == ST_UNSUPPORTED);
    if (st)
        assert_non_null(strstr(err.message, "chatml, llama-2"));
    else
        chat_template_release(&t);
    free(source);
    free(changed);
    return st == ST_OK;
}

static void test_what_makes_no_difference(void **state)
{
    (void)state;
    assert_true(is_recognised("chatml-smollm2", "message['role']", "message.role"));
    assert_true(is_recognised("chatml-smollm2", "message['role']", "message [ \"role\" ]"));
    assert_true(is_recognised("chatml-smollm2", "{% for", "{%-  for"));
    assert_true(is_recognised("chatml-smollm2", "\\n", "\n"));
    assert_true(is_recognised("chatml-smollm2", "%}{", "%}\n    {#- so #}\n{%- endif %}{") == false);
    assert_true(is_recognised("chatml-smollm2", "{% endif %}", "\n{%- endif %}"));
    assert_true(is_recognised("chatml-smollm2", "{% endfor %}", "{# said by\nall #}{% endfor %}"));
    assert_true(is_recognised("chatml-smollm2", "{% endfor %}", "{% endfor %}\n"));
    assert_true(is_recognised("zephyr", "\n{% endif %}", "\n  {% endif %}"));
    assert_true(is_recognised("chatml-qwen2.5",
                              "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "Hi."));
}

static void test_what_makes_a_difference(void **state)
{
    (void)state;
    assert_false(is_recognised("chatml-smollm2", "'<|im_end|>' + '\\n'", "'<|im_end|>'"));
    assert_false(is_recognised("chatml-smollm2", "message['content']", "message['content'] | trim"));
    assert_false(is_recognised("chatml-smollm2", "!= 'system'", "== 'system'"));
    assert_false(is_recognised("chatml-smollm2", "{% endfor %}", " {% endfor %}"));
    assert_false(is_recognised("chatml-smollm2", "{% endfor %}", "\n{% endfor %}"));
    assert_false(is_recognised("chatml-smollm2", "\\n", "\\x0a"));
    assert_false(is_recognised("chatml-qwen2.5", "'You are Qwen, created by", "'I am Qwen, created by"));
    assert_false(is_recognised("mistral-v0.2", "' [/INST]'", "'[/INST]'"));
    assert_false(is_recognised("llama-2-chat", "bos_token", "eos_token"));
}

static void test_no_templates(void **state)
{
    (void)state;
    static const char *const texts[] = {
        "",     "vicuna",   "chatml ", "{{",      "{%",       "{#",
        "{{ '", "{{ '\\",   "{{ x[",   "{{ x['a", "{{ x['a'", "{% for m in messages %}{{ m }}{% endfor %}",
        "}}",   "{{ 'a' }", "[\"a\"]"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        struct chat_template t;
        struct error err = {0};
        assert_int_equal(chat_template_recognise(texts[i], strlen(texts[i]), &t, &err), ST_UNSUPPORTED);
        assert_non_null(strstr(err.message, "zephyr"));
    }
    struct chat_template t;
    assert_int_equal(chat_template_recognise("{{ a\0 }}", 8, &t, NULL), ST_UNSUPPORTED);
}

/* Cut anywhere, a template is another one, or none. */
static void test_cut_templates(void **state)
{
    (void)state;
    static const char *const names[] = {"chatml-smollm2", "zephyr", "llama-3.1"};
    for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
        size_t n;
        char *source = read_template(names[k], &n);
        while (n > 0 && (source[n - 1] == '\n' || source[n - 1] == ' ')) n--;
        for (size_t size = 0; size < n; size++) {
            char *cut = malloc(size + !size); /* of that size, so that a sanitizer sees a read beyond it */
            assert_non_null(cut);
            memcpy(cut, source, size);
            struct chat_template t;
            assert_int_equal(chat_template_recognise(cut, size, &t, NULL), ST_UNSUPPORTED);
            free(cut);
        }
        free(source);
    }
}

/* --- requests --- */

static void assert_render_refused(const char *name, const struct chat_message *messages, size_t count,
                                  struct chat_options options, const char *reason)
{
    struct chat_template t = recognise(name, strlen(name));
    struct strbuf out = {0};
    struct error err = {0};
    strbuf_puts(&out, "before");
    assert_refused(chat_render(&t, messages, count, &options, &out, &err), ST_INVALID, err, reason);
    assert_string_equal(out.data, "before");
    strbuf_release(&out);
    chat_template_release(&t);
}

static void test_refusals_say_why(void **state)
{
    (void)state;
    const struct chat_message user = {"user", "Hi"}, system = {"system", "Be."}, tool = {"tool", "1"},
                              bot = {"assistant", "?"};
    const struct chat_options none = {0};
    assert_render_refused("chatml", &user, 0, none, "there are none");
    assert_render_refused("chatml", &tool, 1, none, "message 0: role 'tool'");
    assert_render_refused(
        "chatml", &user, 1,
        (struct chat_options){.add_generation_prompt = true, .continue_final_message = true},
        "exclude each other");
    assert_render_refused("gemma", (struct chat_message[]){system, user}, 2, none, "no system messages");
    assert_render_refused("llama-2", (struct chat_message[]){user, system}, 2, none, "only as the first");
    assert_render_refused("llama-2", (struct chat_message[]){user, user}, 2, none,
                          "message 1: role is 'user'");
    assert_render_refused("llama-2", &bot, 1, none, "message 0: role is 'assistant'");
    assert_render_refused("llama-2", &system, 1, none, "needs a user message");
}

static void test_without_bos_and_eos(void **state)
{
    (void)state;
    const struct chat_message messages[] = {{"user", "Hi"}, {"assistant", "Ho"}};
    struct chat_template t = recognise("llama-2", 7);
    struct strbuf out = {0};
    assert_int_equal(chat_render(&t, messages, 2, &(struct chat_options){0}, &out, NULL), ST_OK);
    assert_string_equal(out.data, "[INST] Hi [/INST] Ho ");
    strbuf_release(&out);
    chat_template_release(&t);
}

static void test_the_date_of_today(void **state)
{
    (void)state;
    const struct chat_message user = {"user", "Hi"};
    struct chat_template t = recognise_fixture("llama-3.2");
    struct strbuf out = {0};
    assert_int_equal(chat_render(&t, &user, 1, &(struct chat_options){0}, &out, NULL), ST_OK);
    const char *date = strstr(out.data, "Today Date: ");
    int day, year, end = 0;
    char month[4];
    assert_non_null(date);
    assert_int_equal(sscanf(date, "Today Date: %2d %3[A-Z a-z] %4d\n\n%n", &day, month, &year, &end), 3);
    assert_true(end == 25 && day >= 1 && day <= 31 && year >= 2024);
    strbuf_release(&out);
    chat_template_release(&t);
}

/* A template and a prompt, of which nothing stays. */
static enum status render_once(void *ctx)
{
    static const struct chat_message messages[] = {{"system", "Be."}, {"user", "Hi"}};
    const char *source = ctx;
    struct chat_template t = {0};
    struct strbuf out = {0};
    enum status st = chat_template_recognise(source, strlen(source), &t, NULL);
    if (!st) st = chat_render(&t, messages, 2, &(struct chat_options){0}, &out, NULL);
    strbuf_release(&out);
    chat_template_release(&t);
    return st;
}

static void test_out_of_memory(void **state)
{
    (void)state;
    if (!alloc_fail_available()) skip();
    static const char *const names[] = {"chatml-qwen2.5", "llama-2-chat", "llama-3.2"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        size_t n;
        char *source = read_template(names[i], &n);
        char *text = strndup(source, n);
        assert_true(alloc_fail_sweep(render_once, text) > 5);
        free(text);
        free(source);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_prompts_equal_the_reference),
        cmocka_unit_test(test_families_and_default_systems),
        cmocka_unit_test(test_bare_names),
        cmocka_unit_test(test_what_makes_no_difference),
        cmocka_unit_test(test_what_makes_a_difference),
        cmocka_unit_test(test_no_templates),
        cmocka_unit_test(test_cut_templates),
        cmocka_unit_test(test_refusals_say_why),
        cmocka_unit_test(test_without_bos_and_eos),
        cmocka_unit_test(test_the_date_of_today),
        cmocka_unit_test(test_out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#include "tests/support/cases.h"

#include "base/file.h"
#include "base/json.h"
#include "base/safetensors.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void must(enum status st, const struct error *err)
{
    if (st) fail_msg("%s: %s", status_text(st), err->message);
}

static struct file_map map_fixture(const char *folder, const char *name, const char *file)
{
    struct test_path part = test_path("%s/%s%s", folder, name, file), path = fixture_path(part.text);
    struct file_map m;
    struct error err;
    must(file_map(path.text, &m, &err), &err);
    return m;
}

static const struct lr_adapter *adapter_find(struct case_book *b, const char *name)
{
    for (int i = 0; i < b->adapter_count; i++)
        if (!strcmp(b->adapters[i].name, name)) return &b->adapters[i].packed->lr;

    assert_true(b->adapter_count < CASES_MAX);
    struct case_adapter *a = &b->adapters[b->adapter_count++];
    snprintf(a->name, sizeof a->name, "%s", name);
    bool gguf = !strncmp(name, "gguf", 4); /* one file, without a configuration */
    struct file_map config = {0};
    if (!gguf) config = map_fixture(b->adapter_folder, name, "/adapter_config.json");
    struct file_map tensors =
        map_fixture(b->adapter_folder, name, gguf ? "/adapter.gguf" : "/adapter_model.safetensors");
    struct adapter_base base = adapter_base_of(b->teacher.model);
    struct adapter_bundle *bundle;
    struct error err;
    must(adapter_read(config.data, config.size, tensors.data, tensors.size, &base, &bundle, &err), &err);
    must(adapter_pack(bundle, b->teacher.model->device, &a->packed, &err), &err);
    adapter_bundle_free(bundle);
    file_unmap(&tensors);
    file_unmap(&config);
    return &a->packed->lr;
}

static void case_read(struct case_book *b, const cJSON *json, const struct safetensors *logits)
{
    assert_true(b->case_count < CASES_MAX);
    struct logit_case *c = &b->cases[b->case_count++];
    const char *name;
    assert_int_equal(json_get_string(json, "name", &name, NULL), ST_OK);
    snprintf(c->name, sizeof c->name, "%s", name);

    const cJSON *item;
    cJSON_ArrayForEach(item, json_get(json, "prompt"))
    {
        assert_true(c->count < CASE_TOKENS_MAX);
        c->tokens[c->count++] = item->valueint;
    }
    cJSON_ArrayForEach(item, json_get(json, "set"))
    {
        assert_true(c->member_count < CASE_SET_MAX);
        const char *adapter;
        double weight;
        assert_int_equal(json_get_string(item, "adapter", &adapter, NULL), ST_OK);
        assert_int_equal(json_get_f64(item, "weight", -10, 10, &weight, NULL), ST_OK);
        c->members[c->member_count++] = (struct lr_member){adapter_find(b, adapter), (float)weight};
    }
    /* Where absent they stay 0. */
    (void)json_get_f64(json, "flip_effect", 0, 1e9, &c->flip_effect, NULL);
    (void)json_get_f64(json, "router_gap", 0, 1, &c->router_gap, NULL);

    const struct safetensor *t = safetensors_find(logits, c->name);
    assert_non_null(t);
    assert_int_equal(t->type, DTYPE_F32);
    assert_int_equal(t->bytes, (size_t)c->count * b->teacher.model->shape.vocab * sizeof *c->expected);
    c->expected = malloc(t->bytes);
    assert_non_null(c->expected);
    memcpy(c->expected, t->data, t->bytes);
}

static void book_open(struct case_book *b, const char *model, const char *adapters, const char *answers,
                      struct device *device, enum dtype kv_type)
{
    *b = (struct case_book){.adapter_folder = adapters};
    struct test_path file = test_path("models/%s.gguf", model), path = fixture_path(file.text);
    struct error err;
    must(teacher_open(path.text, device, CASES_MAX * CASE_TOKENS_MAX, kv_type, &b->teacher, &err), &err);

    struct file_map text = map_fixture(answers, "cases", ".json");
    struct file_map tensors = map_fixture(answers, model, ".safetensors");
    struct safetensors *logits;
    cJSON *json;
    must(json_parse(text.data, text.size, &json, &err), &err);
    must(safetensors_parse(tensors.data, tensors.size, &logits, &err), &err);
    const cJSON *item;
    cJSON_ArrayForEach(item, json_get(json, "cases"))
    {
        const char *of;
        assert_int_equal(json_get_string(item, "model", &of, NULL), ST_OK);
        if (!strcmp(of, model)) case_read(b, item, logits);
    }
    assert_true(b->case_count > 0);
    cJSON_Delete(json);
    safetensors_free(logits);
    file_unmap(&tensors);
    file_unmap(&text);
}

void case_book_open(struct case_book *b, const char *model, struct device *device, enum dtype kv_type)
{
    book_open(b, model, "adapters", "logits", device, kv_type);
}

void case_book_open_formats(struct case_book *b, const char *model, struct device *device, enum dtype kv_type)
{
    book_open(b, model, "formats", "formats", device, kv_type);
}

void case_book_close(struct case_book *b)
{
    for (int i = 0; i < b->case_count; i++) free(b->cases[i].expected);
    for (int i = 0; i < b->adapter_count; i++) packed_adapter_free(b->adapters[i].packed);
    teacher_close(&b->teacher);
}

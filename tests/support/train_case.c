#include "tests/support/train_case.h"

#include "base/json.h"
#include "tests/support/check.h"
#include "tests/support/teacher.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct pass_batch pass_batch_of(const struct case_batch *b)
{
    return (struct pass_batch){.rows = b->rows,
                               .seq_count = b->seq_count,
                               .first_row = b->first_row,
                               .token = b->token,
                               .target = b->target,
                               .weight = b->weight};
}

static struct file_map map_fixture(const char *folder, const char *name)
{
    struct test_path part = test_path("%s/%s", folder, name), path = fixture_path(part.text);
    struct file_map m;
    struct error err;
    assert_ok(file_map(path.text, &m, &err), err);
    return m;
}

/* --- from JSON --- */

static double number(const cJSON *json, const char *key)
{
    const cJSON *item = json_get(json, key);
    if (!cJSON_IsNumber(item)) fail_msg("training fixtures: '%s' is missing", key);
    return item->valuedouble;
}

static void text(const cJSON *json, const char *key, const char *fmt, char *out, size_t size)
{
    const char *s;
    assert_int_equal(json_get_string(json, key, &s, NULL), ST_OK);
    int n = snprintf(out, size, fmt, s);
    assert_in_range(n, 1, size - 1);
}

/* One number, or one a step; returns how many. */
static int numbers(const cJSON *json, const char *key, double *out)
{
    const cJSON *item = json_get(json, key);
    if (!cJSON_IsArray(item)) {
        out[0] = number(json, key);
        return 1;
    }
    int count = cJSON_GetArraySize(item);
    assert_in_range(count, 1, TRAIN_STEPS_MAX);
    for (int i = 0; i < count; i++) out[i] = cJSON_GetArrayItem(item, i)->valuedouble;
    return count;
}

static void batch_read(const cJSON *json, struct case_batch *b)
{
    const cJSON *sequence, *item;
    cJSON_ArrayForEach(sequence, json_get(json, "sequences"))
    {
        assert_true(b->seq_count < TRAIN_SEQS_MAX);
        b->first_row[b->seq_count++] = b->rows;
        cJSON_ArrayForEach(item, sequence)
        {
            assert_true(b->rows < TRAIN_ROWS_MAX);
            b->target[b->rows] = item->next ? item->next->valueint : -1;
            b->token[b->rows++] = item->valueint;
        }
    }
    b->first_row[b->seq_count] = b->rows;
    int row = 0;
    cJSON_ArrayForEach(item, json_get(json, "weights")) b->weight[row++] = (float)item->valuedouble;
    assert_int_equal(row, b->rows);
}

static void case_read(const cJSON *json, struct train_case *c)
{
    *c = (struct train_case){0};
    text(json, "name", "%s", c->name, sizeof c->name);
    text(json, "model", "models/%s.gguf", c->model, sizeof c->model);
    text(json, "adapter", "%s", c->adapter, sizeof c->adapter);
    const cJSON *batches = json_get(json, "batches"), *item;
    if (!batches) batch_read(json, &c->batch[c->batch_count++]);
    cJSON_ArrayForEach(item, batches)
    {
        assert_true(c->batch_count < TRAIN_BATCHES_MAX);
        batch_read(item, &c->batch[c->batch_count++]);
    }
    c->loss = (struct pass_loss){.balance = number(json, "balance"),
                                 .contrast = number(json, "contrast"),
                                 .temperature = number(json, "temperature"),
                                 .pairs = (int)number(json, "pairs")};
    c->auxiliary = c->loss.pairs > 0;
    if (batches) {
        c->rate = number(json, "rate");
        c->clip = number(json, "clip");
        c->warmup = (int)number(json, "warmup");
        numbers(json, "norm", c->norm);
    } else {
        c->loss.seed = (uint64_t)number(json, "seed");
        c->similarity = number(json, "similarity");
        c->cohesion = number(json, "cohesion");
    }
    c->step_count = numbers(json, "ce", c->ce);
    assert_int_equal(numbers(json, "balance_loss", c->balance), c->step_count);
    assert_int_equal(numbers(json, "contrast_loss", c->contrast), c->step_count);
}

int train_cases_read(const char *file, struct train_case out[TRAIN_CASES_MAX])
{
    struct test_path name = test_path("%s.json", file);
    struct file_map bytes = map_fixture("training", name.text);
    cJSON *json;
    struct error err;
    assert_ok(json_parse(bytes.data, bytes.size, &json, &err), err);
    int count = 0;
    const cJSON *item;
    cJSON_ArrayForEach(item, json_get(json, file))
    {
        assert_true(count < TRAIN_CASES_MAX);
        case_read(item, &out[count++]);
    }
    assert_true(count > 0);
    cJSON_Delete(json);
    file_unmap(&bytes);
    return count;
}

/* --- a model with an adapter --- */

struct train_rig train_rig_open(const struct train_case *c, enum cpu_level level, int threads)
{
    /* Batches are cut into tiles of 11 rows. */
    struct engine_config config = {.kv_type = DTYPE_F32, .max_batch = 2, .prefill_chunk = 9, .no_prefix_cache = true};
    struct train_rig r = {.rig = rig_open_at(c->model, level, threads, config)};
    struct test_path folder = test_path("adapters/%s", c->adapter);
    r.config = map_fixture(folder.text, "adapter_config.json");
    r.tensors = map_fixture(folder.text, "adapter_model.safetensors");
    struct adapter_base base = adapter_base_of(engine_model(r.rig.engine));
    struct error err;
    assert_ok(
        adapter_read(r.config.data, r.config.size, r.tensors.data, r.tensors.size, &base, &r.bundle, &err),
        err);
    assert_ok(transposed_open(r.rig.engine, &r.transposed, &err), err);
    assert_ok(params_open(r.rig.device, r.bundle, &r.params, &err), err);
    assert_ok(pass_open(r.rig.engine, r.transposed, r.params, TRAIN_ROWS_MAX, TRAIN_ROWS_MAX, TRAIN_KEEP_BYTES,
                        &r.pass),
              err);
    return r;
}

void train_rig_close(struct train_rig *r)
{
    pass_close(r->pass);
    params_close(r->params);
    transposed_close(r->transposed);
    adapter_bundle_free(r->bundle);
    file_unmap(&r->tensors);
    file_unmap(&r->config);
    rig_close(&r->rig);
}

float *train_rig_read(const struct train_rig *r, const float *vector)
{
    size_t bytes = r->params->count * sizeof *vector;
    float *out = malloc(bytes);
    assert_non_null(out);
    r->rig.device->ops->read(r->rig.device, out, vector, bytes);
    return out;
}

void train_rig_write(const struct train_rig *r, float *vector, const float *from)
{
    r->rig.device->ops->write(r->rig.device, vector, from, r->params->count * sizeof *vector);
}

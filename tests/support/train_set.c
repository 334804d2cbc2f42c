#include "tests/support/train_set.h"

#include "tests/support/check.h"
#include "tests/support/teacher.h"

#include <stdlib.h>

void train_set_text(struct strbuf *out)
{
    for (int i = 0; i < TRAIN_SET_EXAMPLES; i++)
        strbuf_printf(out, "{\"tokens\": [1, %d, 9, %d, %d, 2], \"weights\": [0, 0, 0, 1, 1, 1]}\n", 20 + i,
                      100 + 3 * i, 200 + i % 5);
}

void train_set_pairs(struct strbuf *out)
{
    for (int i = 0; i < TRAIN_SET_EXAMPLES; i++)
        strbuf_printf(out, "{\"prompt\": \"%c is\", \"chosen\": \" yes %c\", \"rejected\": \" no\"}\n",
                      'a' + i, 'A' + i);
}

static struct dataset *read_set(const struct train_set *s, void (*text_of)(struct strbuf *),
                                enum train_loss loss)
{
    const struct dataset_rules rules = {.tokenizer = engine_tokenizer(s->rig.engine),
                                        .context_length = engine_shape(s->rig.engine)->context_length,
                                        .batch_tokens = 64,
                                        .loss = loss,
                                        .name = "examples"};
    struct strbuf text = {0};
    struct dataset *d;
    struct error err;
    text_of(&text);
    assert_ok(dataset_read_bytes(&rules, text.data, text.size, &d, &err), err);
    strbuf_release(&text);
    return d;
}

void train_set_open(struct train_set *s, const char *model, int experts, float alpha)
{
    struct error err;
    struct fresh_adapter f = {
        .rank = 4, .experts = experts, .top_k = 2, .rule = GATE_TOPK, .alpha = alpha, .seed = 3};
    *s = (struct train_set){.rig = rig_open_at(test_path("models/%s", model).text, CPU_LEVEL_BEST, 2,
                                               (struct engine_config){.kv_bytes = 1 << 20})};
    for (int p = 0; p < PROJ_COUNT; p++) f.target[p] = true;
    train_set_base(s->rig.engine, &s->base);
    assert_ok(bundle_fresh(&f, &s->base, &s->bundle, &err), err);
    assert_ok(transposed_open(s->rig.engine, &s->transposed, &err), err);
    s->examples = read_set(s, train_set_text, LOSS_CROSS_ENTROPY);
    s->pairs = read_set(s, train_set_pairs, LOSS_DPO);
}

void train_set_close(struct train_set *s)
{
    dataset_free(s->examples);
    dataset_free(s->pairs);
    adapter_bundle_free(s->bundle);
    transposed_close(s->transposed);
    rig_close(&s->rig);
}

void train_set_base(const struct engine *e, struct adapter_base *out)
{
    *out = adapter_base_of(engine_model(e));
}

struct train_settings train_set_settings(void)
{
    struct train_settings s;
    train_settings_default(&s);
    s.steps = 8;
    s.batch_tokens = 64;
    s.learning_rate = 5e-3;
    s.contrast_pairs = 16;
    return s;
}

struct trainer_config train_set_config(const struct train_set *s, const struct train_settings *settings)
{
    return (struct trainer_config){.engine = s->rig.engine,
                                   .device = s->rig.device,
                                   .transposed = s->transposed,
                                   .bundle = s->bundle,
                                   .examples = settings->loss == LOSS_DPO ? s->pairs : s->examples,
                                   .settings = *settings,
                                   .identity = "a test"};
}

float *train_set_values(struct trainer *t, const struct train_set *s, size_t *count_out)
{
    const struct params *p = trainer_params(t);
    float *out = malloc(p->count * sizeof *out);
    struct engine_turn *turn;
    assert_non_null(out);
    assert_int_equal(engine_turn_open(s->rig.engine, &turn), ST_OK);
    assert_int_equal(engine_turn_begin(turn), ST_OK);
    s->rig.device->ops->read(s->rig.device, out, p->value, p->count * sizeof *out);
    engine_turn_end(turn);
    engine_turn_close(turn);
    *count_out = p->count;
    return out;
}

/* Damaged examples: those that are accepted must keep what dataset.h promises of them. */
#include "engine/chat.h"
#include "tests/support/fixture.h"
#include "tests/support/fuzz.h"
#include "training/batch.h"
#include "training/dataset.h"

#include <stdlib.h>
#include <string.h>

#define CONTEXT 200
#define BATCH   150

static struct tokenizer *tokenizer;
static struct chat_template chat;

static void check_sequence(const struct dataset *d, const struct dataset_sequence *s)
{
    float weights[CONTEXT];
    int counted = 0, weighing = 0;
    CHECK(s->count >= 2 && s->count <= CONTEXT);
    for (int i = 0; i < s->run_count; i++) counted += d->run[s->first_run + (size_t)i].count;
    CHECK(counted == s->count);
    dataset_weights(d, s, weights);
    for (int i = 0; i < s->count; i++) {
        CHECK(weights[i] >= 0 && (double)weights[i] <= DATASET_WEIGHT_MAX);
        CHECK((size_t)d->token[s->first + (size_t)i] < tokenizer_vocab_size(tokenizer));
        weighing += i > 0 && weights[i] > 0;
    }
    CHECK(weighing > 0);
}

static void check_batches(const struct dataset *d)
{
    struct batch_plan plan;
    struct train_batch batch = {0};
    size_t count;
    double epoch;
    CHECK(batch_plan_init(&plan, d, 1, 0.2, BATCH) == ST_OK);
    for (int64_t step = 0; step < batch_plan_steps(&plan, 1); step++) {
        const uint32_t *examples = batch_plan_step(&plan, step, &count, &epoch);
        CHECK(train_batch_fill(&batch, d, examples, count) == ST_OK);
        CHECK(batch.pass.rows <= BATCH && batch.weight_sum > 0);
    }
    train_batch_release(&batch);
    batch_plan_release(&plan);
}

static enum status read_examples(const struct mutate_source *source, const uint8_t *data, size_t size,
                                 struct error *err)
{
    const enum train_loss *loss = source->context;
    struct dataset *d;
    const struct dataset_rules rules = {.tokenizer = tokenizer,
                                        .chat = &chat,
                                        .context_length = CONTEXT,
                                        .batch_tokens = BATCH,
                                        .loss = *loss,
                                        .name = "examples"};
    enum status st = dataset_read_bytes(&rules, (const char *)data, size, &d, err);
    if (st) return st;
    CHECK(d->example_count > 0 && d->sequence_count == d->example_count * (size_t)d->sequences_each);
    for (size_t i = 0; i < d->sequence_count; i++) check_sequence(d, &d->sequence[i]);
    check_batches(d);
    dataset_free(d);
    return ST_OK;
}

int main(int argc, char **argv)
{
    static const char completion[] = "{\"prompt\": \"2 + 2 =\", \"completion\": \" 4\"}";
    static const char text[] = "{\"text\": \"Once upon a time\", \"id\": 1}\n\n";
    static const char messages[] = "{\"messages\": [{\"role\": \"system\", \"content\": \"Be brief.\"}, "
                                   "{\"role\": \"user\", \"content\": \"Hi\"}, "
                                   "{\"role\": \"assistant\", \"content\": \"Hello\", \"weight\": 1}]}\n";
    static const char tokens[] =
        "{\"tokens\": [5, 6, 7, 1200], \"weights\": [0, 1, 0.5, 2]}\n{\"tokens\": [1, 2]}";
    static const char pairs[] = "{\"prompt\": \"Q\", \"chosen\": \"yes\", \"rejected\": \"no\"}\n"
                                "{\"messages\": [{\"role\": \"user\", \"content\": \"Q\"}], \"chosen\": "
                                "\"a\", \"rejected\": \"b\"}\n";
    static const char sampled[] =
        "{\"tokens\": [5, 6, 7], \"logprobs\": [null, -0.5, -1], \"advantages\": [0, 2, -3]}\n";
    static const char *const words[] = {"\n",
                                        "{\"text\": \"a b c\"}\n",
                                        "\"weights\"",
                                        "\"prompt\"",
                                        "null",
                                        "1e999",
                                        "-1",
                                        "[",
                                        "]",
                                        "\\u0000",
                                        "<|im_start|>",
                                        "<|im_end|>",
                                        "\"assistant\"",
                                        "99999"};
    static const enum train_loss losses[] = {LOSS_CROSS_ENTROPY, LOSS_DPO, LOSS_PPO};
#define SOURCE(text, loss)                                                                  \
    {                                                                                       \
#text, text, sizeof text - 1, 0, words, sizeof words / sizeof *words, &losses[loss] \
    }
    const struct mutate_source sources[] = {SOURCE(completion, 0), SOURCE(text, 0),  SOURCE(messages, 0),
                                            SOURCE(tokens, 0),     SOURCE(pairs, 1), SOURCE(sampled, 2)};
    size_t n;
    struct gguf *g = NULL;
    struct error err;
    void *bytes = fixture_read("tokenizer/bpe-smollm.gguf", &n);
    CHECK(gguf_parse(bytes, n, &g, &err) == ST_OK);
    CHECK(tokenizer_open(g, &tokenizer, &err) == ST_OK);
    CHECK(chat_template_recognise("chatml", 6, &chat, &err) == ST_OK);
    int failed = fuzz_main(argc, argv, sources, sizeof sources / sizeof *sources, read_examples);
    chat_template_release(&chat);
    tokenizer_close(tokenizer);
    gguf_free(g);
    free(bytes);
    return failed;
}

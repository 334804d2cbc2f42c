/* Examples: what each form becomes, and what each mistake is told. And the batches made of them. */
#include "base/file.h"
#include "tests/support/alloc_fail.h"
#include "tests/support/check.h"
#include "tests/support/fixture.h"
#include "tests/support/temp_folder.h"
#include "training/batch.h"
#include "training/dataset.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* --- a model's tokenizer and template --- */

struct vocabulary {
    void *bytes;
    struct gguf *gguf;
    struct tokenizer *tokenizer;
    struct chat_template chat;
};

static struct vocabulary vocabulary;

static void open_vocabulary(struct vocabulary *v, const char *file, const char *family)
{
    size_t n;
    struct error err;
    v->bytes = fixture_read(file, &n);
    assert_ok(gguf_parse(v->bytes, n, &v->gguf, &err), err);
    assert_ok(tokenizer_open(v->gguf, &v->tokenizer, &err), err);
    assert_ok(chat_template_recognise(family, strlen(family), &v->chat, &err), err);
}

static void close_vocabulary(struct vocabulary *v)
{
    chat_template_release(&v->chat);
    tokenizer_close(v->tokenizer);
    gguf_free(v->gguf);
    free(v->bytes);
}

static int setup(void **state)
{
    (void)state;
    open_vocabulary(&vocabulary, "tokenizer/bpe-smollm.gguf", "chatml");
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    close_vocabulary(&vocabulary);
    return 0;
}

static struct dataset_rules rules_of(const struct vocabulary *v)
{
    return (struct dataset_rules){.tokenizer = v->tokenizer,
                                  .chat = &v->chat,
                                  .context_length = 512,
                                  .batch_tokens = 2048,
                                  .name = "examples"};
}

static struct dataset_rules rules(void) { return rules_of(&vocabulary); }

static struct dataset *read_text(const struct dataset_rules *r, const char *text)
{
    struct dataset *d = NULL;
    struct error err;
    assert_ok(dataset_read_bytes(r, text, strlen(text), &d, &err), err);
    return d;
}

static void refused_by(const struct dataset_rules *r, const char *text, const char *message)
{
    struct dataset *d = NULL;
    struct error err = {0};
    enum status st = dataset_read_bytes(r, text, strlen(text), &d, &err);
    assert_refused(st, ST_INVALID, err, message);
    assert_null(d);
}

static void refused(const char *text, const char *message)
{
    const struct dataset_rules r = rules();
    refused_by(&r, text, message);
}

/* The text of those tokens of a sequence that weigh `weight`. */
static char *weighing(const struct vocabulary *v, const struct dataset *d, size_t sequence, float weight)
{
    const struct dataset_sequence *s = &d->sequence[sequence];
    float *weights = calloc((size_t)s->count, sizeof *weights);
    struct strbuf text = {0};
    assert_non_null(weights);
    dataset_weights(d, s, weights);
    strbuf_puts(&text, "");
    for (int i = 0; i < s->count; i++)
        if (weights[i] == weight)
            assert_int_equal(tokenizer_decode(v->tokenizer, d->token + s->first + i, 1, 0, &text), ST_OK);
    free(weights);
    return strbuf_take(&text);
}

static void assert_split(const struct vocabulary *v, const struct dataset *d, size_t sequence,
                         const char *zero, const char *one)
{
    char *z = weighing(v, d, sequence, 0), *o = weighing(v, d, sequence, 1);
    assert_string_equal(z, zero);
    assert_string_equal(o, one);
    free(z);
    free(o);
}

static const char *eos_text(const struct vocabulary *v)
{
    static char text[64];
    size_t size;
    const char *piece = tokenizer_piece(v->tokenizer, tokenizer_eos(v->tokenizer), 0, false, &size);
    snprintf(text, sizeof text, "%.*s", (int)size, piece);
    return text;
}

/* --- forms --- */

static void a_completion_weighs_with_its_end(void **state)
{
    (void)state;
    const struct dataset_rules r = rules();
    struct dataset *d = read_text(&r, "{\"prompt\": \"2 + 2 =\", \"completion\": \" 4\"}\n");
    char expected[80];
    snprintf(expected, sizeof expected, " 4%s", eos_text(&vocabulary));
    assert_int_equal(d->example_count, 1);
    assert_split(&vocabulary, d, 0, "2 + 2 =", expected);
    assert_int_equal(d->token[d->token_count - 1], tokenizer_eos(vocabulary.tokenizer));
    dataset_free(d);
}

/* At serving the prompt is encoded alone, so a token must not reach over its end. */
static void a_prompt_is_encoded_as_it_is_served(void **state)
{
    (void)state;
    const struct dataset_rules r = rules();
    struct token_list prompt = {0}, whole = {0};
    const char *text = "He said hel";
    assert_int_equal(tokenizer_encode(vocabulary.tokenizer, text, strlen(text),
                                      TOKENIZE_ADD_SPECIAL | TOKENIZE_PARSE_SPECIAL, &prompt),
                     ST_OK);
    assert_int_equal(
        tokenizer_encode(vocabulary.tokenizer, "He said hello", 13, TOKENIZE_ADD_SPECIAL, &whole), ST_OK);
    assert_memory_not_equal(prompt.ids, whole.ids,
                            prompt.count * sizeof *prompt.ids); /* or it proves nothing */
    struct dataset *d = read_text(&r, "{\"prompt\": \"He said hel\", \"completion\": \"lo\"}");
    assert_true((size_t)d->sequence[0].count > prompt.count);
    assert_memory_equal(d->token, prompt.ids, prompt.count * sizeof *prompt.ids);
    token_list_release(&prompt);
    token_list_release(&whole);
    dataset_free(d);
}

static void an_end_token_is_not_doubled(void **state)
{
    (void)state;
    const struct dataset_rules r = rules();
    char line[160];
    snprintf(line, sizeof line, "{\"prompt\": \"a\", \"completion\": \"b%s\"}", eos_text(&vocabulary));
    struct dataset *d = read_text(&r, line);
    size_t ends = 0;
    for (size_t i = 0; i < d->token_count; i++) ends += d->token[i] == tokenizer_eos(vocabulary.tokenizer);
    assert_int_equal(ends, 1);
    dataset_free(d);
}

static void a_text_weighs_whole(void **state)
{
    (void)state;
    const struct dataset_rules r = rules();
    struct dataset *d = read_text(&r, "{\"text\": \"Once upon a time\", \"id\": 7, \"metadata\": {}}");
    char expected[120];
    snprintf(expected, sizeof expected, "Once upon a time%s", eos_text(&vocabulary));
    assert_split(&vocabulary, d, 0, "", expected);
    dataset_free(d);
}

static void tokens_stay_as_they_are(void **state)
{
    (void)state;
    const struct dataset_rules r = rules();
    static const float expected[] = {1, 0, 0, 2.5f};
    float weights[4];
    struct dataset *d =
        read_text(&r, "{\"tokens\": [5, 6, 7, 8], \"weights\": [1, 0, 0, 2.5]}\n{\"tokens\": [9, 10]}");
    assert_int_equal(d->example_count, 2);
    for (int i = 0; i < 6; i++) assert_int_equal(d->token[i], 5 + i);
    dataset_weights(d, &d->sequence[0], weights);
    assert_memory_equal(weights, expected, sizeof expected);
    dataset_weights(d, &d->sequence[1], weights);
    assert_true(weights[0] == 1 && weights[1] == 1);
    assert_int_equal(d->example[1].line, 2);
    assert_int_equal(d->rows_max, 4);
    dataset_free(d);
}

#define CONVERSATION                                                                                  \
    "{\"messages\": [{\"role\": \"system\", \"content\": \"Be brief.\"},"                             \
    "{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Hello\"%s}," \
    "{\"role\": \"user\", \"content\": \"Bye\"}, {\"role\": \"assistant\", \"content\": \"See you\"%s}]}"

static void only_the_assistant_weighs(void **state)
{
    (void)state;
    const struct dataset_rules r = rules();
    char line[600];
    snprintf(line, sizeof line, CONVERSATION, "", "");
    struct dataset *d = read_text(&r, line);
    assert_split(
        &vocabulary, d, 0,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        "Hello<|im_end|>See you<|im_end|>");
    dataset_free(d);
}

static void a_message_can_be_taken_out(void **state)
{
    (void)state;
    const struct dataset_rules r = rules();
    char line[600];
    snprintf(line, sizeof line, CONVERSATION, ", \"weight\": 0", "");
    struct dataset *d = read_text(&r, line);
    char *one = weighing(&vocabulary, d, 0, 1);
    assert_string_equal(one, "See you<|im_end|>");
    free(one);
    dataset_free(d);
    snprintf(line, sizeof line, CONVERSATION, "", ", \"weight\": 0");
    d = read_text(&r, line);
    assert_split(
        &vocabulary, d, 0,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Hello<|im_end|>"); /* what comes after is of no use */
    dataset_free(d);
}

/* Where a template has no generation prompt, the model writes all that opens its turn; SentencePiece puts a
 * space before a text, but not in the middle of one. */
static void a_turn_begins_where_the_prompt_ends(void **state)
{
    (void)state;
    struct vocabulary v;
    open_vocabulary(&v, "tokenizer/spm.gguf", "llama-2");
    const struct dataset_rules r = rules_of(&v);
    struct dataset *d = read_text(&r, "{\"messages\": [{\"role\": \"user\", \"content\": \"the time\"},"
                                      "{\"role\": \"assistant\", \"content\": \"the day\"}]}");
    const struct dataset_sequence *s = &d->sequence[0];
    struct token_list prompt = {0}, turn = {0};
    const char *text = "<s>[INST] the time [/INST]";
    assert_int_equal(tokenizer_encode(v.tokenizer, text, strlen(text), TOKENIZE_PARSE_SPECIAL, &prompt),
                     ST_OK);
    /* " the day " as it stands in the text: the first space is the one that the tokenizer would put there. */
    assert_int_equal(tokenizer_encode(v.tokenizer, "the day ", 8, 0, &turn), ST_OK);
    assert_int_equal(token_list_push(&turn, tokenizer_eos(v.tokenizer)), ST_OK);
    assert_int_equal(s->count, prompt.count + turn.count);
    assert_memory_equal(d->token, prompt.ids, prompt.count * sizeof *prompt.ids);
    assert_memory_equal(d->token + prompt.count, turn.ids, turn.count * sizeof *turn.ids);
    float *weights = calloc((size_t)s->count, sizeof *weights);
    dataset_weights(d, s, weights);
    for (int i = 0; i < s->count; i++) assert_true(weights[i] == (i < (int)prompt.count ? 0 : 1));
    free(weights);
    token_list_release(&prompt);
    token_list_release(&turn);
    dataset_free(d);
    close_vocabulary(&v);
}

static void pairs_become_two_sequences(void **state)
{
    (void)state;
    struct dataset_rules r = rules();
    r.loss = LOSS_DPO;
    struct dataset *d =
        read_text(&r, "{\"prompt\": \"Q:\", \"chosen\": \" yes\", \"rejected\": \" no\"}\n"
                      "{\"messages\": [{\"role\": \"user\", \"content\": \"Q\"}], \"chosen\": \"yes\", "
                      "\"rejected\": \"no\"}");
    char yes[80], no[80];
    snprintf(yes, sizeof yes, " yes%s", eos_text(&vocabulary));
    snprintf(no, sizeof no, " no%s", eos_text(&vocabulary));
    assert_int_equal(d->example_count, 2);
    assert_int_equal(d->sequence_count, 4);
    assert_split(&vocabulary, d, 0, "Q:", yes);
    assert_split(&vocabulary, d, 1, "Q:", no);
    char *prompt = weighing(&vocabulary, d, 2, 0);
    assert_non_null(strstr(prompt, "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"));
    free(prompt);
    assert_int_equal(d->example[1].rows, d->sequence[2].count + d->sequence[3].count);
    dataset_free(d);
    refused_by(&r, "{\"text\": \"a b c\"}", "examples, line 1: the loss dpo needs");
    refused_by(&r, "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"b\"}", "the same text");
    refused_by(&r, "{\"prompt\": \"a\", \"chosen\": \"b\"}", "'rejected' is missing");
}

#define OPENAI_INPUT "{\"input\": {\"messages\": [{\"role\": \"user\", \"content\": \"Q\"}], \"tools\": []}, "

static void openais_pairs_are_the_same(void **state)
{
    (void)state;
    struct dataset_rules r = rules();
    r.loss = LOSS_DPO;
    struct dataset *d =
        read_text(&r, "{\"messages\": [{\"role\": \"user\", \"content\": \"Q\"}], \"chosen\": \"yes\", "
                      "\"rejected\": \"no\"}\n" OPENAI_INPUT
                      "\"preferred_output\": [{\"role\": \"assistant\", \"content\": \"yes\"}], "
                      "\"non_preferred_output\": [{\"role\": \"assistant\", \"content\": \"no\"}]}");
    assert_int_equal(d->sequence_count, 4);
    for (int i = 0; i < 2; i++) {
        const struct dataset_sequence *ours = &d->sequence[i], *openais = &d->sequence[i + 2];
        assert_int_equal(ours->count, openais->count);
        assert_memory_equal(d->token + ours->first, d->token + openais->first,
                            (size_t)ours->count * sizeof *d->token);
    }
    dataset_free(d);
    refused_by(&r, "{\"input\": 1, \"preferred_output\": []}", "'input' must be");
    refused_by(&r, OPENAI_INPUT "\"preferred_output\": []}", "'preferred_output' must be an array of one");
    refused_by(&r, OPENAI_INPUT "\"preferred_output\": [{\"role\": \"user\", \"content\": \"a\"}]}",
               "'preferred_output' must be an array of one");
}

static void old_tokens_come_along(void **state)
{
    (void)state;
    struct dataset_rules r = rules();
    r.loss = LOSS_PPO;
    struct dataset *d =
        read_text(&r, "{\"tokens\": [5, 6, 7], \"logprobs\": [null, -0.5, -1], \"advantages\": [0, 2, -3]}");
    assert_int_equal(d->old_count, 3);
    assert_true(d->old[0].logprob == 0 && d->old[1].logprob == -0.5f && d->old[2].advantage == -3);
    dataset_free(d);
    refused_by(&r, "{\"tokens\": [5, 6, 7]}", "'logprobs' must be an array");
    refused_by(&r, "{\"tokens\": [5, 6], \"logprobs\": [0], \"advantages\": [0, 0]}",
               "'logprobs' has 1 numbers for 2 tokens");
    refused_by(&r, "{\"tokens\": [5, 6], \"logprobs\": [0, 1], \"advantages\": [0, 0]}", "logprobs[1]");
    refused_by(&r, "{\"text\": \"a b c\"}", "this loss needs tokens, logprobs and advantages");
}

/* --- mistakes --- */

static void mistakes_are_told_with_their_line(void **state)
{
    (void)state;
    refused("", "examples: there are no examples");
    refused("\n \n\t\r\n", "there are no examples");
    refused("{\"text\": \"a b\"}\n{\"text\": \"a b\"}\n{\"text\": \"a",
            "examples, line 3: not JSON: column ");
    refused("{\"text\": \"a b\"}\n\n{\"text\": \"a b\"}", "examples, line 2: a blank line between examples");
    refused("{\"text\": \"a b\", \"text\": \"c\"}", "line 1: not JSON: column ");
    refused("[1, 2]", "line 1: it must be an object");
    refused("{\"question\": \"a\"}", "it has no known form");
    refused("{\"prompt\": \"a\"}", "it has no known form");
    refused("{\"completion\": \"a\"}", "'prompt' is missing");
    refused("{\"prompt\": \"a\", \"completion\": 4}", "completion");
    refused("{\"prompt\": \"a\", \"completion\": \"\"}", "the completion is empty");
    refused("{\"text\": \"\"}", "'text' is empty");
    refused("{\"prompt\": \"a\", \"completion\": \"b\", \"weight\": 2}",
            "'weight' is not known beside 'completion'");
    refused("{\"text\": \"a\", \"messages\": []}", "'text' is not known beside 'messages'");
    refused("{\"text\": \"a b\", \"prompt completion\": 1}", "'prompt completion' is not known");
    refused("{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}", "for the loss dpo");
    refused("{\"tokens\": [1, 2], \"logprobs\": [0, 0]}", "for the losses importance_sampling and ppo");
}

static void tokens_are_checked(void **state)
{
    (void)state;
    refused("{\"tokens\": 5}", "'tokens' must be an array");
    refused("{\"tokens\": []}", "at least two tokens; this one has 0");
    refused("{\"tokens\": [5]}", "at least two tokens; this one has 1");
    refused("{\"tokens\": [5, -1]}", "tokens[1] is no token: the vocabulary has ids 0 to 1207");
    refused("{\"tokens\": [5, 1208]}", "tokens[1] is no token");
    refused("{\"tokens\": [5, 1.5]}", "tokens[1] is no token");
    refused("{\"tokens\": [5, \"6\"]}", "tokens[1] is no token");
    refused("{\"tokens\": [5, 6], \"weights\": [1]}", "'weights' has 1 numbers for 2 tokens");
    refused("{\"tokens\": [5, 6], \"weights\": [1, -1]}", "weights[1] must be a number from 0 to");
    refused("{\"tokens\": [5, 6], \"weights\": [1, \"1\"]}", "weights[1]");
    refused("{\"tokens\": [5, 6, 7], \"weights\": [1, 0, 0]}",
            "no token after the first has a weight above 0");
}

static void messages_are_checked(void **state)
{
    (void)state;
    refused("{\"messages\": []}", "at least one message");
    refused("{\"messages\": [3]}", "message 0: it must be an object");
    refused("{\"messages\": [{\"role\": \"user\"}]}", "message 0: 'content' is missing");
    refused("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"robot\", \"content\": "
            "\"b\"}]}",
            "message 1: role 'robot' is not");
    refused("{\"messages\": [{\"role\": \"user\", \"content\": \"a\", \"tool_calls\": []}]}",
            "message 0: 'tool_calls' is not known here");
    refused("{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\", \"weight\": 2}]}", "weight");
    refused("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", "no message of the assistant");
    struct dataset_rules r = rules();
    r.chat = NULL;
    r.chat_problem = "of its own";
    refused_by(&r, "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}",
               "no chat template for messages (of its own)");
}

static void lengths_are_checked(void **state)
{
    (void)state;
    struct dataset_rules r = rules();
    const char *text = "{\"tokens\": [1, 2]}\n{\"tokens\": [5, 6, 7, 8, 9]}";
    r.context_length = 4;
    refused_by(&r, text, "examples, line 2: 5 tokens are too long for the model's context of 4");
    r.context_length = 5;
    r.batch_tokens = 4;
    refused_by(&r, text, "examples, line 2: 5 tokens are more than batch_tokens, which is 4");
    r.batch_tokens = 5;
    dataset_free(read_text(&r, text));
}

static void a_line_without_end_is_refused(void **state)
{
    (void)state;
    const struct dataset_rules r = rules();
    size_t n = DATASET_LINE_BYTES_MAX + 1;
    char *text = malloc(n);
    assert_non_null(text);
    memset(text, ' ', n);
    struct dataset *d = NULL;
    struct error err = {0};
    enum status st = dataset_read_bytes(&r, text, n, &d, &err);
    free(text);
    assert_refused(st, ST_TOO_LARGE, err, "examples, line 1: more than 16777216 bytes");
}

static void too_large(const struct dataset_rules *r, const char *text, const char *message)
{
    struct dataset *d = NULL;
    struct error err = {0};
    assert_refused(dataset_read_bytes(r, text, strlen(text), &d, &err), ST_TOO_LARGE, err, message);
}

static void a_set_has_its_limits(void **state)
{
    (void)state;
    struct dataset_rules r = rules();
    const char *text = "{\"tokens\": [1, 2, 3]}\n{\"tokens\": [4, 5]}\n{\"tokens\": [6, 7]}";
    r.tokens_max = 6;
    too_large(&r, text, "examples, line 3: more than 6 tokens in all: give fewer examples at a time");
    r.tokens_max = 7;
    r.examples_max = 2;
    too_large(&r, text, "examples, line 3: more than 2 examples: give fewer at a time");
    r.examples_max = 3;
    dataset_free(read_text(&r, text));
}

/* --- files --- */

static bool count_calls(void *ctx, double done)
{
    int *calls = ctx;
    assert_true(done >= 0 && done <= 1);
    return --*calls != 0;
}

static void files_are_read_with_progress(void **state)
{
    (void)state;
    struct temp_folder folder;
    struct dataset_rules r = rules();
    struct strbuf text = {0};
    struct dataset *d = NULL;
    struct error err = {0};
    int calls = -1;
    temp_folder_make(&folder);
    for (int i = 0; i < 1000; i++)
        strbuf_printf(&text, "{\"prompt\": \"%d\", \"completion\": \" %d\"}\r\n", i, i * i);
    strbuf_puts(&text, "\n\n");
    file_write(folder.path, "a.jsonl", text.data, text.size);
    int fd = open(path_in(folder.path, "a.jsonl"), O_RDONLY | O_CLOEXEC);
    assert_true(fd >= 0);
    r.on_progress = count_calls;
    r.progress_ctx = &calls;
    assert_ok(dataset_read_file(&r, fd, &d, &err), err);
    assert_int_equal(d->example_count, 1000);
    assert_true(calls < -10);
    dataset_free(d);
    d = NULL;
    calls = 3; /* the third call says no */
    enum status st = dataset_read_file(&r, fd, &d, &err);
    assert_int_equal(st, ST_CANCELLED);
    assert_null(d);
    close(fd);
    strbuf_release(&text);
    temp_folder_remove(&folder);
}

static enum status read_and_free(void *ctx)
{
    (void)ctx;
    struct dataset_rules r = rules();
    struct dataset *d;
    static const char text[] =
        "{\"prompt\": \"a\", \"completion\": \"b\"}\n"
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"},"
        "{\"role\": \"assistant\", \"content\": \"b\"}]}\n{\"tokens\": [5, 6], \"weights\": [0, 1]}";
    enum status st = dataset_read_bytes(&r, text, strlen(text), &d, NULL);
    if (!st) dataset_free(d);
    return st;
}

static void running_out_of_memory_is_an_answer(void **state)
{
    (void)state;
    if (!alloc_fail_available()) skip();
    assert_true(alloc_fail_sweep(read_and_free, NULL) > 20);
}

/* --- batches --- */

/* Examples of 2 to 9 tokens; token 0 of each is its number, by a thousand. */
static struct dataset *numbered(int count, int64_t batch_tokens)
{
    struct dataset_rules r = rules();
    struct strbuf text = {0};
    r.batch_tokens = batch_tokens;
    for (int i = 0; i < count; i++) {
        strbuf_printf(&text, "{\"tokens\": [%d", i % 1000);
        for (int k = 0; k <= i % 8; k++) strbuf_puts(&text, ", 7");
        strbuf_puts(&text, "]}\n");
    }
    struct dataset *d = read_text(&r, text.data);
    strbuf_release(&text);
    return d;
}

static void every_example_comes_once_an_epoch(void **state)
{
    (void)state;
    struct dataset *d = numbered(103, 16);
    struct batch_plan p, again;
    assert_int_equal(batch_plan_init(&p, d, 5, 0.1, 16), ST_OK);
    assert_int_equal(batch_plan_init(&again, d, 5, 0.1, 16), ST_OK);
    assert_int_equal(p.held_count, 10);
    assert_int_equal(p.train_count, 93);
    int64_t steps = batch_plan_steps(&p, 2), step = 0;
    assert_true(steps > batch_plan_steps(&p, 1.5) && batch_plan_steps(&p, 1.5) > batch_plan_steps(&p, 1));
    uint32_t first_of_epoch[2] = {0, 0};
    for (int epoch = 0; epoch < 2; epoch++) {
        int seen[103] = {0};
        double done = 0;
        for (size_t i = 0; i < p.held_count; i++) seen[p.held[i]]++;
        for (bool first = true; step < steps && done < epoch + 1; step++, first = false) {
            size_t count;
            const uint32_t *e = batch_plan_step(&p, step, &count, &done);
            int rows = 0;
            if (first) first_of_epoch[epoch] = e[0];
            for (size_t i = 0; i < count; i++) {
                seen[e[i]]++;
                rows += d->example[e[i]].rows;
            }
            assert_true(rows <= 16);
        }
        for (int i = 0; i < 103; i++) assert_int_equal(seen[i], 1);
    }
    assert_int_equal(step, steps);
    assert_int_not_equal(first_of_epoch[0], first_of_epoch[1]);
    /* Asked in any order, a step is the same. */
    for (step = steps - 1; step >= 0; step -= 7) {
        size_t count, count2;
        double done, done2;
        const uint32_t *e = batch_plan_step(&p, step, &count, &done);
        const uint32_t *f = batch_plan_step(&again, step, &count2, &done2);
        assert_int_equal(count, count2);
        assert_memory_equal(e, f, count * sizeof *e);
        assert_true(done == done2);
    }
    batch_plan_release(&p);
    batch_plan_release(&again);
    dataset_free(d);
}

static void shares_are_held_out(void **state)
{
    (void)state;
    static const struct {
        int count;
        double share;
        size_t held;
    } cases[] = {{9, 0.1, 0}, {10, 0.01, 1}, {4000, 0.5, 1000}, {10, 0, 0}, {40, 0.25, 10}, {10, 0.9, 9}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct dataset *d = numbered(cases[i].count, 64);
        struct batch_plan p;
        assert_int_equal(batch_plan_init(&p, d, 1, cases[i].share, 64), ST_OK);
        assert_int_equal(p.held_count, cases[i].held);
        assert_int_equal(p.train_count, (size_t)cases[i].count - cases[i].held);
        batch_plan_release(&p);
        dataset_free(d);
    }
}

static void rows_predict_the_next_token(void **state)
{
    (void)state;
    struct dataset_rules r = rules();
    r.loss = LOSS_PPO;
    struct dataset *d =
        read_text(&r, "{\"tokens\": [5, 6, 7], \"weights\": [9, 0, 2], \"logprobs\": [0, -1, -2], "
                      "\"advantages\": [0, 3, 4]}\n"
                      "{\"tokens\": [8, 9], \"logprobs\": [0, -3], \"advantages\": [0, 5]}");
    struct train_batch b = {0};
    static const uint32_t both[] = {1, 0};
    static const int32_t token[] = {8, 5, 6}, target[] = {9, 6, 7};
    static const float weight[] = {1, 0, 2};
    assert_int_equal(train_batch_fill(&b, d, both, 2), ST_OK);
    assert_int_equal(b.pass.rows, 3);
    assert_int_equal(b.tokens, 5);
    assert_int_equal(b.pass.seq_count, 2);
    assert_true(b.first_row[0] == 0 && b.first_row[1] == 1 && b.first_row[2] == 3);
    assert_memory_equal(b.pass.token, token, sizeof token);
    assert_memory_equal(b.pass.target, target, sizeof target);
    assert_memory_equal(b.pass.weight, weight, sizeof weight);
    assert_true(b.weight_sum == 3);
    assert_true(b.old[0].advantage == 5 && b.old[1].logprob == -1 && b.old[2].advantage == 4);
    train_batch_release(&b);
    dataset_free(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_completion_weighs_with_its_end),
        cmocka_unit_test(a_prompt_is_encoded_as_it_is_served),
        cmocka_unit_test(an_end_token_is_not_doubled),
        cmocka_unit_test(a_text_weighs_whole),
        cmocka_unit_test(tokens_stay_as_they_are),
        cmocka_unit_test(only_the_assistant_weighs),
        cmocka_unit_test(a_message_can_be_taken_out),
        cmocka_unit_test(a_turn_begins_where_the_prompt_ends),
        cmocka_unit_test(pairs_become_two_sequences),
        cmocka_unit_test(openais_pairs_are_the_same),
        cmocka_unit_test(old_tokens_come_along),
        cmocka_unit_test(mistakes_are_told_with_their_line),
        cmocka_unit_test(tokens_are_checked),
        cmocka_unit_test(messages_are_checked),
        cmocka_unit_test(lengths_are_checked),
        cmocka_unit_test(a_line_without_end_is_refused),
        cmocka_unit_test(a_set_has_its_limits),
        cmocka_unit_test(files_are_read_with_progress),
        cmocka_unit_test(running_out_of_memory_is_an_answer),
        cmocka_unit_test(every_example_comes_once_an_epoch),
        cmocka_unit_test(shares_are_held_out),
        cmocka_unit_test(rows_predict_the_next_token),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}

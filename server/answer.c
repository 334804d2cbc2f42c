/* A job's answer: whole, or chunk by chunk. */
#include "server/job.h"

#include <stdlib.h>
#include <string.h>

static const char *piece_of(const void *ctx, int32_t id, size_t *size_out)
{
    const char *piece = tokenizer_piece(ctx, id, 0, false, size_out);
    return piece ? piece : "";
}

static struct response_head head_of(const struct job *j)
{
    const struct completion_request *r = &j->request;
    return (struct response_head){
        .id = j->id,
        .created = j->created,
        .model = r->model ? r->model : j->service->config->model_name,
        .fingerprint = j->fingerprint,
        .chat = r->chat,
        .text = {piece_of, engine_tokenizer(j->service->engine), r->tokens_as_ids},
    };
}

static const char *finish_name(const struct sequence *q)
{
    if (!q->done) return NULL;
    return q->finish == FINISH_STOP ? "stop" : "length";
}

static void add_version_header(const struct job *j)
{
    if (j->versions.size) exchange_add_header(j->x, "x-adapter-version", j->versions.data);
}

/* All that a sequence holds now. */
static struct response_choice choice_of(const struct sequence *q, int index)
{
    const struct completion_request *r = &q->job->request;
    struct response_choice c = {
        .index = index,
        .text = q->text.data ? q->text.data : "",
        .text_size = q->text.size,
        .finish = finish_name(q),
        .text_offset = q->text_offset,
        .token_ids = q->tokens.ids,
        .token_count = q->tokens.count,
        .with_ids = r->return_token_ids,
        .first = !q->started,
    };
    if (r->logprobs >= 0) c.logprobs = (struct logprob_range){&q->logprobs, 0, q->logprobs.count};
    if (r->prompt_logprobs >= 0) c.prompt_logprobs = &q->prompt_logprobs;
    if (r->return_token_ids && !q->started) {
        c.prompt_ids = q->prompt->tokens.ids;
        c.prompt_count = q->prompt->tokens.count;
    }
    return c;
}

void answer_start(struct job *j)
{
    if (j->streaming) return;
    j->streaming = true;
    add_version_header(j);
    exchange_stream(j->x, "text/event-stream");
}

static void forget_sent(struct sequence *q, const struct token_text *text)
{
    for (size_t i = 0; i < q->logprobs.count; i++)
        q->text_offset += token_text_characters(text, q->logprobs.entries[i].token);
    strbuf_clear(&q->text);
    q->tokens.count = 0;
    q->logprobs.count = q->logprobs.top_count = 0;
    q->started = true;
}

/* A client that does not read is as good as gone. */
static void send_out(struct job *j)
{
    struct api_error err = {0};
    j->wrote = true;
    if (exchange_write(j->x, &j->out)) return;
    api_error_set(&err, 503, "client_too_slow", NULL, "the answer was not read fast enough");
    job_fail(j, &err);
}

void answer_flush(struct sequence *q)
{
    struct job *j = q->job;
    const struct completion_request *r = &j->request;
    bool news = q->text.size || q->done || q->logprobs.count || (r->return_token_ids && q->tokens.count);
    if (!news) return;
    struct response_head head = head_of(j);
    struct response_choice choice = choice_of(q, q->index);
    sse_write_chunk(&j->out, &head, &choice, r->include_usage);
    forget_sent(q, &head.text);
    send_out(j);
}

/* A prompt counts once, however many choices it has. */
static struct response_usage usage_of(const struct job *j)
{
    struct response_usage u = {0};
    for (size_t i = 0; i < j->sequence_count; i++) {
        const struct sequence *q = &j->sequences[i];
        if (q->index % j->request.best_of == 0) {
            u.prompt_tokens += q->prompt_tokens;
            u.cached_tokens += q->cached_tokens;
        }
        u.output_tokens += q->output_tokens;
    }
    return u;
}

static double score(const struct sequence *q)
{
    return q->logprob_count ? q->logprob_sum / q->logprob_count : 0;
}

/* The likeliest per token first; ties by index, so that the order is the same each time. */
static int compare_score(const void *a, const void *b)
{
    const struct sequence *p = *(const struct sequence *const *)a, *q = *(const struct sequence *const *)b;
    double sp = score(p), sq = score(q);
    if (sp != sq) return sp > sq ? -1 : 1;
    return p->index - q->index;
}

/* The n best of each prompt's best_of, prompt by prompt. False without memory. */
static bool choose(const struct job *j, struct response_choice *choices)
{
    size_t n = (size_t)j->request.n, best_of = (size_t)j->request.best_of;
    const struct sequence **ranked = calloc(best_of, sizeof *ranked);
    if (!ranked) return false;
    for (size_t p = 0; p < j->prompt_count; p++) {
        for (size_t i = 0; i < best_of; i++) ranked[i] = &j->sequences[p * best_of + i];
        if (best_of > n) qsort(ranked, best_of, sizeof *ranked, compare_score);
        for (size_t i = 0; i < n; i++) choices[p * n + i] = choice_of(ranked[i], (int)(p * n + i));
    }
    free(ranked);
    return true;
}

static void finish_whole(struct job *j)
{
    struct response_head head = head_of(j);
    size_t count = j->prompt_count * (size_t)j->request.n;
    struct response_choice *choices = calloc(count, sizeof *choices);
    struct exchange *x = j->x;
    struct api_error err = {0};
    strbuf_clear(&j->out);
    if (choices && choose(j, choices)) response_write(&j->out, &head, choices, count, usage_of(j));
    add_version_header(j);
    j->x = NULL;
    if (j->out.failed || !j->out.size) {
        api_error_from(&err, ST_NOMEM, NULL, NULL);
        exchange_reply_error(x, &err);
    } else {
        exchange_reply(x, 200, "application/json", &j->out);
    }
    free(choices);
}

static void finish_stream(struct job *j)
{
    struct response_head head = head_of(j);
    if (j->request.include_usage) sse_write_usage(&j->out, &head, usage_of(j));
    sse_write_done(&j->out);
    send_out(j);
    struct exchange *x = j->x;
    j->x = NULL;
    if (x) exchange_end(x);
}

void answer_finish(struct job *j)
{
    if (j->streaming)
        finish_stream(j);
    else
        finish_whole(j);
}

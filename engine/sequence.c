#include "engine/sequence.h"

#include "base/utf8.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- checks ------------------------------------------------------------------------------------ */

static bool within(double v, double min, double max) { return v >= min && v <= max; }

static enum status numbers_check(const struct sampling *s, struct error *err)
{
    const struct { const char *name; double value, min, max; } range[] = {
        {"temperature", s->temperature, 0, 1000},
        {"top_p", s->top_p, 0, 1},
        {"min_p", s->min_p, 0, 1},
        {"presence_penalty", s->presence_penalty, -1000, 1000},
        {"frequency_penalty", s->frequency_penalty, -1000, 1000},
        {"repetition_penalty", s->repetition_penalty, 1e-3, 1000},
        {"max_tokens", s->max_tokens, 0, INT32_MAX},
        {"min_tokens", s->min_tokens, 0, INT32_MAX},
        {"logprobs", s->logprobs, -1, ENGINE_LOGPROBS_MAX},
        {"prompt_logprobs", s->prompt_logprobs, -1, ENGINE_LOGPROBS_MAX},
        {"number of logit_bias entries", (double)s->bias_count, 0, ENGINE_BIAS_MAX},
        {"number of stop strings", (double)s->stop_count, 0, ENGINE_STOP_MAX},
        {"number of stop tokens", (double)s->stop_token_count, 0, ENGINE_STOP_MAX},
    };
    for (size_t i = 0; i < sizeof range / sizeof *range; i++)
        if (!within(range[i].value, range[i].min, range[i].max))
            return error_set(err, ST_INVALID, "%s is %g; it must be %g to %g", range[i].name,
                             range[i].value, range[i].min, range[i].max);
    return ST_OK;
}

static enum status token_check(const struct sequence_rules *rules, const char *where, int32_t token,
                               struct error *err)
{
    size_t vocab = rules->shape->vocab;
    if (token >= 0 && (size_t)token < vocab) return ST_OK;
    return error_set(err, ST_INVALID, "%s: token %d is not one of the model's 0 to %zu", where,
                     (int)token, vocab - 1);
}

static enum status sampling_check(const struct sequence_rules *rules, const struct sampling *s,
                                  struct error *err)
{
    enum status st = numbers_check(s, err);
    for (size_t i = 0; i < s->bias_count && !st; i++) {
        st = token_check(rules, "logit_bias", s->bias[i].token, err);
        if (!st && !within(s->bias[i].bias, -1e6, 1e6))
            st = error_set(err, ST_INVALID, "logit_bias of token %d is %g; it must be -1e6 to 1e6",
                           (int)s->bias[i].token, (double)s->bias[i].bias);
    }
    for (size_t i = 0; i < s->stop_token_count && !st; i++)
        st = token_check(rules, "stop_token_ids", s->stop_token_ids[i], err);
    for (size_t i = 0; i < s->stop_count && !st; i++) {
        size_t n = strlen(s->stop[i]);
        if (n == 0 || n > ENGINE_STOP_BYTES_MAX || !utf8_valid(s->stop[i], n))
            st = error_set(err, ST_INVALID,
                           "stop string %zu has %zu bytes; it must be UTF-8 of 1 to %d", i, n,
                           ENGINE_STOP_BYTES_MAX);
    }
    return st;
}

static enum status prompt_check(const struct sequence_rules *rules, const struct engine_request *r,
                                struct error *err)
{
    size_t room = (size_t)rules->shape->context_length - (r->sampling.max_tokens > 0);
    if (r->prompt_count == 0) return error_set(err, ST_INVALID, "the prompt is empty");
    if (r->prompt_count > room)
        return error_set(err, ST_INVALID,
                         "the prompt has %zu tokens; the context of %d has room for %zu and the "
                         "answer: shorten the prompt",
                         r->prompt_count, rules->shape->context_length, room);
    for (size_t i = 0; i < r->prompt_count; i++) {
        enum status st = token_check(rules, "prompt", r->prompt[i], err);
        if (st) return st;
    }
    return ST_OK;
}

static enum status adapters_check(const struct sequence_rules *rules,
                                  const struct engine_request *r, struct error *err)
{
    if (r->member_count > ENGINE_SET_MAX)
        return error_set(err, ST_INVALID, "%zu adapters in one request; at most %d",
                         r->member_count, ENGINE_SET_MAX);
    size_t width = 0;
    for (size_t i = 0; i < r->member_count; i++) {
        const struct lr_member *m = &r->members[i];
        if (!within(m->weight, -1e6, 1e6))
            return error_set(err, ST_INVALID, "weight %g of adapter %zu; it must be -1e6 to 1e6",
                             (double)m->weight, i);
        if (m->adapter->layers != rules->shape->layers)
            return error_set(err, ST_REJECTED, "adapter %zu has %d layers; the model has %d", i,
                             m->adapter->layers, rules->shape->layers);
        if (m->weight != 0) width += m->adapter->width;
    }
    if (width > (size_t)rules->lr_width)
        return error_set(err, ST_REJECTED,
                         "the adapters need %zu elements of scratch together; this server reserves %d",
                         width, rules->lr_width);
    return ST_OK;
}

/* --- lifetime ---------------------------------------------------------------------------------- */

static bool ending_build(struct sequence *q, const struct sequence_rules *rules,
                         const struct sampling *s)
{
    size_t ends = s->ignore_eos ? 0 : rules->end_count;
    q->ending = malloc((ends + s->stop_token_count + 1) * sizeof *q->ending);
    if (!q->ending) return false;
    for (size_t i = 0; i < ends; i++) q->ending[q->ending_count++] = rules->end_tokens[i];
    for (size_t i = 0; i < s->stop_token_count; i++)
        q->ending[q->ending_count++] = s->stop_token_ids[i];
    return true;
}

static bool sequence_init(struct sequence *q, const struct sequence_rules *rules,
                          const struct engine_request *r)
{
    size_t n = r->prompt_count;
    int room = rules->shape->context_length - (int)n;
    q->sampling = r->sampling;
    if (q->sampling.max_tokens > room) q->sampling.max_tokens = room;
    q->sched.priority = r->priority;
    q->sched.prompt_count = (int)n;
    /* The last token's key and value are never needed. */
    q->sched.tokens_max = (int)n + (q->sampling.max_tokens > 0 ? q->sampling.max_tokens - 1 : 0);
    for (size_t i = 0; i < r->member_count; i++)
        if (r->members[i].weight != 0) q->members[q->member_count++] = r->members[i];
    q->sched.space.salt = r->cache_salt;
    if (q->member_count > 0) q->sched.space.set = r->set_key;
    q->sched.reads_all = q->sampling.prompt_logprobs >= 0;
    q->on_event = r->on_event;
    q->ctx = r->ctx;
    q->stop_token = -1;

    q->prompt = malloc(n * sizeof *q->prompt);
    if (!q->prompt || !ending_build(q, rules, &r->sampling)) return false;
    memcpy(q->prompt, r->prompt, n * sizeof *q->prompt);
    q->sched.prompt = q->prompt;
    if (q->sampling.prompt_logprobs >= 0) {
        q->prompt_logprobs = calloc(n, sizeof *q->prompt_logprobs);
        if (!q->prompt_logprobs) return false;
    }
    q->sampler = sampler_new(&q->sampling, rules->shape->vocab, q->prompt, n, q->ending,
                             q->ending_count);
    q->stream = stream_new(rules->tokenizer, &q->sampling);
    return q->sampler && q->stream;
}

enum status sequence_new(const struct sequence_rules *rules, const struct engine_request *r,
                         struct sequence **out, struct error *err)
{
    enum status st = sampling_check(rules, &r->sampling, err);
    if (!st) st = prompt_check(rules, r, err);
    if (!st) st = adapters_check(rules, r, err);
    if (st) return st;
    struct sequence *q = calloc(1, sizeof *q);
    if (!q || !sequence_init(q, rules, r)) {
        sequence_free(q);
        return error_set(err, ST_NOMEM, "out of memory for the request");
    }
    *out = q;
    return ST_OK;
}

void sequence_free(struct sequence *q)
{
    if (!q) return;
    sampler_free(q->sampler);
    stream_free(q->stream);
    free(q->prompt_logprobs);
    free(q->ending);
    free(q->prompt);
    free(q);
}

/* --- events ------------------------------------------------------------------------------------ */

void sequence_admitted(struct sequence *q)
{
    struct engine_event event = {.kind = EVENT_ADMITTED};
    q->on_event(q->ctx, &event);
}

static void prompt_send(struct sequence *q)
{
    struct engine_event event = {.kind = EVENT_PROMPT,
                                 .prompt_logprobs = q->prompt_logprobs,
                                 .prompt_logprob_count = (size_t)q->sched.prompt_count - 1};
    q->on_event(q->ctx, &event);
}

static void token_send(struct sequence *q, int32_t token, const struct token_logprob *logprob)
{
    struct engine_event event = {.kind = EVENT_TOKEN, .token = token, .logprob = logprob};
    event.text = stream_take(q->stream, &event.text_size);
    q->on_event(q->ctx, &event);
}

void sequence_done(struct sequence *q)
{
    struct engine_event event = {.kind = EVENT_DONE,
                                 .finish = q->finish,
                                 .stop_string = stream_stopped_by(q->stream),
                                 .stop_token = q->stop_token,
                                 .error = q->finish == FINISH_ERROR ? &q->error : NULL,
                                 .prompt_tokens = q->sched.prompt_count,
                                 .cached_tokens = q->sched.cached,
                                 .output_tokens = q->output_count};
    event.text = stream_take(q->stream, &event.text_size);
    q->on_event(q->ctx, &event);
}

void sequence_end(struct sequence *q, enum finish_reason finish, const struct error *error)
{
    CHECK(!q->ended);
    q->ended = true;
    q->finish = finish;
    if (error) q->error = *error;
    if (stream_finish(q->stream) == ST_OK || finish == FINISH_ERROR) return;
    q->finish = FINISH_ERROR;
    error_set(&q->error, ST_NOMEM, "out of memory for the text");
}

/* --- logits ------------------------------------------------------------------------------------ */

#define OUTPUT_RING (2 * KV_PAGE_TOKENS)

int32_t sequence_token(const struct sequence *q, int position)
{
    return position < q->sched.prompt_count ? q->prompt[position]
                                            : q->output[position % OUTPUT_RING];
}

bool sequence_wants_logits(const struct sequence *q, int position)
{
    return position + 1 >= q->sched.prompt_count || q->prompt_logprobs;
}

static bool token_ends(const struct sequence *q, int32_t token)
{
    for (size_t i = 0; i < q->ending_count; i++)
        if (q->ending[i] == token) return true;
    return false;
}

/* Adds a chosen token to the output. */
static enum status token_take(struct sequence *q, int32_t token, const struct token_logprob *logprob)
{
    q->output[(q->sched.prompt_count + q->output_count) % OUTPUT_RING] = token;
    q->output_count++;
    bool can_stop = q->output_count > q->sampling.min_tokens;
    if (token_ends(q, token)) {
        q->stop_token = token;
        enum status st = q->sampling.include_stop ? stream_push(q->stream, token, false) : ST_OK;
        if (!st) sequence_end(q, FINISH_STOP, NULL);
        return st;
    }
    enum status st = stream_push(q->stream, token, can_stop);
    if (st) return st;
    token_send(q, token, logprob);
    if (stream_stopped_by(q->stream)) sequence_end(q, FINISH_STOP, NULL);
    else if (q->output_count == q->sampling.max_tokens) sequence_end(q, FINISH_LENGTH, NULL);
    return ST_OK;
}

void sequence_judge(struct sequence *q, struct sampler_scratch *scratch, int position,
                    const float *logits, struct verdict *out)
{
    out->status = ST_OK;
    if (position + 1 < q->sched.prompt_count)
        out->status = logprob_compute(scratch, logits, q->prompt[position + 1],
                                      q->sampling.prompt_logprobs, &q->prompt_logprobs[position],
                                      &out->error);
    else if (q->sampling.max_tokens > 0)
        out->status = sampler_choose(q->sampler, scratch, logits, q->output_count, &out->token,
                                     q->sampling.logprobs >= 0 ? &out->logprob : NULL, &out->error);
}

void sequence_take(struct sequence *q, int position, const struct verdict *v)
{
    if (q->ended) return;
    if (v->status) {
        sequence_end(q, FINISH_ERROR, &v->error);
        return;
    }
    if (position + 1 < q->sched.prompt_count) return;
    if (position + 1 == q->sched.prompt_count && q->prompt_logprobs) prompt_send(q);
    if (q->sampling.max_tokens == 0) {
        sequence_end(q, FINISH_LENGTH, NULL);
        return;
    }
    enum status st = token_take(q, v->token, q->sampling.logprobs >= 0 ? &v->logprob : NULL);
    if (!st) return;
    struct error error;
    error_set(&error, st, "out of memory for the text");
    sequence_end(q, FINISH_ERROR, &error);
}

/* A job's sequences into the engine. */
#include "server/job.h"

#include <limits.h>
#include <sodium.h>
#include <string.h>

static int larger(int a, int b) { return a > b ? a : b; }

static void fill_sampling(const struct job *j, struct sampling *s)
{
    const struct completion_request *r = &j->request;
    *s = (struct sampling){
        .temperature = (float)r->temperature,
        .top_p = (float)r->top_p,
        .min_p = (float)r->min_p,
        .top_k = r->top_k,
        .presence_penalty = (float)r->presence_penalty,
        .frequency_penalty = (float)r->frequency_penalty,
        .repetition_penalty = (float)r->repetition_penalty,
        .bias = (const struct logit_bias *)r->bias,
        .bias_count = r->bias_count,
        .max_tokens = r->max_tokens < 0 ? INT_MAX : r->max_tokens,
        .min_tokens = r->min_tokens,
        .ignore_eos = r->ignore_eos,
        .stop = r->stop,
        .stop_count = r->stop_count,
        .stop_token_ids = r->stop_token_ids,
        .stop_token_count = r->stop_token_count,
        .include_stop = r->include_stop,
        .skip_special = r->skip_special_tokens,
        .logprobs = r->logprobs,
        .prompt_logprobs = r->prompt_logprobs,
    };
    if (r->best_of > r->n) s->logprobs = larger(s->logprobs, 0); /* to judge them by */
    if (r->echo) s->prompt_logprobs = larger(s->prompt_logprobs, r->logprobs);
}

/* Choice 0 has the seed itself, the others ones far from it. */
static uint64_t seed_of_choice(uint64_t seed, uint64_t choice) { return seed + choice * 0x9E3779B97F4A7C15u; }

static enum status submit_one(struct job *j, struct sequence *q, const struct sampling *sampling,
                              struct error *err)
{
    struct engine_request r = {
        .prompt = q->prompt->tokens.ids,
        .prompt_count = q->prompt->tokens.count,
        .sampling = *sampling,
        .members = j->members,
        .member_count = j->member_count,
        .set_key = j->set_key,
        .cache_salt = j->cache_salt,
        .priority = j->request.priority,
        .on_event = job_on_event,
        .ctx = q,
    };
    r.sampling.seed = seed_of_choice(sampling->seed, (uint64_t)q->index % (uint64_t)j->request.best_of);
    if (!job_events_open(q)) return error_set(err, ST_NOMEM, "out of memory");
    enum status st = engine_submit(j->service->engine, &r, &q->id, err);
    if (!st) j->live++;
    return st;
}

/* Echoed text and what stands for the first token, which nothing predicted. */
static bool begin_echo(struct sequence *q)
{
    const struct completion_request *r = &q->job->request;
    if (!r->echo) return true;
    if (q->prompt->echo.size) strbuf_append(&q->text, q->prompt->echo.data, q->prompt->echo.size);
    if (r->logprobs >= 0) logprob_list_push(&q->logprobs, q->prompt->tokens.ids[0], __builtin_nanf(""), 0, 0);
    return !q->text.failed && !q->logprobs.failed;
}

enum status job_submit(struct job *j, struct error *err)
{
    _Static_assert(sizeof(struct logit_bias) == sizeof(struct token_bias),
                   "api's struct is handed on as it is");
    struct sampling sampling;
    enum status st = ST_OK;
    fill_sampling(j, &sampling);
    sampling.seed = j->request.seed;
    if (!j->request.has_seed) randombytes_buf(&sampling.seed, sizeof sampling.seed);
    for (size_t i = 0; i < j->sequence_count && !st; i++) {
        struct sequence *q = &j->sequences[i];
        q->job = j;
        q->index = (int)i;
        q->prompt = &j->prompts[i / (size_t)j->request.best_of];
        st = begin_echo(q) ? submit_one(j, q, &sampling, err) : error_set(err, ST_NOMEM, "out of memory");
    }
    return st;
}

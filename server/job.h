/* One completion request under way: from its body to the last event of its last sequence.
 *
 *   parsed -> leases and tokens (a worker, where that may block) -> submitted -> events -> answered, freed
 *
 * A job outlives its exchange: when the client goes away, its sequences are cancelled and the job
 * stays until the engine has sent the last event of each, since until then their adapters are in use. The
 * leases are released in job_free and nowhere else. Loop's thread only, except job_prepare and what
 * job_on_event reads. */
#ifndef SERVER_JOB_H
#define SERVER_JOB_H

#include "api/completion.h"
#include "api/response.h"
#include "server/service.h"

/* One prompt as tokens. */
struct job_prompt {
    struct token_list tokens;
    struct strbuf echo; /* its text, where `echo` asks for it */
};

/* One sequence in the engine: one choice of one prompt. */
struct sequence {
    struct job *job;
    const struct job_prompt *prompt;
    int index;          /* prompt * best_of + choice */
    uint64_t id;        /* the engine's; 0 before submission */
    bool done, started; /* last event seen; first chunk written */

    /* What was generated and not yet sent (streams), or all of it. */
    struct strbuf text;
    struct token_list tokens;
    struct logprob_list logprobs; /* with `echo`, the prompt's come first */
    struct logprob_list prompt_logprobs;
    size_t text_offset; /* characters before what `logprobs` holds */
    double logprob_sum;
    int logprob_count;
    bool failed; /* out of memory for news: an error in the end */

    /* Written on the engine's thread before the last event is posted, read after. */
    struct strbuf tail; /* the last event's text */
    bool lost;          /* as `failed`, for news that could not be posted */
    enum finish_reason finish;
    struct error error;
    int prompt_tokens, cached_tokens, output_tokens;
    struct event_mail *last; /* its message, made beforehand so that it cannot fail to come */
};

struct job {
    struct task task;
    struct service *service;
    struct job *next, *previous; /* service->jobs */
    struct exchange *x;          /* NULL once answered or gone */
    bool working;                /* a worker has it */
    bool admitted;               /* a sequence of it is in the batch, or was */
    struct completion_request request;

    struct lease *leases[COMPLETION_ADAPTERS_MAX];
    struct lr_member members[COMPLETION_ADAPTERS_MAX];
    size_t member_count;
    struct key128 set_key, cache_salt;
    char id[80], fingerprint[64];
    int64_t created;        /* unix seconds */
    uint64_t arrived;       /* uv_hrtime */
    bool spoke;             /* the first token came */
    struct strbuf versions; /* "name@version, ..." */

    struct job_prompt *prompts;
    size_t prompt_count;
    struct sequence *sequences; /* [prompt_count * best_of] */
    size_t sequence_count, live;

    bool streaming;         /* headers are sent */
    bool wrote;             /* since the last tick of the ping timer */
    struct api_error error; /* http != 0: the job failed */
    struct strbuf out;      /* scratch for chunks */
};

/* completions.c */
void job_free(struct job *j); /* not while working or live */
/* Answers with an error, or ends the stream with it, and cancels what runs. */
void job_fail(struct job *j, const struct api_error *err);
void job_cancel_all(struct service *s, const struct api_error *err);
/* Comments on streams that had nothing to say since the last call. */
void job_ping_all(struct service *s);

/* prepare.c: leases and tokens, into j->error on failure. Any thread, while the loop leaves the job alone. */
void job_prepare(struct job *j);
/* Names the adapters that were given by number; false, with j->error, where there is none of that number. */
bool job_name_adapters(struct job *j);
/* Without blocking: false where a worker must do it. */
bool job_try_leases(struct job *j);

/* submit.c */
NODISCARD enum status job_submit(struct job *j, struct error *err);

/* events.c: the engine's callback; ctx is a sequence. */
void job_on_event(void *ctx, const struct engine_event *event);
NODISCARD bool job_events_open(struct sequence *q);
void job_events_close(struct sequence *q);

/* answer.c */
void answer_start(struct job *j);      /* headers of a stream */
void answer_flush(struct sequence *q); /* a chunk, if there is news */
void answer_finish(struct job *j);     /* the end of a stream, or the whole body */

#endif

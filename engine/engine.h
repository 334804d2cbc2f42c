/* The engine: one model, one device, one thread that runs steps over everyone's sequences.
 *
 * A step is one forward pass over a ragged batch: a token of each running sequence and chunks
 * of the prompts that are being read. Sequences join and leave between steps. Everything a sequence
 * can need (KV pages for prompt and output) is reserved when it is admitted, so a running sequence
 * never fails for lack of memory.
 *
 * The engine knows nothing of names, tenants or files: a request comes with token ids and with
 * adapters that stay valid until its last event. Thread-safe: any thread may submit and
 * cancel; callbacks run on the engine thread and must not block. */
#ifndef ENGINE_ENGINE_H
#define ENGINE_ENGINE_H

#include "base/key128.h"
#include "base/status.h"
#include "engine/chat.h"
#include "engine/tokenizer.h"
#include "kernels/device.h"
#include "kernels/lowrank.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct engine;

/* Files in which packed weights may be kept for the next start. */
#define PACK_PATHS 2

struct engine_config {
    const char *model_path;
    struct device *device;    /* not owned; outlives the engine */
    int max_batch;            /* sequences running at once; 0: 64 */
    int max_queue;            /* sequences waiting; 0: 1024 */
    int prefill_chunk;        /* prompt tokens in one step at most; 0: 128 */
    size_t kv_bytes;          /* budget of the KV cache; 0: 1 GiB. Less is used where max_batch full
                                 contexts fit in less */
    enum dtype kv_type;       /* DTYPE_F16 or DTYPE_F32 */
    int context_length;       /* 0: the model's own */
    int lr_width;             /* see device_limits; 0: 4096 */
    bool no_prefix_cache;     /* what was computed for one request is not kept for others */
    double turn_seconds;      /* of background work between two steps; 0: 0.01 */
    /* Packed weights are taken from the first of these files that holds them, or else written to the first
     * that can be. NULL ends the list; the first NULL: they are packed at every start. */
    const char *pack_path[PACK_PATHS];
    /* Called while opening, on the opening thread, for a progress bar; done in 0..1. May be NULL. */
    void (*on_progress)(void *ctx, double done);
    void *progress_ctx;
};

NODISCARD enum status engine_open(const struct engine_config *config, struct engine **out,
                                  struct error *err);
/* Cancels what is left, joins the thread, frees. To drain, stop submitting and wait for the events. */
void engine_close(struct engine *e);

/* The shapes an adapter must fit. */
struct model_shape {
    int layers, heads, kv_heads, head_dim;
    size_t embed, ffn, vocab;
    int context_length;
    bool qk_permuted; /* q and k rows are stored for adjacent-pair rotation (GGUF llama) */
    char name[128];   /* general.name, for people */
    char fingerprint[17]; /* hex, of the model file's metadata and size */
};
/* Width of a projection's input and output. */
void model_shape_projection(const struct model_shape *s, enum projection p, size_t *d_in,
                            size_t *d_out);
const struct model_shape *engine_shape(const struct engine *e);
/* A row of a projection's weights as the model file has it, decoded: out (d_in). Any thread may call it. */
void engine_weight_row(const struct engine *e, int layer, enum projection p, size_t row, float *out);
const struct tokenizer *engine_tokenizer(const struct engine *e);
/* NULL where the model has no template or an unknown one; why, in err (may be NULL). */
const struct chat_template *engine_chat(const struct engine *e, struct error *err);

struct logit_bias {
    int32_t token;
    float bias;
};

#define ENGINE_LOGPROBS_MAX 20
#define ENGINE_BIAS_MAX 4096       /* entries of logit_bias */
#define ENGINE_STOP_MAX 64         /* stop strings, and stop tokens */
#define ENGINE_STOP_BYTES_MAX 1024 /* of one stop string */

struct sampling {
    float temperature;       /* 0: greedy */
    float top_p, min_p;      /* 1 and 0: off */
    int top_k;               /* 0 or less: off */
    uint64_t seed;
    float presence_penalty, frequency_penalty; /* over generated tokens, as OpenAI defines them */
    float repetition_penalty;                  /* over prompt and generated tokens; 1: off */
    const struct logit_bias *bias;
    size_t bias_count;
    /* max_tokens is lowered to what the context has room for; 0 only reads the prompt. Before
     * min_tokens nothing ends the text: end tokens cannot be chosen, stop strings do not count. */
    int max_tokens, min_tokens;
    bool ignore_eos;         /* end tokens of the model do not end the text */
    const char *const *stop; /* [stop_count] NUL-terminated valid UTF-8, none empty */
    size_t stop_count;
    const int32_t *stop_token_ids;
    size_t stop_token_count;
    bool include_stop;       /* keep the stop string in the text */
    bool skip_special;       /* special tokens give no text; default true */
    int logprobs;            /* alternatives reported for each token, 0..MAX; -1: none at all */
    int prompt_logprobs;     /* the same for the prompt's tokens; -1: none */
};

struct engine_event;

/* Everything is copied by engine_submit but the adapters behind `members`. */
struct engine_request {
    const int32_t *prompt;
    size_t prompt_count;            /* >= 1 */
    struct sampling sampling;
    const struct lr_member *members;
    size_t member_count;            /* at most ENGINE_SET_MAX */
    /* Equal exactly for equal sets, of equal contents and weights: their rows are neighbours in a batch,
     * and they share pages of the KV cache. Zero: the bare base. */
    struct key128 set_key;
    struct key128 cache_salt;       /* requests share KV pages with those of the same salt only */
    int priority;                   /* lower first among those waiting; ties by arrival */
    void (*on_event)(void *ctx, const struct engine_event *event);
    void *ctx;
};
#define ENGINE_SET_MAX 8

enum engine_event_kind {
    EVENT_ADMITTED, /* capacity is reserved: the request will run */
    EVENT_PROMPT,   /* prompt_logprobs are ready: one entry per prompt token from the second on */
    EVENT_TOKEN,    /* a token was generated; not sent for the end or stop token that ends the text */
    EVENT_DONE      /* the last event, always exactly one; adapters are no longer used */
};

enum finish_reason { FINISH_STOP, FINISH_LENGTH, FINISH_CANCELLED, FINISH_ERROR };

struct token_logprob {
    int32_t token;
    float logprob;
    int rank; /* 0: the most likely */
    int top_count;
    struct { int32_t token; float logprob; } top[ENGINE_LOGPROBS_MAX]; /* most likely first */
};

/* Valid during the callback only. */
struct engine_event {
    enum engine_event_kind kind;
    /* TOKEN */
    int32_t token;
    const struct token_logprob *logprob; /* NULL unless asked for */
    /* TOKEN and DONE: text that became certain: whole UTF-8 characters (invalid bytes replaced by
     * U+FFFD) which no stop string can still claim. May be empty: a later event carries the text. */
    const char *text;
    size_t text_size;
    /* PROMPT */
    const struct token_logprob *prompt_logprobs;
    size_t prompt_logprob_count;
    /* DONE */
    enum finish_reason finish;
    const char *stop_string;  /* the one that matched, or NULL */
    int32_t stop_token;       /* the token that ended it, or -1 */
    const struct error *error; /* with FINISH_ERROR */
    int prompt_tokens, output_tokens; /* output: generated ones, the ending token included */
    int cached_tokens; /* of the prompt, those found in the KV cache */
};

/* Queues a request. Its id, never 0, is for engine_cancel; no event is sent unless ST_OK, and the
 * first may come before this returns.
 * ST_INVALID: a token or a parameter out of range, or a prompt that leaves no room for a token in
 * the context (which is never longer than the KV cache can hold; err says the numbers);
 * ST_REJECTED: adapters wider than lr_width; ST_FULL: the queue is full; ST_DRAINING: closing;
 * ST_DEVICE: the device failed earlier, nothing can run. */
NODISCARD enum status engine_submit(struct engine *e, const struct engine_request *r, uint64_t *id_out,
                                    struct error *err);
/* Ends the sequence within a step, with FINISH_CANCELLED. Unknown and finished ids are ignored. */
void engine_cancel(struct engine *e, uint64_t id);

/* --- others' work on the engine's device ---------------------------------------------------------
 * Between steps the engine lends its device to background work: the borrower calls ops from its own thread while the
 * engine waits. While sequences run, a turn lasts turn_seconds of the configuration at most, and an op; borrowers take
 * turns in order of arrival. With nothing to serve, they have the device all the time. What ops compute does not depend
 * on how they are cut into turns. */
struct engine_turn; /* of one borrower, which is one thread at a time */
/* ST_NOMEM. To be closed before the engine. */
NODISCARD enum status engine_turn_open(struct engine *e, struct engine_turn **out);
void engine_turn_close(struct engine_turn *t); /* not while it has the device */
/* Waits for the device. ST_DEVICE: it failed. */
NODISCARD enum status engine_turn_begin(struct engine_turn *t);
/* To be called between ops: gives the device back where the turn is over and waits for the next. On failure
 * (as of engine_turn_begin) the device is given back. */
NODISCARD enum status engine_turn_continue(struct engine_turn *t);
void engine_turn_end(struct engine_turn *t);

/* The model and device behind the engine, for background work. */
struct model;
const struct model *engine_model(const struct engine *e);
int engine_step_rows(const struct engine *e); /* the most rows a forward op on its device may have */

struct engine_stats {
    int running, waiting;
    int kv_pages_used, kv_pages;
    uint64_t steps, prompt_tokens, output_tokens; /* prompt: computed ones */
    /* Tokens of the prompts of ended requests that might have been cached, and of those that were. */
    uint64_t prefix_queries, prefix_hits;
    double step_seconds, overhead_seconds; /* summed: whole steps; the part outside device ops */
};
void engine_stats(struct engine *e, struct engine_stats *out);

#endif

/* Measures the engine for bench.py: reads one job a line from standard input, answers numbers in one line.
 *
 *     prefill SEQUENCES LENGTH KIND ADAPTERS          prompt tokens a second, of prompts never seen before
 *     decode SEQUENCES LENGTH TOKENS KIND ADAPTERS    generated tokens a second, while all sequences decode, and the
 *                                                     share of the steps' time outside the device's ops
 *     logprobs TOKEN...                               log-probability of every token of a text but the first
 *
 * KIND is none, lora (rank 16 on all seven projections) or moe (8 experts of rank 4, the best two, likewise);
 * sequence i uses adapter i mod ADAPTERS. Weights of adapters are random: time does not depend on them. Prompts of
 * decode are the same each time and come from the prefix cache but for the first.
 *
 *     bench_engine MODEL.gguf THREADS [CPU-LEVEL] */
#include "base/memory.h"
#include "engine/engine.h"
#include "kernels/device.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SEQUENCES_MAX 32
#define ADAPTERS_MAX  8
#define PROMPT_MAX    8192
#define LINE_BYTES    (16 * PROMPT_MAX)

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void stop(const char *what, const struct error *err)
{
    fprintf(stderr, "bench_engine: %s: %s\n", what, err ? err->message : "");
    exit(1);
}

/* ------------------------------------------------------------------ adapters */

struct kind {
    const char *name;
    int experts, rank, top_k;
    enum gate_rule rule;
};
static const struct kind kinds[] = {
    {"lora", 1, 16, 1, GATE_NONE},
    {"moe", 8, 4, 2, GATE_TOPK},
};
#define KIND_COUNT (sizeof kinds / sizeof *kinds)

static uint64_t random_state = 1;

/* Uniform bf16 in +-1/16 (xorshift, Marsaglia 2003). */
static void *random_matrix(size_t count)
{
    uint16_t *m = malloc(count * sizeof *m);
    if (!m) stop("no memory for adapters", NULL);
    for (size_t i = 0; i < count; i++) {
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        random_state ^= random_state << 17;
        m[i] = f32_to_bf16((float)(int32_t)(random_state >> 32) / 34359738368.0f);
    }
    return m;
}

static const struct lr_site *make_site(struct device *d, const struct kind *k, size_t d_in, size_t d_out)
{
    const void *a[8], *b[8];
    float scale[8];
    for (int e = 0; e < k->experts; e++) {
        a[e] = random_matrix((size_t)k->rank * d_in);
        b[e] = random_matrix((size_t)k->rank * d_out);
        scale[e] = 1;
    }
    void *router = k->rule == GATE_NONE ? NULL : random_matrix((size_t)k->experts * d_in);
    struct lr_site_source source = {
        .experts = k->experts,
        .rank = k->rank,
        .top_k = k->top_k,
        .d_in = d_in,
        .d_out = d_out,
        .rule = k->rule,
        .temperature = 1,
        .type = DTYPE_BF16,
        .router_type = DTYPE_BF16,
        .router = router,
        .a = a,
        .b = b,
        .scale = scale,
    };
    struct lr_site *site;
    if (d->ops->lr_site_pack(d, &source, &site)) stop("cannot pack an adapter", NULL);
    for (int e = 0; e < k->experts; e++) {
        free((void *)a[e]);
        free((void *)b[e]);
    }
    free(router);
    return site;
}

/* Lives as long as the program. */
static struct lr_adapter *make_adapter(struct device *d, const struct model_shape *s, const struct kind *k)
{
    struct lr_adapter *adapter = calloc(1, sizeof *adapter);
    size_t count = (size_t)s->layers * PROJ_COUNT;
    const struct lr_site **sites = calloc(count, sizeof *sites);
    if (!adapter || !sites) stop("no memory for adapters", NULL);
    for (size_t i = 0; i < count; i++) {
        size_t d_in, d_out;
        model_shape_projection(s, (enum projection)(i % PROJ_COUNT), &d_in, &d_out);
        sites[i] = make_site(d, k, d_in, d_out);
    }
    *adapter = (struct lr_adapter){
        .width = (size_t)(3 * k->experts * (k->rank + 1)), .layers = s->layers, .sites = sites};
    return adapter;
}

/* ------------------------------------------------------------------ one job */

struct bench {
    struct device *device;
    struct engine *engine;
    int texts; /* used so far */
    struct lr_adapter *adapters[KIND_COUNT][ADAPTERS_MAX]; /* made when first asked for */
};

struct job {
    int sequences, length, tokens, kind, adapters; /* kind -1: none */
    int text;                                      /* other prompts for another number */
};

struct sequence {
    struct run *run;
    int seen;
    double first, last; /* times of its tokens */
    double *times;      /* [tokens] */
};

struct run {
    pthread_mutex_t lock;
    pthread_cond_t ended;
    int running;
    struct sequence sequences[SEQUENCES_MAX];
};

static void on_event(void *ctx, const struct engine_event *event)
{
    struct sequence *s = ctx;
    if (event->kind == EVENT_TOKEN) {
        s->last = s->times[s->seen++] = now();
        if (s->seen == 1) s->first = s->last;
    }
    if (event->kind != EVENT_DONE) return;
    if (event->finish != FINISH_LENGTH) stop("a sequence ended early", event->error);
    pthread_mutex_lock(&s->run->lock);
    s->run->running--;
    pthread_cond_signal(&s->run->ended);
    pthread_mutex_unlock(&s->run->lock);
}

static struct lr_member member_of(struct bench *b, const struct job *j, int sequence)
{
    int index = sequence % j->adapters;
    struct lr_adapter **adapter = &b->adapters[j->kind][index];
    if (!*adapter) *adapter = make_adapter(b->device, engine_shape(b->engine), &kinds[j->kind]);
    return (struct lr_member){.adapter = *adapter, .weight = 1};
}

static void submit_all(struct bench *b, const struct job *j, struct run *run)
{
    static int32_t prompt[PROMPT_MAX];
    for (int i = 0; i < j->sequences; i++) {
        for (int t = 0; t < j->length; t++) prompt[t] = 1000 + (j->text * 977 + i * 131 + t * 37) % 20000;
        struct lr_member member;
        struct engine_request request = {
            .prompt = prompt,
            .prompt_count = (size_t)j->length,
            .sampling = {.top_p = 1,
                         .repetition_penalty = 1,
                         .max_tokens = j->tokens,
                         .ignore_eos = true,
                         .skip_special = true,
                         .logprobs = -1,
                         .prompt_logprobs = -1},
            .on_event = on_event,
            .ctx = &run->sequences[i],
        };
        if (j->kind >= 0) {
            member = member_of(b, j, i);
            request.members = &member;
            request.member_count = 1;
            request.set_key.word[0] = (uint64_t)(1 + j->kind * ADAPTERS_MAX + i % j->adapters);
        }
        uint64_t id;
        struct error err;
        if (engine_submit(b->engine, &request, &id, &err)) stop("cannot submit", &err);
    }
}

struct result {
    double prefill_s;   /* from the submission to the last first token */
    double decode_rate; /* tokens a second while all sequences decode */
    double overhead;    /* share of the steps' time outside the device's ops */
};

static void wait_for_all(struct run *run)
{
    pthread_mutex_lock(&run->lock);
    while (run->running > 0) pthread_cond_wait(&run->ended, &run->lock);
    pthread_mutex_unlock(&run->lock);
}

static double decode_rate(const struct run *run, const struct job *j, double from)
{
    double to = 1e300;
    for (int i = 0; i < j->sequences; i++)
        if (run->sequences[i].last < to) to = run->sequences[i].last;
    long tokens = 0;
    for (int i = 0; i < j->sequences; i++)
        for (int t = 0; t < j->tokens; t++)
            tokens += run->sequences[i].times[t] > from && run->sequences[i].times[t] <= to;
    return (double)tokens / (to - from);
}

static struct result run_job(struct bench *b, const struct job *j)
{
    struct run run = {.running = j->sequences};
    pthread_mutex_init(&run.lock, NULL);
    pthread_cond_init(&run.ended, NULL);
    for (int i = 0; i < j->sequences; i++) {
        double *times = calloc((size_t)j->tokens, sizeof *times);
        if (!times) stop("no memory", NULL);
        run.sequences[i] = (struct sequence){.run = &run, .times = times};
        if (j->kind >= 0) (void)member_of(b, j, i); /* made before the clock starts */
    }
    struct engine_stats before, after;
    engine_stats(b->engine, &before);
    double begin = now(), from = 0;
    submit_all(b, j, &run);
    wait_for_all(&run);
    engine_stats(b->engine, &after);

    for (int i = 0; i < j->sequences; i++)
        if (run.sequences[i].first > from) from = run.sequences[i].first;
    struct result result = {
        .prefill_s = from - begin,
        .decode_rate = decode_rate(&run, j, from),
        .overhead = (after.overhead_seconds - before.overhead_seconds) / (after.step_seconds - before.step_seconds),
    };
    for (int i = 0; i < j->sequences; i++) free(run.sequences[i].times);
    pthread_cond_destroy(&run.ended);
    pthread_mutex_destroy(&run.lock);
    return result;
}

/* ------------------------------------------------------------------ a text's log-probabilities */

struct text_run {
    pthread_mutex_t lock;
    pthread_cond_t ended;
    bool done;
};

static void on_text_event(void *ctx, const struct engine_event *event)
{
    struct text_run *run = ctx;
    for (size_t i = 0; event->kind == EVENT_PROMPT && i < event->prompt_logprob_count; i++)
        printf("%.7g ", (double)event->prompt_logprobs[i].logprob);
    if (event->kind != EVENT_DONE) return;
    if (event->finish != FINISH_LENGTH) stop("the text ended early", event->error);
    pthread_mutex_lock(&run->lock);
    run->done = true;
    pthread_cond_signal(&run->ended);
    pthread_mutex_unlock(&run->lock);
}

static void print_logprobs(struct bench *b, const int32_t *token, size_t count)
{
    struct text_run run = {.done = false};
    pthread_mutex_init(&run.lock, NULL);
    pthread_cond_init(&run.ended, NULL);
    struct engine_request request = {
        .prompt = token,
        .prompt_count = count,
        .sampling = {.top_p = 1, .repetition_penalty = 1, .logprobs = -1, .prompt_logprobs = 0},
        .on_event = on_text_event,
        .ctx = &run,
    };
    uint64_t id;
    struct error err;
    if (engine_submit(b->engine, &request, &id, &err)) stop("cannot submit the text", &err);
    pthread_mutex_lock(&run.lock);
    while (!run.done) pthread_cond_wait(&run.ended, &run.lock);
    pthread_mutex_unlock(&run.lock);
    printf("\n");
    pthread_cond_destroy(&run.ended);
    pthread_mutex_destroy(&run.lock);
}

/* ------------------------------------------------------------------ the loop */

static int kind_of(const char *name)
{
    for (size_t i = 0; i < KIND_COUNT; i++)
        if (!strcmp(kinds[i].name, name)) return (int)i;
    return -1;
}

static bool job_valid(const struct job *j)
{
    return j->sequences >= 1 && j->sequences <= SEQUENCES_MAX && j->length >= 1 && j->length <= PROMPT_MAX &&
           j->tokens >= 1 && (j->kind < 0 || (j->adapters >= 1 && j->adapters <= ADAPTERS_MAX));
}

/* false: the line is not a job. */
static bool answer(struct bench *b, const char *line)
{
    struct job j = {.tokens = 1};
    char kind[16];
    if (sscanf(line, "prefill %d %d %15s %d", &j.sequences, &j.length, kind, &j.adapters) == 4) {
        j.kind = kind_of(kind);
        j.text = ++b->texts;
        if (!job_valid(&j)) return false;
        printf("%.6g\n", j.sequences * j.length / run_job(b, &j).prefill_s);
        return true;
    }
    if (sscanf(line, "decode %d %d %d %15s %d", &j.sequences, &j.length, &j.tokens, kind, &j.adapters) == 5) {
        j.kind = kind_of(kind);
        if (!job_valid(&j) || j.tokens < 2) return false;
        struct result result = run_job(b, &j);
        printf("%.6g %.6g\n", result.decode_rate, result.overhead);
        return true;
    }
    if (!strncmp(line, "logprobs ", 9)) {
        static int32_t token[PROMPT_MAX];
        size_t count = 0;
        char *end;
        for (const char *at = line + 9; count < PROMPT_MAX; at = end) {
            long value = strtol(at, &end, 10);
            if (end == at) break;
            token[count++] = (int32_t)value;
        }
        if (count < 2) return false;
        print_logprobs(b, token, count);
        return true;
    }
    return false;
}

int main(int argc, char **argv)
{
    if (argc != 3 && argc != 4) {
        fputs("usage: bench_engine MODEL.gguf THREADS [CPU-LEVEL]   (jobs on standard input)\n", stderr);
        return 2;
    }
    struct error err;
    struct bench b = {0};
    struct cpu_device_config device = {.level = CPU_LEVEL_BEST, .threads = atoi(argv[2])};
    if (argc == 4 && cpu_level_parse(argv[3], &device.level)) stop("no such CPU level", NULL);
    if (cpu_device_open(&device, &b.device, &err)) stop("device", &err);
    struct engine_config config = {.model_path = argv[1],
                                   .device = b.device,
                                   .max_batch = SEQUENCES_MAX,
                                   .prefill_chunk = 512,
                                   .kv_type = DTYPE_F16};
    if (engine_open(&config, &b.engine, &err)) stop("engine", &err);
    printf("%s\n", b.device->name);
    fflush(stdout);

    static char line[LINE_BYTES];
    while (fgets(line, sizeof line, stdin)) {
        if (!answer(&b, line)) stop("not a job", NULL);
        fflush(stdout);
    }
    engine_close(b.engine);
    b.device->ops->close(b.device);
    return 0;
}

/* Measures the engine for bench.py: reads one job a line from standard input, answers one number a line.
 *
 *     prefill SEQUENCES LENGTH KIND ADAPTERS          prompt tokens a second
 *     decode SEQUENCES LENGTH TOKENS KIND ADAPTERS    generated tokens a second, while all sequences decode
 *     bandwidth                                       bytes a second read from memory by all threads
 *
 * KIND is none, lora (rank 16 on all seven projections) or moe (8 experts of rank 4, the best two, likewise);
 * sequence i uses adapter i mod ADAPTERS. Weights of adapters are random: time does not depend on them.
 *
 *     bench_engine MODEL.gguf THREADS */
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
#define PROMPT_MAX    1024

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
    int threads;
    struct lr_adapter *adapters[KIND_COUNT][ADAPTERS_MAX]; /* made when first asked for */
};

struct job {
    int sequences, length, tokens, kind, adapters; /* kind -1: none */
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
    int32_t prompt[PROMPT_MAX];
    for (int i = 0; i < j->sequences; i++) {
        for (int t = 0; t < j->length; t++) prompt[t] = 1000 + (i * 131 + t * 37) % 20000;
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

/* The time from the submission to the last first token, and the rate while all sequences decode. */
static void run_job(struct bench *b, const struct job *j, double *prefill_s, double *decode_rate)
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
    double begin = now();
    submit_all(b, j, &run);
    pthread_mutex_lock(&run.lock);
    while (run.running > 0) pthread_cond_wait(&run.ended, &run.lock);
    pthread_mutex_unlock(&run.lock);

    double from = 0, to = 1e300;
    for (int i = 0; i < j->sequences; i++) {
        if (run.sequences[i].first > from) from = run.sequences[i].first;
        if (run.sequences[i].last < to) to = run.sequences[i].last;
    }
    long tokens = 0;
    for (int i = 0; i < j->sequences; i++) {
        for (int t = 0; t < j->tokens; t++)
            tokens += run.sequences[i].times[t] > from && run.sequences[i].times[t] <= to;
        free(run.sequences[i].times);
    }
    *prefill_s = from - begin;
    *decode_rate = (double)tokens / (to - from);
    pthread_cond_destroy(&run.ended);
    pthread_mutex_destroy(&run.lock);
}

/* ------------------------------------------------------------------ memory bandwidth */

#define STREAM_BYTES ((size_t)256 << 20) /* of each thread: far beyond any cache */

static void *stream_memory(void *data)
{
    const uint64_t *p = data;
    uint64_t sum[8] = {0};
    for (size_t i = 0; i < STREAM_BYTES / sizeof *p; i += 8)
        for (size_t lane = 0; lane < 8; lane++) sum[lane] += p[i + lane];
    for (size_t lane = 1; lane < 8; lane++) sum[0] += sum[lane];
    return (void *)(uintptr_t)sum[0]; /* so that the loop has a purpose */
}

static double measure_bandwidth(int threads)
{
    pthread_t thread[64];
    void *data[64];
    if (threads > 64) threads = 64;
    for (int i = 0; i < threads; i++) {
        data[i] = memory_alloc(STREAM_BYTES);
        if (!data[i]) stop("no memory for the bandwidth test", NULL);
        memset(data[i], i + 1, STREAM_BYTES);
    }
    double best = 1e300;
    for (int round = 0; round < 5; round++) {
        double begin = now();
        for (int i = 0; i < threads; i++)
            if (pthread_create(&thread[i], NULL, stream_memory, data[i])) stop("no threads", NULL);
        for (int i = 0; i < threads; i++) pthread_join(thread[i], NULL);
        double took = now() - begin;
        if (took < best) best = took;
    }
    for (int i = 0; i < threads; i++) memory_free(data[i]);
    return (double)STREAM_BYTES * threads / best;
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
static bool answer(struct bench *b, const char *line, double *out)
{
    struct job j = {.tokens = 1};
    char kind[16];
    double prefill_s, decode_rate;
    if (!strncmp(line, "bandwidth", 9)) {
        *out = measure_bandwidth(b->threads);
        return true;
    }
    if (sscanf(line, "prefill %d %d %15s %d", &j.sequences, &j.length, kind, &j.adapters) == 4) {
        j.kind = kind_of(kind);
        if (!job_valid(&j)) return false;
        run_job(b, &j, &prefill_s, &decode_rate);
        *out = j.sequences * j.length / prefill_s;
        return true;
    }
    if (sscanf(line, "decode %d %d %d %15s %d", &j.sequences, &j.length, &j.tokens, kind, &j.adapters) == 5) {
        j.kind = kind_of(kind);
        if (!job_valid(&j)) return false;
        run_job(b, &j, &prefill_s, &decode_rate);
        *out = decode_rate;
        return true;
    }
    return false;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fputs("usage: bench_engine MODEL.gguf THREADS   (jobs on standard input)\n", stderr);
        return 2;
    }
    struct error err;
    struct bench b = {.threads = atoi(argv[2])};
    struct cpu_device_config device = {.level = CPU_LEVEL_BEST, .threads = b.threads};
    if (cpu_device_open(&device, &b.device, &err)) stop("device", &err);
    struct engine_config config = {.model_path = argv[1],
                                   .device = b.device,
                                   .max_batch = SEQUENCES_MAX,
                                   .prefill_chunk = 512,
                                   .no_prefix_cache = true, /* rounds repeat their prompts */
                                   .kv_type = DTYPE_F16};
    if (engine_open(&config, &b.engine, &err)) stop("engine", &err);
    printf("%s\n", b.device->name);
    fflush(stdout);

    char line[256];
    while (fgets(line, sizeof line, stdin)) {
        double result;
        if (!answer(&b, line, &result)) stop("not a job", NULL);
        printf("%.6g\n", result);
        fflush(stdout);
    }
    engine_close(b.engine);
    b.device->ops->close(b.device);
    return 0;
}

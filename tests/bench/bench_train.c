/* Measures training for train_bench.py: an adapter on all seven projections learns one batch of sequences
 * again and again. Writes a line when it is ready, then for each line of standard input makes a step
 * (forward, backward, clipped AdamW) and answers the seconds it took and the loss.
 *
 *     bench_train MODEL.gguf THREADS EXPERTS RANK TOP_K SEQUENCES LENGTH SCORED
 *
 * SCORED: tokens at each sequence's end that are learned; the others are prompt. EXPERTS 1 is a LoRA. */
#include "training/learner.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define RATE 1e-3

struct bench {
    struct device *device;
    struct engine *engine;
    struct transposed *transposed;
    struct learner *learner;
    struct pass_batch batch;
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void must(enum status st, const struct error *err)
{
    if (!st) return;
    fprintf(stderr, "bench_train: %s: %s\n", status_text(st), err ? err->message : "");
    exit(1);
}

static void *array(size_t count, size_t size)
{
    void *p = calloc(count, size);
    if (!p) must(ST_NOMEM, NULL);
    return p;
}

static void engine_start(struct bench *b, const char *model, int threads)
{
    struct error err;
    struct cpu_device_config device = {.level = CPU_LEVEL_BEST, .threads = threads};
    must(cpu_device_open(&device, &b->device, &err), &err);
    struct engine_config config = {
        .device = b->device, .model_path = model, .kv_type = DTYPE_F16, .max_batch = 1, .context_length = 64};
    must(engine_open(&config, &b->engine, &err), &err);
}

static struct adapter_base base_of(const struct engine *e)
{
    const struct model_shape *s = engine_shape(e);
    struct adapter_base base = {.layers = s->layers,
                                .heads = s->heads,
                                .kv_heads = s->kv_heads,
                                .head_dim = s->head_dim,
                                .qk_permuted = s->qk_permuted};
    for (int p = 0; p < PROJ_COUNT; p++)
        model_shape_projection(s, (enum projection)p, &base.d_in[p], &base.d_out[p]);
    return base;
}

static void learner_start(struct bench *b, int experts, int rank, int top_k)
{
    struct error err;
    struct adapter_base base = base_of(b->engine);
    struct fresh_adapter fresh = {.rank = rank,
                                  .experts = experts,
                                  .top_k = top_k,
                                  .rule = GATE_TOPK,
                                  .alpha = (float)(2 * rank),
                                  .target = {1, 1, 1, 1, 1, 1, 1}};
    struct adapter_bundle *bundle;
    must(bundle_fresh(&fresh, &base, &bundle, &err), &err);
    must(transposed_open(b->engine, &b->transposed, &err), &err);
    must(learner_open(b->engine, b->device, b->transposed, bundle, &b->learner, &err), &err);
    adapter_bundle_free(bundle);
}

/* The tokens of train_peer.py, in rows as train_batch_fill makes them: none for a last token. */
static void batch_make(struct bench *b, int sequences, int length, int scored)
{
    int each = length - 1, rows = sequences * each;
    int *first = array((size_t)sequences + 1, sizeof *first);
    int32_t *token = array((size_t)rows, sizeof *token), *target = array((size_t)rows, sizeof *target);
    float *weight = array((size_t)rows, sizeof *weight);
    for (int r = 0; r < rows; r++) {
        int s = r / each, t = r % each;
        token[r] = 1000 + (s * 131 + t * 37) % 20000;
        target[r] = 1000 + (s * 131 + (t + 1) * 37) % 20000;
        weight[r] = t + 1 >= length - scored ? 1.0f / (float)(sequences * scored) : 0;
    }
    for (int s = 0; s <= sequences; s++) first[s] = s * each;
    b->batch = (struct pass_batch){.rows = rows,
                                   .seq_count = sequences,
                                   .first_row = first,
                                   .token = token,
                                   .target = target,
                                   .weight = weight};
    must(learner_reserve(b->learner, rows, each), NULL);
}

static void step(struct bench *b)
{
    struct train_settings settings;
    train_settings_default(&settings);
    struct learner *l = b->learner;
    struct pass_loss loss = {.balance = settings.balance,
                             .contrast = settings.contrast,
                             .temperature = settings.contrast_temperature,
                             .pairs = (int)settings.contrast_pairs,
                             .seed = (uint64_t)l->optim_steps};
    struct pass_result result;
    double norm, begin = now();
    must(pass_backward(l->pass, &b->batch, l->params->routed_count ? &loss : NULL, NULL, &result), NULL);
    must(learner_update(l, &settings, RATE, &norm), NULL);
    printf("%.6f %.5f\n", now() - begin, result.ce);
    fflush(stdout);
}

static void bench_close(struct bench *b)
{
    learner_close(b->learner);
    transposed_close(b->transposed);
    engine_close(b->engine);
    b->device->ops->close(b->device);
    free((void *)b->batch.first_row);
    free((void *)b->batch.token);
    free((void *)b->batch.target);
    free((void *)b->batch.weight);
}

int main(int argc, char **argv)
{
    if (argc != 9) {
        fprintf(stderr, "usage: bench_train MODEL THREADS EXPERTS RANK TOP_K SEQUENCES LENGTH SCORED\n");
        return 2;
    }
    int n[9];
    for (int i = 2; i < 9; i++) n[i] = atoi(argv[i]);
    struct bench b = {0};
    engine_start(&b, argv[1], n[2]);
    learner_start(&b, n[3], n[4], n[5]);
    batch_make(&b, n[6], n[7], n[8]);
    printf("%s, %zu parameters\n", b.device->name, b.learner->params->count);
    fflush(stdout);
    for (char line[64]; fgets(line, sizeof line, stdin);) step(&b);
    bench_close(&b);
    return 0;
}

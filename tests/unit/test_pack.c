/* Packed weights kept from one start of a model to the next. */
#include "engine/pack.h"

#include "tests/support/check.h"
#include "tests/support/gguf_writer.h"
#include "tests/support/random.h"
#include "tests/support/rig.h"
#include "tests/support/teacher.h"
#include "tests/support/temp_folder.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define LAYERS 2
#define EMBED  256
#define HEADS  4
#define KV     128
#define FFN    512
#define VOCAB  30000 /* enough for a file to be worth it: 8 MB */
#define TOKENS 20

struct stage {
    struct device *device;
    struct temp_folder folder;
    char model[300];
    float *logits[2]; /* (TOKENS, VOCAB) */
};

/* Q8_0 rows with small scales, so that nothing overflows. */
static void *random_q8_0(struct test_random *r, size_t rows, size_t cols, size_t *bytes)
{
    *bytes = rows * dtype_row_bytes(DTYPE_Q8_0, cols);
    unsigned char *data = malloc(*bytes);
    random_bytes(r, data, *bytes);
    for (size_t at = 0; at < *bytes; at += 34) data[at] = 0, data[at + 1] = 0x10; /* 2^-11 */
    return data;
}

static void put_matrix(struct gguf_writer *w, struct test_random *r, const char *name, size_t cols,
                       size_t rows)
{
    size_t bytes;
    void *data = random_q8_0(r, rows, cols, &bytes);
    gguf_put_tensor(w, name, DTYPE_Q8_0, 2, (uint64_t[]){cols, rows}, data, bytes);
    free(data);
}

static void put_norm(struct gguf_writer *w, const char *name)
{
    float ones[EMBED];
    for (int i = 0; i < EMBED; i++) ones[i] = 1;
    gguf_put_tensor(w, name, DTYPE_F32, 1, (uint64_t[]){EMBED}, ones, sizeof ones);
}

static void put_layer(struct gguf_writer *w, struct test_random *r, int layer)
{
    static const struct {
        const char *name;
        size_t cols, rows;
    } matrix[] = {{"attn_q", EMBED, EMBED},      {"attn_k", EMBED, KV},    {"attn_v", EMBED, KV},
                  {"attn_output", EMBED, EMBED}, {"ffn_gate", EMBED, FFN}, {"ffn_up", EMBED, FFN},
                  {"ffn_down", FFN, EMBED}};
    char name[64];
    for (size_t i = 0; i < sizeof matrix / sizeof *matrix; i++) {
        snprintf(name, sizeof name, "blk.%d.%s.weight", layer, matrix[i].name);
        put_matrix(w, r, name, matrix[i].cols, matrix[i].rows);
    }
    snprintf(name, sizeof name, "blk.%d.attn_norm.weight", layer);
    put_norm(w, name);
    snprintf(name, sizeof name, "blk.%d.ffn_norm.weight", layer);
    put_norm(w, name);
}

/* In place of the one there. */
static void model_write(const char *path, uint64_t seed, size_t vocab)
{
    struct gguf_writer w = {.version = 3};
    struct strbuf bytes = {0};
    struct test_random r = {seed};
    gguf_put_string(&w, "general.architecture", "llama");
    gguf_put_u64(&w, "llama.block_count", GGUF_U32, LAYERS);
    gguf_put_u64(&w, "llama.embedding_length", GGUF_U32, EMBED);
    gguf_put_u64(&w, "llama.feed_forward_length", GGUF_U32, FFN);
    gguf_put_u64(&w, "llama.attention.head_count", GGUF_U32, HEADS);
    gguf_put_u64(&w, "llama.attention.head_count_kv", GGUF_U32, HEADS * KV / EMBED);
    gguf_put_u64(&w, "llama.context_length", GGUF_U32, 64);
    put_matrix(&w, &r, "token_embd.weight", EMBED, vocab);
    put_norm(&w, "output_norm.weight");
    for (int l = 0; l < LAYERS; l++) put_layer(&w, &r, l);
    gguf_finish(&w, &bytes);
    assert_int_equal(file_replace(path, bytes.data, bytes.size, NULL), ST_OK);
    strbuf_release(&bytes);
}

static bool mapped(const char *path)
{
    char line[1024];
    bool found = false;
    FILE *f = fopen("/proc/self/maps", "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f)) found |= strstr(line, path) != NULL;
    fclose(f);
    return found;
}

/* Opens the model with pack files as given (or none), runs some tokens, closes. from: which file is in use.
 */
static void run(struct stage *s, const char *first, const char *second, float *logits, const char **from)
{
    struct model_config config = {.path = s->model, .device = s->device, .pack_path = {first, second}};
    struct teacher t;
    struct error err;
    assert_ok(teacher_open_as(&config, 32, DTYPE_F32, &t, &err), err);
    int32_t tokens[TOKENS];
    for (int i = 0; i < TOKENS; i++) tokens[i] = i * 1471 % VOCAB;
    assert_int_equal(teacher_run(&t, tokens, TOKENS, 8, NULL, 0, logits), ST_OK);
    *from = first && mapped(first) ? first : second && mapped(second) ? second : NULL;
    teacher_close(&t);
}

static void assert_same(struct stage *s)
{
    for (int i = 0; i < TOKENS * VOCAB; i++) assert_true(isfinite(s->logits[0][i]));
    assert_memory_equal(s->logits[0], s->logits[1], sizeof(float) * TOKENS * VOCAB);
}

static void the_next_start_maps_the_same_weights(void **state)
{
    struct stage *s = *state;
    char *path = strdup(path_in(s->folder.path, "model.gguf.pack"));
    const char *from;
    run(s, NULL, NULL, s->logits[0], &from);
    assert_int_equal(file_count(s->folder.path), 1);
    run(s, path, NULL, s->logits[1], &from);
    assert_null(from);
    assert_same(s);
    run(s, path, NULL, s->logits[1], &from);
    assert_ptr_equal(from, path);
    assert_same(s);
    assert_int_equal(file_count(s->folder.path), 2);
    free(path);
}

static void a_changed_model_replaces_its_file(void **state)
{
    struct stage *s = *state;
    char *path = strdup(path_in(s->folder.path, "model.gguf.pack"));
    const char *from;
    run(s, path, NULL, s->logits[0], &from);
    model_write(s->model, 2, VOCAB);
    run(s, path, NULL, s->logits[0], &from);
    assert_null(from);
    run(s, path, NULL, s->logits[1], &from);
    assert_ptr_equal(from, path);
    assert_same(s);
    run(s, NULL, NULL, s->logits[1], &from);
    assert_same(s);
    assert_int_equal(file_count(s->folder.path), 2);
    free(path);
}

static void where_one_folder_cannot_be_written_the_next_is_used(void **state)
{
    struct stage *s = *state;
    char *nowhere = strdup(path_in(s->folder.path, "model.gguf/x.pack")); /* below a file */
    char *path = strdup(path_in(s->folder.path, "cache/x.pack"));
    const char *from;
    run(s, nowhere, NULL, s->logits[0], &from); /* served all the same */
    assert_null(from);
    run(s, nowhere, path, s->logits[1], &from);
    assert_null(from);
    assert_same(s);
    run(s, nowhere, path, s->logits[1], &from);
    assert_ptr_equal(from, path);
    assert_same(s);
    free(nowhere);
    free(path);
}

static void small_models_and_weights_in_place_need_no_file(void **state)
{
    struct stage *s = *state;
    char *path = strdup(path_in(s->folder.path, "x.pack"));
    struct model_config config = {.path = s->model, .device = s->device, .pack_path = {path}};
    struct model *m;
    model_write(s->model, 3, 100);
    assert_int_equal(model_open(&config, &m, NULL), ST_OK);
    model_close(m);
    config.device = rig_device(CPU_REFERENCE, 1);
    model_write(s->model, 3, VOCAB);
    assert_int_equal(model_open(&config, &m, NULL), ST_OK);
    model_close(m);
    config.device->ops->close(config.device);
    assert_int_equal(file_count(s->folder.path), 1);
    free(path);
}

/* --- what the file cannot vouch for --- */

/* A device whose layouts have changed while their names have not. */
static bool never_filled(struct device *d, const struct matrix *m, const void *packed, size_t row)
{
    (void)d, (void)m, (void)packed, (void)row;
    return false;
}

static void a_sample_of_every_weight_is_packed_anew(void **state)
{
    struct stage *s = *state;
    char *path = strdup(path_in(s->folder.path, "model.gguf.pack"));
    const char *from;
    run(s, path, NULL, s->logits[0], &from);
    struct device_ops ops = *s->device->ops;
    const struct device_ops *real = s->device->ops;
    ops.weight_filled = never_filled;
    s->device->ops = &ops;
    run(s, path, NULL, s->logits[1], &from);
    s->device->ops = real;
    assert_null(from);
    assert_same(s);
    free(path);
}

/* --- together --- */

struct starter {
    struct stage *stage;
    const char *path;
    pthread_t thread;
    enum status st;
};

static void *starter_main(void *arg)
{
    struct starter *a = arg;
    struct device *d = rig_device(CPU_LEVEL_BEST, 1);
    struct model_config config = {.path = a->stage->model, .device = d, .pack_path = {a->path}};
    for (int i = 0; i < 3 && !a->st; i++) {
        struct model *m;
        a->st = model_open(&config, &m, NULL);
        if (!a->st) model_close(m);
    }
    d->ops->close(d);
    return NULL;
}

static void several_may_start_at_once(void **state)
{
    struct stage *s = *state;
    char *path = strdup(path_in(s->folder.path, "model.gguf.pack"));
    struct starter starters[3];
    for (int i = 0; i < 3; i++) {
        starters[i] = (struct starter){.stage = s, .path = path};
        assert_int_equal(pthread_create(&starters[i].thread, NULL, starter_main, &starters[i]), 0);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(starters[i].thread, NULL);
        assert_int_equal(starters[i].st, ST_OK);
    }
    const char *from;
    run(s, NULL, NULL, s->logits[0], &from);
    run(s, path, NULL, s->logits[1], &from);
    assert_ptr_equal(from, path);
    assert_same(s);
    assert_int_equal(file_count(s->folder.path), 2);
    free(path);
}

/* --- progress --- */

struct progress {
    double last, step_max;
    bool backwards;
};

static void on_progress(void *ctx, double done)
{
    struct progress *p = ctx;
    p->backwards |= done < p->last;
    p->step_max = fmax(p->step_max, done - p->last);
    p->last = done;
}

/* One tensor is nearly the whole file; it is packed in several steps. */
static void progress_moves_within_a_tensor(void **state)
{
    struct stage *s = *state;
    struct progress p = {0};
    struct model_config config = {
        .path = s->model, .device = s->device, .on_progress = on_progress, .progress_ctx = &p};
    struct model *m;
    assert_int_equal(model_open(&config, &m, NULL), ST_OK);
    model_close(m);
    assert_true(!p.backwards && p.last == 1 && p.step_max < 0.6);
}

static int setup(void **state)
{
    static struct stage s;
    s.device = rig_device(CPU_LEVEL_BEST, 2);
    temp_folder_make(&s.folder);
    snprintf(s.model, sizeof s.model, "%s/model.gguf", s.folder.path);
    model_write(s.model, 1, VOCAB);
    for (int i = 0; i < 2; i++) s.logits[i] = calloc(TOKENS * VOCAB, sizeof(float));
    *state = &s;
    return 0;
}

static int teardown(void **state)
{
    struct stage *s = *state;
    s->device->ops->close(s->device);
    temp_folder_remove(&s->folder);
    for (int i = 0; i < 2; i++) free(s->logits[i]);
    return 0;
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    if (cpu_level_supported() == CPU_REFERENCE) {
        print_message("this processor has no kernels that pack weights\n");
        return cmocka_run_group_tests(((const struct CMUnitTest[]){TEST(progress_moves_within_a_tensor)}),
                                      NULL, NULL);
    }
    const struct CMUnitTest tests[] = {
        TEST(the_next_start_maps_the_same_weights),
        TEST(a_changed_model_replaces_its_file),
        TEST(where_one_folder_cannot_be_written_the_next_is_used),
        TEST(small_models_and_weights_in_place_need_no_file),
        TEST(a_sample_of_every_weight_is_packed_anew),
        TEST(several_may_start_at_once),
        TEST(progress_moves_within_a_tensor),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

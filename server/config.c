#include "server/config.h"

#include "base/file.h"
#include "base/log.h"
#include "server/pack_path.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

enum {
    SERVE = COMMAND_SERVE,
    GENERATE = COMMAND_GENERATE,
    TRAIN = COMMAND_TRAIN,
    RUNS = SERVE | GENERATE,
    ENGINE = RUNS | TRAIN,
    REMOTE = COMMAND_LIST | COMMAND_CHANGE
};

#define AT(member) offsetof(struct config, member)

static const struct option options[] = {
    {"model", "FILE", "the model, a GGUF file (required)", OPTION_STRING, AT(model), .commands = ENGINE},
    {"config", "FILE", "a JSON file of these options, {\"max-batch\": 32, ...}", OPTION_STRING, AT(file),
     .commands = SERVE},
    {"data", "DIR", "where adapters are kept (~/.local/share/medley)", OPTION_STRING, AT(data),
     .commands = SERVE},
    {"listen", "HOST:PORT", "address; port 0 picks a free one (127.0.0.1:8080)", OPTION_STRING, AT(listen),
     .commands = SERVE},
    {"insecure-listen", NULL, "allow an address others can reach although no key is set", OPTION_FLAG,
     AT(insecure_listen), .commands = SERVE},
    {"model-name", "NAME", "the base model's name in requests (the file's name without .gguf)", OPTION_STRING,
     AT(model_name), .commands = SERVE},
    {"threads", "N", "compute threads; 0: one per core", OPTION_INT, AT(threads), 0, 1024, ENGINE},
    {"no-pin", NULL, "let threads change cores also where they are as many as the cores", OPTION_FLAG, AT(no_pin),
     .commands = ENGINE},
    {"cpu-level", "LEVEL", "instruction set; default: the machine's best", OPTION_STRING, AT(cpu_level),
     .commands = ENGINE, .choices = "reference|avx2|avxvnni|avx512"},
    {"max-batch", "N", "sequences decoded together (64)", OPTION_INT, AT(max_batch), 1, 4096, SERVE},
    {"max-queue", "N", "sequences that may wait (1024)", OPTION_INT, AT(max_queue), 1, 1 << 20, SERVE},
    {"prefill-chunk", "N", "prompt tokens read in one step at most (128)", OPTION_INT, AT(prefill_chunk), 1,
     1 << 16, RUNS},
    {"context", "N", "context length; 0: the model's own", OPTION_INT, AT(context), 0, 1 << 24, ENGINE},
    {"kv-bytes", "SIZE", "memory for keys and values (1G, or less where that is plenty)", OPTION_BYTES,
     AT(kv_bytes), .commands = RUNS},
    {"kv-type", "TYPE", "element type of keys and values (f16)", OPTION_STRING, AT(kv_type), .commands = RUNS,
     .choices = "f16|f32"},
    {"pack-cache", "DIR",
     "keep packed weights here for the next start; off: nowhere (beside the model, else ~/.cache)",
     OPTION_STRING, AT(pack_cache), .commands = ENGINE},
    {"no-prefix-cache", NULL, "compute every prompt anew, whatever was computed for others", OPTION_FLAG,
     AT(no_prefix_cache), .commands = SERVE},
    {"adapter-bytes", "SIZE", "memory for adapters (1G)", OPTION_BYTES, AT(adapter_bytes), .commands = SERVE},
    {"keep-versions", "N", "versions kept of an adapter that asks for no other number; 0: all (0)",
     OPTION_INT, AT(keep_versions), 0, 1000000, SERVE},
    {"adapter-root", "DIR", "folder from which /v1/load_lora_adapter may load (none)", OPTION_STRING,
     AT(adapter_root), .commands = SERVE},
    {"upload-bytes", "SIZE", "largest adapter upload (1G)", OPTION_BYTES, AT(upload_bytes),
     .commands = SERVE},
    {"rank-max", "N", "largest rank of an adapter's expert (256)", OPTION_INT, AT(rank_max), 1, LR_RANK_MAX,
     ENGINE},
    {"experts-max", "N", "most experts of an adapter's site (64)", OPTION_INT, AT(experts_max), 1,
     LR_EXPERTS_MAX, ENGINE},
    {"lr-width", "N", "scratch a row has for adapters, in numbers (4096)", OPTION_INT, AT(lr_width), 1,
     1 << 20, RUNS},
    {"no-training", NULL, "refuse all calls that train", OPTION_FLAG, AT(no_training), .commands = SERVE},
    {"train-turn-ms", "X", "time training has between two steps of running answers (10)", OPTION_REAL,
     AT(train_turn_ms), 0.1, 10000, SERVE},
    {"train-jobs", "N", "training jobs that run at once (2)", OPTION_INT, AT(train_jobs), 1, 64, SERVE},
    {"train-queue", "N", "training jobs that may wait or run (64)", OPTION_INT, AT(train_queue), 1, 1 << 16,
     SERVE},
    {"train-file-bytes", "SIZE", "largest file of examples (1G)", OPTION_BYTES, AT(train_file_bytes),
     .commands = SERVE},
    {"train-storage-bytes", "SIZE", "all files of examples together (8G)", OPTION_BYTES,
     AT(train_tenant_bytes), .commands = SERVE},
    {"max-connections", "N", "open connections (1024)", OPTION_INT, AT(max_connections), 1, 1 << 16, SERVE},
    {"drain-seconds", "N", "time for running requests after SIGTERM (30)", OPTION_INT, AT(drain_seconds), 0,
     86400, SERVE},
    {"log-level", "LEVEL", "least severe messages shown (info)", OPTION_STRING, AT(log_level),
     .commands = SERVE, .choices = "debug|info|warn|error|off"},
    {"server", "URL", "the server to talk to (http://127.0.0.1:8080)", OPTION_STRING, AT(server),
     .commands = REMOTE},
    {"expected-version", "VERSION", "change nothing unless this is the current version", OPTION_STRING,
     AT(expected_version), .commands = COMMAND_CHANGE},
    {"model", "FILE", "the base model, a GGUF file; needed for LoRA of q or k in a GGUF file", OPTION_STRING,
     AT(model), .commands = COMMAND_CONVERT},
    {"format", "FORMAT", "what to write; default: peft where that can say it, else moelora", OPTION_STRING,
     AT(format), .commands = COMMAND_CONVERT, .choices = "peft|moelora"},
    {"force", NULL, "replace files that are there", OPTION_FLAG, AT(force), .commands = COMMAND_CONVERT},
    {"adapter", "PATH", "an adapter's folder or archive; repeat for a set", OPTION_LIST, AT(adapters),
     .commands = GENERATE},
    {"chat", NULL, "the prompt is a user's message: apply the chat template", OPTION_FLAG, AT(chat),
     .commands = GENERATE},
    {"system", "TEXT", "a system message, with --chat", OPTION_STRING, AT(system), .commands = GENERATE},
    {"max-tokens", "N", "stop after N tokens (256)", OPTION_INT, AT(max_tokens), 1, INT_MAX, GENERATE},
    {"temperature", "X", "0 is greedy (0.8)", OPTION_REAL, AT(temperature), 0, 2, GENERATE},
    {"top-p", "X", "nucleus sampling; 1: off", OPTION_REAL, AT(top_p), 0, 1, GENERATE},
    {"top-k", "N", "sample among the N likeliest; 0: off", OPTION_INT, AT(top_k), 0, INT_MAX, GENERATE},
    {"server", "URL", "a running server, which trains an adapter of its own; default: this process does",
     OPTION_STRING, AT(train.server), .commands = TRAIN},
    {"data-dir", "DIR", "a data folder that no server has open, whose adapter is trained", OPTION_STRING,
     AT(train.data_dir), .commands = TRAIN},
    {"adapter", "PATH",
     "the adapter to go on from: a folder, an archive or a file; with --server or --data-dir its name",
     OPTION_STRING, AT(train.adapter), .commands = TRAIN},
    {"create", NULL, "begin with a new adapter, which changes nothing until it is trained", OPTION_FLAG,
     AT(train.create), .commands = TRAIN},
    {"rank", "N", "of a new adapter's experts (4)", OPTION_INT, AT(train.rank), 1, LR_RANK_MAX, TRAIN},
    {"experts", "N", "of a new adapter; 1: plain LoRA (8)", OPTION_INT, AT(train.experts), 1, LR_EXPERTS_MAX,
     TRAIN},
    {"top-k", "N", "experts that a new adapter's router chooses (2)", OPTION_INT, AT(train.top_k), 1,
     LR_EXPERTS_MAX, TRAIN},
    {"gate", "RULE", "of a new adapter's router (topk)", OPTION_STRING, AT(train.rule), .commands = TRAIN,
     .choices = "topk|topk_raw|dense"},
    {"alpha", "X", "scales a new adapter by alpha / rank (twice the rank)", OPTION_REAL, AT(train.alpha), 0,
     1e6, TRAIN},
    {"rslora", NULL, "scale it by alpha / sqrt(rank)", OPTION_FLAG, AT(train.rslora), .commands = TRAIN},
    {"targets", "LIST", "projections of a new adapter, such as q_proj,v_proj (all seven)", OPTION_STRING,
     AT(train.targets), .commands = TRAIN},
    {"out", "FOLDER", "where the trained adapter goes (required but with these)", OPTION_STRING,
     AT(train.out), .commands = TRAIN},
    {"data", "FILE", "examples, a JSON object a line (required)", OPTION_STRING, AT(train.examples),
     .commands = TRAIN},
    {"held-out-data", "FILE", "examples to judge by; default: a share of --data", OPTION_STRING,
     AT(train.held_out), .commands = TRAIN},
    {"log", "FILE", "a JSON object a step is appended to it", OPTION_STRING, AT(train.log),
     .commands = TRAIN},
    {"checkpoint", "FILE", "where training stands (checkpoint, in the --out folder)", OPTION_STRING,
     AT(train.checkpoint), .commands = TRAIN},
    {"resume", NULL, "go on from the checkpoint of the same run", OPTION_FLAG, AT(train.resume),
     .commands = TRAIN},
    {"force", NULL, "replace an adapter that is in the --out folder", OPTION_FLAG, AT(force),
     .commands = TRAIN},
    {"seed", "N", "the same seed gives the same text; default: random", OPTION_SEED, AT(seed),
     .commands = GENERATE},
};

#define OPTION_COUNT (sizeof options / sizeof *options)

/* The options of a command: those above, and with train a run's settings. */
struct all_options {
    struct option option[OPTION_COUNT + TRAIN_SETTINGS_MAX];
    char name[TRAIN_SETTINGS_MAX][32], help[TRAIN_SETTINGS_MAX][160];
};

static void add_setting(struct all_options *all, size_t i)
{
    const struct train_setting *s = &train_setting_table[i];
    struct strbuf help = {0};
    snprintf(all->name[i], sizeof all->name[i], "%s", s->name);
    for (char *c = strchr(all->name[i], '_'); c; c = strchr(c, '_')) *c = '-';
    strbuf_printf(&help, "%s (", s->help);
    if (s->choices)
        train_choice_write(s, (int)s->otherwise, &help);
    else
        strbuf_printf(&help, "%g", s->otherwise);
    snprintf(all->help[i], sizeof all->help[i], "%s)", help.data ? help.data : s->help);
    strbuf_release(&help);
    all->option[OPTION_COUNT + i] = (struct option){.name = all->name[i],
                                                    .metavar = s->choices ? "NAME" : "N",
                                                    .help = all->help[i],
                                                    .kind = OPTION_STRING,
                                                    .offset = AT(train.settings) + i * sizeof(const char *),
                                                    .commands = TRAIN,
                                                    .choices = s->choices};
}

static struct option_table table_of(enum command command, struct all_options *all)
{
    CHECK(train_setting_count <= TRAIN_SETTINGS_MAX);
    memcpy(all->option, options, sizeof options);
    for (size_t i = 0; i < train_setting_count; i++) add_setting(all, i);
    return (struct option_table){all->option, OPTION_COUNT + train_setting_count, command};
}

void config_help(enum command command, FILE *out)
{
    struct all_options all;
    struct option_table t = table_of(command, &all);
    options_help(&t, out);
}

static void set_defaults(struct config *c)
{
    *c = (struct config){
        .kv_type = "f16",
        .server = "http://127.0.0.1:8080",
        .listen = "127.0.0.1:8080",
        .log_level = "info",
        .max_batch = 64,
        .max_queue = 1024,
        .prefill_chunk = 128,
        .lr_width = 4096,
        .adapter_bytes = (size_t)1 << 30,
        .upload_bytes = (size_t)1 << 30,
        .rank_max = 256,
        .experts_max = 64,
        .train_turn_ms = 10,
        .train_jobs = 2,
        .train_queue = 64,
        .train_file_bytes = (size_t)1 << 30,
        .train_tenant_bytes = (size_t)8 << 30,
        .max_connections = 1024,
        .drain_seconds = 30,
        .max_tokens = 256,
        .temperature = 0.8,
        .top_p = 1,
        .train = {.rank = 4, .experts = 8, .top_k = 2},
    };
}

static enum status read_file(const struct option_table *t, struct config *c, const bool *given,
                             struct error *err)
{
    struct file_map map;
    enum status st = file_map(c->file, &map, err);
    if (st) return st;
    st = json_parse(map.data ? map.data : "", map.size, &c->json, err);
    file_unmap(&map);
    return st ? st : options_read_object(t, c->json, c, given, err);
}

/* "/models/Llama-3.gguf" is called "Llama-3". */
static char *name_of_file(const char *path)
{
    const char *slash = strrchr(path, '/');
    const char *name = slash ? slash + 1 : path;
    size_t n = strlen(name);
    if (n > 5 && !strcmp(name + n - 5, ".gguf")) n -= 5;
    return strndup(name, n);
}

static enum status complete(enum command command, struct config *c, struct error *err)
{
    const char *key = getenv("MEDLEY_API_KEY");
    if (key && key[0]) c->api_key = key;
    bool remote = command == COMMAND_TRAIN && c->train.server;
    if ((command & ENGINE) && !remote && !c->model)
        return error_set(err, ST_INVALID, "--model FILE is required: a GGUF file");
    if ((command & ENGINE) && !remote) {
        enum status st = pack_path_resolve(c->model, c->pack_cache, c->pack_path, err);
        if (st) return st;
    }
    if (command != COMMAND_SERVE) return ST_OK;
    if (!c->model_name) c->model_name = c->owned_name = name_of_file(c->model);
    if (!c->data) {
        const char *home = getenv("HOME");
        if (!home || asprintf(&c->owned_data, "%s/.local/share/medley", home) < 0)
            return error_set(err, ST_INVALID, "--data DIR is required where there is no home folder");
        c->data = c->owned_data;
    }
    return c->model_name ? ST_OK : error_set(err, ST_NOMEM, "out of memory");
}

enum status config_read(enum command command, int argc, char **argv, struct config *out, struct error *err)
{
    bool given[OPTION_COUNT + TRAIN_SETTINGS_MAX] = {0};
    struct all_options all;
    struct option_table t = table_of(command, &all);
    set_defaults(out);
    enum status st = options_read(&t, argc, argv, out, given, &out->words, err);
    if (!st && out->file) st = read_file(&t, out, given, err);
    return st ? st : complete(command, out, err);
}

void config_release(struct config *c)
{
    cJSON_Delete(c->json);
    free(c->owned_data);
    free(c->owned_name);
    for (int i = 0; i < PACK_PATHS; i++) free(c->pack_path[i]);
    *c = (struct config){0};
}

enum status config_open_device(const struct config *c, struct device **out, struct error *err)
{
    struct cpu_device_config d = {.level = CPU_LEVEL_BEST, .threads = c->threads, .no_pin = c->no_pin};
    if (c->cpu_level && cpu_level_parse(c->cpu_level, &d.level))
        return error_set(err, ST_INVALID, "--cpu-level: unknown level '%s'", c->cpu_level);
    return cpu_device_open(&d, out, err);
}

void config_engine(const struct config *c, struct device *device, struct engine_config *out)
{
    *out = (struct engine_config){
        .model_path = c->model,
        .device = device,
        .max_batch = c->max_batch,
        .max_queue = c->max_queue,
        .prefill_chunk = c->prefill_chunk,
        .kv_bytes = c->kv_bytes,
        .kv_type = !strcmp(c->kv_type, "f32") ? DTYPE_F32 : DTYPE_F16,
        .context_length = c->context,
        .lr_width = c->lr_width,
        .no_prefix_cache = c->no_prefix_cache,
        .turn_seconds = c->train_turn_ms / 1000,
    };
    for (int i = 0; i < PACK_PATHS; i++) out->pack_path[i] = c->pack_path[i];
}

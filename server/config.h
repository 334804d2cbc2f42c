/* What the commands can be told, with defaults: see `medley serve --help`. */
#ifndef SERVER_CONFIG_H
#define SERVER_CONFIG_H

#include "engine/engine.h"
#include "kernels/device.h"
#include "server/options.h"
#include "training/settings.h"

/* A command's options are those of its kind. */
enum command {
    COMMAND_SERVE = 1,
    COMMAND_GENERATE = 2,
    COMMAND_INSPECT = 4,
    COMMAND_LIST = 8,
    COMMAND_CHANGE = 16, /* of a running server's adapters */
    COMMAND_CONVERT = 32,
    COMMAND_TRAIN = 64,
};

struct config {
    /* model and device */
    const char *model, *cpu_level, *kv_type, *pack_cache;
    int threads, max_batch, max_queue, prefill_chunk, context, lr_width;
    size_t kv_bytes;
    bool no_prefix_cache;
    bool no_pin;
    /* server */
    const char *file, *data, *listen, *model_name, *log_level;
    const char *adapter_root; /* NULL: clients name no paths of this machine */
    bool insecure_listen;
    size_t adapter_bytes, upload_bytes;
    int rank_max, experts_max, keep_versions, max_connections, drain_seconds;
    /* training */
    bool no_training;
    double train_turn_ms;
    int train_jobs, train_queue;
    size_t train_file_bytes, train_tenant_bytes;
    /* of a running server */
    const char *server, *expected_version;
    /* convert */
    const char *format;
    bool force;
    /* generate */
    struct option_list adapters;
    bool chat;
    const char *system;
    int max_tokens, top_k;
    double temperature, top_p;
    struct option_seed seed;

    /* train */
    struct {
        const char *server, *data_dir; /* NULL: in this process, of a folder */
        const char *adapter, *out, *examples, *held_out, *log, *checkpoint, *targets, *rule;
        const char *settings[TRAIN_SETTINGS_MAX]; /* by train_setting_table; NULL: not given */
        bool resume, create, rslora;
        int rank, experts, top_k;
        double alpha; /* 0: twice the rank */
    } train;

    struct option_list words;      /* arguments that are no options */
    const char *api_key;           /* from the environment only: MEDLEY_API_KEY; NULL: none */
    cJSON *json;                   /* owned: the file, where strings live */
    char *owned_data, *owned_name; /* owned defaults */
    char *pack_path[PACK_PATHS];   /* owned: see pack_path.h */
};

/* Reads the arguments after the subcommand's name, then the file they name. The caller owes
 * config_release, also after a failure. */
NODISCARD enum status config_read(enum command command, int argc, char **argv, struct config *out,
                                  struct error *err);
void config_release(struct config *c);
void config_help(enum command command, FILE *out);

/* The device and the engine that the configuration describes; the same for every command. */
NODISCARD enum status config_open_device(const struct config *c, struct device **out, struct error *err);
void config_engine(const struct config *c, struct device *device, struct engine_config *out);

#endif

/* The subcommands, and what they share. Each returns the process's exit status. */
#ifndef SERVER_COMMANDS_H
#define SERVER_COMMANDS_H

#include "server/config.h"

int serve_run(const struct config *c);
int generate_run(const struct config *c);
int inspect_run(const struct config *c);
int convert_run(const struct config *c);
int push_run(const struct config *c);
int train_run(const struct config *c);
int train_remote_run(const struct config *c); /* train_run with --server */
int train_folder_run(const struct config *c); /* with --data-dir */
int list_run(const struct config *c);
int rollback_run(const struct config *c);
int remove_run(const struct config *c);

/* "medley: <message>" on stderr; returns 1. */
int command_failed(const struct error *err);

/* A bar on stderr, where that is a terminal; *cells is -1 at first. */
void progress_bar(const char *what, int *cells, double done);
/* A bar while a model loads, where stderr is a terminal: engine_config.on_progress. */
void progress_show(void *ctx, double done);

/* What the registry must know of the model. */
struct registry_config;
void registry_config_fill(const struct config *c, const struct engine *e, struct device *device,
                          const char *data_dir, struct registry_config *out);

#endif

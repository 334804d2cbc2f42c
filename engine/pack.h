/* All packed weights of a model in one block of memory: mapped from the file an earlier start has left, or
 * packed now and left for the next one.
 *
 * A mapped file's pages are shared by all processes that serve the model, and cost a start little more than
 * reading them once. Weights that a device uses in place are not in it. */
#ifndef ENGINE_PACK_H
#define ENGINE_PACK_H

#include "base/file.h"
#include "base/status.h"
#include "engine/engine.h"
#include "kernels/device.h"

/* Less than this is packed sooner than a file is found and checked. */
#define PACK_FILE_BYTES_MIN ((size_t)8 << 20)

struct pack_item {
    char name[64]; /* of the tensor */
    struct matrix matrix;
    struct weight **weight; /* where pack_open puts it; it lives as long as the pack */
};

struct pack_config {
    struct device *device;
    const struct file_map *model;
    const char *model_path;
    const char *path[PACK_PATHS]; /* as in struct engine_config */
    void (*on_progress)(void *ctx, double done);
    void *progress_ctx;
};

struct pack;

/* Makes the weights of all items; `items` becomes the pack's, also on failure. What is wrong with a file is
 * logged and costs time only. A new file is written by a thread of its own, while the weights are in use. */
NODISCARD enum status pack_open(const struct pack_config *config, struct pack_item *items, size_t count,
                                struct pack **out, struct error *err);
/* Waits some seconds for a file that is being written, then gives it up. */
void pack_close(struct pack *p);

#endif

#include "server/commands.h"

#include "adapters/registry.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

int command_failed(const struct error *err)
{
    fprintf(stderr, "medley: %s\n", err->message[0] ? err->message : status_text(err->status));
    return 1;
}

#define BAR_WIDTH 40

void progress_bar(const char *what, int *cells, double done)
{
    int now = (int)(done * BAR_WIDTH);
    if (!isatty(STDERR_FILENO) || now == *cells) return;
    *cells = now;
    fprintf(stderr, "\r%s [%-*.*s] %3.0f%%%s", what, BAR_WIDTH, now,
            "########################################", 100 * done, done >= 1 ? "\n" : "");
}

void progress_show(void *ctx, double done) { progress_bar("loading", ctx, done); }

static void base_row(const void *model, int layer, enum projection p, size_t row, float *out)
{
    engine_weight_row(model, layer, p, row, out);
}

void registry_config_fill(const struct config *c, const struct engine *e, struct device *device,
                          const char *data_dir, struct registry_config *out)
{
    const struct model_shape *s = engine_shape(e);
    *out = (struct registry_config){
        .data_dir = data_dir,
        .device = device,
        .resident_bytes = c->adapter_bytes,
        .upload_bytes_max = c->upload_bytes,
        .keep_versions = c->keep_versions,
        .lr_width_max = c->lr_width,
        .base = {.layers = s->layers,
                 .heads = s->heads,
                 .kv_heads = s->kv_heads,
                 .head_dim = s->head_dim,
                 .qk_permuted = s->qk_permuted,
                 .rank_max = c->rank_max,
                 .experts_max = c->experts_max,
                 .row = base_row,
                 .model = e},
    };
    memcpy(out->base_fingerprint, s->fingerprint, sizeof out->base_fingerprint);
    for (int p = 0; p < PROJ_COUNT; p++)
        model_shape_projection(s, (enum projection)p, &out->base.d_in[p], &out->base.d_out[p]);
}

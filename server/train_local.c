#include "server/train_local.h"

#include "adapters/registry.h"
#include "server/commands.h"

#include <signal.h>
#include <string.h>

/* --- Ctrl-C, and being told to end --- */

static atomic_bool interrupted;

static void on_interrupt(int number)
{
    signal(number, SIG_DFL); /* the second one ends the process */
    atomic_store(&interrupted, true);
}

void train_interrupt_watch(void)
{
    signal(SIGINT, on_interrupt);
    signal(SIGTERM, on_interrupt);
}

const atomic_bool *train_interrupted(void) { return &interrupted; }

/* --- a new adapter, the engine --- */

static enum status read_targets(const char *list, bool target[PROJ_COUNT], struct error *err)
{
    while (list && *list) {
        size_t n = strcspn(list, ",");
        int p = 0;
        while (p < PROJ_COUNT &&
               (strlen(projection_name(p)) != n || strncmp(projection_name(p), list, n) != 0))
            p++;
        if (p == PROJ_COUNT)
            return error_set(err, ST_INVALID,
                             "--targets: '%.*s' is none of q_proj, k_proj, v_proj, o_proj, gate_proj, "
                             "up_proj, down_proj",
                             (int)(n < 40 ? n : 40), list);
        target[p] = true;
        list += n + (list[n] == ',');
    }
    return ST_OK;
}

enum status train_create(const struct config *c, const struct train_settings *s,
                         const struct adapter_base *base, struct adapter_bundle **out, struct error *err)
{
    struct fresh_adapter f = {.rank = c->train.rank,
                              .experts = c->train.experts,
                              .top_k = c->train.top_k,
                              .rule = GATE_TOPK,
                              .alpha = (float)(c->train.alpha > 0 ? c->train.alpha : 2 * c->train.rank),
                              .rslora = c->train.rslora,
                              .seed = s->seed};
    if (c->train.rule && strcmp(c->train.rule, "topk") != 0)
        f.rule = strcmp(c->train.rule, "dense") == 0 ? GATE_DENSE : GATE_TOPK_RAW;
    if (f.experts > 1 && f.rule != GATE_DENSE && f.top_k > f.experts)
        return error_set(err, ST_INVALID, "--top-k %d is more than --experts %d", f.top_k, f.experts);
    for (int p = 0; p < PROJ_COUNT; p++) f.target[p] = !c->train.targets;
    enum status st = read_targets(c->train.targets, f.target, err);
    return st ? st : bundle_fresh(&f, base, out, err);
}

enum status train_open_engine(const struct config *c, struct device **device, struct engine **engine,
                              struct adapter_base *base, struct error *err)
{
    struct engine_config config;
    struct registry_config registry;
    int cells = -1;
    enum status st = config_open_device(c, device, err);
    if (st) return st;
    if (!(*device)->grad)
        return error_set(err, ST_UNSUPPORTED, "the device '%s' cannot train", (*device)->name);
    config_engine(c, *device, &config);
    config.max_batch = 1;
    config.on_progress = progress_show;
    config.progress_ctx = &cells;
    st = engine_open(&config, engine, err);
    if (st) return st;
    registry_config_fill(c, *engine, *device, NULL, &registry);
    *base = registry.base;
    return ST_OK;
}

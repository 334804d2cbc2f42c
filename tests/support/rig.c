#include "tests/support/rig.h"

#include "tests/support/check.h"

struct device *rig_device(enum cpu_level level, int threads)
{
    struct cpu_device_config c = {.level = level, .threads = threads};
    struct device *d;
    struct error err;
    if (cpu_device_open(&c, &d, &err)) fail_msg("%s", err.message);
    return d;
}

struct rig rig_open_at(const char *model, enum cpu_level level, int threads, struct engine_config config)
{
    struct rig r = {.device = rig_device(level, threads), .path = test_path("%s", fixture_path(model).text)};
    struct error err;
    config.device = r.device;
    config.model_path = r.path.text;
    if (engine_open(&config, &r.engine, &err)) fail_msg("%s", err.message);
    return r;
}

struct rig rig_open(struct engine_config config)
{
    return rig_open_at("models/gqa_tied.gguf", CPU_LEVEL_BEST, 2, config);
}

void rig_close(struct rig *r)
{
    engine_close(r->engine);
    r->device->ops->close(r->device);
}

/* A CPU device with an engine on it. */
#ifndef TESTS_SUPPORT_RIG_H
#define TESTS_SUPPORT_RIG_H

#include "engine/engine.h"
#include "tests/support/fixture.h"

struct rig {
    struct device *device;
    struct engine *engine;
    struct test_path path; /* of the model */
};

struct device *rig_device(enum cpu_level level, int threads);
/* A fixture's model; config.device and model_path are filled in. Fails the test where that does not work. */
struct rig rig_open_at(const char *model, enum cpu_level level, int threads, struct engine_config config);
/* A small model, two threads, the machine's best instructions. */
struct rig rig_open(struct engine_config config);
void rig_close(struct rig *r);

#endif

/* Where packed weights of a model file are kept: beside it, and where that cannot be, in the user's cache. */
#ifndef SERVER_PACK_PATH_H
#define SERVER_PACK_PATH_H

#include "base/status.h"
#include "engine/engine.h"

/* choice: NULL for the above, a folder for that one alone, or "off". Fills malloc'd paths as
 * engine_config.pack_path has them; nothing is looked at or made but the model's true name. */
NODISCARD enum status pack_path_resolve(const char *model, const char *choice, char *out[PACK_PATHS],
                                        struct error *err);

#endif

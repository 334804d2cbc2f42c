/* New adapters, for training. */
#ifndef SERVER_TRAINING_H
#define SERVER_TRAINING_H

#include "server/service.h"
#include "training/params.h"

/* A new adapter that nothing has trained. ST_CONFLICT: the name is taken. Blocks. */
NODISCARD enum status adapter_create(struct service *s, const char *name, const struct fresh_adapter *shape,
                                     struct put_result *out, struct error *err);
/* What a new adapter is where nothing else is said. */
void fresh_default(const struct service *s, struct fresh_adapter *out);

#endif

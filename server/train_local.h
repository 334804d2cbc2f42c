/* What the ways of `medley train` share. */
#ifndef SERVER_TRAIN_LOCAL_H
#define SERVER_TRAIN_LOCAL_H

#include "server/config.h"
#include "training/params.h"

#include <stdatomic.h>

/* From then on SIGINT and SIGTERM set the flag; a second one ends the process. */
void train_interrupt_watch(void);
const atomic_bool *train_interrupted(void);

/* The adapter that --create asks for. */
NODISCARD enum status train_create(const struct config *c, const struct train_settings *s,
                                   const struct adapter_base *base, struct adapter_bundle **out,
                                   struct error *err);

/* Device and engine, which are the caller's to close also after a failure, and what adapters must fit. */
NODISCARD enum status train_open_engine(const struct config *c, struct device **device,
                                        struct engine **engine, struct adapter_base *base, struct error *err);

#endif

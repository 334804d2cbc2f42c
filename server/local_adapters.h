/* Adapters from files for one run of a command: a registry in a temporary folder, gone at the end. */
#ifndef SERVER_LOCAL_ADAPTERS_H
#define SERVER_LOCAL_ADAPTERS_H

#include "server/config.h"

struct local_adapters;

/* Those of config->adapters: folders with the two files, archives of them, or safetensors files with
 * adapter_config.json beside. */
NODISCARD enum status local_adapters_open(const struct config *c, const struct engine *e,
                                          struct device *device, struct local_adapters **out,
                                          struct error *err);
void local_adapters_close(struct local_adapters *a); /* NULL is fine */
/* Each with weight 1, into members[OPTION_LIST_MAX]; how many. */
size_t local_adapters_members(const struct local_adapters *a, struct lr_member *members);

#endif

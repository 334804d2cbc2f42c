/* An adapter version in a device's memory: a bundle's sites, packed. */
#ifndef ADAPTERS_VERSION_H
#define ADAPTERS_VERSION_H

#include "adapters/reader.h"
#include "base/status.h"
#include "kernels/device.h"

struct packed_adapter {
    struct lr_adapter lr;
    size_t bytes;                /* all memory it holds */
    struct device *device;       /* not owned */
    struct packed_adapter *next; /* for a list of its owner's */
};

/* All sites or none. Afterwards the bundle and its files are no longer needed.
 * ST_NOMEM where the device has no room, or what else its packing says. */
NODISCARD enum status adapter_pack(const struct adapter_bundle *b, struct device *device,
                                   struct packed_adapter **out, struct error *err);
void packed_adapter_free(struct packed_adapter *p);

#endif

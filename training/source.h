/* Sites of a bundle that is made here instead of being read from a file. */
#ifndef TRAINING_SOURCE_H
#define TRAINING_SOURCE_H

#include "adapters/reader.h"

/* A site in the bundle's memory with room for its parts, zeros, and the numbers of *shape. NULL when out of memory. */
struct lr_site_source *source_new(struct adapter_bundle *b, const struct lr_site_source *shape);

#endif

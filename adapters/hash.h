/* Content hashes, in hex. Those of files are SHA-256, which most CPUs have instructions for: 1.4 GB/s with them, where
 * BLAKE2b makes 0.9. Files stored earlier are named by their BLAKE2b-256, and keep that name. */
#ifndef ADAPTERS_HASH_H
#define ADAPTERS_HASH_H

#include "base/key128.h"
#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>

#define HASH_HEX_SIZE 65 /* with the terminating NUL */

void hash_bytes(const void *data, size_t size, char out[HASH_HEX_SIZE]);

/* Is this the hash of these bytes, of either kind? */
bool hash_matches(const void *data, size_t size, const char *hash);

/* The identity of an adapter version: a hash of a text that names both files and their hashes. ST_NOMEM where the
 * library cannot start. */
NODISCARD enum status hash_version(const char *config_hash, const char *tensors_hash,
                                   char out[HASH_HEX_SIZE]);

/* A hash of three texts. */
NODISCARD enum status hash_key(const char *tenant, const char *name, const char *hash,
                         struct key128 *out);

#endif

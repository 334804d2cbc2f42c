/* Content hashes: BLAKE2b-256, in hex. */
#ifndef ADAPTERS_HASH_H
#define ADAPTERS_HASH_H

#include "base/key128.h"
#include "base/status.h"

#include <stddef.h>

#define HASH_HEX_SIZE 65 /* with the terminating NUL */

/* ST_NOMEM where the library cannot start. */
NODISCARD enum status hash_bytes(const void *data, size_t size, char out[HASH_HEX_SIZE]);

/* The identity of an adapter version: a hash of a text that names both files and their hashes. */
NODISCARD enum status hash_version(const char *config_hash, const char *tensors_hash,
                                   char out[HASH_HEX_SIZE]);

/* A hash of three texts. */
NODISCARD enum status hash_key(const char *tenant, const char *name, const char *hash,
                         struct key128 *out);

#endif

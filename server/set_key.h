/* Identities of adapter sets and cache salts: what may share a batch segment and KV pages.
 *
 * A key names contents: versions, never names alone, so that what is computed with an adapter is not taken
 * for the work of its successor of the same name. Digests of 128 bits under a secret that nobody outside this
 * process knows: unequal sets do not have equal keys, not even by a client's design. */
#ifndef SERVER_SET_KEY_H
#define SERVER_SET_KEY_H

#include "base/key128.h"

#include <stddef.h>

#define SET_SECRET_BYTES 16

struct set_member {
    struct key128 version; /* adapter_view.key: of tenant, name and content */
    float weight;
};

/* Members in the order in which they are applied. Zero for none: the bare base. */
struct key128 set_key(const unsigned char secret[SET_SECRET_BYTES], const struct set_member *members,
                      size_t count);

/* Tenants never share, even without a salt (NULL), which is another one than "". */
struct key128 salt_key(const unsigned char secret[SET_SECRET_BYTES], const char *tenant, const char *salt);

#endif

#include "server/set_key.h"

#include <sodium.h>
#include <string.h>

_Static_assert(sizeof(struct key128) == crypto_generichash_BYTES_MIN, "BLAKE2b-128");
_Static_assert(SET_SECRET_BYTES == crypto_generichash_KEYBYTES_MIN, "BLAKE2b's key");

static void hash_start(crypto_generichash_state *state, const unsigned char *secret)
{
    crypto_generichash_init(state, secret, SET_SECRET_BYTES, sizeof(struct key128));
}

static void hash_add(crypto_generichash_state *state, const void *data, size_t size)
{
    crypto_generichash_update(state, data, size);
}

static struct key128 hash_end(crypto_generichash_state *state)
{
    struct key128 key;
    crypto_generichash_final(state, (unsigned char *)&key, sizeof key);
    return key;
}

struct key128 set_key(const unsigned char secret[SET_SECRET_BYTES], const struct set_member *members,
                      size_t count)
{
    crypto_generichash_state state;
    if (!count) return (struct key128){{0}};
    hash_start(&state, secret);
    for (size_t i = 0; i < count; i++) {
        hash_add(&state, &members[i].version, sizeof members[i].version);
        hash_add(&state, &members[i].weight, sizeof members[i].weight);
    }
    return hash_end(&state);
}

struct key128 salt_key(const unsigned char secret[SET_SECRET_BYTES], const char *tenant, const char *salt)
{
    crypto_generichash_state state;
    hash_start(&state, secret);
    hash_add(&state, tenant, strlen(tenant) + 1); /* NUL separates */
    if (salt) hash_add(&state, salt, strlen(salt) + 1);
    return hash_end(&state);
}

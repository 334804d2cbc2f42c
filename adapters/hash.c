#include "adapters/hash.h"

#include <nettle/sha2.h>
#include <sodium.h>
#include <string.h>

void hash_bytes(const void *data, size_t size, char out[HASH_HEX_SIZE])
{
    unsigned char digest[SHA256_DIGEST_SIZE];
    struct sha256_ctx state;
    sha256_init(&state);
    sha256_update(&state, size, data);
    sha256_digest(&state, sizeof digest, digest);
    sodium_bin2hex(out, HASH_HEX_SIZE, digest, sizeof digest);
}

bool hash_matches(const void *data, size_t size, const char *hash)
{
    char actual[HASH_HEX_SIZE];
    unsigned char digest[32];
    hash_bytes(data, size, actual);
    if (strcmp(actual, hash) == 0) return true;
    crypto_generichash(digest, sizeof digest, data, size, NULL, 0);
    sodium_bin2hex(actual, sizeof actual, digest, sizeof digest);
    return strcmp(actual, hash) == 0;
}

static void hash_text(crypto_generichash_state *state, const char *text)
{
    crypto_generichash_update(state, (const unsigned char *)text, strlen(text) + 1); /* NUL separates */
}

enum status hash_version(const char *config_hash, const char *tensors_hash, char out[HASH_HEX_SIZE])
{
    unsigned char digest[32];
    crypto_generichash_state state;
    if (sodium_init() < 0) return ST_NOMEM;
    crypto_generichash_init(&state, NULL, 0, sizeof digest);
    hash_text(&state, "medley adapter version 1");
    hash_text(&state, "adapter_config.json");
    hash_text(&state, config_hash);
    hash_text(&state, "adapter_model.safetensors");
    hash_text(&state, tensors_hash);
    crypto_generichash_final(&state, digest, sizeof digest);
    sodium_bin2hex(out, HASH_HEX_SIZE, digest, sizeof digest);
    return ST_OK;
}

enum status hash_key(const char *tenant, const char *name, const char *hash, struct key128 *out)
{
    struct key128 digest;
    crypto_generichash_state state;
    _Static_assert(sizeof digest == crypto_generichash_BYTES_MIN, "BLAKE2b-128");
    if (sodium_init() < 0) return ST_NOMEM;
    crypto_generichash_init(&state, NULL, 0, sizeof digest);
    hash_text(&state, tenant);
    hash_text(&state, name);
    hash_text(&state, hash);
    crypto_generichash_final(&state, (unsigned char *)&digest, sizeof digest);
    *out = digest;
    return ST_OK;
}

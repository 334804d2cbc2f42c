/* Reading members of a body with one sticky error: private to this folder.
 *
 * Each reader leaves its output alone where the member is missing or null, and where an earlier one failed.
 * So a body is read straight through, and `failed` looked at once. */
#ifndef API_PARSE_H
#define API_PARSE_H

#include "api/error.h"
#include "base/json.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct parse {
    const cJSON *body;
    struct api_error *err;
    bool failed;
};

/* Parses the text of a body, which must be an object. The caller owes cJSON_Delete. */
NODISCARD bool parse_body(const char *text, size_t size, cJSON **out, struct api_error *err);

void parse_fail(struct parse *p, enum status st, const char *param, const char *fmt, ...) PRINTF_LIKE(4, 5);
void parse_bool(struct parse *p, const char *key, bool *out);
void parse_int(struct parse *p, const char *key, int min, int max, int *out);
void parse_f64(struct parse *p, const char *key, double min, double max, double *out);
void parse_string(struct parse *p, const char *key, const char **out);
/* The member `seed`, from the body's text, since a tree rounds 64 bits. Whether it is given. */
bool parse_seed(struct parse *p, const char *text, size_t size, uint64_t *out);
/* A string or an array of strings: a malloc'd table of borrowed strings. */
void parse_strings(struct parse *p, const char *key, size_t max, const char ***out, size_t *count_out);
/* calloc that reports; NULL also for count 0. */
void *parse_alloc(struct parse *p, size_t count, size_t size);

/* A whole number in [0, 2^31) as token ids are written. */
bool json_token_id(const cJSON *v, int32_t *out);

struct message;
/* The member `messages`; see completion.h. */
void parse_messages(struct parse *p, struct message **out, size_t *count_out);
void messages_free(struct message *messages, size_t count);

struct completion_request;
/* `adapters`, `lora`, `adapter_id` and `model`: which adapters to use. */
void parse_adapter_choice(struct parse *p, const char *base_name, struct completion_request *r);

/* Refuses parameters that would change the answer and are not done here. */
void parse_refuse_unsupported(struct parse *p, bool chat);

#endif

/* Tokens to text as they come: whole characters, and nothing that a stop string may still claim.
 *
 *  1. What has been given out is valid UTF-8; bytes that can never become a character are U+FFFD.
 *  2. A stop string matches where its last byte arrives first; of several that end there, the
 *     longest. So the text does not depend on how it was cut into tokens.
 *  3. Text is held back exactly while it is the beginning of some stop string. */
#ifndef ENGINE_STREAM_H
#define ENGINE_STREAM_H

#include "base/status.h"
#include "engine/engine.h"

#include <stdbool.h>
#include <stddef.h>

struct stream;

/* Copies what it needs of the sampling's stop strings; t outlives the stream. NULL when there is no
 * memory. */
struct stream *stream_new(const struct tokenizer *t, const struct sampling *s);
void stream_free(struct stream *s);

/* Adds a token's text. can_stop false: it is given out without looking for stop strings (min_tokens).
 * After a stop string matched nothing may be added. ST_NOMEM. */
NODISCARD enum status stream_push(struct stream *s, int32_t token, bool can_stop);
/* The end: held text is certain now, and half a character will not be completed. ST_NOMEM. */
NODISCARD enum status stream_finish(struct stream *s);

/* Text that became certain since the last take; valid until the next call on s. */
const char *stream_take(struct stream *s, size_t *size_out);
/* The stop string that matched, or NULL; valid as long as s. */
const char *stream_stopped_by(const struct stream *s);

#endif

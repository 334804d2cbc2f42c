/* The bodies of /tokenize and /detokenize, in the dialects of three servers.
 *
 * The key that holds the text tells the dialect: `content` (llama.cpp), `prompt` or `messages` (vLLM),
 * `inputs` (TGI). Each is answered in its own shape; /detokenize answers both `content` and `prompt`. */
#ifndef API_TOKENIZE_H
#define API_TOKENIZE_H

#include "api/completion.h"
#include "base/strbuf.h"

enum tokenize_dialect { TOKENIZE_LLAMA_CPP, TOKENIZE_VLLM, TOKENIZE_TGI };

struct tokenize_request {
    enum tokenize_dialect dialect;
    cJSON *body;              /* owned; strings below live in it */
    const char *text;         /* NULL where messages are given */
    struct message *messages; /* owned */
    size_t message_count;
    bool add_special, parse_special;
    bool add_generation_prompt;
    bool with_pieces; /* the text of each token beside its id */
};

NODISCARD bool tokenize_request_parse(const char *text, size_t size, struct tokenize_request *out,
                                      struct api_error *err);
void tokenize_request_release(struct tokenize_request *r);

/* One token of an answer; piece is borrowed and may be half a character. */
struct token_piece {
    int32_t id;
    const char *piece;
    size_t size;
};
void tokenize_write(struct strbuf *out, const struct tokenize_request *r, const struct token_piece *tokens,
                    size_t count, int context_length);

/* `tokens` of a detokenize body: one row, into *out (owed: token_rows_release). Writes to text, as scan.h
 * says. */
NODISCARD bool detokenize_request_parse(char *text, size_t size, struct token_rows *out,
                                        struct api_error *err);
void detokenize_write(struct strbuf *out, const char *text, size_t size);

#endif

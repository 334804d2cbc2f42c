/* What the handlers of calls about adapters share. */
#ifndef SERVER_ADAPTERS_H
#define SERVER_ADAPTERS_H

#include "api/adapter.h"
#include "server/service.h"

/* Compare-and-set: If-Match: "version" or ?expected_version=version. */
struct condition {
    bool given;
    char version[65];
};
/* false: there is one, but it is none of these. */
NODISCARD bool condition_take(const struct exchange *x, struct condition *out, struct api_error *err);
/* The version that was given, or NULL. */
const char *condition_version(const struct condition *c);

/* A call about one adapter, or about all. */
struct lookup {
    struct call call;
    char name[160]; /* the path's parameter */
    struct condition condition;
    struct adapter_request request; /* the body, where there is one */
};
void lookup_start(struct exchange *x, void (*work)(struct call *c));
/* With a JSON body. */
void lookup_start_with(struct exchange *x, enum adapter_request_kind kind, void (*work)(struct call *c));

/* true: st was a failure, now in c->error. */
bool lookup_failed(struct lookup *l, enum status st, const struct error *cause);
/* The answer: the adapter as it is now. */
void lookup_answer_info(struct lookup *l);

/* false, with err: no adapter may be called so. */
bool adapter_name_check(const struct service *s, const char *name, struct api_error *err);
/* 404, code model_not_found. */
void adapter_not_found(struct api_error *err, const char *name, const char *param);
/* A failure of registry_put: 422 where the adapter in the request is at fault, not the request. */
void adapter_put_failed(struct api_error *err, enum status st, const struct error *cause);
/* The JSON of one adapter. */
void adapter_info_write(struct strbuf *out, const struct adapter_info *info);

#endif

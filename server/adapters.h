/* Answers about adapters that several handlers give. */
#ifndef SERVER_ADAPTERS_H
#define SERVER_ADAPTERS_H

#include "server/service.h"

/* 404, code model_not_found. */
void adapter_not_found(struct api_error *err, const char *name, const char *param);
/* The JSON of one adapter. */
void adapter_info_write(struct strbuf *out, const struct adapter_info *info);

#endif

/* The handlers of all routes; http.h says what they owe. */
#ifndef SERVER_HANDLERS_H
#define SERVER_HANDLERS_H

#include "server/http.h"

void health_get(struct exchange *x);
void ready_get(struct exchange *x);

void models_get(struct exchange *x);
void model_get(struct exchange *x);
void adapters_get(struct exchange *x);
void adapter_get(struct exchange *x);
void adapter_delete(struct exchange *x);
void adapter_rollback(struct exchange *x);
void adapter_change(struct exchange *x);
void adapter_download(struct exchange *x);
void lora_adapters_get(struct exchange *x);
void lora_adapters_post(struct exchange *x);
void lora_load_post(struct exchange *x);
void lora_unload_post(struct exchange *x);
void adapter_put_begin(struct exchange *x);

void adapters_post(struct exchange *x);
void adapter_train(struct exchange *x);
void adapter_jobs_get(struct exchange *x);
void adapter_forward_backward(struct exchange *x);
void adapter_optim_step(struct exchange *x);
void adapter_publish(struct exchange *x);
void adapter_session_delete(struct exchange *x);
void adapter_routing(struct exchange *x);
void files_post_begin(struct exchange *x);
void files_get(struct exchange *x);
void file_get(struct exchange *x);
void file_delete(struct exchange *x);
void file_content_get(struct exchange *x);
void tuning_post(struct exchange *x);
void tunings_get(struct exchange *x);
void tuning_get(struct exchange *x);
void tuning_delete(struct exchange *x);
void tuning_cancel(struct exchange *x);
void tuning_events_get(struct exchange *x);
void tuning_checkpoints_get(struct exchange *x);
void metrics_get(struct exchange *x);
void openapi_get(struct exchange *x);

void completions_post(struct exchange *x);
void chat_post(struct exchange *x);
void tokenize_post(struct exchange *x);
void detokenize_post(struct exchange *x);

#endif

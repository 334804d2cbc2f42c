/* Jobs, events, checkpoints, files and routing as JSON. */
#include "server/training.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>
#include <time.h>

/* ------------------------------------------------------------------ members */

static void put_key(struct strbuf *out, const char *key)
{
    bool first = out->size && out->data[out->size - 1] == '{';
    strbuf_printf(out, "%s\"%s\": ", first || !out->size ? "" : ", ", key);
}

static void put_string(struct strbuf *out, const char *key, const char *value)
{
    put_key(out, key);
    json_write_string(out, value, strlen(value));
}

/* NULL and "" are null. */
static void put_text(struct strbuf *out, const char *key, const char *value)
{
    if (value && value[0]) {
        put_string(out, key, value);
    } else {
        put_key(out, key);
        strbuf_puts(out, "null");
    }
}

static void put_i64(struct strbuf *out, const char *key, int64_t value)
{
    put_key(out, key);
    strbuf_printf(out, "%" PRId64, value);
}

/* Of times: 0 is "not yet". */
static void put_time(struct strbuf *out, const char *key, int64_t value)
{
    put_key(out, key);
    if (value)
        strbuf_printf(out, "%" PRId64, value);
    else
        strbuf_puts(out, "null");
}

static void put_bool(struct strbuf *out, const char *key, bool value)
{
    put_key(out, key);
    strbuf_puts(out, value ? "true" : "false");
}

/* NaN is null. Seven digits are more than a float's loss has. */
static void put_f64(struct strbuf *out, const char *key, double value)
{
    put_key(out, key);
    if (isfinite(value))
        strbuf_printf(out, "%.7g", value);
    else
        strbuf_puts(out, "null");
}

static void put_json(struct strbuf *out, const char *key, const char *json)
{
    put_key(out, key);
    strbuf_puts(out, json ? json : "null");
}

/* ------------------------------------------------------------------ jobs */

static void put_member(struct strbuf *out, const char *key, const cJSON *value)
{
    char *text = value ? cJSON_PrintUnformatted(value) : NULL;
    put_json(out, key, text);
    cJSON_free(text);
}

static void put_published(struct strbuf *out, const char *key, const struct train_job *job)
{
    char name[ADAPTER_NAME_MAX + ADAPTER_VERSION_HEX + 2];
    snprintf(name, sizeof name, "%s@%s", job->adapter, job->version_after);
    put_text(out, key, job->version_after[0] ? name : NULL);
}

/* What OpenAI's clients wrote comes back as it was; else what it amounts to. */
static void put_hyperparameters(struct strbuf *out, const struct train_job *job, const cJSON *kept)
{
    const cJSON *written = json_get(kept, "hyperparameters");
    if (written) {
        put_member(out, "hyperparameters", written);
        return;
    }
    put_key(out, "hyperparameters");
    strbuf_puts(out, "{");
    if (job->settings.steps)
        put_string(out, "n_epochs", "auto");
    else
        put_f64(out, "n_epochs", job->settings.epochs);
    put_string(out, "batch_size", "auto");
    put_string(out, "learning_rate_multiplier", "auto");
    strbuf_putc(out, '}');
}

/* A straight line through what is done. */
static int64_t estimated_finish(const struct train_job *job)
{
    if (job->state != TRAIN_RUNNING || !job->step || job->steps <= job->step || !job->started) return 0;
    int64_t now = (int64_t)time(NULL);
    double each = (double)(now - job->started) / (double)job->step;
    return now + (int64_t)(each * (double)(job->steps - job->step));
}

static void put_openai(struct strbuf *out, const struct train_job *job, const cJSON *kept)
{
    const cJSON *model = json_get(kept, "model");
    put_string(out, "object", "fine_tuning.job");
    put_string(out, "id", job->id);
    put_string(out, "model", cJSON_IsString(model) ? model->valuestring : job->adapter);
    put_time(out, "created_at", job->created);
    put_time(out, "finished_at", job->finished);
    put_published(out, "fine_tuned_model", job);
    put_string(out, "organization_id", "medley");
    put_json(out, "result_files", "[]");
    put_string(out, "status", train_state_name(job->state));
    put_string(out, "training_file", job->file_id);
    put_text(out, "validation_file", job->validation_file_id);
    put_hyperparameters(out, job, kept);
    put_member(out, "method", json_get(kept, "method"));
    put_member(out, "metadata", json_get(kept, "metadata"));
    put_json(out, "integrations", "[]");
    put_key(out, "seed");
    strbuf_printf(out, "%" PRIu64, job->settings.seed);
    put_time(out, "estimated_finish", estimated_finish(job));
    put_text(out, "user_provided_suffix", job->suffix);
    put_i64(out, "trained_tokens", job->tokens);
}

static void put_error(struct strbuf *out, const struct train_job *job)
{
    put_key(out, "error");
    if (job->state != TRAIN_FAILED) {
        strbuf_puts(out, "null");
        return;
    }
    strbuf_putc(out, '{');
    put_string(out, "code", api_status_code(job->error.status));
    put_string(out, "message", job->error.message);
    put_json(out, "param", NULL);
    strbuf_putc(out, '}');
}

static void put_ours(struct strbuf *out, const struct train_job *job)
{
    put_string(out, "adapter", job->adapter);
    put_text(out, "version_before", job->version_before);
    put_text(out, "version_after", job->version_after);
    put_bool(out, "can_publish", job->result);
    put_bool(out, "cancel_asked", job->cancel_asked);
    put_text(out, "note", job->state == TRAIN_SUCCEEDED ? job->error.message : NULL);
    put_time(out, "started_at", job->started);
    put_i64(out, "queue_place", job->queue_place);
    put_i64(out, "step", job->step);
    put_i64(out, "steps", job->steps);
    put_f64(out, "progress", job->progress);
    put_i64(out, "examples", job->examples);
    put_i64(out, "held_out", job->held_out);
    put_f64(out, "tokens_per_second", job->tokens_per_second);
    put_f64(out, "loss", job->loss);
    put_f64(out, "loss_before", job->loss_before);
    put_f64(out, "loss_after", job->loss_after);
    put_key(out, "settings");
    train_settings_write(&job->settings, out);
}

void train_job_write(struct strbuf *out, const struct train_job *job, const struct train_routing *routing)
{
    cJSON *kept = NULL;
    if (job->metadata && json_parse(job->metadata, strlen(job->metadata), &kept, NULL)) kept = NULL;
    strbuf_putc(out, '{');
    put_openai(out, job, kept);
    put_error(out, job);
    put_ours(out, job);
    put_key(out, "expert_load");
    if (routing && routing->site_count)
        train_load_write(out, routing);
    else
        strbuf_puts(out, "null");
    strbuf_putc(out, '}');
    cJSON_Delete(kept);
}

/* OpenAI knows "message" and "metrics" only. */
void train_event_write(struct strbuf *out, const char *job_id, const struct train_event *e)
{
    bool metrics = !strcmp(e->kind, "metrics") || !strcmp(e->kind, "evaluation");
    strbuf_puts(out, "{\"object\": \"fine_tuning.job.event\"");
    put_key(out, "id");
    strbuf_printf(out, "\"ftevent-%" PRId64 "\"", e->number);
    put_string(out, "job_id", job_id);
    put_i64(out, "created_at", e->created);
    put_string(out, "level", e->level);
    put_string(out, "type", metrics ? "metrics" : "message");
    put_string(out, "kind", e->kind);
    put_string(out, "message", e->message);
    put_json(out, "data", e->data);
    strbuf_putc(out, '}');
}

/* Checkpoints are states to go on from, no versions to be called by name. */
void train_checkpoint_write(struct strbuf *out, const char *job_id, const struct train_checkpoint *c)
{
    strbuf_puts(out, "{\"object\": \"fine_tuning.job.checkpoint\"");
    put_string(out, "id", c->id);
    put_i64(out, "created_at", c->created);
    put_json(out, "fine_tuned_model_checkpoint", NULL);
    put_string(out, "fine_tuning_job_id", job_id);
    put_i64(out, "step_number", c->step);
    put_i64(out, "bytes", (int64_t)c->bytes);
    put_key(out, "metrics");
    strbuf_putc(out, '{');
    put_i64(out, "step", c->step);
    put_f64(out, "train_loss", c->loss);
    put_f64(out, "valid_loss", c->held_out_loss);
    strbuf_puts(out, "}}");
}

void train_file_write(struct strbuf *out, const struct train_file *f)
{
    strbuf_puts(out, "{\"object\": \"file\"");
    put_string(out, "id", f->id);
    put_i64(out, "bytes", (int64_t)f->bytes);
    put_i64(out, "created_at", f->created);
    put_json(out, "expires_at", NULL);
    put_string(out, "filename", f->name);
    put_string(out, "purpose", f->purpose);
    put_string(out, "status", "processed");
    put_json(out, "status_details", NULL);
    strbuf_putc(out, '}');
}

/* ------------------------------------------------------------------ routing */

static void put_shares(struct strbuf *out, const double *v, int count)
{
    strbuf_putc(out, '[');
    for (int i = 0; i < count; i++) strbuf_printf(out, "%s%.4g", i ? ", " : "", v[i]);
    strbuf_putc(out, ']');
}

void train_load_write(struct strbuf *out, const struct train_routing *r)
{
    strbuf_putc(out, '{');
    for (size_t i = 0; i < r->site_count; i++) {
        const struct train_site_routing *s = &r->sites[i];
        strbuf_printf(out, "%s\"%d.%s\": ", i ? ", " : "", s->layer, projection_name(s->projection));
        put_shares(out, s->share, s->experts);
    }
    strbuf_putc(out, '}');
}

/* ------------------------------------------------------------------ step-wise calls */

static void put_logprobs(struct strbuf *out, const struct session_result *r)
{
    put_key(out, "logprobs");
    strbuf_putc(out, '[');
    for (size_t i = 0; i < r->sequence_count; i++) {
        const struct session_tokens *t = &r->sequences[i];
        strbuf_puts(out, i ? ", [" : "[");
        for (size_t j = 0; j < t->count; j++)
            strbuf_printf(out, "%s%.7g", j ? ", " : "", (double)t->logprob[j]);
        strbuf_putc(out, ']');
    }
    strbuf_putc(out, ']');
}

static void put_losses(struct strbuf *out, const struct session_result *r)
{
    put_f64(out, "loss", r->loss);
    put_f64(out, "objective", r->objective);
    put_f64(out, "balance", r->balance);
    put_f64(out, "contrast", r->contrast);
    put_f64(out, "similarity", r->similarity);
    put_f64(out, "cohesion", r->cohesion);
    put_f64(out, "margin", r->margin);
    put_f64(out, "accuracy", r->accuracy);
    put_f64(out, "clipped", r->clipped);
    put_f64(out, "weight", r->weight);
    put_i64(out, "tokens", r->tokens);
    put_f64(out, "seconds", r->seconds);
    put_logprobs(out, r);
}

void session_result_write(struct strbuf *out, enum session_action action, const struct session_result *r)
{
    static const char *const names[] = {"forward", "forward_backward", "optim_step", "publish"};
    strbuf_putc(out, '{');
    put_key(out, "object");
    strbuf_printf(out, "\"training.%s\"", names[action]);
    put_bool(out, "opened", r->opened);
    put_i64(out, "optim_steps", r->optim_steps);
    put_text(out, "version_before", r->version_before);
    if (action == SESSION_FORWARD || action == SESSION_FORWARD_BACKWARD) put_losses(out, r);
    if (action == SESSION_OPTIM_STEP) {
        put_f64(out, "grad_norm", r->grad_norm);
        put_f64(out, "learning_rate", r->learning_rate);
    }
    if (action == SESSION_PUBLISH) {
        put_string(out, "version", r->put.version);
        put_bool(out, "unchanged", r->put.unchanged);
    }
    strbuf_putc(out, '}');
}

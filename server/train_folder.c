/* `medley train --data-dir`: a job on a data folder, in this process. */
#include "server/commands.h"
#include "server/service.h"
#include "server/train_local.h"
#include "server/train_show.h"

#include "base/file.h"
#include "base/log.h"
#include "training/jobs.h"
#include "training/publish.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct folder_run {
    const struct config *config;
    struct train_settings settings;
    struct device *device;
    struct engine *engine;
    struct adapter_base base;
    struct registry *registry;
    struct jobs *jobs;
    struct train_show show;
    char job[TRAIN_ID_MAX];
    int64_t seen; /* the last event */
};

static enum status check_arguments(const struct config *c, struct error *err)
{
    if (!c->train.adapter)
        return error_set(err, ST_INVALID, "--adapter NAME is required: its name in the data folder");
    if (!c->train.resume && !c->train.examples)
        return error_set(err, ST_INVALID, "--data FILE is required: examples, a JSON object a line");
    if (c->train.out || c->train.log || c->train.checkpoint)
        return error_set(err, ST_INVALID,
                         "--out, --log and --checkpoint are not for --data-dir, which keeps all of it");
    return ST_OK;
}

static enum status open_all(struct folder_run *r, struct error *err)
{
    const struct config *c = r->config;
    struct registry_config registry;
    enum status st = check_arguments(c, err);
    if (!st) st = train_settings_given(c, &r->settings, NULL, err);
    if (!st) st = train_open_engine(c, &r->device, &r->engine, &r->base, err);
    if (st) return st;
    registry_config_fill(c, r->engine, r->device, c->train.data_dir, &registry);
    st = registry_open(&registry, &r->registry, err);
    if (st) return st;
    const struct jobs_config jobs = {.data_dir = c->train.data_dir,
                                     .engine = r->engine,
                                     .device = r->device,
                                     .registry = r->registry,
                                     .base = r->base,
                                     .running_max = 1};
    return jobs_open(&jobs, &r->jobs, err);
}

static void close_all(struct folder_run *r)
{
    jobs_close(r->jobs);
    registry_close(r->registry);
    engine_close(r->engine);
    if (r->device) r->device->ops->close(r->device);
}

/* --- the job --- */

static enum status create(struct folder_run *r, struct error *err)
{
    struct adapter_bundle *bundle = NULL;
    struct put_result put;
    enum status st = train_create(r->config, &r->settings, &r->base, &bundle, err);
    if (!st)
        st = bundle_publish(r->registry, TENANT, r->config->train.adapter, bundle, &r->base, "", &put, err);
    adapter_bundle_free(bundle);
    return st;
}

/* A file of examples into the folder; its id in out. */
static enum status take_file(struct folder_run *r, const char *path, char out[TRAIN_ID_MAX],
                             struct error *err)
{
    struct train_upload *u = NULL;
    struct train_file file;
    struct file_map map;
    const char *slash = strrchr(path, '/');
    enum status st = file_map(path, &map, err);
    if (st) return st;
    st = train_upload_open(r->jobs, TENANT, &u, err);
    if (!st) st = train_upload_write(u, map.data, map.size, err);
    if (st)
        train_upload_drop(u);
    else
        st = train_upload_finish(u, slash ? slash + 1 : path, "fine-tune", &file, err);
    file_unmap(&map);
    if (!st) memcpy(out, file.id, TRAIN_ID_MAX);
    return st;
}

/* A job has what it needs of it. */
static void drop_file(struct folder_run *r, const char *id)
{
    struct error err = {0};
    if (jobs_file_delete(r->jobs, TENANT, id, &err)) log_warn("the file of examples stays: %s", err.message);
}

static enum status submit(struct folder_run *r, struct error *err)
{
    const struct config *c = r->config;
    char examples[TRAIN_ID_MAX], held_out[TRAIN_ID_MAX];
    bool existing;
    enum status st = take_file(r, c->train.examples, examples, err);
    if (!st && c->train.held_out) st = take_file(r, c->train.held_out, held_out, err);
    if (st) return st;
    const struct train_request request = {.adapter = c->train.adapter,
                                          .settings = r->settings,
                                          .file_id = examples,
                                          .validation_file_id = c->train.held_out ? held_out : NULL};
    st = jobs_submit(r->jobs, TENANT, &request, r->job, &existing, err);
    drop_file(r, examples);
    if (c->train.held_out) drop_file(r, held_out);
    return st;
}

/* The adapter's newest job, if it has not ended. */
static enum status find_job(struct folder_run *r, struct error *err)
{
    struct train_job *list;
    size_t count;
    bool more;
    enum status st = jobs_list(r->jobs, TENANT, r->config->train.adapter, NULL, 1, &list, &count, &more, err);
    if (st) return st;
    bool found = count == 1 && !train_state_ended(list[0].state);
    if (found) memcpy(r->job, list[0].id, sizeof r->job);
    for (size_t i = 0; i < count; i++) train_job_release(&list[i]);
    free(list);
    return found ? ST_OK
                 : error_set(err, ST_NOT_FOUND, "no job of '%s' is left to go on with",
                             r->config->train.adapter);
}

static void show_event(struct folder_run *r, const struct train_event *e)
{
    cJSON *data = NULL;
    if (strcmp(e->kind, "metrics") == 0 && e->data &&
        json_parse(e->data, strlen(e->data), &data, NULL) == ST_OK)
        train_show_json(&r->show, data);
    cJSON_Delete(data);
    r->seen = e->number;
}

#define EVENTS_AT_ONCE 64

static enum status take_events(struct folder_run *r, bool *ended, struct error *err)
{
    struct train_event *events;
    size_t count;
    enum status st =
        jobs_events(r->jobs, TENANT, r->job, r->seen, EVENTS_AT_ONCE, &events, &count, ended, err);
    if (st) return st;
    for (size_t i = 0; i < count; i++) {
        show_event(r, &events[i]);
        train_event_release(&events[i]);
    }
    free(events);
    return ST_OK;
}

static enum status show_end(struct folder_run *r, struct error *err)
{
    struct train_job job;
    enum status st = jobs_get(r->jobs, TENANT, r->job, &job, err);
    if (st) return st;
    if (!isnan(job.loss_before) && !isnan(job.loss_after))
        fprintf(stderr, "held-out loss: %.4f before, %.4f after\n", job.loss_before, job.loss_after);
    if (job.state != TRAIN_SUCCEEDED)
        st = error_set(err, ST_REJECTED, "the job %s: %s", train_state_name(job.state), job.error.message);
    else if (job.version_after[0])
        printf("%s@%s\n", job.adapter, job.version_after);
    else if (job.error.message[0])
        fprintf(stderr, "%s\n", job.error.message);
    train_job_release(&job);
    return st;
}

static enum status follow(struct folder_run *r, struct error *err)
{
    const struct timespec moment = {.tv_nsec = 50000000};
    bool ended = false;
    enum status st = ST_OK;
    while (!st && !ended) {
        if (atomic_load(train_interrupted()))
            return error_set(
                err, ST_CANCELLED,
                "interrupted; the same command with --resume goes on, as a server over this folder would");
        st = take_events(r, &ended, err);
        if (!st && !ended) nanosleep(&moment, NULL);
    }
    return st ? st : show_end(r, err);
}

int train_folder_run(const struct config *c)
{
    struct folder_run r = {.config = c};
    struct error err = {0};
    log_set_level(LOG_WARN);
    train_interrupt_watch();
    enum status st = open_all(&r, &err);
    if (!st && c->train.create && !c->train.resume) st = create(&r, &err);
    if (!st) st = c->train.resume ? find_job(&r, &err) : submit(&r, &err);
    if (!st) st = follow(&r, &err);
    close_all(&r);
    return st ? command_failed(&err) : 0;
}

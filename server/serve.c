/* `medley serve`: start, run, drain. */
#include "server/commands.h"

#include "base/log.h"
#include "server/job.h"
#include "server/listen.h"
#include "server/routes.h"
#include "server/service.h"
#include "server/training.h"

#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PING_MS  5000
#define GRACE_MS 2000 /* for answers to reach their clients after everything was cancelled */

struct server {
    struct service service;
    const struct config *config;
    uv_loop_t loop;
    struct listen_address address;
    uv_signal_t interrupt, terminate;
    uv_timer_t ping, drain;
    bool handles; /* the four above are open */
    struct task load, preload;
    bool pinned_left;
    enum status load_status;
    struct error error; /* of loading */
    int progress;
};

/* ------------------------------------------------------------------ drain */

static void stop(struct service *s) { uv_stop(s->loop); }

static void on_grace_over(uv_timer_t *t) { uv_stop(t->loop); }

static void on_drain_over(uv_timer_t *t)
{
    struct server *v = t->data;
    struct api_error err = {0};
    log_warn("requests are still running after %d s: cancelling them", v->config->drain_seconds);
    api_error_set(&err, 503, "shutting_down", NULL, "the server is shutting down");
    job_cancel_all(&v->service, &err);
    session_cancel_all(&v->service);
    uv_timer_start(&v->drain, on_grace_over, GRACE_MS, 0);
}

static void on_signal(uv_signal_t *signal, int number)
{
    struct server *v = signal->data;
    struct service *s = &v->service;
    if (s->state != SERVICE_READY) {
        /* Loading cannot be interrupted, and a second signal means now. Nothing on disk needs a goodbye. */
        log_info("stopped%s", s->state == SERVICE_LOADING ? " while loading" : " without draining");
        _exit(s->state == SERVICE_LOADING ? 0 : 128 + number);
    }
    s->state = SERVICE_DRAINING;
    size_t running = http_exchange_count(s->http);
    log_info("draining: %zu requests are under way; signal again to stop at once", running);
    http_quiesce(s->http);
    struct api_error err = {0};
    api_error_set(&err, 503, "shutting_down", NULL,
                  "the server is shutting down; the training goes on when it starts again");
    follow_end_all(s, &err);
    uv_timer_start(&v->drain, on_drain_over, (uint64_t)v->config->drain_seconds * 1000, 0);
    service_settle(s);
}

static void on_idle(void *ctx) { service_settle(ctx); }

static void on_ping(uv_timer_t *t)
{
    struct service *s = &((struct server *)t->data)->service;
    job_ping_all(s);
    follow_ping_all(s);
}

/* ------------------------------------------------------------------ loading */

static enum status open_training(struct server *v, struct error *err)
{
    struct service *s = &v->service;
    struct jobs_config c = {
        .data_dir = v->config->data,
        .engine = s->engine,
        .device = s->device,
        .registry = s->registry,
        .base = s->base,
        .running_max = v->config->train_jobs,
        .queue_max = v->config->train_queue,
        .file_bytes_max = v->config->train_file_bytes,
        .tenant_bytes_max = v->config->train_tenant_bytes,
    };
    s->no_training = "it was started with --no-training";
    if (v->config->no_training) return ST_OK;
    enum status st = jobs_open(&c, &s->training, err);
    if (st != ST_UNSUPPORTED || s->device->grad) return st;
    s->no_training = "its device has no operations for that";
    return ST_OK;
}

static void load(struct task *t)
{
    struct server *v = (struct server *)((char *)t - offsetof(struct server, load));
    struct service *s = &v->service;
    struct engine_config engine;
    struct registry_config registry;
    v->load_status = config_open_device(v->config, &s->device, &v->error);
    if (v->load_status) return;
    config_engine(v->config, s->device, &engine);
    engine.on_progress = progress_show;
    engine.progress_ctx = &v->progress;
    v->load_status = engine_open(&engine, &s->engine, &v->error);
    if (v->load_status) return;
    registry_config_fill(v->config, s->engine, s->device, v->config->data, &registry);
    s->base = registry.base;
    v->load_status = registry_open(&registry, &s->registry, &v->error);
    if (!v->load_status) v->load_status = open_training(v, &v->error);
}

static void print_banner(const struct server *v)
{
    const struct service *s = &v->service;
    const struct model_shape *shape = engine_shape(s->engine);
    struct engine_stats stats;
    struct registry_stats adapters;
    engine_stats(s->engine, &stats);
    registry_stats(s->registry, &adapters);
    size_t page = kv_page_bytes(!strcmp(v->config->kv_type, "f32") ? DTYPE_F32 : DTYPE_F16, shape->layers,
                                shape->kv_heads, shape->head_dim);
    fprintf(stderr,
            "model    %s (%s), context %d\n"
            "device   %s, up to %d sequences at once\n"
            "kv cache %d pages of %d tokens, %.0f MiB of %s\n"
            "adapters %zu in %s, up to %.0f MiB resident\n\n"
            "Try it:\n\n"
            "  curl %s/v1/chat/completions -H 'Content-Type: application/json'%s \\\n"
            "    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"What is the capital of France?\"}], "
            "\"max_tokens\": 64}'\n\n",
            shape->name[0] ? shape->name : "unnamed", v->config->model_name, shape->context_length,
            s->device->name, v->config->max_batch, stats.kv_pages, KV_PAGE_TOKENS,
            (double)stats.kv_pages * (double)page / 0x1p20, v->config->kv_type, adapters.adapters,
            v->config->data, (double)v->config->adapter_bytes / 0x1p20, v->address.url,
            v->config->api_key ? " -H \"Authorization: Bearer $MEDLEY_API_KEY\"" : "");
}

/* Pinned adapters, one after the other, on one worker and at its low priority: the server is ready without
 * them, and whoever asks for one that is still missing loads it. */
static void preload(struct task *t)
{
    struct server *v = (struct server *)((char *)t - offsetof(struct server, preload));
    v->pinned_left = registry_load_pinned(v->service.registry);
}

static void preloaded(struct task *t)
{
    struct server *v = (struct server *)((char *)t - offsetof(struct server, preload));
    if (v->pinned_left && v->service.state == SERVICE_READY)
        task_start(&v->service, &v->preload, preload, preloaded);
}

static void loaded(struct task *t)
{
    struct server *v = (struct server *)((char *)t - offsetof(struct server, load));
    if (v->load_status) {
        uv_stop(&v->loop);
        return;
    }
    v->service.state = SERVICE_READY;
    print_banner(v);
    printf("ready\n");
    fflush(stdout);
    task_start(&v->service, &v->preload, preload, preloaded);
}

/* ------------------------------------------------------------------ start and end */

static enum status check_address(const struct server *v, struct error *err)
{
    const struct config *c = v->config;
    if (v->address.loopback || c->api_key || c->insecure_listen) return ST_OK;
    return error_set(
        err, ST_INVALID,
        "%s can be reached from outside this machine: set MEDLEY_API_KEY in the environment, or say "
        "--insecure-listen to allow everybody",
        v->address.url);
}

static void open_handles(struct server *v)
{
    uv_signal_init(&v->loop, &v->interrupt);
    uv_signal_init(&v->loop, &v->terminate);
    uv_timer_init(&v->loop, &v->ping);
    uv_timer_init(&v->loop, &v->drain);
    v->interrupt.data = v->terminate.data = v->ping.data = v->drain.data = v;
    uv_signal_start(&v->interrupt, on_signal, SIGINT);
    uv_signal_start(&v->terminate, on_signal, SIGTERM);
    uv_timer_start(&v->ping, on_ping, PING_MS, PING_MS);
    v->handles = true;
}

static enum status start(struct server *v, struct error *err)
{
    struct service *s = &v->service;
    s->loop = &v->loop;
    s->config = v->config;
    s->on_settled = stop;
    s->started = (int64_t)time(NULL);
    randombytes_buf(s->set_secret, sizeof s->set_secret);
    enum status st = listen_open(v->config->listen, &v->address, err);
    if (st) return st;
    st = check_address(v, err);
    if (st) {
        close(v->address.fd);
        return st;
    }
    struct http_config http = {
        .loop = &v->loop,
        .listen_fd = v->address.fd,
        .connections_max = v->config->max_connections,
        .routes = server_routes,
        .route_count = server_route_count,
        .ctx = s,
        .admit = service_admit,
        .on_idle = on_idle,
    };
    st = mailbox_open(&s->mailbox, &v->loop);
    if (st) return error_set(err, st, "cannot start the event loop");
    open_handles(v);
    return http_open(&http, &s->http, err);
}

static void close_handles(struct server *v)
{
    if (!v->handles) return;
    uv_close((uv_handle_t *)&v->interrupt, NULL);
    uv_close((uv_handle_t *)&v->terminate, NULL);
    uv_close((uv_handle_t *)&v->ping, NULL);
    uv_close((uv_handle_t *)&v->drain, NULL);
}

/* What is left of the requests ends with the engine's last events and the workers' last tasks; then nothing
 * holds a lease, and the registry may go. */
static void finish(struct server *v)
{
    struct service *s = &v->service;
    s->on_settled = stop;
    http_close(s->http);
    s->http = NULL;
    while (s->task_count) uv_run(&v->loop, UV_RUN_ONCE);
    if (s->training) jobs_close(s->training);
    engine_close(s->engine);
    if (v->handles) mailbox_close(&s->mailbox);
    CHECK(!s->jobs && !s->follows && !s->session_requests);
    close_handles(v);
    while (s->task_count) uv_run(&v->loop, UV_RUN_ONCE);
    registry_close(s->registry);
    if (s->device) s->device->ops->close(s->device);
    uv_run(&v->loop, UV_RUN_DEFAULT);
    uv_loop_close(&v->loop);
}

int serve_run(const struct config *c)
{
    static const char *const levels[] = {"debug", "info", "warn", "error", "off"};
    for (int i = 0; i <= LOG_OFF; i++)
        if (!strcmp(c->log_level, levels[i])) log_set_level((enum log_level)i);
    struct server *v = calloc(1, sizeof *v);
    struct error err = {0};
    if (!v || uv_loop_init(&v->loop)) {
        free(v);
        error_set(&err, ST_NOMEM, "cannot start the event loop");
        return command_failed(&err);
    }
    v->config = c;
    v->progress = -1;
    enum status st = start(v, &err);
    if (!st) {
        printf("listening on %s\n", v->address.url);
        fflush(stdout);
        task_start(&v->service, &v->load, load, loaded);
        uv_run(&v->loop, UV_RUN_DEFAULT);
        st = v->load_status;
        err = v->error;
    }
    finish(v);
    free(v);
    if (!st) log_info("stopped");
    return st ? command_failed(&err) : 0;
}

/* GET /metrics: Prometheus' text format. Names are vLLM's where the meaning is, so that its dashboards and
 * routers work. */
#include "server/metrics.h"

#include "server/handlers.h"
#include "server/job.h"
#include "server/training.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* vLLM's. */
static const double latency_bounds[LATENCY_BUCKETS] = {
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160};

void latency_add(struct latency *l, double seconds)
{
    int i = 0;
    while (i < LATENCY_BUCKETS && seconds > latency_bounds[i]) i++;
    l->bucket[i]++;
    l->count++;
    l->sum += seconds;
}

static void head(struct strbuf *out, const char *name, const char *type, const char *help)
{
    strbuf_printf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void value(struct strbuf *out, const char *name, const char *type, const char *help, double v)
{
    head(out, name, type, help);
    strbuf_printf(out, "%s %.15g\n", name, v);
}

static void gauge(struct strbuf *out, const char *name, const char *help, double v)
{
    value(out, name, "gauge", help, v);
}

static void counter(struct strbuf *out, const char *name, const char *help, double v)
{
    value(out, name, "counter", help, v);
}

static void histogram(struct strbuf *out, const char *name, const char *help, const struct latency *l)
{
    uint64_t below = 0;
    head(out, name, "histogram", help);
    for (int i = 0; i < LATENCY_BUCKETS; i++) {
        below += l->bucket[i];
        strbuf_printf(out, "%s_bucket{le=\"%g\"} %" PRIu64 "\n", name, latency_bounds[i], below);
    }
    strbuf_printf(out, "%s_bucket{le=\"+Inf\"} %" PRIu64 "\n%s_sum %.9g\n%s_count %" PRIu64 "\n", name,
                  l->count, name, l->sum, name, l->count);
}

static void write_engine(struct strbuf *out, const struct service *s)
{
    struct engine_stats e;
    engine_stats(s->engine, &e);
    gauge(out, "vllm:num_requests_running", "Sequences in the batch.", e.running);
    gauge(out, "vllm:num_requests_waiting", "Sequences that wait for room.", e.waiting);
    gauge(out, "vllm:kv_cache_usage_perc", "Pages of keys and values in use, 1 is all.",
          e.kv_pages ? (double)e.kv_pages_used / e.kv_pages : 0);
    counter(out, "vllm:prefix_cache_queries_total", "Prompt tokens looked for in the prefix cache.",
            (double)e.prefix_queries);
    counter(out, "vllm:prefix_cache_hits_total", "Prompt tokens found there.", (double)e.prefix_hits);
    counter(out, "vllm:num_preemptions_total", "Sequences put back for lack of memory: memory is reserved.",
            0);
    counter(out, "vllm:prompt_tokens_total", "Prompt tokens computed.", (double)e.prompt_tokens);
    counter(out, "vllm:generation_tokens_total", "Tokens generated.", (double)e.output_tokens);
    counter(out, "medley_steps_total", "Steps of the engine.", (double)e.steps);
    counter(out, "medley_step_seconds_total", "Time in steps.", e.step_seconds);
    counter(out, "medley_step_overhead_seconds_total", "Of it, outside the device's operations.",
            e.overhead_seconds);
}

static void write_requests(struct strbuf *out, const struct metrics *m)
{
    static const char *const reasons[] = {"stop", "length", "abort", "error"};
    head(out, "vllm:request_success_total", "counter", "Sequences that ended, by reason.");
    for (int i = 0; i <= FINISH_ERROR; i++)
        strbuf_printf(out, "vllm:request_success_total{finished_reason=\"%s\"} %" PRIu64 "\n", reasons[i],
                      m->finished[i]);
    histogram(out, "vllm:time_to_first_token_seconds", "From a request's arrival to its first token.",
              &m->first_token);
    histogram(out, "vllm:e2e_request_latency_seconds", "From a request's arrival to its end.", &m->whole);
}

/* Appends a name unless the list ("a,b") has it. What a request calls an adapter may be anything. */
static void list_name(struct strbuf *list, const char *name)
{
    if (!name || !adapter_name_valid(name)) return;
    size_t n = strlen(name);
    for (const char *at = list->data; list->size && at; at = strchr(at, ',')) {
        at += *at == ',';
        if (strncmp(at, name, n) == 0 && (at[n] == ',' || !at[n])) return;
    }
    strbuf_printf(list, "%s%s", list->size ? "," : "", name);
}

/* Whose adapters are in the batch, and whose wait for it. As vLLM has it: lists in labels, and the time as the value,
 * by which routers find the newest. */
static void write_lora_requests(struct strbuf *out, const struct service *s)
{
    struct strbuf running = {0}, waiting = {0};
    for (const struct job *j = s->jobs; j; j = j->next)
        for (size_t i = 0; i < j->request.adapter_count; i++)
            list_name(j->admitted ? &running : &waiting, j->request.adapters[i].name);
    head(out, "vllm:lora_requests_info", "gauge", "Adapters of requests; the value is the time.");
    strbuf_printf(out,
                  "vllm:lora_requests_info{max_lora=\"%d\",running_lora_adapters=\"%s\","
                  "waiting_lora_adapters=\"%s\"} %" PRId64 "\n",
                  s->config->max_batch, running.size ? running.data : "", waiting.size ? waiting.data : "",
                  (int64_t)time(NULL));
    if (running.failed || waiting.failed) out->failed = true;
    strbuf_release(&running);
    strbuf_release(&waiting);
}

static void write_adapters(struct strbuf *out, const struct service *s)
{
    struct registry_stats r;
    registry_stats(s->registry, &r);
    gauge(out, "medley_adapters", "Adapters.", (double)r.adapters);
    gauge(out, "medley_adapter_versions", "Versions of them.", (double)r.versions);
    gauge(out, "medley_adapter_versions_resident", "Versions in memory.", (double)r.resident);
    gauge(out, "medley_adapter_resident_bytes", "Memory they take.", (double)r.resident_bytes);
    gauge(out, "medley_adapter_leases", "Holds on versions by requests.", (double)r.leases);
    counter(out, "medley_adapter_loads_total", "Versions loaded into memory.", (double)r.loads);
    counter(out, "medley_adapter_evictions_total", "Versions that made room for others.",
            (double)r.evictions);
}

static void write_training(struct strbuf *out, const struct service *s)
{
    struct jobs_stats t;
    jobs_stats(s->training, &t);
    gauge(out, "medley_training_jobs_queued", "Training jobs that wait.", t.queued);
    gauge(out, "medley_training_jobs_running", "Training jobs that run.", t.running);
    gauge(out, "medley_training_sessions", "Adapters trained step by step.", t.sessions);
    counter(out, "medley_training_steps_total", "Steps of the optimiser.", (double)t.steps);
    counter(out, "medley_training_tokens_total", "Tokens trained on.", (double)t.tokens);
    counter(out, "medley_training_step_seconds_total", "Time in those steps.", t.step_seconds);
    counter(out, "medley_training_published_total", "Versions published.", (double)t.published);
    counter(out, "medley_training_failed_total", "Jobs that failed.", (double)t.failed);
    gauge(out, "medley_training_bytes", "Memory: transposed weights, parameters, moments, activations.",
          (double)(t.transposed_bytes + t.state_bytes));
}

void metrics_get(struct exchange *x)
{
    const struct service *s = service_of(x);
    struct strbuf out = {0};
    write_engine(&out, s);
    write_requests(&out, &s->metrics);
    write_lora_requests(&out, s);
    write_adapters(&out, s);
    if (s->training) write_training(&out, s);
    exchange_reply(x, 200, "text/plain; version=0.0.4", &out);
}

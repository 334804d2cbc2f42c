/* `medley generate`: one prompt, its continuation streamed to the terminal. */
#include "server/commands.h"

#include "api/completion.h"
#include "base/log.h"
#include "server/local_adapters.h"
#include "server/prompt.h"
#include "server/service.h"

#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct generation {
    const struct config *config;
    uv_loop_t loop;
    uv_signal_t interrupt;
    struct mailbox mailbox;
    struct device *device;
    struct engine *engine;
    struct local_adapters *adapters;
    struct token_list prompt;
    uint64_t id;
    uint64_t started_ns, first_ns, ended_ns;
    enum finish_reason finish;
    struct error error;
    int prompt_tokens, output_tokens;
    struct strbuf pending; /* text not yet printed; under lock */
    uv_mutex_t lock;
    struct mail text_mail, done_mail;
    bool text_posted; /* under lock */
};

/* ------------------------------------------------------------------ on the engine's thread */

static void on_event(void *ctx, const struct engine_event *e)
{
    struct generation *g = ctx;
    uv_mutex_lock(&g->lock);
    if (e->kind == EVENT_TOKEN && !g->first_ns) g->first_ns = uv_hrtime();
    if (e->text_size) strbuf_append(&g->pending, e->text, e->text_size);
    bool post = g->pending.size && !g->text_posted;
    g->text_posted |= post;
    uv_mutex_unlock(&g->lock);
    if (post) mailbox_post(&g->mailbox, &g->text_mail);
    if (e->kind != EVENT_DONE) return;
    g->finish = e->finish;
    if (e->error) g->error = *e->error;
    g->prompt_tokens = e->prompt_tokens;
    g->output_tokens = e->output_tokens;
    mailbox_post(&g->mailbox, &g->done_mail);
}

/* ------------------------------------------------------------------ on the main thread */

static void print_pending(struct mail *m)
{
    struct generation *g = (struct generation *)((char *)m - offsetof(struct generation, text_mail));
    uv_mutex_lock(&g->lock);
    struct strbuf text = g->pending;
    g->pending = (struct strbuf){0};
    g->text_posted = false;
    uv_mutex_unlock(&g->lock);
    fwrite(text.data, 1, text.size, stdout);
    fflush(stdout);
    strbuf_release(&text);
}

static void on_done(struct mail *m)
{
    struct generation *g = (struct generation *)((char *)m - offsetof(struct generation, done_mail));
    g->ended_ns = uv_hrtime();
    uv_stop(&g->loop);
}

static void on_interrupt(uv_signal_t *signal, int number)
{
    (void)number;
    struct generation *g = signal->data;
    engine_cancel(g->engine, g->id);
}

static void print_stats(const struct generation *g)
{
    double prefill = g->first_ns ? (double)(g->first_ns - g->started_ns) / 1e9 : 0;
    double decode = g->first_ns ? (double)(g->ended_ns - g->first_ns) / 1e9 : 0;
    int after_first = g->output_tokens > 1 ? g->output_tokens - 1 : 0;
    fprintf(stderr, "\n%d prompt tokens in %.2f s (%.0f/s), %d tokens", g->prompt_tokens, prefill,
            prefill > 0 ? g->prompt_tokens / prefill : 0, g->output_tokens);
    if (decode > 0 && after_first) fprintf(stderr, " in %.2f s (%.1f/s)", decode, after_first / decode);
    fprintf(stderr, g->finish == FINISH_CANCELLED ? ", interrupted\n" : "\n");
}

static enum status tokenise(struct generation *g, struct error *err)
{
    const struct config *c = g->config;
    const char *text = c->words.items[0];
    if (!c->chat) {
        unsigned flags = TOKENIZE_ADD_SPECIAL | TOKENIZE_PARSE_SPECIAL;
        enum status st = tokenizer_encode(engine_tokenizer(g->engine), text, strlen(text), flags, &g->prompt);
        return st ? error_set(err, st, "the prompt cannot be tokenised: %s", status_text(st)) : ST_OK;
    }
    struct message messages[] = {{"system", (char *)c->system}, {"user", (char *)text}};
    struct chat_prompt chat = {.messages = c->system ? messages : messages + 1,
                               .count = c->system ? 2 : 1,
                               .add_generation_prompt = true};
    return prompt_render(g->engine, &chat, 0, &g->prompt, err);
}

static enum status submit(struct generation *g, struct error *err)
{
    const struct config *c = g->config;
    struct lr_member members[OPTION_LIST_MAX];
    struct engine_request r = {
        .prompt = g->prompt.ids,
        .prompt_count = g->prompt.count,
        .members = members,
        .member_count = local_adapters_members(g->adapters, members),
        .on_event = on_event,
        .ctx = g,
        .sampling = {.temperature = (float)c->temperature,
                     .top_p = (float)c->top_p,
                     .top_k = c->top_k,
                     .repetition_penalty = 1,
                     .max_tokens = c->max_tokens,
                     .skip_special = true,
                     .logprobs = -1,
                     .prompt_logprobs = -1,
                     .seed = c->seed.value},
    };
    r.set_key.word[0] = r.member_count > 0; /* the only set there is */
    if (!c->seed.given) randombytes_buf(&r.sampling.seed, sizeof r.sampling.seed);
    g->text_mail.deliver = print_pending;
    g->done_mail.deliver = on_done;
    g->started_ns = uv_hrtime();
    return engine_submit(g->engine, &r, &g->id, err);
}

static enum status open_all(struct generation *g, struct error *err)
{
    struct engine_config engine;
    int shown = -1;
    enum status st = config_open_device(g->config, &g->device, err);
    if (st) return st;
    config_engine(g->config, g->device, &engine);
    engine.max_batch = 1;
    engine.on_progress = progress_show;
    engine.progress_ctx = &shown;
    st = engine_open(&engine, &g->engine, err);
    if (!st) st = local_adapters_open(g->config, g->engine, g->device, &g->adapters, err);
    return st ? st : tokenise(g, err);
}

static void close_all(struct generation *g)
{
    engine_close(g->engine);
    local_adapters_close(g->adapters);
    if (g->device) g->device->ops->close(g->device);
    token_list_release(&g->prompt);
    strbuf_release(&g->pending);
}

static enum status generate(struct generation *g, struct error *err)
{
    enum status st = mailbox_open(&g->mailbox, &g->loop);
    if (st) return st;
    uv_signal_init(&g->loop, &g->interrupt);
    g->interrupt.data = g;
    uv_signal_start(&g->interrupt, on_interrupt, SIGINT);
    st = submit(g, err);
    if (!st) uv_run(&g->loop, UV_RUN_DEFAULT);
    mailbox_close(&g->mailbox);
    uv_close((uv_handle_t *)&g->interrupt, NULL);
    uv_run(&g->loop, UV_RUN_DEFAULT);
    if (st) return st;
    print_stats(g);
    if (g->finish != FINISH_ERROR) return ST_OK;
    *err = g->error;
    return err->status;
}

int generate_run(const struct config *c)
{
    struct generation *g = calloc(1, sizeof *g);
    struct error err = {0};
    if (!g || uv_loop_init(&g->loop) || uv_mutex_init(&g->lock)) {
        free(g);
        error_set(&err, ST_NOMEM, "out of memory");
        return command_failed(&err);
    }
    g->config = c;
    log_set_level(LOG_WARN);
    enum status st = open_all(g, &err);
    if (!st) st = generate(g, &err);
    close_all(g);
    uv_mutex_destroy(&g->lock);
    uv_loop_close(&g->loop);
    free(g);
    return st ? command_failed(&err) : 0;
}

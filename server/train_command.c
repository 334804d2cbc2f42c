/* `medley train`: an adapter trained on a file of examples, in this process. */
#include "server/commands.h"
#include "server/train_local.h"
#include "server/train_show.h"

#include "base/file.h"
#include "base/log.h"
#include "training/publish.h"
#include "training/routing.h"
#include "training/start.h"
#include "training/trainer.h"

#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct run {
    const struct config *config;
    struct train_settings settings;
    struct device *device;
    struct engine *engine;
    struct adapter_base base;
    struct train_start start;       /* of --adapter */
    struct adapter_bundle *created; /* of --create */
    struct transposed *transposed;
    struct dataset *examples, *held_out;
    struct trainer *trainer;
    struct routing_log *routing;
    char *checkpoint;
    FILE *log; /* NULL: none */
    struct train_show show;
    double saved; /* when a checkpoint was written, by the clock */
};

static enum status no_memory(struct error *err) { return error_set(err, ST_NOMEM, "out of memory"); }

/* --- examples --- */

static bool show_reading(void *ctx, double done)
{
    progress_bar("reading", ctx, done);
    return !atomic_load(train_interrupted());
}

static enum status read_examples(struct run *r, const char *path, struct dataset **out, struct error *err)
{
    struct error why = {0};
    int cells = -1, fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return file_error(err, "open", path);
    const struct dataset_rules rules = {.tokenizer = engine_tokenizer(r->engine),
                                        .chat = engine_chat(r->engine, &why),
                                        .chat_problem = why.message,
                                        .context_length = engine_shape(r->engine)->context_length,
                                        .batch_tokens = r->settings.batch_tokens,
                                        .loss = (enum train_loss)r->settings.loss,
                                        .name = path,
                                        .on_progress = show_reading,
                                        .progress_ctx = &cells};
    enum status st = dataset_read_file(&rules, fd, out, err);
    close(fd);
    return st;
}

/* --- opening --- */

static enum status check_arguments(const struct config *c, struct error *err)
{
    struct stat info;
    if (!c->train.examples)
        return error_set(err, ST_INVALID, "--data FILE is required: examples, a JSON object a line");
    if (!c->train.out)
        return error_set(err, ST_INVALID, "--out FOLDER is required: where the trained adapter goes");
    if (!c->train.adapter == !c->train.create)
        return error_set(err, ST_INVALID,
                         "give --adapter PATH to go on from an adapter, or --create for a new one");
    char *there = NULL;
    if (asprintf(&there, "%s/adapter_config.json", c->train.out) < 0) return no_memory(err);
    bool taken = !c->force && stat(there, &info) == 0;
    enum status st =
        taken ? error_set(err, ST_INVALID, "'%s' is there already; --force replaces it", there) : ST_OK;
    free(there);
    return st;
}

static enum status open_trainer(struct run *r, struct error *err)
{
    const struct config *c = r->config;
    struct strbuf identity = {0};
    strbuf_printf(&identity, "%s %s %d %d %d %g", engine_shape(r->engine)->fingerprint,
                  c->train.adapter ? c->train.adapter : "", c->train.rank, c->train.experts, c->train.top_k,
                  c->train.alpha);
    const struct trainer_config config = {.engine = r->engine,
                                          .device = r->device,
                                          .transposed = r->transposed,
                                          .bundle = r->created ? r->created : r->start.bundle,
                                          .examples = r->examples,
                                          .validation = r->held_out,
                                          .settings = r->settings,
                                          .identity = identity.data};
    enum status st = identity.failed ? no_memory(err) : trainer_open(&config, &r->trainer, err);
    strbuf_release(&identity);
    if (!st && routing_log_open(trainer_params(r->trainer), &r->routing)) st = no_memory(err);
    return st;
}

static enum status open_files(struct run *r, struct error *err)
{
    const struct config *c = r->config;
    if (c->train.checkpoint)
        r->checkpoint = strdup(c->train.checkpoint);
    else if (asprintf(&r->checkpoint, "%s/checkpoint", c->train.out) < 0)
        r->checkpoint = NULL;
    if (!r->checkpoint) return no_memory(err);
    enum status st = file_make_folders(c->train.out, err);
    if (st || !c->train.log) return st;
    r->log = fopen(c->train.log, "ae");
    return r->log ? ST_OK : file_error(err, "open", c->train.log);
}

static enum status open_all(struct run *r, struct error *err)
{
    const struct config *c = r->config;
    enum status st = check_arguments(c, err);
    if (!st) st = train_settings_given(c, &r->settings, NULL, err);
    if (!st) st = open_files(r, err);
    if (!st) st = train_open_engine(c, &r->device, &r->engine, &r->base, err);
    if (!st)
        st = c->train.create ? train_create(c, &r->settings, &r->base, &r->created, err)
                             : train_start_open(c->train.adapter, &r->base, &r->start, err);
    if (!st) st = read_examples(r, c->train.examples, &r->examples, err);
    if (!st && c->train.held_out) st = read_examples(r, c->train.held_out, &r->held_out, err);
    if (!st) st = transposed_open(r->engine, &r->transposed, err);
    return st ? st : open_trainer(r, err);
}

static void close_all(struct run *r)
{
    trainer_close(r->trainer);
    routing_log_close(r->routing);
    transposed_close(r->transposed);
    dataset_free(r->examples);
    dataset_free(r->held_out);
    adapter_bundle_free(r->created);
    train_start_close(&r->start);
    engine_close(r->engine);
    if (r->device) r->device->ops->close(r->device);
    if (r->log) fclose(r->log);
    free(r->checkpoint);
}

/* --- what is shown and logged --- */

static void log_line(struct run *r, struct strbuf *line)
{
    strbuf_putc(line, '\n');
    if (r->log && !line->failed) {
        fwrite(line->data, 1, line->size, r->log);
        fflush(r->log);
    }
    strbuf_release(line);
}

static void log_evaluation(struct run *r, int64_t step, const struct objective_evaluation *e)
{
    struct strbuf line = {0};
    if (isnan(e->loss)) return;
    strbuf_printf(&line, "{\"evaluation\":{\"step\":%lld,\"loss\":", (long long)step);
    json_write_f64(&line, e->loss);
    strbuf_puts(&line, ",\"similarity\":");
    json_write_f64(&line, e->similarity);
    strbuf_puts(&line, ",\"cohesion\":");
    json_write_f64(&line, e->cohesion);
    strbuf_puts(&line, "}}");
    log_line(r, &line);
}

static void log_routing(struct run *r)
{
    struct train_routing routing;
    struct strbuf line = {0};
    if (routing_log_read(r->routing, &routing)) return;
    strbuf_puts(&line, "{\"routing\":");
    train_routing_write(&routing, &line);
    strbuf_putc(&line, '}');
    log_line(r, &line);
    train_routing_release(&routing);
}

static void log_step(struct run *r, const struct trainer_step *s)
{
    struct strbuf line = {0};
    trainer_step_write(s, (enum train_loss)r->settings.loss, &line);
    log_line(r, &line);
}

static void show_step(struct run *r, const struct trainer_step *s)
{
    const struct train_point p = {.step = s->step,
                                  .steps = s->steps,
                                  .loss = s->result.objective,
                                  .balance = s->result.balance,
                                  .contrast = s->result.contrast,
                                  .tokens = (double)s->result.tokens,
                                  .seconds = s->seconds};
    train_show(&r->show, &p);
}

/* --- running --- */

static enum status save(struct run *r, struct error *err)
{
    struct checkpoint_state state;
    r->saved = train_clock();
    return trainer_save(r->trainer, r->checkpoint, &state, err);
}

static bool save_due(const struct run *r, int64_t step)
{
    const struct train_settings *s = &r->settings;
    return (s->checkpoint_steps > 0 && step % s->checkpoint_steps == 0) ||
           (s->checkpoint_seconds > 0 && train_clock() - r->saved >= s->checkpoint_seconds);
}

static enum status evaluate(struct run *r, int64_t step, struct objective_evaluation *out, struct error *err)
{
    enum status st = trainer_evaluate(r->trainer, train_interrupted(), out, err);
    if (!st) log_evaluation(r, step, out);
    return st;
}

static enum status run_step(struct run *r, struct error *err)
{
    struct trainer_step s;
    struct objective_evaluation e;
    enum status st = trainer_step(r->trainer, train_interrupted(), &s, err);
    if (st) return st;
    routing_log_add(r->routing, s.step, &s.result);
    log_step(r, &s);
    show_step(r, &s);
    if (trainer_evaluation_due(r->trainer)) st = evaluate(r, s.step, &e, err);
    return !st && !trainer_done(r->trainer) && save_due(r, s.step) ? save(r, err) : st;
}

static enum status begin(struct run *r, struct error *err)
{
    struct objective_evaluation before;
    struct trainer_facts facts;
    trainer_facts(r->trainer, &facts);
    fprintf(stderr, "%zu examples, %zu held out, %zu parameters, %lld steps\n", facts.examples,
            facts.held_out, facts.parameters, (long long)facts.steps);
    enum status st =
        trainer_begin(r->trainer, r->config->train.resume ? r->checkpoint : NULL, train_interrupted(), err);
    trainer_before(r->trainer, &before);
    if (!st && !r->config->train.resume) log_evaluation(r, 0, &before);
    r->saved = train_clock();
    return st;
}

/* After the last step: the result into the folder, if it is to be had. */
static enum status finish(struct run *r, struct error *err)
{
    struct objective_evaluation before, after;
    struct trainer_facts facts;
    struct adapter_bundle *bundle = NULL;
    trainer_facts(r->trainer, &facts);
    trainer_before(r->trainer, &before);
    enum status st = evaluate(r, facts.steps, &after, err);
    if (st) return st;
    log_routing(r);
    if (facts.held_out) fprintf(stderr, "held-out loss: %.4f before, %.4f after\n", before.loss, after.loss);
    if (r->settings.publish == PUBLISH_ON_IMPROVEMENT && !(after.loss < before.loss)) {
        fprintf(stderr, "no improvement: nothing is written\n");
        return ST_OK;
    }
    st = trainer_bundle(r->trainer, &r->base, &bundle, err);
    if (!st) st = bundle_write(bundle, &r->base, r->config->train.out, err);
    adapter_bundle_free(bundle);
    if (st) return st;
    fprintf(stderr, "the adapter is in %s\n", r->config->train.out);
    unlink(r->checkpoint);
    return ST_OK;
}

/* Ctrl-C: nothing is lost but the step it came in. */
static enum status stop(struct run *r, struct error *err)
{
    struct error inner = {0};
    enum status st = save(r, &inner);
    if (st) return error_set(err, st, "interrupted, and the checkpoint cannot be written: %s", inner.message);
    return error_set(err, ST_CANCELLED, "interrupted; --resume with the same arguments goes on from %s",
                     r->checkpoint);
}

static enum status train(struct run *r, struct error *err)
{
    enum status st = begin(r, err);
    if (st == ST_CANCELLED) return error_set(err, st, "interrupted before the first step");
    while (!st && !trainer_done(r->trainer)) st = run_step(r, err);
    if (!st) st = finish(r, err);
    return st == ST_CANCELLED ? stop(r, err) : st;
}

int train_run(const struct config *c)
{
    if (c->train.server) return train_remote_run(c);
    if (c->train.data_dir) return train_folder_run(c);
    struct run r = {.config = c};
    struct error err = {0};
    log_set_level(LOG_WARN);
    train_interrupt_watch();
    enum status st = open_all(&r, &err);
    if (!st) st = train(&r, &err);
    close_all(&r);
    return st ? command_failed(&err) : 0;
}

#include "server/train_show.h"

#include "base/strbuf.h"
#include "training/trainer.h"

#include <math.h>
#include <stdio.h>
#include <unistd.h>

#define BAR_CELLS        20
#define SECONDS_PER_LINE 10

static double smooth(double old, double now) { return old > 0 ? 0.8 * old + 0.2 * now : now; }

void train_show(struct train_show *s, const struct train_point *p)
{
    static const char cells[] = "####################";
    bool terminal = isatty(STDERR_FILENO), last = p->step == p->steps;
    double now = train_clock();
    s->step_seconds = smooth(s->step_seconds, p->seconds);
    s->step_tokens = smooth(s->step_tokens, p->tokens);
    if (!last && now - s->shown < (terminal ? 0.1 : SECONDS_PER_LINE)) return;
    s->shown = now;
    int64_t left = (int64_t)(s->step_seconds * (double)(p->steps - p->step));
    fprintf(stderr, "%sstep %lld/%lld [%-*.*s] loss %.4f", terminal ? "\r" : "", (long long)p->step,
            (long long)p->steps, BAR_CELLS, p->steps > 0 ? (int)(BAR_CELLS * p->step / p->steps) : 0, cells,
            p->loss);
    if (!isnan(p->balance)) fprintf(stderr, ", balance %.3f", p->balance);
    if (!isnan(p->contrast)) fprintf(stderr, ", contrast %.3f", p->contrast);
    fprintf(stderr, ", %.0f tokens/s, %lld:%02lld left %s",
            s->step_seconds > 0 ? s->step_tokens / s->step_seconds : 0, (long long)left / 60,
            (long long)left % 60, !terminal || last ? "\n" : "  ");
}

static double number_of(const cJSON *object, const char *key, double otherwise)
{
    (void)json_get_f64(object, key, -1e300, 1e300, &otherwise, NULL);
    return otherwise;
}

void train_show_json(struct train_show *s, const cJSON *e)
{
    const struct train_point p = {.step = (int64_t)number_of(e, "step", 0),
                                  .steps = (int64_t)number_of(e, "steps", 0),
                                  .loss = number_of(e, "cross_entropy", number_of(e, "dpo", NAN)),
                                  .balance = number_of(e, "balance", NAN),
                                  .contrast = number_of(e, "contrast", NAN),
                                  .tokens = number_of(e, "tokens", 0),
                                  .seconds = number_of(e, "seconds", 0)};
    train_show(s, &p);
}

enum status train_settings_given(const struct config *c, struct train_settings *out, struct strbuf *given,
                                 struct error *err)
{
    enum status st = ST_OK;
    train_settings_default(out);
    for (size_t i = 0; i < train_setting_count && !st; i++) {
        const struct train_setting *t = &train_setting_table[i];
        if (!c->train.settings[i]) continue;
        st = train_settings_set(out, t->name, c->train.settings[i], err);
        if (st || !given) continue;
        strbuf_putc(given, ',');
        train_setting_write(out, t, given);
    }
    return st;
}

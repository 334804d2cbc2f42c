#include "training/dataset_int.h"

#include "base/json.h"
#include "base/memory.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static enum status no_memory(struct error *err) { return error_set(err, ST_NOMEM, "out of memory"); }

void dataset_free(struct dataset *d)
{
    if (!d) return;
    free(d->token);
    free(d->run);
    free(d->old);
    free(d->sequence);
    free(d->example);
    free(d);
}

void dataset_weights(const struct dataset *d, const struct dataset_sequence *s, float *out)
{
    for (int i = 0; i < s->run_count; i++)
        for (int k = 0; k < d->run[s->first_run + (size_t)i].count; k++)
            *out++ = d->run[s->first_run + (size_t)i].weight;
}

/* --- adding an example --- */

static enum status check_draft(const struct dataset_rules *r, const struct draft *x, struct error *err)
{
    size_t n = x->tokens.count, weighing = 0;
    if (n < 2) return error_set(err, ST_INVALID, "a sequence needs at least two tokens; this one has %zu", n);
    if (n > (size_t)r->context_length)
        return error_set(err, ST_INVALID,
                         "%zu tokens are too long for the model's context of %d: shorten or split it", n,
                         r->context_length);
    for (size_t i = 1; i < n; i++) weighing += x->weight[i] > 0;
    if (!weighing)
        return error_set(err, ST_INVALID,
                         "no token after the first has a weight above 0: there is nothing to learn");
    return ST_OK;
}

static enum status add_runs(struct dataset *d, const struct draft *x, struct error *err)
{
    for (size_t i = 0; i < x->tokens.count;) {
        size_t end = i + 1;
        while (end < x->tokens.count && x->weight[end] == x->weight[i]) end++;
        if (array_grow((void **)&d->run, &d->run_capacity, d->run_count, sizeof *d->run))
            return no_memory(err);
        d->run[d->run_count++] = (struct weight_run){(int)(end - i), x->weight[i]};
        i = end;
    }
    return ST_OK;
}

static size_t limit_of(size_t asked, size_t ceiling) { return asked && asked < ceiling ? asked : ceiling; }

static enum status add_sequence(struct dataset *d, const struct dataset_rules *r, const struct draft *x,
                                struct error *err)
{
    size_t most = limit_of(r->tokens_max, DATASET_TOKENS_MAX);
    struct dataset_sequence s = {.first = d->token_count,
                                 .count = (int)x->tokens.count,
                                 .first_run = d->run_count,
                                 .first_old = d->old_count};
    if (d->token_count + x->tokens.count > most)
        return error_set(err, ST_TOO_LARGE, "more than %zu tokens in all: give fewer examples at a time", most);
    for (size_t i = 0; i < x->tokens.count; i++) {
        if (array_grow((void **)&d->token, &d->token_capacity, d->token_count, sizeof *d->token))
            return no_memory(err);
        d->token[d->token_count++] = x->tokens.ids[i];
    }
    for (size_t i = 0; i < x->old_count; i++) {
        if (array_grow((void **)&d->old, &d->old_capacity, d->old_count, sizeof *d->old))
            return no_memory(err);
        d->old[d->old_count++] = x->old[i];
    }
    enum status st = add_runs(d, x, err);
    if (st) return st;
    s.run_count = (int)(d->run_count - s.first_run);
    if (array_grow((void **)&d->sequence, &d->sequence_capacity, d->sequence_count, sizeof *d->sequence))
        return no_memory(err);
    d->sequence[d->sequence_count++] = s;
    if (s.count > d->seq_rows_max) d->seq_rows_max = s.count;
    return ST_OK;
}

static enum status add_example(struct dataset *d, const struct dataset_rules *r,
                               const struct example_space *space, size_t line, struct error *err)
{
    struct dataset_example e = {.line = line, .first_sequence = d->sequence_count};
    enum status st = ST_OK;
    for (int i = 0; i < d->sequences_each && !st; i++) {
        st = check_draft(r, &space->draft[i], err);
        if (!st) st = add_sequence(d, r, &space->draft[i], err);
        e.rows += (int)space->draft[i].tokens.count;
    }
    if (st) return st;
    if (e.rows > r->batch_tokens)
        return error_set(
            err, ST_INVALID,
            "%d tokens are more than batch_tokens, which is %lld: raise it, or shorten the example", e.rows,
            (long long)r->batch_tokens);
    size_t most = limit_of(r->examples_max, DATASET_EXAMPLES_MAX);
    if (d->example_count == most)
        return error_set(err, ST_TOO_LARGE, "more than %zu examples: give fewer at a time", most);
    if (array_grow((void **)&d->example, &d->example_capacity, d->example_count, sizeof *d->example))
        return no_memory(err);
    d->example[d->example_count++] = e;
    if (e.rows > d->rows_max) d->rows_max = e.rows;
    return ST_OK;
}

/* --- lines --- */

struct reader {
    const struct dataset_rules *rules;
    FILE *in;
    size_t size, done; /* bytes; of the source, and read */
    size_t line;
    size_t blank; /* the first blank line since the last example; 0: none */
    struct strbuf text;
    struct example_space space;
    struct dataset *dataset;
    char buffer[1 << 16]; /* of `in`, which would do without where it finds no memory */
};

/* The next line without its end into r->text; *end where there is none. */
static enum status next_line(struct reader *r, bool *end, struct error *err)
{
    int c;
    strbuf_clear(&r->text);
    while ((c = getc_unlocked(r->in)) != EOF && c != '\n') {
        if (r->text.size == DATASET_LINE_BYTES_MAX)
            return error_set(err, ST_TOO_LARGE, "more than %d bytes: is each example on a line of its own?",
                             DATASET_LINE_BYTES_MAX);
        strbuf_putc(&r->text, (char)c);
    }
    if (r->text.failed) return no_memory(err);
    if (ferror(r->in)) return error_set(err, ST_IO, "reading failed: %s", strerrordesc_np(errno));
    *end = c == EOF && r->text.size == 0;
    r->done += r->text.size + (c != EOF);
    return ST_OK;
}

static bool is_blank(const struct strbuf *text)
{
    return text->size == 0 || strspn(text->data, " \t\r") == text->size;
}

/* Of json_parse's message, the part after the line number, which is always 1. */
static enum status not_json(const struct error *inner, struct error *err)
{
    const char *column = strstr(inner->message, "column ");
    return error_set(err, ST_INVALID, "not JSON: %s", column ? column : inner->message);
}

static enum status read_line(struct reader *r, struct error *err)
{
    struct error inner = {0};
    cJSON *object = NULL;
    enum status st = json_parse(r->text.data, r->text.size, &object, &inner);
    if (st == ST_BAD_FORMAT) return not_json(&inner, err);
    if (st) return error_set(err, st, "%s", inner.message);
    st = example_read(r->rules, object, &r->space, err);
    if (!st) st = add_example(r->dataset, r->rules, &r->space, r->line, err);
    cJSON_Delete(object);
    return st;
}

static bool report(const struct reader *r)
{
    double done = r->size ? (double)r->done / (double)r->size : 1;
    return !r->rules->on_progress || r->rules->on_progress(r->rules->progress_ctx, done < 1 ? done : 1);
}

#define LINES_PER_REPORT 64

static enum status read_lines(struct reader *r, struct error *err)
{
    enum status st = ST_OK;
    for (bool end = false; !st; r->blank = 0) {
        do { /* blank lines are fine where nothing follows */
            r->line++;
            st = next_line(r, &end, err);
            if (!st && !end && is_blank(&r->text) && !r->blank) r->blank = r->line;
        } while (!st && !end && is_blank(&r->text));
        if (st || end) break;
        if (r->blank) {
            r->line = r->blank;
            return error_set(err, ST_INVALID, "a blank line between examples: remove it");
        }
        st = read_line(r, err);
        if (!st && r->line % LINES_PER_REPORT == 0 && !report(r))
            st = error_set(err, ST_CANCELLED, "cancelled");
    }
    return st;
}

static enum status read_all(struct reader *r, struct dataset **out, struct error *err)
{
    const char *name = r->rules->name;
    struct error inner = {0};
    setvbuf(r->in, r->buffer, _IOFBF, sizeof r->buffer);
    r->dataset = calloc(1, sizeof *r->dataset);
    if (!r->dataset) return no_memory(err);
    r->dataset->sequences_each = r->rules->loss == LOSS_DPO ? 2 : 1;
    enum status st = read_lines(r, &inner);
    if (st)
        error_set(err, st, "%s, line %zu: %s", name, r->line, inner.message);
    else if (r->dataset->example_count == 0)
        st = error_set(err, ST_INVALID, "%s: there are no examples; give one JSON object a line", name);
    if (!st) {
        report(r);
        *out = r->dataset;
        r->dataset = NULL;
    }
    dataset_free(r->dataset);
    example_space_release(&r->space);
    strbuf_release(&r->text);
    return st;
}

enum status dataset_read_file(const struct dataset_rules *rules, int fd, struct dataset **out,
                              struct error *err)
{
    struct stat info;
    int copy = dup(fd); /* fclose closes it */
    struct reader r = {.rules = rules, .in = copy >= 0 ? fdopen(copy, "rb") : NULL};
    if (!r.in || fstat(fd, &info) || fseeko(r.in, 0, SEEK_SET)) {
        enum status st = error_set(err, ST_IO, "%s: cannot be read: %s", rules->name, strerrordesc_np(errno));
        if (r.in)
            fclose(r.in);
        else if (copy >= 0)
            close(copy);
        return st;
    }
    r.size = (size_t)info.st_size;
    enum status st = read_all(&r, out, err);
    fclose(r.in);
    return st;
}

enum status dataset_read_bytes(const struct dataset_rules *rules, const char *bytes, size_t size,
                               struct dataset **out, struct error *err)
{
    struct reader r = {.rules = rules, .size = size};
    /* fmemopen takes no empty buffer everywhere, and a line's end changes nothing. */
    r.in = size ? fmemopen((void *)bytes, size, "rb") : fmemopen("\n", 1, "rb");
    if (!r.in) return no_memory(err);
    enum status st = read_all(&r, out, err);
    fclose(r.in);
    return st;
}

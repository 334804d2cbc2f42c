#include "engine/step.h"

#include <stdlib.h>

struct step *step_new(int rows, int sequences)
{
    struct step *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->wanted_row = calloc((size_t)rows, sizeof *s->wanted_row);
    s->wanted = calloc((size_t)rows, sizeof *s->wanted);
    s->tokens = calloc((size_t)rows, sizeof *s->tokens);
    s->seqs = calloc((size_t)sequences, sizeof *s->seqs);
    s->segments = calloc((size_t)sequences, sizeof *s->segments);
    if (!s->wanted_row || !s->wanted || !s->tokens || !s->seqs || !s->segments) {
        step_free(s);
        return NULL;
    }
    s->batch = (struct batch){.tokens = s->tokens, .seqs = s->seqs, .segments = s->segments};
    return s;
}

void step_free(struct step *s)
{
    if (!s) return;
    free(s->wanted_row);
    free(s->wanted);
    free(s->tokens);
    free(s->seqs);
    free(s->segments);
    free(s);
}

static void rows_add(struct step *s, struct sequence *q, int first, int rows)
{
    for (int i = 0; i < rows; i++) {
        int row = s->batch.rows++;
        s->tokens[row] = sequence_token(q, first + i);
        if (!sequence_wants_logits(q, first + i)) continue;
        s->wanted_row[s->wanted_count] = row;
        s->wanted[s->wanted_count++] = (struct wanted){.seq = q, .position = first + i};
    }
}

/* Keys only bring equal sets together. Whose adapters a row gets is decided by the sets themselves. */
static bool sets_equal(const struct sequence *a, const struct sequence *b)
{
    if (a->member_count != b->member_count) return false;
    for (int i = 0; i < a->member_count; i++)
        if (a->members[i].adapter != b->members[i].adapter || a->members[i].weight != b->members[i].weight)
            return false;
    return true;
}

void step_build(struct step *s, const struct step_entry *entries, int count)
{
    struct batch *b = &s->batch;
    b->rows = b->seq_count = b->segment_count = s->wanted_count = 0;
    for (int i = 0; i < count; i++) {
        const struct step_entry *e = &entries[i];
        struct sequence *q = (struct sequence *)e->seq;
        s->seqs[b->seq_count++] = (struct seq_rows){.first_row = b->rows, .row_count = e->rows,
                                                    .first_position = e->first,
                                                    .pages = q->sched.table.page};
        bool same_set = i > 0 && sets_equal((const struct sequence *)entries[i - 1].seq, q);
        if (q->member_count > 0 && same_set)
            s->segments[b->segment_count - 1].row_count += e->rows;
        else if (q->member_count > 0)
            s->segments[b->segment_count++] =
                (struct lr_segment){.first_row = b->rows, .row_count = e->rows,
                                    .member_count = q->member_count, .members = q->members};
        rows_add(s, q, e->first, e->rows);
    }
}

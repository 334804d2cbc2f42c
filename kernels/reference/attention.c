/* Causal attention over a paged cache with a running maximum ("online softmax", Milakov and Gimelshein,
 * arXiv 1805.02867; by blocks as in FlashAttention, arXiv 2205.14135). */
#include "kernels/reference/reference.h"

#include <math.h>
#include <string.h>

static const char *token_at(const void *base, enum dtype type, size_t page_stride, int32_t page, int token,
                            size_t head_dim)
{
    size_t element = (size_t)page * page_stride + (size_t)token * head_dim;
    return (const char *)base + element * dtype_block_bytes(type);
}

static float dot_token(const float *q, const char *k, enum dtype type, size_t head_dim)
{
    float key[REF_SPAN], sum[REF_LANES] = {0};
    for (size_t i = 0; i < head_dim; i += REF_SPAN) {
        size_t n = head_dim - i < REF_SPAN ? head_dim - i : REF_SPAN;
        dtype_decode(type, k + i * dtype_block_bytes(type), key, n);
        ref_dot_span(q + i, key, n, sum);
    }
    return ref_dot_total(sum);
}

static void add_token(float *acc, float p, const char *v, enum dtype type, size_t head_dim)
{
    float value[REF_SPAN];
    for (size_t i = 0; i < head_dim; i += REF_SPAN) {
        size_t n = head_dim - i < REF_SPAN ? head_dim - i : REF_SPAN;
        dtype_decode(type, v + i * dtype_block_bytes(type), value, n);
        for (size_t j = 0; j < n; j++) acc[i + j] += p * value[j];
    }
}

/* Query `head` of row `row`. */
static void attend(const struct cpu_attention_part *p, int row, int head)
{
    size_t at = (size_t)head * p->head_dim, dim = p->head_dim;
    const float *q = p->q + (size_t)row * p->q_stride + at;
    float *y = p->y + (size_t)row * p->y_stride + at;
    int end = p->first_position + row + 1 < p->end ? p->first_position + row + 1 : p->end;
    float max = -INFINITY, total = 0;
    memset(y, 0, dim * sizeof *y);

    for (int first = p->begin; first < end; first += KV_PAGE_TOKENS) {
        int count = end - first < KV_PAGE_TOKENS ? end - first : KV_PAGE_TOKENS;
        int32_t page = p->pages[first / KV_PAGE_TOKENS];
        float score[KV_PAGE_TOKENS], page_max = max;
        for (int t = 0; t < count; t++) {
            score[t] =
                p->scale * dot_token(q, token_at(p->k, p->type, p->page_stride, page, t, dim), p->type, dim);
            if (score[t] > page_max) page_max = score[t];
        }

        float shrink = expf(max - page_max);
        max = page_max;
        total *= shrink;
        for (size_t i = 0; i < dim; i++) y[i] *= shrink;
        for (int t = 0; t < count; t++) {
            float weight = expf(score[t] - max);
            total += weight;
            add_token(y, weight, token_at(p->v, p->type, p->page_stride, page, t, dim), p->type, dim);
        }
    }
    p->max[row * p->group + head] = max;
    p->sum[row * p->group + head] = total;
}

void ref_attention(const struct cpu_attention_part *p)
{
    for (int r = 0; r < p->row_count; r++)
        for (int h = 0; h < p->group; h++) attend(p, r, h);
}

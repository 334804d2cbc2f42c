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

/* One query of one head; its result goes straight into y. */
static void attend(const float *q, float *y, size_t head_dim, float scale, int position, const int32_t *pages,
                   const void *k, const void *v, enum dtype type, size_t page_stride)
{
    float max = -INFINITY, total = 0;
    memset(y, 0, head_dim * sizeof *y);

    for (int first = 0; first <= position; first += KV_PAGE_TOKENS) {
        int count = position + 1 - first < KV_PAGE_TOKENS ? position + 1 - first : KV_PAGE_TOKENS;
        int32_t page = pages[first / KV_PAGE_TOKENS];
        float score[KV_PAGE_TOKENS], page_max = max;
        for (int t = 0; t < count; t++) {
            score[t] =
                scale * dot_token(q, token_at(k, type, page_stride, page, t, head_dim), type, head_dim);
            if (score[t] > page_max) page_max = score[t];
        }

        float shrink = expf(max - page_max);
        max = page_max;
        total *= shrink;
        for (size_t i = 0; i < head_dim; i++) y[i] *= shrink;
        for (int t = 0; t < count; t++) {
            float p = expf(score[t] - max);
            total += p;
            add_token(y, p, token_at(v, type, page_stride, page, t, head_dim), type, head_dim);
        }
    }
    for (size_t i = 0; i < head_dim; i++) y[i] /= total;
}

void ref_attention(const float *q, size_t q_stride, float *y, size_t y_stride, int row_count, int group,
                   size_t head_dim, float scale, int first_position, const int32_t *pages, const void *k,
                   const void *v, enum dtype type, size_t page_stride, float *scratch)
{
    (void)scratch;
    for (int r = 0; r < row_count; r++)
        for (int h = 0; h < group; h++)
            attend(q + (size_t)r * q_stride + (size_t)h * head_dim,
                   y + (size_t)r * y_stride + (size_t)h * head_dim, head_dim, scale, first_position + r,
                   pages, k, v, type, page_stride);
}

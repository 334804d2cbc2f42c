/* Attention over a part of a paged cache.
 *
 * A query is one head of one row. Positions go in blocks of BLOCK_TOKENS counted from the part's first, so a query's
 * arithmetic does not depend on the call it is in; all queries of a call take their turn on a
 * block while it is in L1, QUERIES at a time, so the cache is read from memory once. A query's
 * state between blocks is its unscaled output (kept in y), its maximum and its sum of weights. */
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/math.h"

#include <math.h>

#define INLINE       static inline __attribute__((always_inline))
#define UNROLL       _Pragma("GCC unroll 16")
#define BLOCK_PAGES  4
#define BLOCK_TOKENS (BLOCK_PAGES * KV_PAGE_TOKENS)
#define QUERIES      4

/* One kv head of the cache, in bytes. */
struct kv_view {
    const char *k, *v;
    const int32_t *pages;
    size_t page_bytes;
    size_t head_dim;
    int page_count;
};

struct block {
    int first;  /* token */
    int count;  /* tokens any query of the chunk sees */
    bool fetch; /* this block's values and the next one's keys on the way: the first chunk does */
};

/* QUERIES or fewer, which share each key and value they load. */
struct chunk {
    const float *q[QUERIES];
    float *y[QUERIES];
    int length[QUERIES]; /* positions 0 .. length - 1 are seen */
    float *max[QUERIES], *sum[QUERIES];
};

INLINE __m256 kv_load(bool half, const char *row, size_t i)
{
    if (half) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(row + 2 * i)));
    return _mm256_loadu_ps((const float *)(const void *)(row + 4 * i));
}

static void page_fetch(const char *base, const struct kv_view *kv, int page, size_t row_bytes)
{
    if (page >= kv->page_count) return;
    const char *p = base + (size_t)kv->pages[page] * kv->page_bytes;
    for (size_t i = 0; i < KV_PAGE_TOKENS * row_bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T0);
}

/* One token's row. A core has few requests under way at a time and drops what is beyond: fetches are spread evenly
 * over the work that hides them. */
INLINE void row_fetch(const char *row, size_t row_bytes)
{
    for (size_t i = 0; i < row_bytes; i += 64) _mm_prefetch(row + i, _MM_HINT_T0);
}

/* A page, or NULL beyond the sequence's last. */
INLINE const char *page_ahead(const char *base, const struct kv_view *kv, int page)
{
    return page < kv->page_count ? base + (size_t)kv->pages[page] * kv->page_bytes : NULL;
}

/* How many keys or vectors of values go with n queries, so that about eight sums are under way. */
INLINE int width_of(int n) { return n == 1 ? 8 : n == 4 ? 2 : 4; }

/* s[q][t] = dot products of n queries with the keys of one page */
INLINE void page_scores(bool half, int n, const struct chunk *c, const char *page, size_t head_dim,
                        float s[QUERIES][BLOCK_TOKENS], int at, const char *fetch)
{
    const int width = width_of(n);
    const size_t row = head_dim * (half ? 2 : 4);
    for (int t = 0; t < KV_PAGE_TOKENS; t += width, page += (size_t)width * row) {
        for (int j = 0; fetch && j < width; j++) row_fetch(fetch + (size_t)(t + j) * row, row);
        __m256 sums[QUERIES * 8];
        UNROLL for (int i = 0; i < n * width; i++) sums[i] = _mm256_setzero_ps();
        for (size_t d = 0; d < head_dim; d += 8) {
            UNROLL for (int j = 0; j < width; j++)
            {
                __m256 k = kv_load(half, page + (size_t)j * row, d);
                UNROLL for (int i = 0; i < n; i++) sums[i * width + j] =
                    _mm256_fmadd_ps(_mm256_loadu_ps(c->q[i] + d), k, sums[i * width + j]);
            }
        }
        UNROLL for (int i = 0; i < n * width; i += 4)
        {
            __m128 v = sum4_ps(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
            float *to = &s[i / width][at + t + i % width];
            if (width >= 4) {
                _mm_storeu_ps(to, v);
            } else {
                _mm_storel_pi((__m64 *)to, v);
                _mm_storeh_pi((__m64 *)&s[i / width + 1][at + t], v);
            }
        }
    }
}

/* Scores to weights, exp(scale s - max); returns the factor for what was summed before. */
static float weights_make(float *s, int seen, int count, float scale, float *max, float *sum)
{
    for (int t = seen; t < (count + 7) / 8 * 8; t++) s[t] = -INFINITY;
    __m256 f = _mm256_set1_ps(scale), m = _mm256_set1_ps(*max);
    for (int t = 0; t < count; t += 8) {
        __m256 v = _mm256_mul_ps(_mm256_loadu_ps(s + t), f);
        _mm256_storeu_ps(s + t, v);
        m = _mm256_max_ps(m, v);
    }
    float top = max_ps(m);
    __m256 before = exp_ps(_mm256_set1_ps(*max - top)), total = _mm256_setzero_ps();
    m = _mm256_set1_ps(top);
    for (int t = 0; t < count; t += 8) {
        __m256 v = _mm256_loadu_ps(s + t);
        __m256 hidden = _mm256_cmp_ps(v, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ);
        v = _mm256_andnot_ps(hidden, exp_ps(_mm256_sub_ps(v, m)));
        _mm256_storeu_ps(s + t, v);
        total = _mm256_add_ps(total, v);
    }
    float factor = _mm256_cvtss_f32(before);
    *max = top;
    *sum = fmaf(*sum, factor, sum_ps(total));
    return factor;
}

/* y[i][d ..] = factor y + sum_t weight[t] v[t][d ..], `width` vectors wide */
INLINE void values_add(bool half, int n, int width, const struct kv_view *kv, const struct chunk *c,
                       const struct block *b, size_t d, float s[QUERIES][BLOCK_TOKENS], const float *factor)
{
    const size_t row = kv->head_dim * (half ? 2 : 4);
    __m256 y[QUERIES * 8];
    UNROLL for (int i = 0; i < n; i++) UNROLL for (int j = 0; j < width; j++) y[i * width + j] =
        _mm256_mul_ps(_mm256_set1_ps(factor[i]), _mm256_loadu_ps(c->y[i] + d + 8 * j));
    const char *v = kv->v;
    const char *fetch = NULL; /* keys of the next block */
    for (int t = 0; t < b->count; t++, v += row) {
        if (t % KV_PAGE_TOKENS == 0) {
            int page = (b->first + t) / KV_PAGE_TOKENS;
            v = kv->v + (size_t)kv->pages[page] * kv->page_bytes;
            fetch = b->fetch && d == 0 ? page_ahead(kv->k, kv, page + BLOCK_PAGES) : NULL;
        }
        if (fetch) row_fetch(fetch + (size_t)(t % KV_PAGE_TOKENS) * row, row);
        UNROLL for (int j = 0; j < width; j++)
        {
            __m256 x = kv_load(half, v, d + 8 * (size_t)j);
            UNROLL for (int i = 0; i < n; i++) y[i * width + j] =
                _mm256_fmadd_ps(_mm256_set1_ps(s[i][t]), x, y[i * width + j]);
        }
    }
    UNROLL for (int i = 0; i < n; i++) UNROLL for (int j = 0; j < width; j++)
        _mm256_storeu_ps(c->y[i] + d + 8 * j, y[i * width + j]);
}

/* n queries on one block */
INLINE void chunk_step(bool half, int n, const struct kv_view *kv, const struct chunk *c,
                       const struct block *b, float scale)
{
    float s[QUERIES][BLOCK_TOKENS], factor[QUERIES];
    for (int t = 0; t < b->count; t += KV_PAGE_TOKENS) {
        int page = (b->first + t) / KV_PAGE_TOKENS;
        const char *fetch = b->fetch ? page_ahead(kv->v, kv, page) : NULL;
        page_scores(half, n, c, kv->k + (size_t)kv->pages[page] * kv->page_bytes, kv->head_dim, s, t, fetch);
    }
    for (int i = 0; i < n; i++) {
        int seen = c->length[i] - b->first;
        factor[i] =
            weights_make(s[i], seen < b->count ? seen : b->count, b->count, scale, c->max[i], c->sum[i]);
    }
    const size_t width = (size_t)width_of(n) * 8;
    size_t d = 0;
    for (; d + width <= kv->head_dim; d += width) values_add(half, n, width_of(n), kv, c, b, d, s, factor);
    for (; d < kv->head_dim; d += 8) values_add(half, n, 1, kv, c, b, d, s, factor);
}

typedef void chunk_fn(const struct kv_view *kv, const struct chunk *c, const struct block *b, float scale);
#define CHUNK_FN(name, half, n)                                                                           \
    static void name(const struct kv_view *kv, const struct chunk *c, const struct block *b, float scale) \
    {                                                                                                     \
        chunk_step(half, n, kv, c, b, scale);                                                             \
    }
CHUNK_FN(f32_1, false, 1)
CHUNK_FN(f32_2, false, 2)
CHUNK_FN(f32_3, false, 3)
CHUNK_FN(f32_4, false, 4)
CHUNK_FN(f16_1, true, 1)
CHUNK_FN(f16_2, true, 2)
CHUNK_FN(f16_3, true, 3)
CHUNK_FN(f16_4, true, 4)
static chunk_fn *const chunk_fns[2][QUERIES + 1] = {{NULL, f32_1, f32_2, f32_3, f32_4},
                                                    {NULL, f16_1, f16_2, f16_3, f16_4}};

/* The queries of a part are numbered row by row. */
static float *query_output(const struct cpu_attention_part *p, int i)
{
    return p->y + (size_t)(i / p->group) * p->y_stride + (size_t)(i % p->group) * p->head_dim;
}

static void chunk_collect(const struct cpu_attention_part *p, int first, int n, struct chunk *c)
{
    for (int j = 0; j < n; j++) {
        int i = first + j, row = i / p->group, length = p->first_position + row + 1;
        c->q[j] = p->q + (size_t)row * p->q_stride + (size_t)(i % p->group) * p->head_dim;
        c->y[j] = query_output(p, i);
        c->length[j] = length < p->end ? length : p->end;
        c->max[j] = p->max + i;
        c->sum[j] = p->sum + i;
    }
}

static void block_attend(const struct cpu_attention_part *p, const struct kv_view *kv, struct block b)
{
    int hidden_rows = b.first - p->first_position; /* rows that end before this block */
    int count = p->row_count * p->group;
    for (int i = hidden_rows > 0 ? hidden_rows * p->group : 0; i < count; i += QUERIES) {
        int n = count - i < QUERIES ? count - i : QUERIES;
        struct chunk c;
        chunk_collect(p, i, n, &c);
        int left = c.length[n - 1] - b.first;
        b.count = left < BLOCK_TOKENS ? left : BLOCK_TOKENS;
        chunk_fns[p->type == DTYPE_F16][n](kv, &c, &b, p->scale);
        b.fetch = false;
    }
}

static void attention(const struct cpu_attention_part *p)
{
    if (p->head_dim % 8) { /* no model has such heads */
        struct cpu_kernels reference;
        cpu_kernels_reference(&reference);
        reference.attention(p);
        return;
    }
    int total = p->first_position + p->row_count, end = total < p->end ? total : p->end;
    size_t elem = dtype_block_bytes(p->type);
    struct kv_view kv = {.k = p->k,
                         .v = p->v,
                         .pages = p->pages,
                         .page_bytes = p->page_stride * elem,
                         .head_dim = p->head_dim,
                         .page_count = (total + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS};
    for (int i = 0; i < BLOCK_PAGES; i++) page_fetch(kv.k, &kv, p->begin / KV_PAGE_TOKENS + i, p->head_dim * elem);
    for (int i = 0; i < p->row_count * p->group; i++) {
        p->max[i] = -INFINITY;
        p->sum[i] = 0;
        float *out = query_output(p, i);
        for (size_t d = 0; d < p->head_dim; d += 8) _mm256_storeu_ps(out + d, _mm256_setzero_ps());
    }
    for (int t = p->begin; t < end; t += BLOCK_TOKENS) block_attend(p, &kv, (struct block){t, 0, true});
}

void avx2_attention_fill(struct cpu_kernels *k) { k->attention = attention; }

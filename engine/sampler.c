#include "engine/sampler.h"

#include "base/memory.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16  /* independent partial results, so that the compiler can use vectors */
#define BLOCK 256 /* weights summed together, so that a draw walks over sums first */

struct candidate {
    float logit;
    int32_t token;
};

struct sampler_scratch {
    size_t vocab;
    float *adjusted;             /* (vocab): logits after steps 1 to 4 */
    float *weight;               /* (vocab): exp((logit - max) / temperature) */
    double *block_sum;           /* (vocab / BLOCK, rounded up): of weights */
    struct candidate *candidate; /* (vocab) */
};

/* A token of the prompt or the output; an open-addressed table of them. */
struct seen {
    int32_t token; /* -1: empty */
    int32_t generated;
};

struct sampler {
    struct sampling rules; /* its pointers are not used */
    size_t vocab;
    struct logit_bias *bias; /* [bias_count], owned */
    size_t bias_count;
    const int32_t *banned; /* not owned */
    size_t banned_count;
    struct seen *seen; /* [seen_mask + 1], owned; NULL without penalties */
    size_t seen_mask;
};

/* --- scratch and lifetime ---------------------------------------------------------------------- */

struct sampler_scratch *sampler_scratch_new(size_t vocab)
{
    struct sampler_scratch *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->vocab = vocab;
    s->adjusted = memory_zalloc(vocab, sizeof *s->adjusted);
    s->weight = memory_zalloc(vocab, sizeof *s->weight);
    s->block_sum = memory_zalloc(vocab / BLOCK + 1, sizeof *s->block_sum);
    s->candidate = memory_zalloc(vocab, sizeof *s->candidate);
    if (!s->adjusted || !s->weight || !s->block_sum || !s->candidate) {
        sampler_scratch_free(s);
        return NULL;
    }
    return s;
}

void sampler_scratch_free(struct sampler_scratch *s)
{
    if (!s) return;
    memory_free(s->adjusted);
    memory_free(s->weight);
    memory_free(s->block_sum);
    memory_free(s->candidate);
    free(s);
}

static bool penalties_wanted(const struct sampling *r)
{
    return r->repetition_penalty != 1 || r->frequency_penalty != 0 || r->presence_penalty != 0;
}

/* The token's entry, or the empty one where it belongs: the table is never full. */
static struct seen *seen_find(const struct sampler *s, int32_t token)
{
    size_t i = ((uint32_t)token * 2654435769u) & s->seen_mask;
    while (s->seen[i].token >= 0 && s->seen[i].token != token) i = (i + 1) & s->seen_mask;
    return &s->seen[i];
}

static void seen_count(struct sampler *s, int32_t token, int generated)
{
    struct seen *e = seen_find(s, token);
    e->token = token;
    e->generated += generated;
}

static bool seen_build(struct sampler *s, const int32_t *prompt, size_t prompt_count)
{
    size_t tokens = prompt_count + (size_t)s->rules.max_tokens;
    if (tokens > s->vocab) tokens = s->vocab;
    size_t capacity = 16;
    while (capacity < 2 * tokens) capacity *= 2;
    s->seen = malloc(capacity * sizeof *s->seen);
    if (!s->seen) return false;
    s->seen_mask = capacity - 1;
    for (size_t i = 0; i < capacity; i++) s->seen[i] = (struct seen){.token = -1};
    for (size_t i = 0; i < prompt_count; i++) seen_count(s, prompt[i], 0);
    return true;
}

struct sampler *sampler_new(const struct sampling *r, size_t vocab, const int32_t *prompt,
                            size_t prompt_count, const int32_t *banned, size_t banned_count)
{
    struct sampler *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->rules = *r;
    s->vocab = vocab;
    s->banned = banned;
    s->banned_count = banned_count;
    bool ok = true;
    if (r->bias_count > 0) {
        s->bias = malloc(r->bias_count * sizeof *s->bias);
        ok = s->bias != NULL;
        if (ok) memcpy(s->bias, r->bias, r->bias_count * sizeof *s->bias);
        s->bias_count = r->bias_count;
    }
    if (ok && penalties_wanted(r)) ok = seen_build(s, prompt, prompt_count);
    if (!ok) {
        sampler_free(s);
        return NULL;
    }
    return s;
}

void sampler_free(struct sampler *s)
{
    if (!s) return;
    free(s->bias);
    free(s->seen);
    free(s);
}

/* --- passes over the vocabulary ---------------------------------------------------------------- */

/* The largest of n logits; false if one is NaN or +infinity, or all are -infinity. */
static bool logits_max(const float *l, size_t n, float *out)
{
    float max[LANES];
    int bad[LANES] = {0};
    for (int j = 0; j < LANES; j++) max[j] = -INFINITY;
    size_t whole = n - n % LANES;
    for (size_t i = 0; i < whole; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            float v = l[i + (size_t)j];
            max[j] = v > max[j] ? v : max[j];
            bad[j] |= !(v <= FLT_MAX);
        }
    }
    for (size_t i = whole; i < n; i++) {
        max[0] = l[i] > max[0] ? l[i] : max[0];
        bad[0] |= !(l[i] <= FLT_MAX);
    }
    for (int j = 1; j < LANES; j++) {
        max[0] = max[j] > max[0] ? max[j] : max[0];
        bad[0] |= bad[j];
    }
    *out = max[0];
    return !bad[0] && max[0] > -INFINITY;
}

union float_bits { float f; uint32_t u; };

/* exp(x) for x <= 0, to about one unit in the last place, 0 below -87, where it is no normal number.
 * x = n ln 2 + r with |r| <= ln 2 / 2; the Taylor series of exp(r) to degree 7 is off by r^8 / 8!,
 * at most 5e-9. Without branches or calls, so that loops over it become vector code; what comes
 * out of too small an x is nonsense, and masked away. */
static inline float exp_nonpositive(float x)
{
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves an integer in the low bits */
    union float_bits t = {.f = x * 1.44269504f + round};
    float n = t.f - round;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union float_bits scale = {.u = (t.u - 0x4B400000u + 127u) << 23};
    union float_bits y = {.f = p * scale.f};
    y.u &= -(uint32_t)(x >= -87.0f);
    return y.f;
}

/* Sums the weights by blocks; returns the sum of all. */
static double blocks_sum(struct sampler_scratch *s)
{
    double total = 0;
    for (size_t start = 0, b = 0; start < s->vocab; start += BLOCK, b++) {
        const float *w = s->weight + start;
        size_t n = s->vocab - start < BLOCK ? s->vocab - start : BLOCK, whole = n - n % LANES;
        double sum[LANES] = {0};
        for (size_t i = 0; i < whole; i += LANES)
            for (int j = 0; j < LANES; j++) sum[j] += (double)w[i + (size_t)j];
        for (size_t i = whole; i < n; i++) sum[0] += (double)w[i];
        for (int j = 1; j < LANES; j++) sum[0] += sum[j];
        s->block_sum[b] = sum[0];
        total += sum[0];
    }
    return total;
}

/* Fills weight[i] = exp((l[i] - max) / temperature), or 0 where that is below min_p; returns their
 * sum. */
static double weights_compute(struct sampler_scratch *s, const float *l, float max,
                              float temperature, float min_p)
{
    /* Below that only the largest logits have any weight, and 1 / temperature stays finite. */
    float scale = 1 / (temperature > 1e-6f ? temperature : 1e-6f);
    float *w = s->weight;
    for (size_t i = 0; i < s->vocab; i++) {
        float v = exp_nonpositive((l[i] - max) * scale);
        w[i] = v >= min_p ? v : 0;
    }
    return blocks_sum(s);
}

/* --- the likeliest few ------------------------------------------------------------------------- */

/* Whether a stands behind b in order of likelihood. */
static bool candidate_behind(struct candidate a, struct candidate b)
{
    return a.logit != b.logit ? a.logit < b.logit : a.token > b.token;
}

/* c[0..n) is a heap, the hindmost on top, but for c[at]. */
static void heap_sift(struct candidate *c, size_t n, size_t at)
{
    struct candidate moved = c[at];
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= n) break;
        if (child + 1 < n && candidate_behind(c[child + 1], c[child])) child++;
        if (!candidate_behind(c[child], moved)) break;
        c[at] = c[child];
        at = child;
    }
    c[at] = moved;
}

/* Sorts by falling likelihood. */
static void candidates_sort(struct candidate *c, size_t n)
{
    for (size_t i = n / 2; i-- > 0;) heap_sift(c, n, i);
    for (size_t left = n; left > 1; left--) {
        struct candidate last = c[left - 1];
        c[left - 1] = c[0];
        c[0] = last;
        heap_sift(c, left - 1, 0);
    }
}

/* Fills c with the k likeliest of n logits, sorted. */
static void candidates_top(const float *l, size_t n, size_t k, struct candidate *c)
{
    for (size_t i = 0; i < k; i++) c[i] = (struct candidate){l[i], (int32_t)i};
    for (size_t i = k / 2; i-- > 0;) heap_sift(c, k, i);
    for (size_t i = k; i < n; i++) {
        if (l[i] <= c[0].logit) continue; /* equal ones come later, so they stand behind */
        c[0] = (struct candidate){l[i], (int32_t)i};
        heap_sift(c, k, 0);
    }
    candidates_sort(c, k);
}

/* --- log-probabilities ------------------------------------------------------------------------- */

static enum status logits_refuse(struct error *err)
{
    return error_set(err, ST_REJECTED,
                     "the logits are not finite numbers: the weights of the model or of an adapter "
                     "overflow on this text");
}

static int token_rank(const float *l, size_t n, int32_t token)
{
    float own = l[token];
    int before = 0, after = 0; /* of lower and of higher ids */
    for (size_t i = 0; i < (size_t)token; i++) before += l[i] >= own;
    for (size_t i = (size_t)token + 1; i < n; i++) after += l[i] > own;
    return before + after;
}

enum status logprob_compute(struct sampler_scratch *scratch, const float *logits, int32_t token,
                            int top_count, struct token_logprob *out, struct error *err)
{
    size_t n = scratch->vocab;
    float max;
    if (!logits_max(logits, n, &max)) return logits_refuse(err);
    double log_sum = (double)max + log(weights_compute(scratch, logits, max, 1, 0));

    if ((size_t)top_count > n) top_count = (int)n;
    struct token_logprob lp = {.token = token, .top_count = top_count};
    lp.logprob = (float)((double)logits[token] - log_sum);
    lp.rank = token_rank(logits, n, token);
    if (top_count > 0) candidates_top(logits, n, (size_t)top_count, scratch->candidate);
    for (int i = 0; i < top_count; i++) {
        lp.top[i].token = scratch->candidate[i].token;
        lp.top[i].logprob = (float)((double)scratch->candidate[i].logit - log_sum);
    }
    *out = lp;
    return ST_OK;
}

/* --- choosing ---------------------------------------------------------------------------------- */

/* Steps 1 to 4, in place. */
static void logits_adjust(const struct sampler *s, int index, float *l)
{
    if (index < s->rules.min_tokens)
        for (size_t i = 0; i < s->banned_count; i++) l[s->banned[i]] = -INFINITY;
    for (size_t i = 0; i < s->bias_count; i++) l[s->bias[i].token] += s->bias[i].bias;
    if (!s->seen) return;
    const struct sampling *r = &s->rules;
    for (size_t i = 0; i <= s->seen_mask; i++) {
        const struct seen *e = &s->seen[i];
        if (e->token < 0) continue;
        float v = l[e->token];
        v = v > 0 ? v / r->repetition_penalty : v * r->repetition_penalty;
        v -= (float)e->generated * r->frequency_penalty;
        if (e->generated > 0) v -= r->presence_penalty;
        l[e->token] = v;
    }
}

/* SplitMix64's finaliser (Steele, Lea and Flood, 2014) as a hash. */
static uint64_t hash_mix(uint64_t x)
{
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* In [0, 1), for output token `index`. */
static double random_uniform(uint64_t seed, int index)
{
    return (double)(hash_mix(hash_mix(seed) ^ (uint64_t)index) >> 11) * 0x1p-53;
}

/* The weight at which u falls, walking over w[0..n) from `left` on; the last that is not 0 where
 * rounding leaves a crumb beyond it. */
static size_t weights_walk(const float *w, size_t n, double left)
{
    size_t last = 0;
    for (size_t i = 0; i < n; i++) {
        if (w[i] == 0) continue;
        last = i;
        if (left < (double)w[i]) break;
        left -= (double)w[i];
    }
    return last;
}

/* top_k: steps 6, 8 and 9 among the k likeliest. */
static int32_t top_k_draw(const struct sampling *r, struct sampler_scratch *scratch, const float *l,
                          double u)
{
    struct candidate *c = scratch->candidate;
    float *w = scratch->weight;
    size_t n = (size_t)r->top_k, count = 0;
    candidates_top(l, scratch->vocab, n, c);
    double total = 0, kept = 0;
    for (size_t i = 0; i < n; i++) {
        w[i] = exp_nonpositive((c[i].logit - c[0].logit) / r->temperature);
        if (w[i] < r->min_p) w[i] = 0;
        total += (double)w[i];
    }
    while (count < n && (count == 0 || kept < (double)r->top_p * total)) kept += (double)w[count++];
    return c[weights_walk(w, count, u * kept)].token;
}

/* The token at which u falls among all weights in order of ids. total: their sum. */
static int32_t full_draw(const struct sampler_scratch *s, double total, double u)
{
    double left = u * total;
    size_t chosen = 0;
    for (size_t b = 0; b * BLOCK < s->vocab; b++) {
        if (s->block_sum[b] == 0) continue;
        chosen = b;
        if (left < s->block_sum[b]) break;
        left -= s->block_sum[b];
    }
    size_t start = chosen * BLOCK;
    size_t n = s->vocab - start < BLOCK ? s->vocab - start : BLOCK;
    return (int32_t)(start + weights_walk(s->weight + start, n, left));
}

/* Weights are in [0, 1], and the order of floats >= 0 is that of their bits: bucket b holds those from
 * bucket_floor(b) up to bucket_floor(b + 1). */
#define BUCKETS 1024
#define BUCKET_SHIFT 20
static size_t bucket_of(float w) { return (union float_bits){.f = w}.u >> BUCKET_SHIFT; }
static float bucket_floor(size_t b) { return (union float_bits){.u = (uint32_t)b << BUCKET_SHIFT}.f; }

/* The bucket in which the sum of weights, from the heaviest down, reaches target (the lowest that
 * holds any where rounding keeps it from that), and the sum of those above it. */
static size_t nucleus_edge(const struct sampler_scratch *s, double target, double *above_out)
{
    /* Four tables, because neighbours often meet in one bucket and would wait for one another. */
    double mass[4][BUCKETS] = {{0}};
    for (size_t i = 0; i < s->vocab; i++)
        mass[i % 4][bucket_of(s->weight[i])] += (double)s->weight[i];
    double sum = 0;
    size_t edge = 0;
    for (size_t b = BUCKETS; b-- > 0;) {
        double here = (mass[0][b] + mass[1][b]) + (mass[2][b] + mass[3][b]);
        if (here == 0) continue;
        edge = b;
        *above_out = sum;
        sum += here;
        if (sum >= target) break;
    }
    return edge;
}

/* top_p where it is not known how many tokens it takes: clears the weights of those it drops and
 * returns the sum of the others. Only those near the edge have to be sorted. */
static double nucleus_cut(struct sampler_scratch *s, const float *l, double target)
{
    double kept = 0;
    size_t edge = nucleus_edge(s, target, &kept), n = 0;
    float floor = bucket_floor(edge), ceiling = bucket_floor(edge + 1);
    float *w = s->weight;
    for (size_t i = 0; i < s->vocab; i++)
        if (w[i] >= floor && w[i] < ceiling)
            s->candidate[n++] = (struct candidate){l[i], (int32_t)i};
    candidates_sort(s->candidate, n);
    for (size_t i = 0; i < n; i++) {
        float *own = &w[s->candidate[i].token];
        if (kept > 0 && kept >= target) *own = 0;
        else kept += (double)*own;
    }
    for (size_t i = 0; i < s->vocab; i++) w[i] = w[i] >= floor ? w[i] : 0;
    return blocks_sum(s);
}

static int32_t logits_draw(const struct sampler *s, struct sampler_scratch *scratch, const float *l,
                           float max, int index)
{
    const struct sampling *r = &s->rules;
    if (r->temperature == 0) {
        int32_t i = 0;
        while (l[i] != max) i++;
        return i;
    }
    double u = random_uniform(r->seed, index);
    if (r->top_k > 0 && (size_t)r->top_k < s->vocab) return top_k_draw(r, scratch, l, u);
    double total = weights_compute(scratch, l, max, r->temperature, r->min_p);
    if (r->top_p < 1) total = nucleus_cut(scratch, l, (double)r->top_p * total);
    return full_draw(scratch, total, u);
}

enum status sampler_choose(struct sampler *s, struct sampler_scratch *scratch, const float *logits,
                           int index, int32_t *token_out, struct token_logprob *logprob,
                           struct error *err)
{
    float max;
    if (!logits_max(logits, s->vocab, &max)) return logits_refuse(err);
    const float *l = logits;
    if (s->seen || s->bias_count > 0 || index < s->rules.min_tokens) {
        memcpy(scratch->adjusted, logits, s->vocab * sizeof *logits);
        logits_adjust(s, index, scratch->adjusted);
        l = scratch->adjusted;
        if (!logits_max(l, s->vocab, &max))
            return error_set(err, ST_INVALID, "logit_bias and penalties leave no token to choose");
    }
    int32_t token = logits_draw(s, scratch, l, max, index);
    if (logprob) {
        enum status st = logprob_compute(scratch, logits, token, s->rules.logprobs, logprob, err);
        if (st) return st;
    }
    if (s->seen) seen_count(s, token, 1);
    *token_out = token;
    return ST_OK;
}

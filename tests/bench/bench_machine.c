/* What this machine can do at most: the roofs that bench.py prints beside its figures.
 *
 *     bench_machine THREADS
 *
 * prints one line for each of: bytes a second read from memory by one thread and by all; multiply-adds a second of
 * all threads in fp32 (fused) and in int8 (by the fastest instructions this machine has of those that Medley uses),
 * 0 where there is no such instruction. The best of a few rounds each. */
#include "base/memory.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define THREADS_MAX  64
#define ROUNDS       5
#define STREAM_BYTES ((size_t)256 << 20) /* of each thread: far beyond any cache */
#define PEAK_TURNS   4000000             /* tens of milliseconds */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void stop(const char *what)
{
    fprintf(stderr, "bench_machine: %s\n", what);
    exit(1);
}

static void *stream_memory(void *data)
{
    const uint64_t *p = data;
    uint64_t sum[8] = {0};
    for (size_t i = 0; i < STREAM_BYTES / sizeof *p; i += 8)
        for (size_t lane = 0; lane < 8; lane++) sum[lane] += p[i + lane];
    for (size_t lane = 1; lane < 8; lane++) sum[0] += sum[lane];
    return (void *)(uintptr_t)sum[0]; /* so that the loop has a purpose */
}

/* Seconds in which `threads` threads run fn at once, the best of some. */
static double best_of(int threads, void *(*fn)(void *), void *const *data)
{
    pthread_t thread[THREADS_MAX];
    double best = 1e300;
    for (int round = 0; round < ROUNDS; round++) {
        double begin = now();
        for (int i = 0; i < threads; i++)
            if (pthread_create(&thread[i], NULL, fn, data[i])) stop("no threads");
        for (int i = 0; i < threads; i++) pthread_join(thread[i], NULL);
        double took = now() - begin;
        if (took < best) best = took;
    }
    return best;
}

/* ------------------------------------------------------------------ peaks */

struct peak {
    void *(*fn)(void *);
    double multiply_adds; /* of one call */
};

#if defined(__x86_64__)
#include <immintrin.h>

#define CHAINS 12 /* independent sums: more than latency times the instructions a cycle */
#define UNROLL _Pragma("GCC unroll 12")

/* An empty asm on a register keeps the loop from being folded. */
#define KEEP(x) __asm__ volatile("" : "+x"(x))
#define KEEP512(x) __asm__ volatile("" : "+v"(x))

__attribute__((target("avx2,fma"))) static void *fma_avx2(void *unused)
{
    __m256 sum[CHAINS], a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1.0f);
    UNROLL for (int i = 0; i < CHAINS; i++) sum[i] = b;
    for (int turn = 0; turn < PEAK_TURNS; turn++)
        UNROLL for (int i = 0; i < CHAINS; i++)
        {
            sum[i] = _mm256_fmadd_ps(sum[i], a, b);
            KEEP(sum[i]);
        }
    return unused;
}

/* Products of bytes in pairs, added up in 16 bits: what the AVX2 kernels spend most of their time on. */
__attribute__((target("avx2"))) static void *int8_avx2(void *unused)
{
    __m256i sum[CHAINS], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
    UNROLL for (int i = 0; i < CHAINS; i++) sum[i] = _mm256_setzero_si256();
    for (int turn = 0; turn < PEAK_TURNS; turn++) {
        UNROLL for (int i = 0; i < CHAINS; i++)
        {
            __m256i product = _mm256_maddubs_epi16(a, b);
            KEEP(product);
            sum[i] = _mm256_add_epi16(sum[i], product);
            KEEP(sum[i]);
        }
    }
    return unused;
}

__attribute__((target("avx512f,avx512vnni"))) static void *int8_vnni(void *unused)
{
    __m512i sum[CHAINS], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    UNROLL for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_setzero_si512();
    for (int turn = 0; turn < PEAK_TURNS; turn++)
        UNROLL for (int i = 0; i < CHAINS; i++)
        {
            sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
            KEEP512(sum[i]);
        }
    return unused;
}

static struct peak peak_fp32(void)
{
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return (struct peak){0};
    return (struct peak){fma_avx2, 8.0 * CHAINS * PEAK_TURNS};
}

static struct peak peak_int8(void)
{
    if (__builtin_cpu_supports("avx512vnni")) return (struct peak){int8_vnni, 64.0 * CHAINS * PEAK_TURNS};
    if (__builtin_cpu_supports("avx2")) return (struct peak){int8_avx2, 32.0 * CHAINS * PEAK_TURNS};
    return (struct peak){0};
}
#else
static struct peak peak_fp32(void) { return (struct peak){0}; }
static struct peak peak_int8(void) { return (struct peak){0}; }
#endif

static double measure_peak(struct peak p, int threads)
{
    void *none[THREADS_MAX] = {0};
    return p.fn ? p.multiply_adds * threads / best_of(threads, p.fn, none) : 0;
}

int main(int argc, char **argv)
{
    int threads = argc == 2 ? atoi(argv[1]) : 0;
    if (threads < 1 || threads > THREADS_MAX) {
        fprintf(stderr, "usage: bench_machine THREADS   (1 to %d)\n", THREADS_MAX);
        return 2;
    }
    void *data[THREADS_MAX];
    for (int i = 0; i < threads; i++) {
        data[i] = memory_alloc(STREAM_BYTES);
        if (!data[i]) stop("no memory");
        memset(data[i], i + 1, STREAM_BYTES);
    }
    printf("%.6g\n", (double)STREAM_BYTES / best_of(1, stream_memory, data));
    printf("%.6g\n", (double)STREAM_BYTES * threads / best_of(threads, stream_memory, data));
    for (int i = 0; i < threads; i++) memory_free(data[i]);
    printf("%.6g\n", measure_peak(peak_fp32(), threads));
    printf("%.6g\n", measure_peak(peak_int8(), threads));
    return 0;
}

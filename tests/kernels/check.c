#include "tests/kernels/check.h"

#include "base/memory.h"
#include "tests/support/random.h"

#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BUFFERS_MAX 128
#define FILL        0xff

static struct {
    char name[256];
    bool failed;
    int passed_count, failed_count;
    struct test_random random;
    struct {
        void *map;
        size_t bytes;
    } buffer[BUFFERS_MAX];
    size_t buffer_count;
} state;

static void on_crash(int signal_number)
{
    static const char text[] = "\ncrash, as from a read or write past a buffer's end, in: ";
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0 ||
        write(STDERR_FILENO, state.name, strlen(state.name)) < 0 || write(STDERR_FILENO, "\n", 1) < 0)
        _exit(3);
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

void check_begin(const struct check *c, const char *fmt, ...)
{
    signal(SIGSEGV, on_crash);
    signal(SIGBUS, on_crash);
    int n = snprintf(state.name, sizeof state.name, "%s: ", c->name);
    va_list args;
    va_start(args, fmt);
    vsnprintf(state.name + n, sizeof state.name - (size_t)n, fmt, args);
    va_end(args);
    state.failed = false;
}

void check_fail(const char *fmt, ...)
{
    if (state.failed) return; /* one reason is enough */
    state.failed = true;
    printf("FAIL %s: ", state.name);
    va_list args;
    va_start(args, fmt);
    vprintf(fmt, args);
    va_end(args);
    printf("\n");
}

void check_end(void)
{
    if (state.failed)
        state.failed_count++;
    else
        state.passed_count++;
    for (size_t i = 0; i < state.buffer_count; i++) munmap(state.buffer[i].map, state.buffer[i].bytes);
    state.buffer_count = 0;
}

int check_passed_count(void) { return state.passed_count; }
int check_failed_count(void) { return state.failed_count; }

void *check_buffer(size_t bytes, size_t align)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), usable = size_round_up(bytes + align, page);
    CHECK(state.buffer_count < BUFFERS_MAX);
    char *map = mmap(NULL, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(map != MAP_FAILED);
    CHECK(mprotect(map + usable, page, PROT_NONE) == 0);
    memset(map, FILL, usable);
    state.buffer[state.buffer_count].map = map;
    state.buffer[state.buffer_count++].bytes = usable + page;
    size_t start = usable - bytes;
    return map + (start - start % align);
}

void *check_copy(const void *p, size_t bytes, size_t align)
{
    return memcpy(check_buffer(bytes, align), p, bytes);
}

void check_seed(uint64_t seed) { state.random.state = seed; }
size_t check_below(size_t n) { return (size_t)random_below(&state.random, n); }
float check_uniform(float low, float high) { return random_f32(&state.random, low, high); }

float check_normal(void)
{
    float u = check_uniform(1e-7f, 1), angle = check_uniform(0, 6.2831853f);
    return sqrtf(-2 * logf(u)) * cosf(angle);
}

void check_fill_normal(float *x, size_t n, float scale)
{
    for (size_t i = 0; i < n; i++) x[i] = scale * check_normal();
}

/* Byte offsets of the half-precision scales in a block; -1 where there is no second one. */
static void scale_offsets(enum dtype type, int *first, int *second)
{
    *first = type == DTYPE_Q6_K ? 208 : 0;
    bool two = type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q4_K || type == DTYPE_Q5_K;
    *second = two ? 2 : -1;
}

static void fill_blocks(enum dtype type, uint8_t *dst, size_t n, float scale)
{
    size_t bytes = dtype_block_bytes(type);
    int first, second;
    scale_offsets(type, &first, &second);
    for (size_t b = 0; b < n / dtype_block_elems(type); b++, dst += bytes) {
        random_bytes(&state.random, dst, bytes);
        uint16_t d = f32_to_f16(check_uniform(-scale, scale) / 16),
                 m = f32_to_f16(check_uniform(-scale, scale));
        if (check_below(16) == 0) d = 0;
        memcpy(dst + first, &d, 2);
        if (second >= 0) memcpy(dst + second, &m, 2);
    }
}

void check_fill_type(enum dtype type, void *dst, size_t n, float scale)
{
    if (dtype_block_elems(type) > 1) {
        fill_blocks(type, dst, n, scale);
        return;
    }
    char *out = dst;
    for (size_t i = 0; i < n; i++, out += dtype_block_bytes(type)) {
        float v = scale * check_normal();
        uint16_t h = type == DTYPE_F16 ? f32_to_f16(v) : f32_to_bf16(v);
        memcpy(out, type == DTYPE_F32 ? (const void *)&v : &h, dtype_block_bytes(type));
    }
}

void check_near(const char *what, const float *got, const float *want, const float *tol, size_t n)
{
    size_t worst = 0;
    float worst_ratio = 0;
    for (size_t i = 0; i < n; i++) {
        if (isnan(got[i]) && isnan(want[i])) continue;
        float ratio = got[i] == want[i] ? 0 : fabsf(got[i] - want[i]) / tol[i];
        if (ratio <= worst_ratio) continue;
        worst = i;
        worst_ratio = ratio;
        if (isnan(ratio)) break;
    }
    if (!(worst_ratio <= 1))
        check_fail("%s[%zu] is %.9g, the reference has %.9g, which may differ by %.3g", what, worst,
                   (double)got[worst], (double)want[worst], (double)tol[worst]);
}

void check_equal(const char *what, const void *got, const void *want, size_t bytes)
{
    const uint8_t *g = got, *w = want;
    for (size_t i = 0; i < bytes; i++)
        if (g[i] != w[i]) {
            check_fail("%s differs in byte %zu", what, i);
            return;
        }
}

void check_untouched(const char *what, const void *p, size_t bytes)
{
    const uint8_t *b = p;
    for (size_t i = 0; i < bytes; i++)
        if (b[i] != FILL) {
            check_fail("%s: byte %zu was written", what, i);
            return;
        }
}

/* Which instruction sets this machine and this build have, and their kernel tables. */
#include "kernels/cpu/device_int.h"

#include <string.h>

static const char *const level_names[CPU_LEVEL_COUNT] = {
    [CPU_REFERENCE] = "reference",
    [CPU_AVX2] = "avx2",
    [CPU_AVX512] = "avx512",
};

const char *cpu_level_name(enum cpu_level level)
{
    return level < CPU_LEVEL_COUNT ? level_names[level] : "best";
}

enum status cpu_level_parse(const char *name, enum cpu_level *out)
{
    for (int i = 0; i < CPU_LEVEL_COUNT; i++) {
        if (strcmp(name, level_names[i]) != 0) continue;
        *out = (enum cpu_level)i;
        return ST_OK;
    }
    return ST_INVALID;
}

#if defined(__x86_64__)
/* F16C is older than AVX2 and in every machine that has that. */
enum cpu_level cpu_level_supported(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CPU_REFERENCE;
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512vnni");
    return avx512 ? CPU_AVX512 : CPU_AVX2;
}

void cpu_level_kernels(enum cpu_level level, struct cpu_kernels *out)
{
    static void (*const fill[CPU_LEVEL_COUNT])(struct cpu_kernels *) = {
        [CPU_REFERENCE] = cpu_kernels_reference,
        [CPU_AVX2] = cpu_kernels_avx2,
        [CPU_AVX512] = cpu_kernels_avx512,
    };
    CHECK(level < CPU_LEVEL_COUNT);
    fill[level](out);
}
#else
enum cpu_level cpu_level_supported(void) { return CPU_REFERENCE; }

void cpu_level_kernels(enum cpu_level level, struct cpu_kernels *out)
{
    CHECK(level == CPU_REFERENCE);
    cpu_kernels_reference(out);
}
#endif

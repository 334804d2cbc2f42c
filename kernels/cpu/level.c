/* Which instruction sets this machine and this build have, and their kernel tables. */
#include "kernels/cpu/device_int.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

static const char *const level_names[CPU_LEVEL_COUNT] = {
    [CPU_REFERENCE] = "reference",
    [CPU_AVX2] = "avx2",
    [CPU_AVXVNNI] = "avxvnni",
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

enum cpu_level cpu_level_supported(void)
{
    int level = CPU_LEVEL_COUNT - 1;
    while (!cpu_level_usable((enum cpu_level)level)) level--;
    return (enum cpu_level)level;
}

#if defined(__x86_64__)
static bool has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

/* Not a name that all compilers' builtin knows. Its registers are AVX2's, so no more of the system is needed.
 */
static bool has_avxvnni(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

/* F16C is older than AVX2 and in every machine that has that. */
bool cpu_level_usable(enum cpu_level level)
{
    if (level == CPU_REFERENCE) return true;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
    return level == CPU_AVX2 || (level == CPU_AVXVNNI && has_avxvnni()) ||
           (level == CPU_AVX512 && has_avx512());
}

void cpu_level_kernels(enum cpu_level level, struct cpu_kernels *out)
{
    static void (*const fill[CPU_LEVEL_COUNT])(struct cpu_kernels *) = {
        [CPU_REFERENCE] = cpu_kernels_reference,
        [CPU_AVX2] = cpu_kernels_avx2,
        [CPU_AVXVNNI] = cpu_kernels_avxvnni,
        [CPU_AVX512] = cpu_kernels_avx512,
    };
    CHECK(level < CPU_LEVEL_COUNT);
    fill[level](out);
}
#else
bool cpu_level_usable(enum cpu_level level) { return level == CPU_REFERENCE; }

void cpu_level_kernels(enum cpu_level level, struct cpu_kernels *out)
{
    CHECK(level == CPU_REFERENCE);
    cpu_kernels_reference(out);
}
#endif

/* checkkernels: every entry of every kernel table this machine can run, against the plain C one.
 *
 *     checkkernels [--seed N] [--table NAME] [--bench]
 */
#include "tests/kernels/check.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Tables whose instructions are emulated; absent where there are none to build. */
__attribute__((weak)) void cpu_kernels_avxvnni_emulated(struct cpu_kernels *k);
__attribute__((weak)) void cpu_kernels_avx512_emulated(struct cpu_kernels *k);

struct options {
    uint64_t seed;
    const char *table; /* NULL: all */
    bool bench;
};

static bool parse(int argc, char **argv, struct options *o)
{
    *o = (struct options){.seed = (uint64_t)time(NULL)};
    for (int i = 1; i < argc; i++) {
        char *end;
        if (strcmp(argv[i], "--bench") == 0) {
            o->bench = true;
        } else if (strcmp(argv[i], "--table") == 0 && i + 1 < argc) {
            o->table = argv[++i];
        } else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
            o->seed = strtoull(argv[++i], &end, 10);
            if (*end) return false;
        } else {
            return false;
        }
    }
    return true;
}

static void run(const struct options *o, const struct check *c)
{
    if (o->table && strcmp(o->table, c->name) != 0) return;
    if (o->bench) {
        bench_table(c);
        return;
    }
    check_seed(o->seed);
    check_products(c);
    check_elementwise(c);
    check_attention(c);
    check_lowrank(c);
}

int main(int argc, char **argv)
{
    struct options o;
    if (!parse(argc, argv, &o)) {
        fprintf(stderr, "usage: checkkernels [--seed N] [--table "
                        "reference|avx2|avxvnni|avx512|avxvnni-emulated|avx512-emulated] [--bench]\n");
        return 2;
    }
    if (!o.bench) printf("seed %llu\n", (unsigned long long)o.seed);

    struct cpu_kernels reference, table;
    cpu_kernels_reference(&reference);
    for (int level = 0; level < CPU_LEVEL_COUNT; level++) {
        if (!cpu_level_usable((enum cpu_level)level)) continue;
        cpu_level_kernels((enum cpu_level)level, &table);
        run(&o, &(struct check){&table, &reference, cpu_level_name((enum cpu_level)level)});
    }
    const struct {
        void (*fill)(struct cpu_kernels *k);
        const char *name;
    } emulated[] = {{cpu_kernels_avxvnni_emulated, "avxvnni-emulated"},
                    {cpu_kernels_avx512_emulated, "avx512-emulated"}};
    for (int i = 0; i < 2 && !o.bench; i++) {
        if (!emulated[i].fill) continue;
        emulated[i].fill(&table);
        run(&o, &(struct check){&table, &reference, emulated[i].name});
    }
    if (!o.bench) printf("%d passed, %d failed\n", check_passed_count(), check_failed_count());
    return check_failed_count() > 0;
}

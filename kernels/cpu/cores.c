#include "kernels/cpu/cores.h"

#include <sched.h>
#include <stdio.h>
#include <unistd.h>

#define NODES_MAX 64

/* The first of the hardware threads that share cpu's core; cpu itself where the system does not say. */
static int core_leader(int cpu)
{
    char path[96];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    FILE *f = fopen(path, "r");
    int leader;
    if (!f || fscanf(f, "%d", &leader) != 1) leader = cpu;
    if (f) fclose(f);
    return leader;
}

/* The leaders of the cores this thread may run on. */
static void leaders_get(cpu_set_t *allowed, cpu_set_t *leaders)
{
    CPU_ZERO(leaders);
    if (sched_getaffinity(0, sizeof *allowed, allowed) != 0) CPU_ZERO(allowed);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, allowed)) continue;
        int leader = core_leader(cpu);
        if (leader >= 0 && leader < CPU_SETSIZE) CPU_SET(leader, leaders);
    }
}

int cores_count(void)
{
    cpu_set_t allowed, leaders;
    leaders_get(&allowed, &leaders);
    int cores = CPU_COUNT(&leaders);
    return cores > 0 ? cores : 1;
}

static int node_of(int cpu)
{
    for (int node = 0; node < NODES_MAX; node++) {
        char path[96];
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/node%d", cpu, node);
        if (access(path, F_OK) == 0) return node;
    }
    return 0; /* the system does not say */
}

int cores_nodes(void)
{
    cpu_set_t allowed, leaders, nodes;
    CPU_ZERO(&nodes);
    leaders_get(&allowed, &leaders);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &leaders)) CPU_SET(node_of(cpu), &nodes);
    int count = CPU_COUNT(&nodes);
    return count > 0 ? count : 1;
}

void cores_pin(int index)
{
    cpu_set_t allowed, leaders, core;
    leaders_get(&allowed, &leaders);
    int leader = 0;
    for (; leader < CPU_SETSIZE; leader++)
        if (CPU_ISSET(leader, &leaders) && index-- == 0) break;
    if (leader == CPU_SETSIZE) return;
    CPU_ZERO(&core);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && core_leader(cpu) == leader) CPU_SET(cpu, &core);
    (void)sched_setaffinity(0, sizeof core, &core);
}

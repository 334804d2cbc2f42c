/* The physical cores that the calling thread may run on, in the system's order. */
#ifndef KERNELS_CPU_CORES_H
#define KERNELS_CPU_CORES_H

/* At least 1. */
int cores_count(void);

/* Memory nodes these cores belong to, at least 1. */
int cores_nodes(void);

/* From now on the calling thread runs on core `index` only, on any of its hardware threads. Where the system refuses,
 * nothing changes. */
void cores_pin(int index);

#endif

/* Gate rules: from router logits to the experts a row uses. */
#ifndef KERNELS_CPU_ROUTE_H
#define KERNELS_CPU_ROUTE_H

#include "kernels/lowrank.h"

#include <stdint.h>

/* Experts a row of this site uses: the same number for every row. */
int route_chosen_count(const struct lr_site *s);

/* logits (experts; unused by GATE_NONE) -> the chosen experts in ascending order and their gates, both
 * [route_chosen_count]. All in fp32. Top-k compares the logits themselves; among equals the lower index
 * wins and NaN is below everything. */
void route_gates(const struct lr_site *s, const float *logits, int32_t *chosen, float *gate);

#endif

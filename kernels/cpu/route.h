/* Gate rules: from router logits to the experts a row uses. */
#ifndef KERNELS_CPU_ROUTE_H
#define KERNELS_CPU_ROUTE_H

#include "kernels/lowrank.h"

#include <stdint.h>

/* logits (experts, and threshold_row . x after them where the rule is GATE_ADA_THRESHOLD; unused by
 * GATE_NONE) -> the chosen experts in ascending order and their gates, both of room for lr_chosen_max.
 * Returns how many. All in fp32. Choosing compares the logits themselves; among equals the lower index
 * wins and NaN is below everything. Not for GATE_FFN. */
int route_gates(const struct lr_site *s, const float *logits, int32_t *chosen, float *gate);

#endif

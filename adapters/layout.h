/* A site's checked parts as kernels want them: one type, the base model's row order, scales folded. */
#ifndef ADAPTERS_LAYOUT_H
#define ADAPTERS_LAYOUT_H

#include "adapters/parts.h"

/* Allocated in the bundle, or pointing into the file's bytes. base may be NULL, for a bundle that is looked
 * at but not packed: then rows keep their order and DoRA's gains are left out.
 * ST_REJECTED: DoRA's magnitude over the norm of a row of the base is no finite number. */
NODISCARD enum status site_layout(struct adapter_bundle *b, const struct adapter_base *base,
                                  const struct format_rules *rules, const struct site_rules *site_rules,
                                  const struct site_parts *s, float scale, struct lr_site_source **out,
                                  struct error *err);

/* The FFN's router as a site of rank 0. */
NODISCARD enum status router_layout(struct adapter_bundle *b, const struct site_rules *rules,
                                    const struct part *router, struct lr_site_source **out);

/* top_k of a site of that layer with so many experts: all of them where the rules give none. */
int site_top_k(const struct site_rules *rules, int layer, int experts);

#endif

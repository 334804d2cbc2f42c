#include "training/source.h"

#include "base/memory.h"

struct lr_site_source *source_new(struct adapter_bundle *b, const struct lr_site_source *shape)
{
    size_t experts = (size_t)shape->experts, rank = (size_t)shape->rank;
    size_t elem = dtype_block_bytes(shape->type), a = rank * shape->d_in * elem,
           o = rank * shape->d_out * elem;
    struct lr_site_source *s = bundle_alloc(b, 1, sizeof *s);
    const void **matrices = bundle_alloc(b, 2 * experts, sizeof *matrices);
    float *scale = bundle_alloc(b, experts, sizeof *scale);
    char *data = bundle_alloc(b, experts, size_add(a, o));
    void *router = NULL;
    if (shape->rule != GATE_NONE)
        router = bundle_alloc(b, experts, size_mul(shape->d_in, dtype_block_bytes(shape->router_type)));
    if (!s || !matrices || !scale || !data || (shape->rule != GATE_NONE && !router)) return NULL;
    for (size_t e = 0; e < experts; e++) {
        matrices[e] = data + e * (a + o);
        matrices[experts + e] = data + e * (a + o) + a;
    }
    *s = *shape;
    s->router = router;
    s->a = matrices;
    s->b = matrices + experts;
    s->scale = scale;
    return s;
}

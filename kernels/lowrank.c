#include "kernels/lowrank.h"

int lr_chosen_max(enum gate_rule rule, int experts, int top_k)
{
    bool top = rule == GATE_TOPK || rule == GATE_TOPK_RAW;
    return top && top_k < experts ? top_k : experts;
}

static size_t sites_width(struct lr_site_source *const *sites, enum projection first, enum projection last)
{
    size_t sum = 0;
    for (int p = (int)first; p <= (int)last; p++)
        if (sites[p]) sum += (size_t)sites[p]->experts * ((size_t)sites[p]->rank + 1);
    return sum;
}

/* What stands between the two halves of a routed FFN. */
static size_t ffn_width(struct lr_site_source *const *sites, const struct lr_site_source *router)
{
    size_t inner = 0;
    if (!router) return 0;
    if (sites[PROJ_GATE]) inner = sites[PROJ_GATE]->d_out;
    if (sites[PROJ_UP]) inner = sites[PROJ_UP]->d_out;
    if (sites[PROJ_DOWN]) inner = sites[PROJ_DOWN]->d_in;
    return (size_t)lr_chosen_max(router->rule, router->experts, router->top_k) * (inner + 2);
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

size_t lr_width(int layers, struct lr_site_source *const *sites, struct lr_site_source *const *ffn)
{
    size_t widest = 0;
    for (int l = 0; l < layers; l++, sites += PROJ_COUNT) {
        size_t gate_up = sites_width(sites, PROJ_GATE, PROJ_UP);
        size_t down = sites_width(sites, PROJ_DOWN, PROJ_DOWN);
        widest = larger(widest, sites_width(sites, PROJ_Q, PROJ_V));
        widest = larger(widest, sites_width(sites, PROJ_O, PROJ_O));
        widest = larger(widest, ffn_width(sites, ffn ? ffn[l] : NULL) + larger(gate_up, down));
    }
    return widest;
}

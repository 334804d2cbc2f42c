#include "adapters/version.h"

#include <stdlib.h>

/* Only readers see sites as const; whoever packed them frees them. */
static void sites_free(struct device *device, const struct lr_site **sites, size_t count)
{
    for (size_t i = 0; sites && i < count; i++)
        if (sites[i]) device->ops->lr_site_free(device, (struct lr_site *)sites[i]);
    free(sites);
}

void packed_adapter_free(struct packed_adapter *p)
{
    if (!p) return;
    sites_free(p->device, p->lr.sites, (size_t)p->lr.layers * PROJ_COUNT);
    sites_free(p->device, p->lr.ffn, (size_t)p->lr.layers);
    free(p);
}

/* Packs what there is of `count` sources, per_layer of them a layer, into sites (which the caller frees). */
static enum status sites_pack(struct packed_adapter *p, struct lr_site_source *const *sources, size_t count,
                              size_t per_layer, const struct lr_site **sites, struct error *err)
{
    for (size_t i = 0; i < count; i++) {
        if (!sources[i]) continue;
        struct lr_site *site = NULL;
        enum status st = p->device->ops->lr_site_pack(p->device, sources[i], &site);
        if (st)
            return error_set(
                err, st, "cannot put the adapter's %s of layer %zu into the memory of the device: %s",
                per_layer == 1 ? "FFN router" : projection_name((enum projection)(i % per_layer)),
                i / per_layer, status_text(st));
        sites[i] = site;
        p->bytes += site->bytes;
    }
    return ST_OK;
}

enum status adapter_pack(const struct adapter_bundle *b, struct device *device, struct packed_adapter **out,
                         struct error *err)
{
    size_t layers = (size_t)b->layers;
    enum status st = ST_NOMEM;
    struct packed_adapter *p = calloc(1, sizeof *p);
    if (!p) return error_set(err, st, "not enough memory for the adapter");
    p->device = device;
    p->lr.width = b->lr_width;
    p->lr.layers = b->layers;
    p->lr.sites = calloc(layers * PROJ_COUNT, sizeof *p->lr.sites);
    if (b->ffn) p->lr.ffn = calloc(layers, sizeof *p->lr.ffn);
    if (!p->lr.sites || (b->ffn && !p->lr.ffn)) {
        error_set(err, st, "not enough memory for the adapter");
        goto done;
    }
    p->bytes = sizeof *p + layers * (PROJ_COUNT + (b->ffn != NULL)) * sizeof *p->lr.sites;
    st = sites_pack(p, b->sites, layers * PROJ_COUNT, PROJ_COUNT, p->lr.sites, err);
    if (!st && b->ffn) st = sites_pack(p, b->ffn, layers, 1, p->lr.ffn, err);
    if (st) goto done;
    *out = p;
    p = NULL;
done:
    packed_adapter_free(p);
    return st;
}

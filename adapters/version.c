#include "adapters/version.h"

#include <stdlib.h>

void packed_adapter_free(struct packed_adapter *p)
{
    if (!p) return;
    size_t count = p->lr.sites ? (size_t)p->lr.layers * PROJ_COUNT : 0;
    for (size_t i = 0; i < count; i++) /* Only readers see sites as const; whoever packed them frees them. */
        if (p->lr.sites[i]) p->device->ops->lr_site_free(p->device, (struct lr_site *)p->lr.sites[i]);
    free(p->lr.sites);
    free(p);
}

enum status adapter_pack(const struct adapter_bundle *b, struct device *device, struct packed_adapter **out,
                         struct error *err)
{
    size_t count = (size_t)b->layers * PROJ_COUNT;
    enum status st = ST_NOMEM;
    struct packed_adapter *p = calloc(1, sizeof *p);
    if (!p) return error_set(err, st, "not enough memory for the adapter");
    p->device = device;
    p->lr.width = b->lr_width;
    p->lr.layers = b->layers;
    p->bytes = sizeof *p + count * sizeof *p->lr.sites;
    p->lr.sites = calloc(count, sizeof *p->lr.sites);
    if (!p->lr.sites) {
        error_set(err, st, "not enough memory for the adapter");
        goto done;
    }
    for (size_t i = 0; i < count; i++) {
        if (!b->sites[i]) continue;
        struct lr_site *site = NULL;
        st = device->ops->lr_site_pack(device, b->sites[i], &site);
        if (st) {
            error_set(err, st, "cannot put the adapter's %s of layer %zu into the memory of the device: %s",
                      projection_name((enum projection)(i % PROJ_COUNT)), i / PROJ_COUNT, status_text(st));
            goto done;
        }
        p->lr.sites[i] = site;
        p->bytes += site->bytes;
    }
    *out = p;
    p = NULL;
    st = ST_OK;
done:
    packed_adapter_free(p);
    return st;
}

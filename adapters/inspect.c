#include "adapters/inspect.h"

#include "adapters/hash.h"
#include "adapters/package.h"
#include "adapters/reader.h"
#include "adapters/store.h"
#include "base/strbuf.h"

static const char *const rule_names[GATE_RULE_COUNT] = {
    [GATE_NONE] = "none",
    [GATE_DENSE] = "dense",
    [GATE_TOPK] = "topk",
    [GATE_TOPK_RAW] = "topk_raw",
    [GATE_TOP_P] = "top_p",
    [GATE_THRESHOLD] = "threshold",
    [GATE_ADA_THRESHOLD] = "ada_threshold",
    [GATE_FFN] = "ffn",
};

/* The smallest and largest of a number over the sites: "4", or "2 to 8". */
struct range {
    int low, high;
};

static void range_add(struct range *r, int n)
{
    if (!r->low || n < r->low) r->low = n;
    if (n > r->high) r->high = n;
}

static void range_print(struct strbuf *out, const char *label, const struct range *r)
{
    strbuf_printf(out, "%-11s %d", label, r->low);
    if (r->high != r->low) strbuf_printf(out, " to %d", r->high);
    strbuf_putc(out, '\n');
}

static void sites_print(struct strbuf *out, const struct adapter_bundle *b)
{
    struct range rank = {0}, experts = {0}, layer = {0};
    const struct lr_site_source *some = NULL;
    int layers = 0;
    for (int l = 0; l < b->layers; l++) {
        bool any = false;
        for (int p = 0; p < PROJ_COUNT; p++) {
            const struct lr_site_source *s = b->sites[l * PROJ_COUNT + p];
            if (!s) continue;
            some = s;
            any = true;
            range_add(&rank, s->rank);
            range_add(&experts, s->experts);
        }
        if (any) range_add(&layer, l + 1);
        layers += any;
    }
    strbuf_printf(out, "sites       %d, in %d layers (%d to %d)\n", b->site_count, layers, layer.low - 1,
                  layer.high - 1);
    strbuf_printf(out, "targets     %s\n", b->targets);
    range_print(out, "rank", &rank);
    range_print(out, "experts", &experts);
    bool of_ffn = some->rule == GATE_FFN;
    for (int l = 0; l < b->layers && of_ffn; l++)
        if (b->ffn[l]) some = b->ffn[l];
    strbuf_printf(out, "gate        %s", rule_names[some->rule]);
    if (some->rule == GATE_TOPK || some->rule == GATE_TOPK_RAW) strbuf_printf(out, ", top %d", b->top_k);
    if (of_ffn) strbuf_printf(out, ", of whole FFNs");
    strbuf_putc(out, '\n');
}

static enum status package_print(const struct package *p, struct strbuf *out, struct error *err)
{
    struct adapter_bundle *b = NULL;
    enum status st =
        adapter_read(p->config.data, p->config.size, p->tensors.data, p->tensors.size, NULL, &b, err);
    if (st) return st;
    char config[HASH_HEX_SIZE], tensors[HASH_HEX_SIZE], version[HASH_HEX_SIZE];
    hash_bytes(p->config.data, p->config.size, config);
    hash_bytes(p->tensors.data, p->tensors.size, tensors);
    st = hash_version(config, tensors, version);
    if (st) {
        error_set(err, st, "cannot hash the adapter");
        goto done;
    }
    strbuf_printf(out, "format      %s\n", b->format);
    strbuf_printf(out, "version     %.*s\n", ADAPTER_VERSION_HEX, version);
    sites_print(out, b);
    strbuf_printf(out, "parameters  %zu\n", b->parameters);
    strbuf_printf(out, "width       %zu\n", b->lr_width);
    strbuf_printf(out, "bytes       %zu\n", p->config.size + p->tensors.size);
    if (out->failed) st = error_set(err, ST_NOMEM, "out of memory");
done:
    adapter_bundle_free(b);
    return st;
}

enum status adapter_inspect(const char *path, struct strbuf *out, struct error *err)
{
    struct package p = {0};
    enum status st = package_map_path(path, &p, err);
    if (!st) st = package_print(&p, out, err);
    package_close(&p);
    return st;
}

/* Packing a bundle for a device: all of it, FFN routers included, or nothing. */
#include "adapters/version.h"
#include "tests/support/adapter_maker.h"
#include "tests/support/check.h"

#define LAYERS 3

/* Sites at q and at a routed FFN, in the layers that have them. */
struct routed {
    struct lr_site_source q, expert, router;
    struct lr_site_source *sites[LAYERS * PROJ_COUNT], *ffn[LAYERS];
    struct adapter_bundle bundle;
};

static void routed_make(struct routed *r)
{
    *r = (struct routed){.q = {.experts = 1, .rank = 2, .d_in = 16, .d_out = 16},
                         .expert = {.experts = 4, .rank = 3, .rule = GATE_FFN, .d_in = 16, .d_out = 24},
                         .router = {.experts = 4, .top_k = 2, .rule = GATE_TOPK, .d_in = 16, .d_out = 24}};
    for (int l = 0; l < LAYERS; l++) r->sites[l * PROJ_COUNT + PROJ_Q] = &r->q;
    r->sites[PROJ_COUNT + PROJ_UP] = &r->expert;
    r->ffn[1] = &r->router;
    r->bundle = (struct adapter_bundle){.layers = LAYERS, .sites = r->sites, .ffn = r->ffn, .lr_width = 77};
}

static void all_of_it_is_packed(void **state)
{
    (void)state;
    struct counting_device d;
    struct routed r;
    struct packed_adapter *p = NULL;
    struct error err = {0};
    counting_device_init(&d);
    routed_make(&r);
    assert_ok(adapter_pack(&r.bundle, &d.device, &p, &err), err);
    assert_int_equal(atomic_load(&d.live_sites), LAYERS + 2);
    assert_int_equal(p->lr.width, 77);
    assert_int_equal(p->lr.layers, LAYERS);
    assert_int_equal(p->lr.sites[PROJ_COUNT + PROJ_UP]->rule, GATE_FFN);
    assert_null(p->lr.sites[PROJ_UP]);
    assert_null(p->lr.ffn[0]);
    assert_int_equal(p->lr.ffn[1]->rule, GATE_TOPK);
    assert_true(p->bytes > p->lr.sites[PROJ_Q]->bytes * LAYERS + p->lr.sites[PROJ_COUNT + PROJ_UP]->bytes);
    packed_adapter_free(p);
    assert_int_equal(atomic_load(&d.live_sites), 0);

    r.bundle.ffn = NULL;
    r.sites[PROJ_COUNT + PROJ_UP] = NULL;
    assert_ok(adapter_pack(&r.bundle, &d.device, &p, &err), err);
    assert_null(p->lr.ffn);
    packed_adapter_free(p);
    assert_int_equal(atomic_load(&d.live_sites), 0);
}

static void a_failure_leaves_nothing(void **state)
{
    (void)state;
    struct counting_device d;
    struct routed r;
    struct packed_adapter *p = NULL;
    static const char *const failing[] = {"q_proj of layer 0", "q_proj of layer 1", "up_proj of layer 1",
                                          "q_proj of layer 2", "FFN router of layer 1"};
    routed_make(&r);
    for (int i = 0; i < LAYERS + 2; i++) {
        struct error err = {0};
        counting_device_init(&d);
        atomic_store(&d.packs_left, i);
        assert_refused(adapter_pack(&r.bundle, &d.device, &p, &err), ST_NOMEM, err, failing[i]);
        assert_int_equal(atomic_load(&d.live_sites), 0);
        assert_null(p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_of_it_is_packed),
        cmocka_unit_test(a_failure_leaves_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

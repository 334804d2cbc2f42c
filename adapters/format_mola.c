/* MoLA (arXiv 2402.08562) as its authors' code saves it, with ranks and expert counts by layer.
 *
 *   P.lora_A_{e}.weight      (rank, d_in)
 *   P.lora_B_{e}.weight      (d_out, rank)
 *   P.router.router.weight   (experts, d_in)
 *
 * The number of experts comes from the tensors. How many a token uses was a flag of its training program:
 * whoever uploads the files adds `top_k`, a number or one for each layer. */
#include "adapters/reader_int.h"

static const char *const known_keys[] = {"r", "top_k", "init_lora_weights", NULL};
static const struct part_name names[] = {
    {.pattern = "@.lora_A_%.weight", .kind = PART_A},
    {.pattern = "@.lora_B_%.weight", .kind = PART_B},
    {.pattern = "@.router.router.weight", .kind = PART_ROUTER},
    {.pattern = NULL},
};

static bool mola_recognise(const cJSON *config) { return cJSON_IsArray(json_get(config, "r")); }

static enum status mola_rules(const cJSON *config, struct site_rules *r, struct error *err)
{
    const cJSON *top_k = json_get(config, "top_k");
    enum status st = ST_OK;
    r->rule = GATE_TOPK;
    if (!top_k)
        st = error_set(
            err, ST_INVALID,
            "'top_k' is missing: MoLA does not save how many experts a token uses; add it, as a number "
            "or a list with one for each layer");
    else if (!cJSON_IsArray(top_k))
        st = rules_top_k(config, r, err);
    else if (config_counts(top_k, LR_EXPERTS_MAX))
        r->top_k_by_layer = top_k;
    else
        st = error_set(err, ST_INVALID, "'top_k' must be whole numbers from 1 to %d", LR_EXPERTS_MAX);
    return st;
}

const struct adapter_format format_mola = {
    .name = "mola",
    .peft_type = "LORA",
    .recognise = mola_recognise,
    .known_keys = known_keys,
    .rank_key = "r",
    .names = names,
    .site_rules_read = mola_rules,
};

/* The MoELoRA of CoIN (arXiv 2403.08350): experts that share out one rank, all of them weighed.
 *
 *   P.lora_A.loraA.{e}.mlp.weight   (r / expert_num, d_in)
 *   P.lora_B.loraB.{e}.mlp.weight   (d_out, r / expert_num)
 *   P.lora_router.weight            (expert_num, d_in)
 *   P.lora_A.loraA.{e}.weight, P.lora_B.loraB.{e}.weight: the first two again
 *
 * The scale is lora_alpha / r with the whole r. */
#include "adapters/reader_int.h"

static const char *const known_keys[] = {"r", "expert_num", "task_embedding_dim", "init_lora_weights", NULL};
static const struct part_name names[] = {
    {.pattern = "@.lora_A.loraA.%.mlp.weight", .kind = PART_A},
    {.pattern = "@.lora_B.loraB.%.mlp.weight", .kind = PART_B},
    {.pattern = "@.lora_A.loraA.%.weight", .kind = PART_A, .copy = true},
    {.pattern = "@.lora_B.loraB.%.weight", .kind = PART_B, .copy = true},
    {.pattern = "@.lora_router.weight", .kind = PART_ROUTER},
    {.pattern = NULL},
};

static enum status coin_rules(const cJSON *config, struct site_rules *r, struct error *err)
{
    r->rule = GATE_DENSE;
    r->rank_total = true;
    enum status st = rules_experts(config, "expert_num", r, err);
    return st;
}

const struct adapter_format format_coin = {
    .name = "coin",
    .peft_type = "MOE_LORA_CoIN",
    .known_keys = known_keys,
    .rank_key = "r",
    .names = names,
    .site_rules_read = coin_rules,
};

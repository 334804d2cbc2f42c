/* What an adapter_config.json says about ranks, scales and targets, in PEFT's terms.
 *
 * A module is named as in the base model: "model.layers.3.self_attn.q_proj". The parsed JSON must
 * outlive the struct. */
#ifndef ADAPTERS_LORA_CONFIG_H
#define ADAPTERS_LORA_CONFIG_H

#include "base/json.h"
#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>

#define LORA_PATTERNS_MAX 1024 /* entries of rank_pattern and alpha_pattern */

struct pattern;

/* Values by module-name pattern; the first that matches counts. */
struct module_values {
    size_t count;
    struct module_value *entry; /* owned */
};

/* Which modules a list, a regular expression or "all-linear" names. */
struct module_set {
    bool given, all_linear;
    struct pattern *regex; /* owned */
    const cJSON *list;
};

struct lora_config {
    int rank;                   /* 0: not given */
    const cJSON *rank_by_layer; /* in place of rank: an array of whole numbers from 1 */
    double alpha;               /* 0: not given */
    bool rslora;                /* scale = alpha / sqrt(rank) rather than alpha / rank */
    bool unscaled;              /* scale = 1 whatever the rank */
    struct module_values rank_pattern, alpha_pattern;
    struct module_set targets, excludes;
    const cJSON *layers;           /* a number or an array; NULL: all */
    struct pattern *layers_holder; /* of the name before the layer's number; NULL: any */
};

/* rank_key: what the format calls PEFT's "r". Errors name adapter_config.json and the key. On failure *out
 * needs no release. */
NODISCARD enum status lora_config_read(const cJSON *config, const char *rank_key, struct lora_config *out,
                                       struct error *err);
/* Rank, alpha and rslora of `config` in place of those of *c, where it has them: for a group of modules
 * with settings of its own. */
NODISCARD enum status lora_config_override(struct lora_config *c, const cJSON *config, struct error *err);
void lora_config_release(struct lora_config *c);

/* Rank stated for a module of a layer; 0 where the configuration states none. */
NODISCARD enum status lora_config_rank(const struct lora_config *c, const char *module, int layer, int *out,
                                       struct error *err);
/* alpha / rank or alpha / sqrt(rank). ST_REJECTED where there is no alpha: it has no safe default. */
NODISCARD enum status lora_config_scale(const struct lora_config *c, const char *module, int rank, float *out,
                                        struct error *err);
/* Does the configuration put an adapter on this module of this layer? Without target_modules:
 * on any. */
NODISCARD enum status lora_config_targets(const struct lora_config *c, const char *module, int layer,
                                          bool *out, struct error *err);

/* Is this value something other than null, false, 0, "", [] or {}: does it switch anything on? */
bool config_on(const cJSON *value);

/* A key that changes what an adapter computes in a way we do not do, and what to tell its owner. */
struct config_refusal {
    const char *key, *reason;
};
/* ST_UNSUPPORTED for a key of `refused` (ended by a NULL key, or NULL) that is switched on, or one that no format
 * may have;
 * ST_INVALID for one that is switched on and neither in `known` (ended by NULL) nor one that
 * lora_config_read understands or that says nothing of what is computed: we cannot tell what it changes. */
NODISCARD enum status config_keys_check(const cJSON *config, const char *const *known,
                                        const struct config_refusal *refused, struct error *err);

/* An array of whole numbers from 1 to max? */
bool config_counts(const cJSON *value, int max);

/* st, with err's message put behind "adapter_config.json: "; ST_INVALID becomes ST_REJECTED. */
enum status config_error(struct error *err, enum status st, const struct error *inner);

#endif

/* Whether experts specialise: how the rows of the last training steps were routed, site by site. */
#ifndef TRAINING_ROUTING_H
#define TRAINING_ROUTING_H

#include "base/strbuf.h"
#include "training/objective.h"

#define TRAIN_ROUTING_STEPS 20

struct train_site_routing {
    int layer;
    enum projection projection;
    int experts, top_k;
    /* [experts], owned, means over the rows of the steps counted: share of rows that chose the expert; mean
     * gate (0 where it was not chosen); mean p. */
    double *share, *gate, *probability;
};
struct train_routing {
    int64_t step;                         /* the last one counted */
    int64_t steps;                        /* so many were: the last ones, at most TRAIN_ROUTING_STEPS */
    /* Means over them and over sites, as struct pass_result; NAN: not measured. */
    double balance, contrast, similarity, cohesion;
    size_t site_count;                    /* 0: the adapter routes nothing (plain LoRA) */
    struct train_site_routing *sites;
};
void train_routing_release(struct train_routing *r);
/* Appends it as a JSON object: step, steps, balance, contrast, similarity, cohesion, and sites: layer,
 * projection, top_k, share, gate, probability. */
void train_routing_write(const struct train_routing *r, struct strbuf *out);

/* A ring of the last steps. */
struct routing_log;
NODISCARD enum status routing_log_open(const struct params *p, struct routing_log **out); /* ST_NOMEM */
void routing_log_close(struct routing_log *l);
void routing_log_add(struct routing_log *l, int64_t step, const struct objective_result *r);
/* ST_NOT_FOUND: no step yet. ST_NOMEM. The caller owes train_routing_release. */
NODISCARD enum status routing_log_read(const struct routing_log *l, struct train_routing *out);

#endif

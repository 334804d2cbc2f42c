/* What the server counts itself, for GET /metrics. Loop's thread only. */
#ifndef SERVER_METRICS_H
#define SERVER_METRICS_H

#include "engine/engine.h"

#include <stdint.h>

#define LATENCY_BUCKETS 20

/* Of seconds; bucket i counts those up to latency_bounds[i] that no bucket before has. */
struct latency {
    uint64_t bucket[LATENCY_BUCKETS + 1], count;
    double sum;
};
void latency_add(struct latency *l, double seconds);

struct metrics {
    uint64_t finished[FINISH_ERROR + 1]; /* sequences, by enum finish_reason */
    struct latency first_token, whole;   /* of a request: from its body's arrival */
};

#endif

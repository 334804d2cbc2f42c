/* The main of a mutation program: damaged inputs into one function, each answered or refused. */
#ifndef TESTS_SUPPORT_FUZZ_H
#define TESTS_SUPPORT_FUZZ_H

#include "base/status.h"
#include "tests/support/mutate.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Reads the bytes (a mutation of source's), walks over all it was given if they are accepted, and frees
 * everything. A refusal must fill err. */
typedef enum status (*fuzz_target)(const struct mutate_source *source, const uint8_t *data, size_t size,
                                   struct error *err);

/* Usage of every such program: fuzz_x [SEED [MUTATIONS [AT]]]. Mutations are numbered, and number AT
 * of a seed is always the same, so that one that fails can be run alone.
 *
 * Prints "N mutations, N refused, N accepted". Returns 0 if every refusal had a message, there were
 * both refusals and acceptances, and nothing crashed (a crash is reported with its number). */
int fuzz_main(int argc, char **argv, const struct mutate_source *sources, size_t source_count,
              fuzz_target target);

#endif

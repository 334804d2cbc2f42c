/* From a bundle to an adapter's next version. */
#ifndef TRAINING_PUBLISH_H
#define TRAINING_PUBLISH_H

#include "adapters/registry.h"

/* Writes the two files of an adapter into a folder, which is there: Medley's own format, or PEFT's where it
 * can say the same. */
NODISCARD enum status bundle_write(const struct adapter_bundle *b, const struct adapter_base *base,
                                   const char *folder, struct error *err);

/* Copies the two files that stand in a folder into the registry, as registry_put with source VERSION_TRAIN.
 */
NODISCARD enum status folder_publish(struct registry *r, const char *tenant, const char *name,
                                     const char *folder, const char *expected_version, struct put_result *out,
                                     struct error *err);

/* The two in one: for adapters made by bundle_fresh, with expected_version "" (the name must be new). */
NODISCARD enum status bundle_publish(struct registry *r, const char *tenant, const char *name,
                                     const struct adapter_bundle *b, const struct adapter_base *base,
                                     const char *expected_version, struct put_result *out, struct error *err);

#endif

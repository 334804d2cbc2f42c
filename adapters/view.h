/* What the engine may see of an adapter version: its packed sites, nothing else. */
#ifndef ADAPTERS_VIEW_H
#define ADAPTERS_VIEW_H

#include "base/key128.h"
#include "kernels/lowrank.h"

#define ADAPTER_NAME_MAX    128 /* [A-Za-z0-9][A-Za-z0-9._-]{0,127} */
#define ADAPTER_VERSION_HEX 16  /* digits of a version's public name: the head of its content hash */

/* Immutable; valid while a lease on it is held. */
struct adapter_view {
    char name[ADAPTER_NAME_MAX + 1];
    char version[ADAPTER_VERSION_HEX + 1];
    struct key128 key; /* equal exactly for equal (tenant, name, content) */
    struct lr_adapter lr;
};

#endif

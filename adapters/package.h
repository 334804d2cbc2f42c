/* Uploads: from what a client sent to the two files of an adapter.
 *
 * A folder holds either PACKAGE_CONFIG and PACKAGE_TENSORS, or one PACKAGE_BODY: an archive (tar, also
 * compressed with gzip or zstd, or zip) with these two files side by side at any depth, or an adapter in a
 * GGUF file, which becomes PACKAGE_TENSORS with an empty configuration beside it. Of an archive
 * nothing else is written, and no path of it is used. */
#ifndef ADAPTERS_PACKAGE_H
#define ADAPTERS_PACKAGE_H

#include "base/file.h"
#include "base/status.h"

#include <stddef.h>

#define PACKAGE_CONFIG      "adapter_config.json"
#define PACKAGE_TENSORS     "adapter_model.safetensors"
#define PACKAGE_BODY        "body"
#define PACKAGE_ENTRIES_MAX 4096 /* of an archive */

/* Takes the two files out of an archive (or a GGUF file) and puts them into folder, which has neither yet.
 * bytes_max bounds all that the archive unpacks to, the ignored files included. ST_BAD_FORMAT, ST_REJECTED,
 * ST_UNSUPPORTED, ST_TOO_LARGE, ST_NO_SPACE, ST_IO. */
NODISCARD enum status package_extract(const char *path, const char *folder, size_t bytes_max,
                                      struct error *err);

struct package {
    char *config_path, *tensors_path; /* owned */
    struct file_map config, tensors;
};

/* Unpacks the body if the folder has one, which is then removed, and maps the two files. On ST_OK the
 * caller owes one package_close; the folder and its files stay. */
NODISCARD enum status package_open(const char *folder, size_t bytes_max, struct package *out,
                                   struct error *err);
/* Maps the tensors and the PACKAGE_CONFIG of a folder; tensors_path NULL: its PACKAGE_TENSORS. */
NODISCARD enum status package_map(const char *folder, const char *tensors_path, size_t bytes_max,
                                  struct package *out, struct error *err);
/* path: a folder with the two files, an archive of them, a GGUF file, or a safetensors file with
 * PACKAGE_CONFIG beside it. An archive is unpacked into a temporary folder that is gone afterwards. */
NODISCARD enum status package_map_path(const char *path, struct package *out, struct error *err);
void package_close(struct package *p);

#endif

/* The file in which packed weights stay from one start to the next.
 *
 * Who opens such a file knows beforehand, to the byte, how long it is and where in it each weight lies: that
 * follows from the model and the device. A file is compared with this plan and never believed: no number
 * in it is used as a size or a place. Any doubt is an error, the file is not used, and a new one takes its
 * place. */
#ifndef ENGINE_PACK_FILE_H
#define ENGINE_PACK_FILE_H

#include "base/file.h"
#include "base/status.h"
#include "kernels/device.h"

#include <stdatomic.h>
#include <stddef.h>

#define PACK_HASH_BYTES 32

/* What a file must hold to be of use. */
struct pack_spec {
    unsigned char
        plan[PACK_HASH_BYTES]; /* of all that decides which bytes the data are, but the model's own */
    size_t bytes;              /* of data, a multiple of 64, not 0 */
    const struct file_map *model;
    const char *model_path;
};

/* Maps a file that holds just what `spec` asks for, made of this very model; its threads may be used.
 * *data_out points into the map, 64-byte aligned. ST_NOT_FOUND: there is none; else: one that must not be
 * used. */
NODISCARD enum status pack_file_open(const char *path, const struct pack_spec *spec, struct device *d,
                                     struct file_map *out, const void **data_out, struct error *err);

/* Writes data (spec->bytes, 64-byte aligned) under another name and renames it over path, whose folder is
 * made. ST_BUSY: another process is at it, or the model's file has changed meanwhile. ST_CANCELLED soon after
 * *stop was set. ST_NO_SPACE, ST_IO. */
NODISCARD enum status pack_file_write(const char *path, const struct pack_spec *spec, const void *data,
                                      const atomic_bool *stop, struct error *err);

#endif

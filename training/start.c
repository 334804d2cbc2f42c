#include "training/start.h"

enum status train_start_open(const char *path, const struct adapter_base *base, struct train_start *out,
                             struct error *err)
{
    struct train_start s = {0};
    enum status st = package_map_path(path, &s.files, err);
    if (st) return st;
    st = adapter_read(s.files.config.data, s.files.config.size, s.files.tensors.data, s.files.tensors.size,
                      base, &s.bundle, err);
    if (st)
        train_start_close(&s);
    else
        *out = s;
    return st;
}

void train_start_close(struct train_start *s)
{
    adapter_bundle_free(s->bundle);
    package_close(&s->files);
    *s = (struct train_start){0};
}

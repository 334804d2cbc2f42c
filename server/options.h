/* Command-line options and the configuration file, from one table.
 *
 * An option is `--name VALUE`, `--name=VALUE` or, for flags, `--name`; in the file it is a member
 * of one JSON object with the same name. What the command line says wins. The same table prints --help. */
#ifndef SERVER_OPTIONS_H
#define SERVER_OPTIONS_H

#include "base/json.h"
#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum option_kind {
    OPTION_FLAG,   /* bool */
    OPTION_STRING, /* const char * */
    OPTION_LIST,   /* struct option_list; may be given several times */
    OPTION_INT,    /* int */
    OPTION_BYTES,  /* size_t; "512M", "2G" */
    OPTION_REAL,   /* double */
    OPTION_SEED,   /* struct option_seed */
};

#define OPTION_LIST_MAX 8
struct option_list {
    const char *items[OPTION_LIST_MAX];
    size_t count;
};
struct option_seed {
    bool given;
    uint64_t value;
};

struct option {
    const char *name, *metavar, *help; /* metavar NULL for flags */
    enum option_kind kind;
    size_t offset;       /* into the values' struct */
    double min, max;     /* of numbers */
    unsigned commands;   /* the subcommands that take it */
    const char *choices; /* of a string, "a|b|c"; NULL: any */
};

struct option_table {
    const struct option *options;
    size_t count;
    unsigned command; /* the one that runs now */
};

/* Reads argv[0..argc) into values. Words that are no options are collected in order in *words (at most one
 * may be expected by a caller). ST_INVALID explains itself. given[i] becomes true for each option seen. */
NODISCARD enum status options_read(const struct option_table *t, int argc, char **argv, void *values,
                                   bool *given, struct option_list *words, struct error *err);
/* Reads the members of a JSON object for options not yet given. Strings stay borrowed from it. */
NODISCARD enum status options_read_object(const struct option_table *t, const cJSON *object, void *values,
                                          const bool *given, struct error *err);
void options_help(const struct option_table *t, FILE *out);

/* "4096", "512K", "512M", "2G", "1T", with an optional B or iB. */
NODISCARD enum status bytes_parse(const char *text, size_t *out);

#endif

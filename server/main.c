#include "server/commands.h"

#include "base/file.h"
#include "base/log.h"

#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const struct {
    enum command command;
    const char *words; /* "adapter inspect" */
    const char *arguments, *summary;
    int (*run)(const struct config *c);
    size_t words_min, words_max; /* arguments that are no options */
} commands[] = {
    {COMMAND_SERVE, "serve", "--model FILE [options]", "answer HTTP requests", serve_run, 0, 0},
    {COMMAND_GENERATE, "generate", "--model FILE [options] PROMPT", "continue one prompt on the terminal",
     generate_run, 1, 1},
    {COMMAND_TRAIN, "train",
     "(--model FILE (--out FOLDER | --data-dir DIR) | --server URL) --data FILE --adapter PATH|NAME "
     "[--create]",
     "train an adapter on examples, here or in a running server", train_run, 0, 0},
    {COMMAND_INSPECT, "adapter inspect", "PATH", "check an adapter's files and say what is in them",
     inspect_run, 1, 1},
    {COMMAND_CONVERT, "adapter convert", "PATH FOLDER [options]",
     "write an adapter of any format anew, as PEFT LoRA or MoELoRA", convert_run, 2, 2},
    {COMMAND_CHANGE, "adapter push", "NAME PATH [options]",
     "upload an adapter, a folder or a file, to a running server", push_run, 2, 2},
    {COMMAND_LIST, "adapter list", "[options]", "the adapters of a running server", list_run, 0, 0},
    {COMMAND_CHANGE, "adapter rollback", "NAME VERSION [options]", "make an earlier version the current one",
     rollback_run, 2, 2},
    {COMMAND_CHANGE, "adapter rm", "NAME [options]", "remove an adapter with all its versions", remove_run, 1,
     1},
};
#define COMMAND_COUNT (int)(sizeof commands / sizeof *commands)

static void help(FILE *out)
{
    fprintf(out, "Medley serves one language model with many adapters, each request with its own.\n\n");
    for (int i = 0; i < COMMAND_COUNT; i++)
        fprintf(out, "  medley %s %s\n      %s\n", commands[i].words, commands[i].arguments,
                commands[i].summary);
    fprintf(out, "\nmedley COMMAND --help lists a command's options; --version prints the version.\n");
}

static int command_help(int i)
{
    printf("medley %s %s\n%s\n\n", commands[i].words, commands[i].arguments, commands[i].summary);
    config_help(commands[i].command, stdout);
    if (commands[i].command & (COMMAND_LIST | COMMAND_CHANGE | COMMAND_TRAIN))
        printf("\nMEDLEY_API_KEY in the environment is sent to the server as its key.\n");
    if (commands[i].command == COMMAND_SERVE)
        printf("\nMEDLEY_API_KEY in the environment sets a key that every request must bring as a bearer "
               "token.\n");
    return 0;
}

/* How many words of argv name command i; 0: it does not. */
static int match(int i, int argc, char **argv)
{
    char words[64];
    int count = 0;
    snprintf(words, sizeof words, "%s", commands[i].words);
    char *rest;
    for (char *w = strtok_r(words, " ", &rest); w; w = strtok_r(NULL, " ", &rest), count++)
        if (count >= argc || strcmp(argv[count], w) != 0) return 0;
    return count;
}

/* --help or --version, before a lone "--". */
static bool has_word(int argc, char **argv, const char *word)
{
    for (int i = 0; i < argc && strcmp(argv[i], "--"); i++)
        if (!strcmp(argv[i], word)) return true;
    return false;
}

static int run(int i, int argc, char **argv)
{
    if (has_word(argc, argv, "--help")) return command_help(i);
    if (has_word(argc, argv, "--version")) return printf("medley %s\n", MEDLEY_VERSION) < 0;
    struct config config;
    struct error err = {0};
    enum status st = config_read(commands[i].command, argc, argv, &config, &err);
    size_t words = config.words.count;
    if (!st && (words < commands[i].words_min || words > commands[i].words_max))
        st = error_set(&err, ST_INVALID, "%s: it is called as medley %s %s",
                       words ? "too many arguments" : "an argument is missing", commands[i].words,
                       commands[i].arguments);
    int status = st ? command_failed(&err) : commands[i].run(&config);
    config_release(&config);
    return status;
}

/* Models, packed weights and adapters are mapped. Where one is cut short while it is in use, reading on
 * raises SIGBUS: nothing can be saved, but the reason can be said. */
static void on_bus_error(int number)
{
    static const char text[] =
        "medley: a file in use was cut short, or its disk failed: a model's or an adapter's, or "
        "the packed weights. Replace such files by renaming new ones over them.\n";
    (void)number;
    file_write_all(STDERR_FILENO, text, sizeof text - 1);
    _exit(1);
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    signal(SIGBUS, on_bus_error);
    if (sodium_init() < 0) {
        fprintf(stderr, "medley: no source of random numbers\n");
        return 1;
    }
    for (int i = 0; i < COMMAND_COUNT; i++) {
        int words = match(i, argc - 1, argv + 1);
        if (words) return run(i, argc - 1 - words, argv + 1 + words);
    }
    if (argc > 1 && !strcmp(argv[1], "--version")) return printf("medley %s\n", MEDLEY_VERSION) < 0;
    bool asked = argc > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "help"));
    if (argc > 1 && !asked) fprintf(stderr, "medley: there is no command '%s'\n\n", argv[1]);
    help(asked ? stdout : stderr);
    return !asked;
}

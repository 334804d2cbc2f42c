#include "tests/support/fuzz.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define SEED_DEFAULT      20240215
#define MUTATIONS_DEFAULT 2000
#define HANG_SECONDS 300 /* no single mutation takes so long unless it never ends */

/* In memory shared with the process that does the work, to outlive its crash. */
struct progress {
    uint64_t at, refused, accepted, silent;
};

struct job {
    const struct mutate_source *sources;
    size_t source_count;
    fuzz_target target;
    uint64_t seed, first, end;
    struct progress *progress;
};

static void run_one(const struct job *job, uint64_t index)
{
    struct test_random random = {job->seed ^ index * 0xD1342543DE82EF95u};
    const struct mutate_source *source = &job->sources[index % job->source_count];
    size_t size;
    uint8_t *data = mutate_copy(source, &random, &size);
    struct error err = {0};
    if (!job->target(source, data, size, &err)) {
        job->progress->accepted++;
    } else {
        job->progress->refused++;
        if (!err.message[0]) {
            fprintf(stderr, "mutation %" PRIu64 " of '%s': refused without a message\n", index, source->name);
            job->progress->silent++;
        }
    }
    free(data);
}

/* Every source must be good as it is, or its mutations prove little. */
static int check_sources(const struct job *job)
{
    int failed = 0;
    for (size_t i = 0; i < job->source_count; i++) {
        struct error err = {0};
        uint8_t *data = mutate_truncate(&job->sources[i], job->sources[i].size);
        if (job->target(&job->sources[i], data, job->sources[i].size, &err)) {
            fprintf(stderr, "'%s' is refused as it is: %s\n", job->sources[i].name, err.message);
            failed = 1;
        }
        free(data);
    }
    return failed;
}

/* Runs the job in a process of its own; its exit status as waitpid tells it. */
static int run_apart(const struct job *job)
{
    fflush(NULL);
    pid_t child = fork();
    if (child < 0) return -1;
    if (child == 0) {
        int failed = check_sources(job);
        for (uint64_t i = job->first; i < job->end; i++) {
            job->progress->at = i;
            alarm(HANG_SECONDS);
            run_one(job, i);
        }
        exit(failed);
    }
    int status = -1;
    waitpid(child, &status, 0);
    return status;
}

static uint64_t argument(int argc, char **argv, int i, uint64_t otherwise)
{
    return i < argc ? strtoull(argv[i], NULL, 0) : otherwise;
}

int fuzz_main(int argc, char **argv, const struct mutate_source *sources, size_t source_count,
              fuzz_target target)
{
    struct job job = {.sources = sources, .source_count = source_count, .target = target};
    job.seed = argument(argc, argv, 1, SEED_DEFAULT);
    job.end = argument(argc, argv, 2, MUTATIONS_DEFAULT);
    if (argc > 3) {
        job.first = argument(argc, argv, 3, 0);
        job.end = job.first + 1;
    }
    void *shared =
        mmap(NULL, sizeof *job.progress, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) return 2;
    job.progress = shared;

    int status = run_apart(&job);
    const struct progress p = *job.progress;
    munmap(shared, sizeof p);
    printf("seed %" PRIu64 ": %" PRIu64 " mutations, %" PRIu64 " refused, %" PRIu64 " accepted\n", job.seed,
           p.refused + p.accepted, p.refused, p.accepted);
    if (status != 0) {
        fprintf(stderr,
                "failed (wait status 0x%x), last at mutation %" PRIu64 "; again: %s %" PRIu64 " 0 %" PRIu64
                "\n",
                (unsigned)status, p.at, argv[0], job.seed, p.at);
        return 1;
    }
    bool both = (p.refused && p.accepted) || argc > 3;
    if (!both) fputs("mutations were all refused or all accepted: they prove nothing\n", stderr);
    return p.silent || !both;
}

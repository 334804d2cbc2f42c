/* The cases of tests/fixtures/logits: a model, its adapters, and what they must answer. */
#ifndef TESTS_SUPPORT_CASES_H
#define TESTS_SUPPORT_CASES_H

#include "adapters/version.h"
#include "tests/support/teacher.h"

#define CASE_TOKENS_MAX 32
#define CASE_SET_MAX    4
#define CASES_MAX       32

struct logit_case {
    char name[64];
    int32_t tokens[CASE_TOKENS_MAX];
    int count;
    struct lr_member members[CASE_SET_MAX];
    int member_count;
    double flip_effect, router_gap; /* see make_adapters.py; 0 where nothing is chosen */
    float *expected;                /* (count, vocab), owned */
};

struct case_adapter {
    char name[64];
    struct packed_adapter *packed;
};

struct case_book {
    struct teacher teacher;
    struct logit_case cases[CASES_MAX];
    int case_count;
    const char *adapter_folder; /* of the fixtures */
    struct case_adapter adapters[CASES_MAX];
    int adapter_count;
};

/* Opens models/MODEL.gguf, every case of that model in logits/, and every adapter they use, of adapters/.
 * Fails the running test where anything is missing. */
void case_book_open(struct case_book *b, const char *model, struct device *device, enum dtype kv_type);
/* The same of formats/, where both are. */
void case_book_open_formats(struct case_book *b, const char *model, struct device *device,
                            enum dtype kv_type);
void case_book_close(struct case_book *b);

#endif

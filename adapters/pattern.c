#include "adapters/pattern.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

struct pattern {
    pcre2_code *code;
    pcre2_match_context *limits;
    pcre2_match_data *match;
};

void pattern_free(struct pattern *p)
{
    if (!p) return;
    pcre2_match_data_free(p->match);
    pcre2_match_context_free(p->limits);
    pcre2_code_free(p->code);
    free(p);
}

enum status pattern_compile(const char *regex, struct pattern **out, struct error *err)
{
    size_t size = strlen(regex);
    if (size > PATTERN_BYTES_MAX)
        return error_set(err, ST_REJECTED, "the pattern '%.40s...' has %zu bytes; at most %d are allowed",
                         regex, size, PATTERN_BYTES_MAX);
    struct pattern *p = calloc(1, sizeof *p);
    if (!p) return ST_NOMEM;

    enum status st = ST_NOMEM;
    int code = 0;
    PCRE2_SIZE offset = 0;
    p->code =
        pcre2_compile((PCRE2_SPTR)regex, size, PCRE2_ANCHORED | PCRE2_ENDANCHORED, &code, &offset, NULL);
    if (!p->code && code == PCRE2_ERROR_HEAP_FAILED) goto done;
    if (!p->code) {
        PCRE2_UCHAR text[128] = "";
        pcre2_get_error_message(code, text, sizeof text);
        st = error_set(err, ST_REJECTED, "'%.200s' is not a regular expression: %s at byte %zu", regex,
                       (const char *)text, (size_t)offset);
        goto done;
    }
    p->limits = pcre2_match_context_create(NULL);
    p->match = pcre2_match_data_create(1, NULL);
    if (!p->limits || !p->match) goto done;
    pcre2_set_match_limit(p->limits, PATTERN_STEPS_MAX);
    *out = p;
    p = NULL;
    st = ST_OK;
done:
    pattern_free(p);
    return st;
}

enum status pattern_compile_suffix(const char *regex, struct pattern **out, struct error *err)
{
    char whole[PATTERN_BYTES_MAX + 1];
    int n = snprintf(whole, sizeof whole, "(.*\\.)?(%s)", regex);
    if (n < 0 || (size_t)n >= sizeof whole)
        return error_set(err, ST_REJECTED, "the pattern '%.40s...' is too long; at most %d bytes are allowed",
                         regex, PATTERN_BYTES_MAX - 9);
    return pattern_compile(whole, out, err);
}

enum status pattern_match(const struct pattern *p, const char *subject, bool *out, struct error *err)
{
    int rc = pcre2_match(p->code, (PCRE2_SPTR)subject, strlen(subject), 0, 0, p->match, p->limits);
    if (rc == PCRE2_ERROR_NOMEMORY) return ST_NOMEM;
    if (rc < 0 && rc != PCRE2_ERROR_NOMATCH)
        return error_set(err, ST_REJECTED,
                         "a pattern takes too long to compare with the module '%.100s'; simplify it",
                         subject);
    *out = rc >= 0;
    return ST_OK;
}

/* Damaged JSON: a request and a text with every kind of value. What is accepted must survive being
 * written and read again. */
#include "base/json.h"
#include "base/strbuf.h"
#include "tests/support/fuzz.h"

#include <stdlib.h>
#include <string.h>

static enum status read_json(const struct mutate_source *source, const uint8_t *data, size_t size,
                             struct error *err)
{
    (void)source;
    cJSON *json;
    enum status st = json_parse((const char *)data, size, &json, err);
    if (st) return st;

    char *written = cJSON_PrintUnformatted(json);
    cJSON *again = NULL;
    CHECK(written && !json_parse(written, strlen(written), &again, NULL));
    CHECK(cJSON_Compare(json, again, true));
    cJSON_Delete(again);
    free(written);

    const char *model;
    double temperature;
    int64_t n;
    (void)json_get_string(json, "model", &model, NULL);
    (void)json_get_f64(json, "temperature", 0, 2, &temperature, NULL);
    (void)json_get_i64(json, "n", 1, 16, &n, NULL);
    cJSON_Delete(json);
    return ST_OK;
}

int main(int argc, char **argv)
{
    static const char request[] =
        "{\"model\":\"base\",\"prompt\":[\"Hello "
        "\\u00e9\\ud83d\\ude00\",\"two\"],\"max_tokens\":16,\"temperature\":0.7,"
        "\"n\":2,\"stop\":[\"\\n\",\"END\"],\"stream\":false,\"logit_bias\":{\"50256\":-100,\"7\":1.5e1},"
        "\"adapters\":[{\"name\":\"a\",\"weight\":0.5},{\"name\":\"b\",\"weight\":-1}],\"user\":null}";
    static const char values[] =
        " [ 0 , -0.0, 1e3, 1E-3 , true , false,null,\"\",\t{},\r\n[[[[1]]]], \"\xC3\xA9\" ] ";
    static const char *const words[] = {
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "\"",
        "\\",
        "\\u0000",
        "\\uD800",
        "\\uDC00",
        "\\u12",
        "\xC0\x80",
        "\xED\xA0\x80",
        "\xEF\xBB\xBF",
        "1e999",
        "-",
        "01",
        "+1",
        ".5",
        "1.",
        "NaN",
        "Infinity",
        "true",
        "nul",
        " ",
        "\n",
        "\x01",
        "\"model\":\"x\",",
        "\"n\":3,",
        "//x",
        "'a'",
        "123456789012345678901234567890123456789012345678901234567890123456",
        "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
        "{\"a\":{\"a\":{\"a\":{\"a\":",
    };
    const struct mutate_source sources[] = {
        {.name = "request",
         .data = request,
         .size = sizeof request - 1,
         .words = words,
         .word_count = sizeof words / sizeof *words},
        {.name = "values",
         .data = values,
         .size = sizeof values - 1,
         .words = words,
         .word_count = sizeof words / sizeof *words},
    };
    return fuzz_main(argc, argv, sources, 2, read_json);
}

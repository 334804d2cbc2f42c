#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "server/config.h"
#include "server/listen.h"

#define ARGS(...) (sizeof((char *[]){__VA_ARGS__}) / sizeof(char *)), ((char *[]){__VA_ARGS__})

static void sizes_have_units(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        size_t bytes;
    } good[] = {
        {"0", 0},
        {"4096", 4096},
        {"1K", 1024},
        {"512M", (size_t)512 << 20},
        {"2g", (size_t)2 << 30},
        {"1GiB", (size_t)1 << 30},
        {"3kb", 3072},
        {"1T", (size_t)1 << 40},
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        size_t bytes = 1;
        assert_int_equal(bytes_parse(good[i].text, &bytes), ST_OK);
        assert_int_equal(bytes, good[i].bytes);
    }
    static const char *const bad[] = {
        "", "x", "-1", "1X", "1.5G", "1G2", "99999999999999999999", "99999999999999T"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        size_t bytes = 7;
        assert_int_equal(bytes_parse(bad[i], &bytes), ST_INVALID);
        assert_int_equal(bytes, 7);
    }
}

static void flags_fill_the_configuration(void **state)
{
    (void)state;
    struct config c;
    struct error err = {0};
    assert_int_equal(config_read(COMMAND_SERVE,
                                 ARGS("--model", "/models/some.gguf", "--max-batch=32", "--kv-bytes", "512M",
                                      "--cpu-level", "reference", "--data", "d"),
                                 &c, &err),
                     ST_OK);
    assert_string_equal(c.model, "/models/some.gguf");
    assert_string_equal(c.model_name, "some");
    assert_int_equal(c.max_batch, 32);
    assert_int_equal(c.kv_bytes, (size_t)512 << 20);
    assert_string_equal(c.cpu_level, "reference");
    assert_string_equal(c.listen, "127.0.0.1:8080");
    config_release(&c);

    assert_int_equal(config_read(COMMAND_GENERATE,
                                 ARGS("--model", "m", "--adapter", "a", "--adapter", "b", "--seed", "7",
                                      "--temperature", "0.5", "--", "--prompt"),
                                 &c, &err),
                     ST_OK);
    assert_int_equal(c.adapters.count, 2);
    assert_true(c.seed.given && c.seed.value == 7 && c.temperature == 0.5);
    assert_string_equal(c.words.items[0], "--prompt");
    config_release(&c);
}

static void packed_weights_have_their_places(void **state)
{
    (void)state;
    struct config c;
    char *cache = getenv("XDG_CACHE_HOME") ? strdup(getenv("XDG_CACHE_HOME")) : NULL;
    setenv("XDG_CACHE_HOME", "/c", 1);
    assert_int_equal(config_read(COMMAND_GENERATE, ARGS("--model", "/no/x.gguf"), &c, NULL), ST_OK);
    assert_string_equal(c.pack_path[0], "/no/x.gguf.pack");
    char *in_cache = strdup(c.pack_path[1]);
    config_release(&c);
    const char *begin = "/c/medley/packs/x.gguf-", *end = ".pack";
    assert_int_equal(strlen(in_cache), strlen(begin) + 16 + strlen(end));
    assert_memory_equal(in_cache, begin, strlen(begin));
    assert_string_equal(in_cache + strlen(begin) + 16, end);

    /* A model of the same name elsewhere has another file; "off" has none; a folder that is named is the only one. */
    assert_int_equal(config_read(COMMAND_SERVE, ARGS("--model", "/any/x.gguf", "--data", "d"), &c, NULL), ST_OK);
    assert_string_not_equal(c.pack_path[1], in_cache);
    config_release(&c);
    assert_int_equal(config_read(COMMAND_GENERATE, ARGS("--model", "x.gguf", "--pack-cache", "off"), &c, NULL), ST_OK);
    assert_null(c.pack_path[0]);
    config_release(&c);
    assert_int_equal(config_read(COMMAND_GENERATE, ARGS("--model", "/no/x.gguf", "--pack-cache", "/p"), &c, NULL), ST_OK);
    assert_memory_equal(c.pack_path[0], "/p/x.gguf-", 10);
    assert_string_equal(c.pack_path[0] + 3, in_cache + strlen("/c/medley/packs/"));
    assert_null(c.pack_path[1]);
    config_release(&c);
    if (cache)
        setenv("XDG_CACHE_HOME", cache, 1);
    else
        unsetenv("XDG_CACHE_HOME");
    free(cache);
    free(in_cache);
}

static void must_refuse(int argc, char **argv, const char *says)
{
    struct config c;
    struct error err = {0};
    assert_int_equal(config_read(COMMAND_SERVE, argc, argv, &c, &err), ST_INVALID);
    if (!strstr(err.message, says)) fail_msg("'%s' does not say '%s'", err.message, says);
    config_release(&c);
}

static void wrong_flags_explain_themselves(void **state)
{
    (void)state;
    must_refuse(ARGS("--data", "d"), "--model FILE is required");
    must_refuse(ARGS("--model"), "--model needs a value");
    must_refuse(ARGS("--no-such", "1"), "unknown option --no-such");
    must_refuse(ARGS("-m", "x"), "two dashes");
    must_refuse(ARGS("--chat"), "unknown option --chat"); /* of another command */
    must_refuse(ARGS("--model", "m", "--max-batch", "0"), "--max-batch: '0' is not a number from 1");
    must_refuse(ARGS("--model", "m", "--max-batch", "2.5"), "--max-batch");
    must_refuse(ARGS("--model", "m", "--kv-bytes", "much"), "512M");
    must_refuse(ARGS("--model", "m", "--cpu-level", "avx"), "reference|avx2|avxvnni|avx512");
    must_refuse(ARGS("--model", "m", "--insecure-listen=yes"), "takes no value");
}

/* A file with text, which the caller removes and frees. */
static char *file_with(const char *text)
{
    char *path = strdup("/tmp/medley-config-XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
    return path;
}

static void the_file_fills_what_flags_left(void **state)
{
    (void)state;
    struct config c;
    struct error err = {0};
    char *path =
        file_with("{\"model\": \"from-file.gguf\", \"max_batch\": 5, \"kv-bytes\": \"1G\", \"threads\": 3,"
                  " \"insecure-listen\": true, \"data\": \"x\", \"adapter-bytes\": 1000}");
    assert_int_equal(config_read(COMMAND_SERVE, ARGS("--config", path, "--threads", "2"), &c, &err), ST_OK);
    assert_string_equal(c.model_name, "from-file");
    assert_int_equal(c.max_batch, 5);
    assert_int_equal(c.threads, 2);
    assert_int_equal(c.kv_bytes, (size_t)1 << 30);
    assert_int_equal(c.adapter_bytes, 1000);
    assert_true(c.insecure_listen);
    config_release(&c);
    unlink(path);
    free(path);

    static const struct {
        const char *text, *says;
    } bad[] = {
        {"{\"modle\": \"x\"}", "unknown option 'modle'"},
        {"[]", "JSON object"},
        {"{\"threads\": \"many\"}", "--threads"},
        {"{\"threads\": true}", "wrong kind"},
        {"{\"threads\": 1", "JSON"},
        {"", "JSON"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        path = file_with(bad[i].text);
        err = (struct error){0};
        assert_int_not_equal(config_read(COMMAND_SERVE, ARGS("--config", path, "--model", "m"), &c, &err),
                             ST_OK);
        if (!strstr(err.message, bad[i].says)) fail_msg("'%s' does not say '%s'", err.message, bad[i].says);
        config_release(&c);
        unlink(path);
        free(path);
    }
}

static void addresses(void **state)
{
    (void)state;
    struct listen_address a;
    struct error err = {0};
    assert_int_equal(listen_open("127.0.0.1:0", &a, &err), ST_OK);
    assert_true(a.loopback);
    assert_ptr_equal(strstr(a.url, "http://127.0.0.1:"), a.url);
    assert_string_not_equal(a.url, "http://127.0.0.1:0"); /* the real port */
    struct listen_address b;
    assert_int_equal(listen_open(a.url + strlen("http://"), &b, &err), ST_IO);
    assert_non_null(strstr(err.message, "in use"));
    close(a.fd);
    assert_int_equal(listen_open("0.0.0.0:0", &a, &err), ST_OK);
    assert_false(a.loopback);
    close(a.fd);
    static const char *const bad[] = {"",           "8080",        "127.0.0.1",          ":8080",
                                      "127.0.0.1:", "127.0.0.1:x", "nowhere.invalid:0 1"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(listen_open(bad[i], &a, &err), ST_INVALID);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_have_units),
        cmocka_unit_test(flags_fill_the_configuration),
        cmocka_unit_test(packed_weights_have_their_places),
        cmocka_unit_test(wrong_flags_explain_themselves),
        cmocka_unit_test(the_file_fills_what_flags_left),
        cmocka_unit_test(addresses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "server/routes.h"

static const struct route routes[] = {
    {"GET", "/a"},
    {"GET", "/a/{name}"},
    {"PUT", "/a/{name}"},
    {"POST", "/a/{name}/b"},
};

static const struct route *find(const char *method, const char *path, char *param, char *allow)
{
    return route_find(routes, sizeof routes / sizeof *routes, method, path, param, 16, allow, 64);
}

static void paths_are_matched_by_segments(void **state)
{
    (void)state;
    char param[16], allow[64];
    assert_ptr_equal(find("GET", "/a", param, allow), &routes[0]);
    assert_ptr_equal(find("HEAD", "/a", param, allow), &routes[0]);
    assert_ptr_equal(find("PUT", "/a/x.y", param, allow), &routes[2]);
    assert_string_equal(param, "x.y");
    assert_ptr_equal(find("POST", "/a/x/b", param, allow), &routes[3]);
    assert_string_equal(param, "x");
    static const char *const none[] = {
        "", "/", "/b", "/a/", "/aa", "/a/x/c", "/a//b", "/a/x/b/", "/a/0123456789abcdef"};
    for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
        assert_null(find("GET", none[i], param, allow));
        assert_string_equal(allow, "");
    }
}

static void other_methods_list_what_is_allowed(void **state)
{
    (void)state;
    char param[16], allow[64];
    assert_null(find("DELETE", "/a/x", param, allow));
    assert_string_equal(allow, "GET, HEAD, PUT");
    assert_null(find("GET", "/a/x/b", param, allow));
    assert_string_equal(allow, "POST");
}

static void every_route_is_whole(void **state)
{
    (void)state;
    for (size_t i = 0; i < server_route_count; i++) {
        const struct route *r = &server_routes[i];
        assert_true(r->path[0] == '/' && r->handle);
        assert_int_equal(r->body == BODY_NONE, r->body_bytes_max == 0);
        assert_int_equal(r->body == BODY_STREAM, r->begin && r->on_data);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(paths_are_matched_by_segments),
        cmocka_unit_test(other_methods_list_what_is_allowed),
        cmocka_unit_test(every_route_is_whole),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

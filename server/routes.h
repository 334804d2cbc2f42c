/* Which handler answers which method and path. */
#ifndef SERVER_ROUTES_H
#define SERVER_ROUTES_H

#include "server/http.h"

/* The route for a request, its path parameter copied to param. NULL where there is none: then *allow lists
 * the methods the path does have ("GET, HEAD, PUT"), or is empty where the path is unknown. */
const struct route *route_find(const struct route *routes, size_t count, const char *method, const char *path,
                               char *param, size_t param_size, char *allow, size_t allow_size);

/* Every route of the server. */
extern const struct route server_routes[];
extern const size_t server_route_count;

#endif

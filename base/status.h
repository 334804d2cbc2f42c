/* How every fallible function of Medley answers.
 *
 * Zero is success. Outputs come last in a parameter list and are untouched on failure.
 * A function whose failure a person will read takes a `struct error *` (which may be NULL) and
 * fills it once, at the place that knows the reason. Only api/error.c turns a status into HTTP. */
#ifndef BASE_STATUS_H
#define BASE_STATUS_H

#define NODISCARD __attribute__((warn_unused_result))
#define PRINTF_LIKE(fmt, args) __attribute__((format(printf, fmt, args)))

/* name, text. The order is the numbering; append only. */
#define STATUS_TABLE(X)                                                     \
    X(ST_OK, "success")                                                     \
    X(ST_NOMEM, "out of memory")                                            \
    X(ST_INVALID, "invalid argument")             /* the caller's request */ \
    X(ST_BAD_FORMAT, "malformed data")            /* bytes that cannot be read */ \
    X(ST_UNSUPPORTED, "not supported")            /* well-formed, but not something we do */ \
    X(ST_REJECTED, "rejected")                    /* readable, but does not fit this model */ \
    X(ST_NOT_FOUND, "not found")                                            \
    X(ST_CONFLICT, "conflict")                    /* compare-and-set lost */ \
    X(ST_BUSY, "busy")                            /* try again after something finishes */ \
    X(ST_FULL, "capacity exhausted")              /* queue or budget; the client may retry */ \
    X(ST_TOO_LARGE, "too large")                                            \
    X(ST_NO_SPACE, "no space left on device")                               \
    X(ST_IO, "input/output error")                                          \
    X(ST_CANCELLED, "cancelled")                                            \
    X(ST_DRAINING, "shutting down")                                         \
    X(ST_DEVICE, "compute device failed")

enum status {
#define X(name, text) name,
    STATUS_TABLE(X)
#undef X
    ST_COUNT
};

/* A static text, never NULL. */
const char *status_text(enum status st);

/* A status with the sentence a user should read: what is wrong, where, and what to do. */
struct error {
    enum status status;
    char message[512];
};

/* Fills *err (if not NULL; a longer message is cut at a UTF-8 boundary) and returns st, so that
 * `return error_set(err, ST_BAD_FORMAT, "tensor '%s': ...", name);` reads as one step. */
enum status error_set(struct error *err, enum status st, const char *fmt, ...) PRINTF_LIKE(3, 4);

/* For our own mistakes, kept in release builds: logs the condition and aborts. */
#define CHECK(cond) ((cond) ? (void)0 : check_failed(#cond, __FILE__, __LINE__))
_Noreturn void check_failed(const char *cond, const char *file, int line);

#endif

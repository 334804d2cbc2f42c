/* UTF-8 as the Unicode standard defines it: no overlong forms, no surrogates, at most U+10FFFF. */
#ifndef BASE_UTF8_H
#define BASE_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

bool utf8_valid(const char *s, size_t n);

/* Length of the longest prefix that ends on a character boundary, treating an *incomplete* but so
 * far valid last character as not yet there. Bytes that can never become valid count as
 * one-byte characters. Used to hold back half a character while streaming. */
size_t utf8_complete_prefix(const char *s, size_t n);

/* Decodes one character of s (n > 0 bytes): sets *cp and returns its length, or sets *cp to
 * UINT32_MAX and returns 1 for an invalid byte. */
size_t utf8_decode(const char *s, size_t n, uint32_t *cp);

/* Encodes cp (a valid scalar value) into out[4]; returns the length. */
size_t utf8_encode(uint32_t cp, char out[4]);

#endif

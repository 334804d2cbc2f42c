#include "base/utf8.h"

/* Length of the character that starts with byte c, 0 if none does, and the range of its second
 * byte: narrower than 80..BF where that rules out overlong forms, surrogates and values beyond
 * U+10FFFF (Unicode standard, table 3-7). */
static size_t lead_length(uint8_t c, uint8_t *second_min, uint8_t *second_max)
{
    *second_min = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80;
    *second_max = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
    return c < 0x80 ? 1 : c < 0xC2 ? 0 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 0;
}

/* How many of the n > 0 bytes at s can belong to one character, and that character's length:
 * 0 where no character starts here. */
static size_t match_character(const char *s, size_t n, size_t *length)
{
    uint8_t min, max;
    *length = lead_length((uint8_t)s[0], &min, &max);
    size_t i = 1;
    while (i < n && i < *length && (uint8_t)s[i] >= min && (uint8_t)s[i] <= max) {
        min = 0x80;
        max = 0xBF;
        i++;
    }
    return i;
}

size_t utf8_decode(const char *s, size_t n, uint32_t *cp)
{
    static const uint8_t lead_bits[5] = {0, 0x7F, 0x1F, 0x0F, 0x07};
    size_t length;
    if (match_character(s, n, &length) != length) {
        *cp = UINT32_MAX;
        return 1;
    }
    uint32_t v = (uint8_t)s[0] & lead_bits[length];
    for (size_t i = 1; i < length; i++) v = v << 6 | ((uint8_t)s[i] & 0x3F);
    *cp = v;
    return length;
}

bool utf8_valid(const char *s, size_t n)
{
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        i += utf8_decode(s + i, n - i, &cp);
        if (cp == UINT32_MAX) return false;
    }
    return true;
}

size_t utf8_complete_prefix(const char *s, size_t n)
{
    for (size_t tail = 1; tail <= 3 && tail <= n; tail++) {
        const char *start = s + n - tail;
        if (((uint8_t)*start & 0xC0) == 0x80) continue; /* not yet at a first byte */
        size_t length;
        size_t matched = match_character(start, tail, &length);
        return matched == tail && tail < length ? n - tail : n;
    }
    return n;
}

size_t utf8_encode(uint32_t cp, char out[4])
{
    size_t length = cp < 0x80 ? 1 : cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    static const uint8_t lead[5] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (size_t i = length - 1; i > 0; i--, cp >>= 6) out[i] = (char)(0x80 | (cp & 0x3F));
    out[0] = (char)(lead[length] | cp);
    return length;
}

#include "compiler.h"
#include "terse.h"

#include <string.h>

/* Values lie in five partitions of (n + 4) / 5; value i of partition p is value p * partition + i of all, and a place past the
 * end counts as zero. Byte i holds the digits of the five values i, the first partition's most significant. */

#define BLOCK 1024
#define ZEROS 121 /* the byte of five zeros */
#define LONGEST 14
#define SCALE_LOWEST 0x1p-100f /* with less, what is carried over might be no normal number, which some processors round to 0 */

static int64_t in_partition(int64_t n, int64_t begin, int64_t count) {
    return n <= begin ? 0 : n - begin < count ? n - begin : count;
}

/* One more digit for each code; what is left of a value is carried over. */
static void quantize(const float *values, float *residual, int64_t count, float scale, int32_t *codes) {
    const float half = scale / 2;
    for (int64_t i = 0; i < count; i++) {
        float sum = values[i] + residual[i];
        int32_t q = (sum > half) - (sum < -half);
        codes[i] = 3 * codes[i] + 1 + q;
        residual[i] = sum - scale * (float)q;
    }
}

int64_t terse_threelc_encode(const float *values, float *residual, int64_t n, float *scale, uint8_t *out, int64_t capacity) {
    const int64_t partition = n / 5 + (n % 5 > 0);
    if (n < 0 || !(*scale >= 1 && *scale < 2)) return TERSE_EARGUMENT;
    if (capacity < partition) return TERSE_ERANGE;
    int32_t most = 0; /* floats without sign are ordered as their bits are, NaN last */
    for (int64_t i = 0; i < n; i++) {
        float sum = values[i] + residual[i];
        int32_t bits;
        memcpy(&bits, &sum, sizeof bits);
        bits &= INT32_MAX;
        most = bits > most ? bits : most;
    }
    float largest;
    memcpy(&largest, &most, sizeof largest);
    *scale *= largest;
    if (!(*scale <= 0x1.fffffep127f)) return TERSE_ETYPE;
    if (largest < SCALE_LOWEST) {
        for (int64_t i = 0; i < n; i++) residual[i] += values[i];
        *scale = 0;
        return 0;
    }
    uint8_t *end = out;
    int32_t run = 0; /* of zeros, in the last byte */
    for (int64_t begin = 0; begin < partition; begin += BLOCK) {
        const int64_t count = partition - begin < BLOCK ? partition - begin : BLOCK;
        int32_t codes[BLOCK] = {0};
        uint8_t bytes[BLOCK];
        for (int64_t p = 0; p < 5; p++) {
            const int64_t at = p * partition + begin, there = in_partition(n, at, count);
            if (there) quantize(values + at, residual + at, there, *scale, codes);
            for (int64_t i = there; i < count; i++) codes[i] = 3 * codes[i] + 1;
        }
        for (int64_t i = 0; i < count; i++) bytes[i] = (uint8_t)codes[i];
        for (int64_t i = 0; i < count; i++) {
            uint64_t eight;
            if (count - i >= 8 && (memcpy(&eight, bytes + i, 8), eight == 0x7979797979797979)) {
                end += run == 0;
                for (run += 8; run > LONGEST; run -= LONGEST) end[-1] = 255, end++;
                end[-1] = run == 1 ? ZEROS : (uint8_t)(241 + run);
                i += 7;
                continue;
            }
            int32_t zero = bytes[i] == ZEROS, longer = zero & (run > 0) & (run < LONGEST);
            KEEP(zero); /* no branch, which could not be foretold */
            KEEP(longer);
            run = ((run & -longer) + 1) & -zero;
            end += 1 - longer;
            end[-1] = (uint8_t)(run > 1 ? 241 + run : bytes[i]);
        }
    }
    return end - out;
}

int64_t terse_threelc_decode(const uint8_t *in, int64_t length, const float *scale, int64_t n, float *out) {
    const int64_t partition = n / 5 + (n % 5 > 0);
    if (n < 0) return TERSE_EARGUMENT;
    uint32_t sign;
    memcpy(&sign, scale, sizeof sign);
    if (!(*scale >= 0 && *scale <= 0x1.fffffep127f) || sign >> 31) return TERSE_EDATA;
    if (*scale == 0) {
        for (int64_t i = 0; i < n; i++) out[i] = 0;
        return length ? TERSE_EDATA : n;
    }
    float table[5][243];
    for (int32_t code = 0; code < 243; code++)
        for (int32_t p = 4, rest = code; p >= 0; p--, rest /= 3)
            table[p][code] = rest % 3 == 1 ? 0.0f : rest % 3 ? *scale : -*scale;
    const uint8_t *const stop = in + length;
    int64_t run = 0;
    int32_t ended = 0; /* by a run that could have been longer */
    for (int64_t begin = 0; begin < partition; begin += BLOCK) {
        const int64_t count = partition - begin < BLOCK ? partition - begin : BLOCK;
        uint8_t codes[BLOCK];
        for (int64_t i = 0; i < count;) {
            if (run == 0) {
                if (in == stop) return TERSE_EDATA;
                const uint8_t byte = *in++;
                if (byte != ZEROS && byte < 243) {
                    codes[i++] = byte;
                    ended = 0;
                    continue;
                }
                if (ended) return TERSE_EDATA;
                ended = byte != 255;
                run = byte == ZEROS ? 1 : byte - 241;
            }
            const int64_t now = run < count - i ? run : count - i;
            memset(codes + i, ZEROS, (size_t)now);
            i += now;
            run -= now;
        }
        for (int64_t p = 0; p < 5; p++) {
            const int64_t at = p * partition + begin, there = in_partition(n, at, count);
            for (int64_t i = 0; i < there; i++) out[at + i] = table[p][codes[i]];
            for (int64_t i = there; i < count; i++)
                if (table[p][codes[i]] != 0) return TERSE_EDATA;
        }
    }
    return run || in != stop ? TERSE_EDATA : n;
}

#include "terse.h"

#include <string.h>

/* LZMA2 without matches: each byte is a literal, coded bit by bit with a share for each of the 255 places in its tree that
 * moves by 1/32 of its way, and one more bit that says that it is a literal. There is a tree for each value that the highest
 * bits of the byte before can have. Chunks that look like noise are stored. */

#define BLOCK 1024 /* bytes that are looked at to decide */
#define CHUNK 65536
#define WHOLE 2048
#define MOST 4 /* bits of context */

typedef struct {
    uint64_t low;
    uint32_t range;
    int64_t held; /* bytes that a carry may still reach: one and then 255s */
    uint8_t first;
    uint8_t *out, *end;
} coder;

/* Moves the highest byte out, once no carry can reach it. */
static void shift(coder *c) {
    if ((uint32_t)c->low < 0xff000000u || c->low >> 32) {
        const uint8_t carry = (uint8_t)(c->low >> 32);
        for (uint8_t byte = c->first; c->held > 0; c->held--, byte = 0xff)
            if (c->out < c->end) *c->out++ = (uint8_t)(byte + carry);
        c->first = (uint8_t)(c->low >> 24);
    }
    c->held++;
    c->low = (c->low & 0x00ffffff) << 8;
}

static inline void code(coder *c, uint16_t *share, uint32_t bit) {
    const uint32_t bound = (c->range >> 11) * *share;
    if (bit) {
        c->low += bound;
        c->range -= bound;
        *share = (uint16_t)(*share - (*share >> 5));
    } else {
        c->range = bound;
        *share = (uint16_t)(*share + ((WHOLE - *share) >> 5));
    }
    if (c->range < 1u << 24) {
        c->range <<= 8;
        shift(c);
    }
}

/* The range coder's bytes for a chunk after the byte `last`: `room` where they do not fit. The first share is of literals. */
static int64_t code_chunk(const uint8_t *in, int64_t n, uint8_t last, int32_t context, uint16_t (*trees)[256], uint8_t *out,
                          int64_t room) {
    coder c = {.range = 0xffffffff, .held = 1, .out = out, .end = out + room};
    for (int64_t i = 0; i < n && c.out < c.end; i++) {
        uint16_t *shares = trees[last >> (8 - context)];
        code(&c, &trees[0][0], 0);
        last = in[i];
        for (uint32_t node = 1, k = 8; k-- > 0;) {
            const uint32_t bit = last >> k & 1;
            code(&c, &shares[node], bit);
            node = node << 1 | bit;
        }
    }
    for (int32_t k = 0; k < 5; k++) shift(&c);
    return c.out - out;
}

/* Whether bytes occur as evenly as those of noise: an entropy of about 7.88 bits and more, from the sum of squares. */
static int32_t noisy(const uint8_t *in, int64_t n) {
    uint32_t count[256] = {0};
    uint64_t squares = 0;
    for (int64_t i = 0; i < n; i++) count[in[i]]++;
    for (int32_t k = 0; k < 256; k++) squares += (uint64_t)count[k] * count[k];
    return 25600 * squares <= 117 * (uint64_t)(n * n) + 25500 * (uint64_t)n;
}

int64_t terse_literals_encode(const uint8_t *in, int64_t n, int32_t context, uint8_t *out, int64_t capacity) {
    uint16_t shares[1 << MOST][256], before[1 << MOST][256];
    int64_t at = 0;
    int32_t begun = 0; /* whether the decoder knows the shares */
    if (context < 0 || context > MOST) return TERSE_EARGUMENT;
    for (int32_t k = 0; k < 256 << context; k++) shares[k / 256][k % 256] = WHOLE / 2;
    for (int64_t i = 0, size; i < n; i += size) {
        int32_t stored = 0;
        for (size = 0; size < CHUNK && i + size < n;) {
            const int64_t block = n - i - size < BLOCK ? n - i - size : BLOCK;
            const int32_t other = noisy(in + i + size, block);
            if (size && other != stored) break;
            stored = other;
            size += block;
        }
        if (capacity - at < size + 7) return TERSE_ERANGE;
        if (!stored) {
            const int64_t head = begun ? 5 : 6;
            memcpy(before, shares, sizeof shares);
            const int64_t coded = code_chunk(in + i, size, i ? in[i - 1] : 0, context, shares, out + at + head, size);
            if (coded < size) {
                out[at] = begun ? 0x80 : i ? 0xc0 : 0xe0;
                out[at + 1] = (uint8_t)((size - 1) >> 8), out[at + 2] = (uint8_t)(size - 1);
                out[at + 3] = (uint8_t)((coded - 1) >> 8), out[at + 4] = (uint8_t)(coded - 1);
                if (!begun) out[at + 5] = (uint8_t)context; /* lc; lp = pb = 0 */
                begun = 1;
                at += head + coded;
                continue;
            }
            memcpy(shares, before, sizeof shares);
        }
        out[at] = i ? 2 : 1;
        out[at + 1] = (uint8_t)((size - 1) >> 8), out[at + 2] = (uint8_t)(size - 1);
        memcpy(out + at + 3, in + i, (size_t)size);
        at += 3 + size;
    }
    if (at == capacity) return TERSE_ERANGE;
    out[at++] = 0;
    return at;
}

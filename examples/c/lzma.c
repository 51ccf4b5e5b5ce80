/* Raw LZMA2 (Pavlov), as literals alone or with strings that occur again, to memory that holds all of it. */
#include "decoder.h"

#include <string.h>

#define PLACES 16 /* states of the place, at most: 2^pb */

typedef struct {
    uint16_t two[2], low[PLACES][8], middle[PLACES][8], high[256]; /* 514 */
} lengths;

typedef struct {
    uint16_t match[12][PLACES], again[12], first[12], second[12], third[12], whole[12][PLACES];
    uint16_t slot[4][64], distance[115], align[16];
    lengths fresh, repeated;
    uint16_t literal[768 << 4];
} shares;
_Static_assert(sizeof(shares) == 2 * LZMA_SHARES, "room for the shares");

typedef struct {
    device_cursor in;
    uint32_t range, code;
} coder;

static uint32_t bit(coder *c, uint16_t *share) {
    const uint32_t bound = (c->range >> 11) * *share, one = c->code >= bound;
    if (one) {
        c->range -= bound;
        c->code -= bound;
        *share = (uint16_t)(*share - (*share >> 5));
    } else {
        c->range = bound;
        *share = (uint16_t)(*share + ((2048 - *share) >> 5));
    }
    if (c->range < 1u << 24) {
        c->range <<= 8;
        c->code = c->code << 8 | device_byte(&c->in);
    }
    return one;
}

static uint32_t tree(coder *c, uint16_t *share, uint32_t bits) {
    uint32_t node = 1;
    for (uint32_t k = 0; k < bits; k++) node = node << 1 | bit(c, &share[node]);
    return node - (1u << bits);
}

/* The lowest bit first. */
static uint32_t reversed(coder *c, uint16_t *share, uint32_t bits) {
    uint32_t node = 1, value = 0;
    for (uint32_t k = 0; k < bits; k++) {
        const uint32_t one = bit(c, &share[node]);
        node = node << 1 | one;
        value |= one << k;
    }
    return value;
}

static uint32_t length_of(coder *c, lengths *l, uint32_t place) {
    if (!bit(c, &l->two[0])) return 2 + tree(c, l->low[place], 3);
    if (!bit(c, &l->two[1])) return 10 + tree(c, l->middle[place], 3);
    return 18 + tree(c, l->high, 8);
}

static uint32_t distance_of(coder *c, shares *s, uint32_t length) {
    const uint32_t slot = tree(c, s->slot[length < 6 ? length - 2 : 3], 6);
    if (slot < 4) return slot;
    const uint32_t bits = slot / 2 - 1;
    uint32_t distance = (2 | (slot & 1)) << bits;
    if (slot < 14) return distance + reversed(c, s->distance + distance - slot, bits);
    for (uint32_t k = bits; k-- > 4;) {
        c->range >>= 1;
        const uint32_t one = c->code >= c->range;
        if (one) c->code -= c->range;
        distance += one << k;
        if (c->range < 1u << 24) {
            c->range <<= 8;
            c->code = c->code << 8 | device_byte(&c->in);
        }
    }
    return distance + reversed(c, s->align, 4);
}

/* What lasts from chunk to chunk. */
typedef struct {
    uint32_t lc, lp, pb, state, back[4];
} memory;

/* One coded chunk: bytes from `at` up to `end` of what begins at `out`. */
static int32_t chunk(coder *c, shares *s, memory *m, uint8_t *out, uint32_t at, uint32_t end) {
    uint32_t state = m->state, *back = m->back;
    while (at < end) {
        const uint32_t place = at & ((1u << m->pb) - 1), last = at ? out[at - 1] : 0;
        uint32_t length;
        if (c->in.bad) return -1;
        if (!bit(c, &s->match[state][place])) {
            uint16_t *share = s->literal + 768 * (((at & ((1u << m->lp) - 1)) << m->lc) + (last >> (8 - m->lc)));
            uint32_t node = 1;
            if (state > 6) { /* after a match the byte there is looked at */
                if (back[0] >= at) return -1;
                for (uint32_t seen = out[at - back[0] - 1], one, same = 1; node < 256;) {
                    seen <<= 1;
                    const uint32_t theirs = seen >> 8 & 1;
                    one = bit(c, &share[same ? 256 + (theirs << 8) + node : node]);
                    node = node << 1 | one;
                    same &= one == theirs;
                    seen &= 255;
                }
            } else {
                while (node < 256) node = node << 1 | bit(c, &share[node]);
            }
            out[at++] = (uint8_t)node;
            state = state < 4 ? 0 : state < 10 ? state - 3 : state - 6;
            continue;
        }
        if (!bit(c, &s->again[state])) {
            back[3] = back[2], back[2] = back[1], back[1] = back[0];
            length = length_of(c, &s->fresh, place);
            back[0] = distance_of(c, s, length);
            state = state < 7 ? 7 : 10;
        } else {
            if (!bit(c, &s->first[state])) {
                if (!bit(c, &s->whole[state][place])) {
                    if (back[0] >= at) return -1;
                    out[at] = out[at - back[0] - 1];
                    at++;
                    state = state < 7 ? 9 : 11;
                    continue;
                }
            } else {
                uint32_t which = 1;
                if (bit(c, &s->second[state])) which = 2 + bit(c, &s->third[state]);
                const uint32_t distance = back[which];
                for (; which; which--) back[which] = back[which - 1];
                back[0] = distance;
            }
            length = length_of(c, &s->repeated, place);
            state = state < 7 ? 8 : 11;
        }
        if (back[0] >= at || length > end - at) return -1;
        for (; length; length--, at++) out[at] = out[at - back[0] - 1];
    }
    m->state = state;
    return 0;
}

int32_t device_unlzma(const uint8_t *in, uint32_t length, uint8_t *out, uint32_t size, uint16_t *share) {
    shares *s = (shares *)share;
    memory m = {0};
    device_cursor c = {in, in + length, 0};
    uint32_t start = 0, at = 0, begun = 0, known = 0; /* whether there was a beginning, and settings since */
    for (uint32_t control; (control = device_byte(&c)) != 0;) {
        uint32_t count = 0;
        if (control == 1 || control >= 0xe0) start = at, begun = 1, known = 0;
        if (!begun || c.bad || (control > 2 && control < 0x80)) return -1;
        if (control >= 0x80) count = (control & 31) << 16;
        count += device_byte(&c) << 8;
        count += device_byte(&c) + 1;
        if (count > size - at) return -1;
        if (control < 3) {
            const uint8_t *stored = device_bytes(&c, count);
            if (c.bad) return -1;
            memcpy(out + at, stored, count);
            at += count;
            continue;
        }
        uint32_t coded = device_byte(&c) << 8;
        coded += device_byte(&c) + 1;
        const uint32_t anew = control >> 5 & 3; /* 1: the shares, 2: the settings too, 3: what lies behind as well */
        if (anew >= 2) {
            const uint32_t settings = device_byte(&c);
            if (settings >= 225) return -1;
            m.lc = settings % 9, m.lp = settings / 9 % 5, m.pb = settings / 45;
            if (m.lc + m.lp > 4) return -1;
            known = 1;
        }
        if (anew) {
            memset(m.back, 0, sizeof m.back);
            m.state = 0;
            for (uint32_t k = 0; k < LZMA_SHARES; k++) share[k] = 1024;
        }
        const uint8_t *stream = device_bytes(&c, coded);
        if (!known || c.bad) return -1;
        coder r = {.in = {stream, stream + coded, 0}, .range = 0xffffffff};
        if (device_byte(&r.in)) return -1;
        for (uint32_t k = 0; k < 4; k++) r.code = r.code << 8 | device_byte(&r.in);
        if (chunk(&r, s, &m, out + start, at - start, at - start + count)) return -1;
        if (r.in.bad || r.in.at != r.in.end || r.code) return -1;
        at += count;
    }
    return c.bad || at != size || c.at != c.end ? -1 : 0;
}

/* Bytes, numbers and bits; canonical Huffman codes; deflate (RFC 1951). */
#include "decoder.h"

#include <string.h>

uint32_t device_byte(device_cursor *c) {
    if (c->bad || c->at == c->end) return c->bad = 1, 0;
    return *c->at++;
}

uint64_t device_number(device_cursor *c, uint64_t limit) {
    uint64_t value = 0;
    for (uint32_t shift = 0; shift < 63; shift += 7) {
        const uint32_t byte = device_byte(c);
        value |= (uint64_t)(byte & 127) << shift;
        if (byte >= 128) continue;
        if (value < limit && (byte || !shift)) return value;
        break;
    }
    return c->bad = 1, 0;
}

int64_t device_signed(device_cursor *c, uint64_t limit) {
    const uint64_t number = device_number(c, limit);
    return number & 1 ? -(int64_t)(number / 2) - 1 : (int64_t)(number / 2);
}

const uint8_t *device_bytes(device_cursor *c, uint64_t count) {
    if (c->bad || (uint64_t)(c->end - c->at) < count) return c->bad = 1, c->at = c->end;
    c->at += count;
    return c->at - count;
}

uint32_t device_take(device_bits *b, uint32_t count) {
    for (; b->left < count; b->left += 8) b->held |= (uint64_t)device_byte(&b->in) << b->left;
    const uint32_t value = (uint32_t)(b->held & (((uint64_t)1 << count) - 1));
    b->held >>= count;
    b->left -= count;
    return value;
}

int32_t device_ended(const device_bits *b) {
    return !b->in.bad && b->in.at == b->in.end && b->left < 8 && b->held == 0;
}

int32_t device_codes(device_code *code, const uint8_t *lengths, uint32_t count) {
    uint16_t at[16];
    int32_t left = 1;
    memset(code->count, 0, sizeof code->count);
    for (uint32_t s = 0; s < count; s++) code->count[lengths[s]]++;
    code->count[0] = 0;
    for (uint32_t k = 1, sum = 0; k < 16; sum += code->count[k++]) {
        at[k] = (uint16_t)sum;
        left = 2 * left - code->count[k];
        if (left < 0) return left;
    }
    for (uint32_t s = 0; s < count; s++)
        if (lengths[s]) code->symbol[at[lengths[s]]++] = (uint16_t)s;
    return left;
}

int32_t device_symbol(device_bits *b, const device_code *code) {
    int32_t value = 0, first = 0, index = 0;
    for (uint32_t k = 1; k < 16; k++) {
        value |= (int32_t)device_take(b, 1);
        if (value - first < code->count[k]) return b->in.bad ? -1 : code->symbol[index + value - first];
        index += code->count[k];
        first = 2 * (first + code->count[k]);
        value *= 2;
    }
    return -1;
}

/* Whether a code is none: too many symbols, or too few, unless there is one of one bit, or none at all. */
static int32_t short_of(const device_code *code, int32_t left) {
    uint32_t symbols = 0;
    for (uint32_t k = 1; k < 16; k++) symbols += code->count[k];
    return left < 0 || (left > 0 && (symbols > 1 || symbols != code->count[1]));
}

static int32_t dynamic_codes(device_bits *b, device_code *letters, device_code *distances) {
    static const uint8_t order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint8_t lengths[320] = {0};
    const uint32_t many = device_take(b, 5) + 257, far = device_take(b, 5) + 1, named = device_take(b, 4) + 4;
    if (many > 286 || far > 30) return -1;
    for (uint32_t k = 0; k < named; k++) lengths[order[k]] = (uint8_t)device_take(b, 3);
    if (device_codes(letters, lengths, 19)) return -1;
    memset(lengths, 0, sizeof lengths);
    for (uint32_t k = 0; k < many + far;) {
        const int32_t symbol = device_symbol(b, letters);
        uint32_t again = 1;
        uint8_t length = (uint8_t)symbol;
        if (symbol < 0) return -1;
        if (symbol > 15) {
            if (symbol == 16 && k == 0) return -1;
            length = symbol == 16 ? lengths[k - 1] : 0;
            again = symbol == 16 ? 3 + device_take(b, 2) : symbol == 17 ? 3 + device_take(b, 3) : 11 + device_take(b, 7);
        }
        if (again > many + far - k) return -1;
        while (again--) lengths[k++] = length;
    }
    if (lengths[256] == 0) return -1;
    if (short_of(letters, device_codes(letters, lengths, many))) return -1;
    return short_of(distances, device_codes(distances, lengths + many, far)) ? -1 : 0;
}

int64_t device_inflate(const uint8_t *in, uint32_t length, uint8_t *out, size_t room, uint32_t before) {
    uint16_t symbols[288 + 32];
    uint8_t lengths[288 + 30];
    device_bits b = {.in = {in, in + length, 0}};
    size_t at = 0;
    for (uint32_t last = 0; !last;) {
        device_code letters = {.symbol = symbols}, distances = {.symbol = symbols + 288};
        last = device_take(&b, 1);
        const uint32_t kind = device_take(&b, 2);
        if (kind == 0) {
            b.held = b.left = 0; /* up to a whole byte */
            const uint32_t count = device_take(&b, 16), check = device_take(&b, 16);
            const uint8_t *stored = device_bytes(&b.in, count);
            if (b.in.bad || (count ^ check) != 0xffff) return -1;
            if (count > room - at) return -2;
            memcpy(out + at, stored, count);
            at += count;
            continue;
        }
        if (kind == 1) {
            for (uint32_t k = 0; k < sizeof lengths; k++) lengths[k] = k < 144 ? 8 : k < 256 ? 9 : k < 280 ? 7 : k < 288 ? 8 : 5;
            device_codes(&letters, lengths, 288);
            device_codes(&distances, lengths + 288, 30);
        } else if (kind != 2 || dynamic_codes(&b, &letters, &distances)) {
            return -1;
        }
        for (int32_t symbol; (symbol = device_symbol(&b, &letters)) != 256;) {
            if (symbol < 0 || symbol > 285 || b.in.bad) return -1;
            if (symbol < 256) {
                if (at == room) return -2;
                out[at++] = (uint8_t)symbol;
                continue;
            }
            /* Eight lengths one apart, then groups of four that lie 2, 4, ... apart; distances in groups of two. */
            const uint32_t k = (uint32_t)symbol - 257, more = k < 8 || k == 28 ? 0 : k / 4 - 1;
            const uint32_t copied = k == 28 ? 258 : k < 8 ? k + 3 : 3 + ((4 + k % 4) << more) + device_take(&b, more);
            const int32_t far = device_symbol(&b, &distances);
            if (far < 0 || far > 29) return -1;
            const uint32_t extra = far < 4 ? 0 : (uint32_t)far / 2 - 1;
            const uint32_t back = 1 + (far < 4 ? (uint32_t)far : ((2 + (uint32_t)far % 2) << extra) + device_take(&b, extra));
            if (b.in.bad || back > at + before) return -1;
            if (copied > room - at) return -2;
            for (uint32_t j = 0; j < copied; j++, at++) out[at] = out[(ptrdiff_t)at - (ptrdiff_t)back];
        }
    }
    return b.in.bad || b.in.at != b.in.end ? -1 : (int64_t)at;
}

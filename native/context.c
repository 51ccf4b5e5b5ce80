#include "terse.h"

#include <string.h>

/* The same walk serves encoder and decoder: `bit` codes or decodes one binary decision. A 64-bit range that is renewed
 * 32 bits at a time keeps the renewal rare (one branch in about 30 decisions) and the subdivision exact. */

#define LEVELS 24 /* contexts of predicted magnitude */
#define FLAGS 14  /* "greater than k" decisions before the Exp-Golomb remainder */
#define DEPTH 32  /* Exp-Golomb prefix contexts */
#define PEAK 255  /* magnitudes above count as this much in the predictions */

typedef struct {
    uint16_t fast, slow;
    uint32_t count;
} estimate;

typedef struct {
    estimate significant[LEVELS], sign[9], greater[LEVELS][FLAGS], prefix[DEPTH];
} estimates;

typedef struct {
    uint64_t low, range, code;
    uint8_t *out;
    const uint8_t *in;
    int64_t at, length; /* encoder: bytes written, capacity; decoder: bytes asked for, bytes there */
    int32_t failed;
} coder;

static inline void adapt(estimate *e, int32_t bit, const uint16_t *rates, int32_t fast, int32_t slow) {
    int32_t target = bit ? 65535 - 16 : 16, rate = rates[e->count];
    int32_t quick = rate > fast ? rate : fast, calm = rate > slow ? rate : slow;
    e->fast = (uint16_t)(e->fast + ((target - e->fast) * quick >> 16));
    e->slow = (uint16_t)(e->slow + ((target - e->slow) * calm >> 16));
    e->count += e->count < 255;
}

static inline uint32_t chance(const estimate *e) { return ((uint32_t)e->fast + e->slow) >> 1; }

static void carry(coder *c) {
    for (int64_t k = c->at - 1; k >= 0 && ++c->out[k] == 0; k--) {
    }
}

static inline void put(coder *c, uint32_t p, int32_t bit) {
    uint64_t bound = (c->range >> 16) * p;
    if (bit) {
        c->range = bound;
    } else {
        c->low += bound;
        c->range -= bound;
        if (c->low < bound) carry(c);
    }
    if (c->range >> 32 == 0) {
        if (c->length - c->at < 4) {
            c->failed = 1;
            c->at = 0;
        }
        for (int32_t b = 0; b < 4; b++) c->out[c->at++] = (uint8_t)(c->low >> (56 - 8 * b));
        c->low <<= 32;
        c->range <<= 32;
    }
}

static uint32_t next_word(coder *c) {
    uint32_t word = 0;
    for (int32_t b = 0; b < 4; b++, c->at++) word = word << 8 | (c->at < c->length ? c->in[c->at] : 0);
    return word;
}

static inline __attribute__((always_inline)) void renew(coder *c) {
    if (__builtin_expect(c->range >> 32 == 0, 0)) {
        c->code = c->code << 32 | next_word(c);
        c->range <<= 32;
    }
}

static inline __attribute__((always_inline)) int32_t get(coder *c, uint32_t p) {
    uint64_t bound = (c->range >> 16) * p;
    int32_t bit = c->code < bound;
    c->code -= bit ? 0 : bound;
    c->range = bit ? bound : c->range - bound;
    renew(c);
    return bit;
}

#define CODE(e, value) code_bit(c, rate, e, value, decode, fast, slow)

static inline __attribute__((always_inline)) int32_t code_bit(coder *c, const uint16_t *rate, estimate *e, int32_t bit,
                                                              const int32_t decode, int32_t fast, int32_t slow) {
    if (!decode) {
        put(c, chance(e), bit);
        adapt(e, bit, rate, fast, slow);
        return bit;
    }
    uint64_t bound = (c->range >> 16) * chance(e);
    if (c->code < bound) { /* two whole paths: the processor guesses the bit and goes on before it is known */
        c->range = bound;
        adapt(e, 1, rate, fast, slow);
        renew(c);
        return 1;
    }
    c->code -= bound;
    c->range -= bound;
    adapt(e, 0, rate, fast, slow);
    renew(c);
    return 0;
}

/* What lies above the last flag: Exp-Golomb of order 0, prefix adaptive, suffix at even odds. */
static uint32_t remainder_of(coder *c, const uint16_t *rate, estimates *s, uint32_t value, const int32_t decode,
                             int32_t fast, int32_t slow) {
    uint32_t bits = 0;
    if (!decode)
        while (((uint64_t)value + 1) >> (bits + 1)) bits++;
    uint32_t prefix = 0;
    while (prefix < DEPTH - 1 && CODE(&s->prefix[prefix], prefix < bits)) prefix++;
    uint64_t suffix = 1;
    for (uint32_t b = prefix; b-- > 0;) {
        int32_t bit = (int32_t)((value + 1ull) >> b & 1);
        if (decode) {
            bit = get(c, 32768);
        } else {
            put(c, 32768, bit);
        }
        suffix = suffix << 1 | (uint64_t)bit;
    }
    return (uint32_t)(suffix - 1);
}

static inline int32_t sign_class(int32_t v) { return v > 0 ? 2 : v < 0; }

static inline __attribute__((always_inline)) int64_t walk(coder *caller, const terse_model *m, int32_t *values,
                                                          int32_t *column, const int32_t decode) {
    if (m->rows < 0 || m->columns < 0 || m->low > 0 || m->high < 0 || m->low < -(1 << 30) || m->high > 1 << 30 ||
        m->blend < 0 || m->blend > 16 || m->fast > 16 || m->slow > 16 || m->memory > 15 || m->settle > 15)
        return TERSE_EARGUMENT;
    coder local = *caller, *c = &local; /* a copy whose address never leaves: its range and code stay in registers */
    const uint8_t *level_of = m->level;
    const int32_t blend = m->blend, memory = m->memory, low = m->low, high = m->high;
    const int64_t rows = m->rows, columns = m->columns;
    const uint16_t *rate = m->rate;
    estimates s;
    for (int32_t k = 0; k < LEVELS; k++) {
        s.significant[k] = (estimate){m->prior[2 * k], m->prior[2 * k], 0};
        for (int32_t f = 0; f < FLAGS; f++) s.greater[k][f] = (estimate){m->prior[2 * k + 1], m->prior[2 * k + 1], 0};
    }
    for (int32_t k = 0; k < 9; k++) s.sign[k] = (estimate){32768, 32768, 0};
    for (int32_t k = 0; k < DEPTH; k++) s.prefix[k] = (estimate){32768, 32768, 0};
    const int32_t fast = 65536 >> m->fast, slow = 65536 >> m->slow;
    /* Mean magnitude along the row, 16 fractional bits; predictions see it without the left neighbour, so that a context
     * is known before that neighbour is decoded and the processor can work ahead. */
    int32_t row = 32768, older = 32768;
    for (int64_t i = 0; i < rows; i++) {
        int32_t settle = (int32_t)(i < 65536 ? 65536 / (i + 2) : 0), least = 65536 >> m->settle, left = 0;
        if (settle < least) settle = least;
        int32_t *line = values + i * columns;
        for (int64_t j = 0; j < columns; j++) {
            int32_t mean = i ? column[j] : older, up = i ? line[j - columns] : 0;
            int32_t predicted = (blend * mean + (16 - blend) * older) >> 12;
            int32_t level = level_of[predicted < 4095 ? predicted : 4095];
            int32_t value = decode ? 0 : line[j], size = value < 0 ? -value : value, negative = value < 0;
            if (CODE(&s.significant[level], size > 0)) {
                negative = low == 0 ? 0 : high == 0 ? 1 : CODE(&s.sign[3 * sign_class(left) + sign_class(up)], negative);
                int32_t most = negative ? -low : high, k = 1;
                while (k < most && k <= FLAGS && CODE(&s.greater[level][k - 1], size > k)) k++;
                if (k > FLAGS) {
                    coder lent = local;
                    uint32_t rest = remainder_of(&lent, rate, &s, (uint32_t)(size - k), decode, fast, slow);
                    local = lent;
                    if (rest > (uint32_t)(most - k)) return TERSE_EDATA;
                    k += (int32_t)rest;
                }
                if (decode) {
                    size = k;
                    value = negative ? -k : k;
                }
            }
            if (decode) line[j] = value;
            int32_t seen = (size < PEAK ? size : PEAK) << 16;
            if (rows > 1) column[j] = mean + (int32_t)((int64_t)(seen - mean) * settle >> 16);
            older = row;
            row += (seen - row) >> memory;
            left = value;
        }
        if (c->failed) return TERSE_ERANGE;
    }
    *caller = local;
    return 0;
}

/* The shortest number in [low, low + range): as many trailing zero bytes as fit. It may pass 2^64, a carry. */
static uint64_t shortest(uint64_t low, uint64_t range) {
    for (int32_t bits = 56; bits > 0; bits -= 8) {
        uint64_t mask = (1ull << bits) - 1, end = (low + mask) & ~mask;
        if (end - low < range) return end;
    }
    return low;
}

int64_t terse_context_encode(const int32_t *in, const terse_model *model, uint8_t *out, int64_t capacity, int32_t *work) {
    coder c = {.low = 0, .range = ~0ull, .out = out, .length = capacity};
    if (capacity < 16) return TERSE_ERANGE;
    int64_t error = walk(&c, model, (int32_t *)in, work, 0);
    if (error) return error;
    uint64_t end = shortest(c.low, c.range);
    if (end < c.low) carry(&c);
    if (capacity - c.at < 8) return TERSE_ERANGE;
    for (int32_t b = 0; b < 8; b++) out[c.at++] = (uint8_t)(end >> (56 - 8 * b));
    while (c.at > 0 && out[c.at - 1] == 0) c.at--; /* trailing zeros are not written */
    return c.at;
}

int64_t terse_context_decode(const uint8_t *in, int64_t length, const terse_model *model, int32_t *out, int32_t *work) {
    coder c = {.range = ~0ull, .in = in, .length = length};
    if (length && in[length - 1] == 0) return TERSE_EDATA;
    c.code = (uint64_t)next_word(&c) << 32;
    c.code |= next_word(&c);
    int64_t error = walk(&c, model, out, work, 1);
    if (error) return error;
    if (c.at < length) return TERSE_EDATA;
    uint64_t window = 0; /* what the encoder wrote last must be what it would have chosen: one canonical form */
    for (int64_t k = c.at - 8; k < c.at; k++) window = window << 8 | (k < length ? in[k] : 0);
    return shortest(window - c.code, c.range) == window ? model->rows * model->columns : TERSE_EDATA;
}

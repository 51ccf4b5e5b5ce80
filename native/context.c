#include "terse.h"

#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* Magnitudes are coded first, then the signs of those that are not zero. A magnitude is one letter of an alphabet of 16
 * (0..7, then half octaves, then "128 and more") and even bits for what the letter leaves open. The alphabet is chosen by
 * what lies around the value; it is counted while coding and made anew whenever its counts have grown by a third.
 * Four lanes code four rows at once, each a column behind the one above, so that a value waits for none of the other
 * three; they learn when all four are coded. The loops of a step are kept apart because the processor looks only about a
 * hundred instructions ahead: what lies next to each other must be independent. Nothing branches on a decoded value but
 * what is rare.
 * The entropy coder is rANS: a 64-bit state for each lane, 32-bit words, shares in 1/32768. It codes backwards what was
 * modelled forwards, so the encoder lists (start, share, lane) first. */

#define LEVELS 24 /* contexts of predicted magnitude */
#define LEFTS 4   /* contexts of the left neighbour's magnitude: 0, 1, 2, 3 and more */
#define LETTERS 16
#define EXACT 8  /* letters below stand for one magnitude */
#define TAIL 128 /* the last letter stands for magnitudes from here */
#define BITS 15
#define WHOLE (1 << BITS)
#define LEAST 4 /* every letter's share tends to this much of WHOLE at least, and never falls under 2 */
#define LANES 4
#define SMALL 1024 /* fewer values are one lane: every lane wastes two bytes */
#define PLACES 64
#define FRESH 32 /* an alphabet leans on its parent as if that had been counted so often, and by half of its own counts */
#define KNOWN 64 /* and that on the prior */
#define CHUNK 256
#define MANY 16 /* kernels, from which on they are coded side by side */

static const uint8_t NEXT[TERSE_STATES][2] = TERSE_NEXT;

#define INLINE static inline __attribute__((always_inline))
#define KEEP(value) __asm__("" : "+r"(value)) /* in a register, and not a reason to branch */

typedef struct {
    _Alignas(64) uint16_t fresh[LETTERS]; /* counts since the ends were made */
    int32_t due;                          /* until they are made anew */
    int16_t unused[13], before;           /* -WHOLE, which stands at end[-1] */
    int16_t end[LETTERS];                 /* shares of all letters up to this one in 1/WHOLE, less WHOLE; the last is 0 */
} alphabet;

typedef struct {
    _Alignas(16) int32_t below[LETTERS]; /* of all letters up to this one */
} counts;

typedef struct {
    alphabet at[2 * LEVELS][LEFTS];                  /* for even levels and for odd ones */
    counts near[2 * LEVELS][LEFTS], far[2 * LEVELS]; /* for each magnitude of the left neighbour, and for all */
    const int16_t *prior;    /* of the model */
    int32_t offset[LETTERS]; /* from the first alphabet of a level to that of a left neighbour with this letter, in bytes */
    uint32_t open[LETTERS];  /* even bits that tell the magnitudes of a letter apart */
    int32_t row[PLACES][LANES], older[PLACES][LANES];
    int32_t last, most;      /* the last letter that occurs; the counts are halved from `most` on */
} estimates;

typedef struct {
    const uint8_t *in, *end;
    uint64_t *list; /* encoder: start, from bit 16 share, from bit 32 lane */
    int64_t listed, capacity;
} stream;

/* Four rows on their way. Means have 16 fractional bits; the predicted level sees the row's without the last value
 * (`older`), since the left neighbour chooses among the alphabets of that level instead. */
typedef struct {
    uint64_t state[LANES];
    int64_t beside[LANES]; /* `offset` of the left neighbour */
    int32_t settle[LANES];
    int32_t path[LANES]; /* the state of a trellis */
    int32_t *line[LANES]; /* a lane's row, moved back by as many columns as the lane lags behind */
    int32_t *mean;        /* of the columns */
    int64_t place;        /* the first lane's in the kernel; the others, which lag behind, keep their means as far ahead */
} lanes;

/* The least magnitude of each letter. */
static const uint8_t FLOOR[LETTERS] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, TAIL};

static int32_t letter_of(uint32_t size) {
    if (size < EXACT) return (int32_t)size;
    if (size >= TAIL) return LETTERS - 1;
    int32_t letter = EXACT;
    while (size >= FLOOR[letter + 1]) letter++;
    return letter;
}

INLINE void list(stream *c, uint64_t start, uint64_t share, int64_t lane) {
    if (c->listed < c->capacity) c->list[c->listed] = start | share << 16 | (uint64_t)lane << 32;
    c->listed++;
}

/* The state after a step, with a word more when it has run low. Without words it runs down to what it began with. */
INLINE uint64_t moved(stream *c, uint64_t state, uint64_t share, uint64_t inside) {
    state = share * (state >> BITS) + inside;
    if (__builtin_expect(state >> 32 == 0, 0) && c->in != c->end) {
        state = state << 32 | (uint32_t)c->in[0] | (uint32_t)c->in[1] << 8 | (uint32_t)c->in[2] << 16 |
                (uint32_t)c->in[3] << 24;
        c->in += 4;
    }
    return state;
}

static uint32_t code_bits(stream *c, uint64_t *state, int64_t lane, uint32_t value, uint32_t bits, const int32_t decode) {
    if (bits == 0) return 0;
    uint32_t share = 1u << (BITS - bits);
    if (!decode) {
        list(c, value * share, share, lane);
        return value;
    }
    uint32_t slot = (uint32_t)(*state & (WHOLE - 1));
    *state = moved(c, *state, share, slot & (share - 1));
    return slot >> (BITS - bits);
}

/* What is left of a magnitude. From TAIL on: the length of rest + 1 in five bits, then its lower bits. */
static __attribute__((noinline)) uint32_t code_rest(stream *c, const estimates *s, uint64_t *state, int64_t lane,
                                                    int64_t letter, uint32_t size, const int32_t decode) {
    uint32_t rest = size - FLOOR[letter];
    if (letter < LETTERS - 1) return FLOOR[letter] + code_bits(c, state, lane, rest, s->open[letter], decode);
    uint32_t bits = decode ? 0 : 31 - (uint32_t)__builtin_clz(rest + 1);
    bits = code_bits(c, state, lane, bits, 5, decode);
    if (bits > 29) return 1u << 30; /* over every limit */
    uint32_t high = bits > 14 ? bits - 14 : 0, top = 0, low;
    top = code_bits(c, state, lane, (rest + 1) >> 14 & ((1u << high) - 1), high, decode);
    low = code_bits(c, state, lane, (rest + 1) & ((1u << (bits - high)) - 1), bits - high, decode);
    return TAIL + (1u << bits | top << 14 | low) - 1;
}

/* The letter that `slot`, less WHOLE, falls in. */
INLINE int64_t find(const int16_t *end, int32_t slot) {
#if defined(__SSE2__)
    __m128i x = _mm_set1_epi16((int16_t)slot), low = _mm_load_si128((const __m128i *)end);
    __m128i over = _mm_packs_epi16(_mm_cmpgt_epi16(low, x), _mm_cmpgt_epi16(_mm_load_si128((const __m128i *)end + 1), x));
    return __builtin_ctz((uint32_t)_mm_movemask_epi8(over));
#else
    int64_t letter = 0;
    for (int32_t k = 0; k < LETTERS; k++) letter += end[k] <= slot;
    return letter;
#endif
}

/* Makes the ends anew: its own counts on top of those of the level on top of the prior. Single operations on floats give
 * the same on every machine; nothing is summed in floats. */
static __attribute__((noinline)) void renew(estimates *s, alphabet *a) {
    int64_t place = a - &s->at[0][0];
    int32_t *near = (&s->near[0][0] + place)->below, *far = s->far[place / LEFTS].below, fresh[LETTERS];
    const int16_t *prior = s->prior + place / LEFTS * LETTERS;
    const float free = (float)(WHOLE - LEAST * (s->last + 1));
    for (int32_t k = 0, sum = 0; k < LETTERS; k++) fresh[k] = sum += a->fresh[k];
    const int32_t old = near[LETTERS - 1] + fresh[LETTERS - 1] >= s->most;
    const int32_t old_far = far[LETTERS - 1] + fresh[LETTERS - 1] >= s->most;
    for (int32_t k = 0; k < LETTERS; k++) {
        near[k] = (near[k] + fresh[k]) >> old;
        far[k] = (far[k] + fresh[k]) >> old_far;
        a->fresh[k] = 0;
    }
    const int32_t count = near[LETTERS - 1];
    const float own = (float)count, all = (float)far[LETTERS - 1], lean = (float)(FRESH + count / 2);
    const float by_own = 1 / (lean + own), by_all = 1 / (KNOWN + all);
    for (int32_t k = 0; k < LETTERS; k++) {
        float least = (float)(LEAST * (k + 1));
        float parent = (KNOWN * (float)(prior[k] + WHOLE) + least * all + free * (float)far[k]) * by_all;
        float end = (lean * parent + least * own + free * (float)near[k]) * by_own;
        a->end[k] = (int16_t)((int32_t)end - WHOLE);
    }
    for (int32_t k = s->last; k < LETTERS; k++) a->end[k] = 0;
    a->due = count < 6 ? 1 : count / 3;
}

static void begin(estimates *s, const terse_model *m) {
    int32_t most = m->high > -m->low ? m->high : -m->low, last, levels = m->trellis ? 2 * LEVELS : LEVELS;
    if (m->trellis) most = (most + 1) / 2;
    last = letter_of((uint32_t)most);
    if (last == 0) last = 1; /* no share may be the whole, which takes 16 bits */
    memset(s->near, 0, sizeof s->near[0] * (size_t)levels);
    memset(s->far, 0, sizeof s->far[0] * (size_t)levels);
    s->prior = m->prior;
    s->last = last;
    s->most = 2 << m->slow;
    for (int32_t k = 0; k < LETTERS; k++) {
        int32_t end = k == last && most ? most + 1 : k + 1 < LETTERS ? FLOOR[k + 1] : 0;
        for (s->open[k] = 0; FLOOR[k] + (1 << s->open[k]) < end;) s->open[k]++;
        s->offset[k] = (int32_t)sizeof(alphabet) * (k < LEFTS - 1 ? k : LEFTS - 1);
    }
    alphabet first = {.due = 1, .before = -WHOLE};
    for (int32_t k = 0; k < levels; k++) {
        memcpy(first.end, m->prior + LETTERS * k, sizeof first.end);
        for (int32_t i = last; i < LETTERS; i++) first.end[i] = 0;
        for (int32_t l = 0; l < LEFTS; l++) s->at[k][l] = first;
    }
}

/* Step t of the lanes from..to-1, of which lane l is in column t - l. */
INLINE void step(stream *c, estimates *s, const terse_model *m, lanes *v, int64_t t, const int64_t from, const int64_t to,
                 const int32_t trellis, const int32_t decode) {
    alphabet *a[LANES];
    int64_t letter[LANES];
    int32_t *mean = v->mean + t, *row = s->row[v->place], *older = s->older[v->place], blend = m->blend;
    uint32_t size[LANES];
#pragma GCC unroll 4
    for (int64_t l = from; l < to; l++) {
        alphabet *level = s->at[m->level[(uint32_t)(older[l] * (16 - blend) + mean[-l] * blend) >> 12]];
        a[l] = (alphabet *)((char *)level + v->beside[l]);
        KEEP(a[l]);
        if (!decode) {
            int32_t value = v->line[l][t];
            size[l] = (uint32_t)(value < 0 ? -value : value);
            if (trellis) size[l] = (size[l] + (v->path[l] & 1)) >> 1;
            letter[l] = letter_of(size[l]);
        }
    }
    if (decode) {
#pragma GCC unroll 4
        for (int64_t l = from; l < to; l++) {
            letter[l] = find(a[l]->end, (int32_t)((uint32_t)v->state[l] | -(uint32_t)WHOLE));
            KEEP(letter[l]);
        }
    }
#pragma GCC unroll 4
    for (int64_t l = from; l < to; l++) {
        const int16_t *end = a[l]->end + letter[l];
        int32_t start = end[-1];
        uint32_t share = (uint32_t)(end[0] - start);
        if (decode) {
            int32_t slot = (int32_t)((uint32_t)v->state[l] | -(uint32_t)WHOLE);
            v->state[l] = moved(c, v->state[l], share, (uint32_t)(slot - start));
        } else {
            list(c, (uint32_t)(start + WHOLE), share, l);
        }
        a[l]->fresh[letter[l]]++;
    }
#pragma GCC unroll 4
    for (int64_t l = from; l < to; l++) {
        uint32_t seen = (uint32_t)letter[l], found = seen;
        int32_t goal = (int32_t)seen << 16;
        v->beside[l] = s->offset[seen];
        if (__builtin_expect(seen >= EXACT, 0)) {
            uint64_t lent = v->state[l]; /* a copy whose address is taken, so that the state can stay in a register */
            found = code_rest(c, s, &lent, l, seen, size[l], decode);
            v->state[l] = lent;
            if (trellis && found >> 29) found = 1u << 29; /* over every limit */
        }
        if (trellis) {
            int32_t odd = v->path[l] & (seen > 0);
            v->path[l] = NEXT[v->path[l]][found & 1];
            v->beside[l] += (v->path[l] & 1) * (int64_t)sizeof s->at / 2;
            goal -= odd << 15;
            if (decode) v->line[l][t] = (int32_t)(2 * found) - odd;
        } else if (decode) {
            v->line[l][t] = (int32_t)found;
        }
        if (__builtin_expect(--a[l]->due == 0, 0)) renew(s, a[l]);
        mean[-l] += (goal - mean[-l]) * v->settle[l] >> 12;
        older[l] = row[l];
        row[l] += (goal - row[l]) >> m->memory;
    }
}

INLINE int64_t lanes_of(const terse_model *m) {
    return m->rows < LANES || m->columns < LANES || m->rows * m->columns < SMALL ? 1 : LANES;
}

INLINE void code_sizes(stream *given, estimates *s, const terse_model *model, int32_t *values, lanes *rows, int32_t *mean,
                       const int32_t trellis, const int32_t decode) {
    terse_model m = *model; /* copies whose addresses are not taken */
    stream c = *given;
    lanes v = *rows;
    const int64_t most = lanes_of(&m);
    int32_t start[PLACES]; /* where a row's means begin: where those of the rows before have come to */
    for (int32_t k = 0; k < PLACES; k++) start[k] = 32768;
    for (int64_t j = 0; j < m.columns; j++) mean[j] = 32768;
    v.mean = mean;
    for (int64_t i = 0; i < m.rows; i += most) {
        const int64_t active = m.rows - i < most ? m.rows - i : most, steps = m.columns + active - 1;
        for (int64_t l = 0; l < active; l++) {
            int64_t settle = 4096 / (i + l + 2), least = 4096 >> m.settle;
            v.settle[l] = (int32_t)(settle > least ? settle : least);
            v.line[l] = values + (i + l) * m.columns - l;
            v.beside[l] = v.path[l] = 0;
            for (int32_t k = 0; k < m.places; k++) s->row[(k + l) % m.places][l] = s->older[(k + l) % m.places][l] = start[k];
        }
        v.place = 0;
        for (int64_t t = 0; t < steps; t++, v.place = v.place + 1 == m.places ? 0 : v.place + 1) {
            if (active == LANES && t >= LANES - 1 && t < m.columns) {
                step(&c, s, &m, &v, t, 0, LANES, trellis, decode);
            } else {
                int64_t from = t < m.columns ? 0 : t - m.columns + 1, to = t < active ? t + 1 : active;
                for (int64_t l = from; l < to; l++) step(&c, s, &m, &v, t, l, l + 1, trellis, decode);
            }
        }
        for (int64_t l = 0; l < active; l++) {
            for (int32_t k = 0; k < m.places; k++) {
                start[k] = (3 * start[k] + s->row[(k + l) % m.places][l]) / 4;
            }
        }
    }
    *given = c;
    *rows = v;
}

/* Values that lie a step apart: places in the array, and from bit 32 in `around`. */
typedef struct {
    uint64_t first, step;
    int64_t count;
} run;

INLINE uint64_t both(int64_t place, int64_t around) {
    return (uint64_t)place | (uint64_t)around << 32;
}

/* The signs of those of a run that are not zero, by turns of the lanes; returns whose turn is next. */
INLINE int64_t code_run(stream *c, lanes *v, int64_t turn, const run *r, int32_t *values, uint8_t *around, int64_t wide,
                        const int64_t *split, int64_t turns, const int32_t decode) {
    uint64_t place[CHUNK + 1], at = r->first;
    int64_t n = 0;
    for (int64_t k = 0; k < r->count; k++, at += r->step) {
        place[n] = at;
        n += values[(uint32_t)at] != 0;
    }
    for (int64_t k = 0; k < n; k++, turn = (turn + 1) & turns) {
        int32_t *value = values + (uint32_t)place[k];
        uint8_t *own = around ? around + (place[k] >> 32) : 0;
        int64_t share = split[around ? own[-1] << 2 | own[-wide] : 0], minus = -(int64_t)(*value < 0);
        if (decode) {
            uint64_t state = v->state[turn];
            int64_t slot = (int64_t)(state & (WHOLE - 1));
            minus = (slot - share) >> 63;
            KEEP(minus);
            uint64_t part = (uint64_t)(WHOLE - share + ((2 * share - WHOLE) & minus));
            v->state[turn] = moved(c, state, part, (uint64_t)(slot - (share & ~minus)));
            *value = (int32_t)((*value ^ minus) - minus);
        } else {
            list(c, minus ? 0 : (uint64_t)share, (uint64_t)(minus ? share : WHOLE - share), turn);
        }
        if (around) *own = (uint8_t)(1 - minus);
    }
    return turn;
}

/* The signs. Kernels lie in `around` one after the other, with an empty row above and an empty column to the left of each,
 * so that every value has neighbours. Where there are many, they come in blocks, and in a block the same place in all of
 * them, so that a sign does not wait for the one before it. */
INLINE void code_signs(stream *given, const terse_model *m, int32_t *values, lanes *v, uint8_t *around,
                       const int32_t decode) {
    const int64_t high = m->kernel_rows, wide = m->kernel_columns, size = high * wide, all = m->rows * m->columns / size;
    const int64_t across = wide + 1, padded = (high + 1) * across, turns = lanes_of(m) - 1, many = all >= MANY;
    int64_t split[11] = {8, m->signs >> 4 & 15, 0, 0, m->signs & 15, m->signs >> 8 & 15, m->signs >> 12 & 15}, turn = 0;
    stream c = *given;
    lanes w = *v;
    split[2] = 16 - split[1], split[8] = 16 - split[4], split[9] = 16 - split[6], split[10] = 16 - split[5];
    for (int32_t k = 0; k < 11; k++) split[k] *= WHOLE / 16;
    for (int64_t first = 0; first < all; first += many ? CHUNK : 1) {
        if (around) memset(around, 0, (size_t)(padded * (many && all > CHUNK ? CHUNK : many ? all : 1)));
        for (int64_t y = 0; y < high; y++) {
            for (int64_t x = 0; x < wide; x += many ? 1 : CHUNK) {
                run r = {both(first * size + y * wide + x, (y + 1) * across + x + 1),
                         both(many ? size : 1, many ? padded : 1), many ? all - first : wide - x};
                if (r.count > CHUNK) r.count = CHUNK;
                turn = code_run(&c, &w, turn, &r, values, around, across, split, turns, decode);
            }
        }
    }
    *given = c;
    *v = w;
}

INLINE void signs(stream *c, const terse_model *m, int32_t *values, lanes *v, uint8_t *around, const int32_t decode) {
    if (m->low == 0) return;
    if (around) {
        code_signs(c, m, values, v, around, decode);
    } else { /* either sign is as likely: all is one row */
        terse_model plain = *m;
        plain.signs = 0;
        plain.kernel_rows = 1;
        plain.kernel_columns = m->rows * m->columns;
        code_signs(c, &plain, values, v, 0, decode);
    }
}

static int64_t begin_lanes(lanes *v, estimates *s, const terse_model *m) {
    if (m->rows < 1 || m->columns < 1 || m->low > 0 || m->high < 0 || m->low < -(1 << 30) || m->high > 1 << 30 ||
        m->kernel_rows < 1 || m->kernel_columns < 1 || m->places < 1 || m->places > PLACES || m->blend < 0 ||
        m->blend > 16 || m->slow < 4 || m->slow > 12 || m->memory < 0 || m->memory > 15 || m->settle < 1 ||
        m->settle > 8 || m->rows > INT32_MAX / 4 / m->columns)
        return TERSE_EARGUMENT;
    for (int32_t k = 0; k < 16 && m->signs; k += 4)
        if ((m->signs >> k & 15) == 0) return TERSE_EARGUMENT;
    memset(v, 0, sizeof *v);
    begin(s, m);
    return 0;
}

int64_t terse_context_encode(const int32_t *in, const terse_model *m, uint64_t *listed, int64_t room, uint8_t *out,
                             int64_t capacity, int32_t *mean, uint8_t *around) {
    estimates s;
    lanes v;
    int64_t error = begin_lanes(&v, &s, m), at, count = lanes_of(m);
    if (error) return error;
    stream c = {.list = listed, .capacity = room};
    if (m->trellis) code_sizes(&c, &s, m, (int32_t *)in, &v, mean, 1, 0);
    else code_sizes(&c, &s, m, (int32_t *)in, &v, mean, 0, 0);
    signs(&c, m, (int32_t *)in, &v, around, 0);
    if (c.listed > room) return TERSE_ERANGE;
    /* States begin at 0, which costs least. But where one lane sends its first word while another has not come to 32 bits,
     * the decoder would take that word for the other: such a lane begins at 2^32. */
    uint64_t first[LANES] = {0};
again:
    at = capacity;
    memcpy(v.state, first, sizeof first);
    for (int64_t k = c.listed - 1; k >= 0; k--) {
        uint64_t start = listed[k] & 0xffff, share = listed[k] >> 16 & 0xffff, *x = &v.state[listed[k] >> 32];
        if (*x >> (64 - BITS) >= share) {
            int32_t low = 0;
            for (int64_t l = 0; l < count && at == capacity; l++)
                if (v.state[l] >> 32 == 0) first[l] = (uint64_t)1 << 32, low = 1;
            if (low) goto again;
            if (at < 4) return TERSE_ERANGE;
            at -= 4;
            for (int32_t b = 0; b < 4; b++) out[at + b] = (uint8_t)(*x >> 8 * b);
            *x >>= 32;
        }
        *x = (*x / share << BITS) + *x % share + start;
    }
    if (at < 8 * LANES + 2) return TERSE_ERANGE;
    uint32_t lengths = 0; /* of the states as they are, five to eight bytes if words follow; the last one's is not sent */
    for (int64_t l = count; l-- > 0;) {
        uint32_t bytes = 0;
        while (bytes < 8 && v.state[l] >> 8 * bytes) bytes++;
        for (uint32_t b = bytes; b-- > 0;) out[--at] = (uint8_t)(v.state[l] >> 8 * b);
        lengths |= bytes << 4 * l;
    }
    if (count > 1) out[--at] = (uint8_t)(lengths >> 8), out[--at] = (uint8_t)lengths;
    memmove(out, out + at, (size_t)(capacity - at));
    return capacity - at;
}

int64_t terse_context_decode(const uint8_t *in, int64_t length, const terse_model *m, int32_t *out, int32_t *mean,
                             uint8_t *around) {
    estimates s;
    lanes v;
    int64_t error = begin_lanes(&v, &s, m), count = lanes_of(m), at = 0;
    if (error) return error;
    uint32_t lengths = (uint32_t)(length <= 8 ? length : 5 + (length - 5) % 4);
    if (count > 1) {
        if (length < 2) return TERSE_EDATA;
        lengths = in[0] | (uint32_t)in[1] << 8;
        at = 2;
    }
    for (int64_t l = 0; l < count; l++) {
        int64_t bytes = lengths >> 4 * l & 15;
        if (bytes > 8 || bytes > length - at || (bytes && in[at + bytes - 1] == 0)) return TERSE_EDATA;
        for (int64_t b = 0; b < bytes; b++) v.state[l] |= (uint64_t)in[at++] << 8 * b;
    }
    if ((length - at) % 4) return TERSE_EDATA;
    stream c = {.in = in + at, .end = in + length};
    if (m->trellis) code_sizes(&c, &s, m, out, &v, mean, 1, 1);
    else code_sizes(&c, &s, m, out, &v, mean, 0, 1);
    signs(&c, m, out, &v, around, 1);
    for (int64_t l = 0; l < count; l++)
        if (v.state[l] && (count == 1 || v.state[l] != (uint64_t)1 << 32)) return TERSE_EDATA;
    int32_t low = 0, high = 0;
    for (int64_t k = 0; k < m->rows * m->columns; k++) {
        low = out[k] < low ? out[k] : low;
        high = out[k] > high ? out[k] : high;
    }
    return low >= m->low && high <= m->high && c.in == c.end ? m->rows * m->columns : TERSE_EDATA;
}

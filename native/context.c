#include "compiler.h"
#include "rows.h"
#include "terse.h"

#include <string.h>

/* Magnitudes are coded first, then the signs of those that are not zero. A magnitude is one letter of an alphabet of 16
 * (0..7, then half octaves, then "128 and more") and even bits for what the letter leaves open. The alphabet is chosen by
 * what lies around the value; it is counted while coding and made anew whenever one of its counts is full.
 * Four lanes code the same column of four rows at once, so that a value waits for none of the other three, and learn when
 * all four are coded. What can be is done for all lanes in one vector or looked up. Nothing branches on a decoded value but
 * what is rare. Columns that hold nothing but zeros may be left out.
 * The entropy coder is rANS: a 64-bit state for each lane, 32-bit words, shares in 1/32768. It codes backwards what was
 * modelled forwards, so the encoder lists (start, share, lane) first. */

#define LEVELS 25 /* contexts of predicted magnitude */
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
#define UNIT 1024 /* of means, for half a letter */
#define ZERO 7    /* what a zero counts as: no mean falls much below it, so that their floats stay normal */
#define FIRST (2 * (127 + 2) + 1) /* exponent and first bit of the fraction of means in the lowest context, 6 to 8 */

static const uint8_t NEXT[TERSE_STATES][2] = TERSE_NEXT;

#ifdef VECTORS
typedef float floats __attribute__((vector_size(16)));
typedef int32_t integers __attribute__((vector_size(16)));
typedef uint16_t shorts __attribute__((vector_size(16)));
typedef uint16_t quarter __attribute__((vector_size(8)));
#else
typedef float floats[4];
typedef int32_t integers[4];
typedef uint16_t shorts[8];
#endif

typedef struct {
    _Alignas(64) uint16_t fresh[LETTERS]; /* counts since the ends were made, less `room`; full at 2^16 */
    shorts near[2];                       /* counts before, of all letters up to each */
    uint16_t room, unused[14];
    int16_t before;       /* -WHOLE, which stands at end[-1] */
    int16_t end[LETTERS]; /* shares of all letters up to each in 1/WHOLE, less WHOLE; the last is 0 */
} alphabet;

/* What a letter means in a state of the trellis. */
typedef struct {
    uint16_t goal;   /* what means move to */
    int16_t level;   /* the level itself, of exact letters */
    uint16_t offset; /* from the first alphabet of even levels to that of a left neighbour with this letter, in bytes */
    uint16_t path;   /* from the first state to the next one, in bytes */
} meaning;

typedef struct {
    alphabet at[2 * LEVELS][LEFTS]; /* for even levels and for odd ones */
    shorts far[2 * LEVELS][2];      /* counts of a level, whatever its left neighbour */
    shorts occurs[2];               /* all ones but for the last letter that occurs and those behind it */
    meaning of[TERSE_STATES][LETTERS], other[TERSE_STATES][LETTERS]; /* `other`: of numbers that are odd where the letter is not */
    floats row[PLACES];
    const float *prior;     /* of the model */
    uint32_t open[LETTERS]; /* even bits that tell the magnitudes of a letter apart */
    int32_t last, most;     /* the last letter that occurs; the counts are halved from `most` on */
} estimates;

typedef struct {
    const uint8_t *in, *end;
    uint64_t *list; /* encoder: start, from bit 16 share, from bit 32 lane */
    int64_t listed, capacity;
} stream;

/* Rows that are coded together. */
typedef struct {
    const int32_t *column;
    uint64_t state[LANES];
    const meaning *seen[LANES]; /* of the left neighbour */
    int32_t *line[LANES];
    float *mean; /* of the columns */
    float by_row, by_column, memory, settle;
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
    if (RARE(state >> 32 == 0 && c->in != c->end)) {
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
APART uint32_t code_rest(stream *c, const estimates *s, uint64_t *state, int64_t lane, int64_t letter, uint32_t size,
                         const int32_t decode) {
    uint32_t rest = size - FLOOR[letter];
    if (letter < LETTERS - 1) return FLOOR[letter] + code_bits(c, state, lane, rest, s->open[letter], decode);
    uint32_t bits = 0;
    while (!decode && (rest + 1) >> bits > 1) bits++;
    bits = code_bits(c, state, lane, bits, 5, decode);
    if (bits > 29) return 1u << 30; /* over every limit */
    uint32_t high = bits > 14 ? bits - 14 : 0, top = 0, low;
    top = code_bits(c, state, lane, (rest + 1) >> 14 & ((1u << high) - 1), high, decode);
    low = code_bits(c, state, lane, (rest + 1) & ((1u << (bits - high)) - 1), bits - high, decode);
    return TAIL + (1u << bits | top << 14 | low) - 1;
}

/* The letter that `slot`, less WHOLE, falls in. */
INLINE int64_t find(const int16_t *end, int32_t slot) {
#if defined(SSE2) && defined(__x86_64__)
    __m128i x = _mm_set1_epi16((int16_t)slot), low = _mm_load_si128((const __m128i *)end);
    __m128i over = _mm_packs_epi16(_mm_cmpgt_epi16(low, x), _mm_cmpgt_epi16(_mm_load_si128((const __m128i *)end + 1), x));
    int64_t letter;
    __asm__("rep bsfl %1, %k0" : "=r"(letter) : "r"(_mm_movemask_epi8(over)) : "cc"); /* the first bit, without extending it */
    return letter;
#else
    int64_t letter = 0;
    for (int32_t k = 0; k < LETTERS; k++) letter += end[k] <= slot;
    return letter;
#endif
}

#ifdef VECTORS
INLINE shorts packed(integers low, integers high) {
#ifdef SSE2
    return (shorts)_mm_packs_epi32((__m128i)low, (__m128i)high);
#else
    shorts all;
    for (int32_t k = 0; k < 4; k++) all[k] = (uint16_t)low[k], all[k + 4] = (uint16_t)high[k];
    return all;
#endif
}

INLINE floats fourth(const shorts *counts, int32_t k) {
    return __builtin_convertvector(__builtin_convertvector(((const quarter *)counts)[k], integers), floats);
}
#endif

/* Counts that are `room` under, as those of all letters up to each; returns the last. */
INLINE int32_t running(const uint16_t *fresh, uint16_t room, shorts *below) {
#ifdef SSE2
    __m128i more = _mm_set1_epi16((int16_t)room), low = _mm_add_epi16(_mm_load_si128((const __m128i *)fresh), more);
    __m128i high = _mm_add_epi16(_mm_load_si128((const __m128i *)fresh + 1), more);
    low = _mm_add_epi16(low, _mm_slli_si128(low, 2)), high = _mm_add_epi16(high, _mm_slli_si128(high, 2));
    low = _mm_add_epi16(low, _mm_slli_si128(low, 4)), high = _mm_add_epi16(high, _mm_slli_si128(high, 4));
    low = _mm_add_epi16(low, _mm_slli_si128(low, 8)), high = _mm_add_epi16(high, _mm_slli_si128(high, 8));
    below[0] = (shorts)low;
    below[1] = (shorts)_mm_add_epi16(high, _mm_set1_epi16((int16_t)_mm_extract_epi16(low, 7)));
#else
    for (int32_t k = 0, sum = 0; k < LETTERS; k++) below[k / 8][k % 8] = (uint16_t)(sum += (uint16_t)(fresh[k] + room));
#endif
    return below[1][7];
}

/* Adds counts to those before, halved until they are under `most`; returns the last. */
INLINE int32_t added(shorts *before, shorts *below, int32_t more, int32_t most) {
    int32_t all = before[1][7] + more, old = 0;
    while (all >> old >= most) old++;
#ifdef VECTORS
    before[0] = (before[0] + below[0]) >> old, before[1] = (before[1] + below[1]) >> old;
#else
    for (int32_t k = 0; k < LETTERS; k++)
        before[k / 8][k % 8] = (uint16_t)((uint16_t)(before[k / 8][k % 8] + below[k / 8][k % 8]) >> old);
#endif
    return all >> old;
}

/* How often the most frequent letter was seen. */
INLINE int32_t most_frequent(shorts *below) {
#ifdef SSE2
    __m128i low = (__m128i)below[0], high = (__m128i)below[1];
    __m128i before = _mm_or_si128(_mm_slli_si128(high, 2), _mm_srli_si128(low, 14));
    __m128i top = _mm_max_epi16(_mm_sub_epi16(low, _mm_slli_si128(low, 2)), _mm_sub_epi16(high, before));
    top = _mm_max_epi16(top, _mm_srli_si128(top, 8));
    top = _mm_max_epi16(top, _mm_srli_si128(top, 4));
    return _mm_extract_epi16(_mm_max_epi16(top, _mm_srli_si128(top, 2)), 0);
#else
    int32_t top = 0;
    for (int32_t k = 0, before = 0; k < LETTERS; before = below[k / 8][k % 8], k++)
        if (below[k / 8][k % 8] - before > top) top = below[k / 8][k % 8] - before;
    return top;
#endif
}

/* Makes the ends anew: its own counts on top of those of the level on top of the prior. Single operations on floats give
 * the same on every machine; nothing is summed in floats. Ends are written as they are read, in whole vectors. */
APART void renew(estimates *s, alphabet *a) {
    const int64_t level = (a - &s->at[0][0]) / LEFTS;
    shorts below[2];
    const int32_t more = running(a->fresh, a->room, below);
    const int32_t count = added(a->near, below, more, s->most), all = added(s->far[level], below, more, s->most);
    a->room = (uint16_t)(3 + most_frequent(a->near) / 3);
    for (int32_t k = 0; k < LETTERS; k++) a->fresh[k] = (uint16_t)-a->room;
    const float lean = (float)(FRESH + count / 2), free = (float)(WHOLE - LEAST * (s->last + 1));
    const float by_own = 1 / (lean + (float)count), parent = lean * by_own * (1 / (float)(KNOWN + all));
    const float by_prior = KNOWN * parent, by_far = free * parent, by_near = free * by_own;
    const float least = LEAST * ((float)all * parent + (float)count * by_own);
#ifdef VECTORS
    integers end[LETTERS / 4];
    for (int32_t k = 0; k < LETTERS / 4; k++) {
        const floats place = {(float)(4 * k + 1), (float)(4 * k + 2), (float)(4 * k + 3), (float)(4 * k + 4)};
        floats share = by_prior * ((const floats *)s->prior)[level * LETTERS / 4 + k] + by_far * fourth(s->far[level], k) +
                       by_near * fourth(a->near, k) + least * place;
        end[k] = __builtin_convertvector(share, integers) - WHOLE;
    }
    ((shorts *)a->end)[0] = packed(end[0], end[1]) & s->occurs[0];
    ((shorts *)a->end)[1] = packed(end[2], end[3]) & s->occurs[1];
#else
    for (int32_t k = 0; k < LETTERS; k++) {
        float share = by_prior * s->prior[level * LETTERS + k] + by_far * (float)s->far[level][k / 8][k % 8] +
                      by_near * (float)a->near[k / 8][k % 8] + least * (float)(k + 1);
        a->end[k] = s->occurs[k / 8][k % 8] ? (int16_t)((int32_t)share - WHOLE) : 0;
    }
#endif
}

static void begin(estimates *s, const terse_model *m) {
    int32_t most = m->high > -m->low ? m->high : -m->low, last, levels = m->trellis ? 2 * LEVELS : LEVELS;
    if (m->trellis) most = (most + 1) / 2;
    last = letter_of((uint32_t)most);
    if (last == 0) last = 1; /* no share may be the whole, which takes 16 bits */
    memset(s->far, 0, sizeof s->far[0] * (size_t)levels);
    s->prior = m->prior;
    s->last = last;
    s->most = 2 << m->slow;
    alphabet first = {.room = 1, .before = -WHOLE};
    for (int32_t k = 0; k < LETTERS; k++) {
        int32_t end = k == last && most ? most + 1 : k + 1 < LETTERS ? FLOOR[k + 1] : 0;
        for (s->open[k] = 0; FLOOR[k] + (1 << s->open[k]) < end;) s->open[k]++;
        s->occurs[k / 8][k % 8] = k < last ? 0xffff : 0;
        first.fresh[k] = 0xffff;
        for (int32_t p = 0; p < (m->trellis ? TERSE_STATES : 1); p++) {
            int32_t twice = m->trellis ? 2 * k - (k > 0 && p & 1) : 2 * k, left = k < LEFTS - 1 ? k : LEFTS - 1;
            for (int32_t parity = 0; parity < 2; parity++) {
                int32_t next = m->trellis ? NEXT[p][parity] : 0;
                meaning *of = parity == (k & 1) ? &s->of[p][k] : &s->other[p][k];
                of->goal = (uint16_t)(UNIT * twice + ZERO);
                of->level = (int16_t)(m->trellis ? twice : k);
                of->offset = (uint16_t)(&s->at[LEVELS * (next & 1)][left] - &s->at[0][0]) * (uint16_t)sizeof(alphabet);
                of->path = (uint16_t)(next * (int32_t)sizeof s->of[0]);
            }
        }
    }
    for (int32_t k = 0; k < levels; k++) {
        for (int32_t i = 0; i < LETTERS; i++) first.end[i] = i < last ? (int16_t)((int32_t)m->prior[LETTERS * k + i] - WHOLE) : 0;
        for (int32_t l = 0; l < LEFTS; l++) s->at[k][l] = first;
    }
}

/* Moves the means of a column and of the rows to what was seen. */
INLINE void learn(estimates *s, lanes *v, int64_t t, int64_t place, integers pair, const int64_t active) {
#ifdef VECTORS
    floats goal = __builtin_convertvector(pair & 0xffff, floats);
#else
    floats goal;
    for (int32_t l = 0; l < LANES; l++) goal[l] = (float)(pair[l] & 0xffff);
#endif
    float sum = 0, mean = v->mean[t];
    if (active == LANES) sum = (goal[0] + goal[1]) + (goal[2] + goal[3]); /* exact */
    else for (int64_t l = 0; l < active; l++) sum += goal[l];
    v->mean[t] = mean + (sum - (float)active * mean) * v->settle;
#ifdef VECTORS
    s->row[place] += (goal - s->row[place]) * v->memory;
#else
    for (int32_t l = 0; l < LANES; l++) s->row[place][l] += (goal[l] - s->row[place][l]) * v->memory;
#endif
}

/* The alphabets of the predicted levels, in bytes. */
INLINE void predict(const estimates *s, const lanes *v, int64_t t, int64_t place, uint32_t *level) {
#ifdef VECTORS
    integers found = ((integers)(s->row[place] * v->by_row + v->mean[t] * v->by_column) >> 22) * (int32_t)sizeof s->at[0];
    memcpy(level, &found, sizeof found);
#else
    for (int32_t l = 0; l < LANES; l++) {
        float mean = s->row[place][l] * v->by_row + v->mean[t] * v->by_column;
        memcpy(&level[l], &mean, sizeof mean);
        level[l] = (level[l] >> 22) * (uint32_t)sizeof s->at[0];
    }
#endif
}

/* What is left of the magnitudes of those lanes whose letters leave something open. */
APART void code_large(stream *c, estimates *s, lanes *v, const int64_t *letter, const uint32_t *size, int64_t active, int64_t t,
                      const int32_t trellis, const int32_t decode) {
    for (int64_t l = 0; l < active; l++) {
        if (letter[l] < EXACT) continue;
        uint32_t number = code_rest(c, s, &v->state[l], l, letter[l], decode ? 0 : size[l], decode);
        int64_t from = ((const char *)v->seen[l] - (const char *)s->of) / (int64_t)sizeof s->of[0];
        if (trellis && number >> 29) number = 1u << 29; /* over every limit */
        if (trellis && ((letter[l] ^ number) & 1)) v->seen[l] = &s->other[from][letter[l]];
        if (decode) v->line[l][v->column[t]] = trellis ? (int32_t)(2 * number) - (int32_t)(from & 1) : (int32_t)number;
    }
}

/* What lies to the left after columns that were left out: a zero, and the path through the trellis has gone on. */
static void leap(const estimates *s, const meaning **seen, int64_t gap) {
    int64_t path = (*seen)->path / (int64_t)sizeof s->of[0];
    for (gap = (gap - 1) & 3; gap > 0; gap--) path = NEXT[path][0]; /* zeros lead back in one, two or four steps */
    *seen = &s->of[path][0];
}

/* Codes `active` rows at once. What is known before the letters are, what to learn from the column before and what to expect
 * in the next one, stands between finding the letters and what waits for them, so that the processor has something to do. */
INLINE void code_rows(stream *given, estimates *s, lanes *rows, int64_t columns, int64_t places, const int64_t active,
                      const int32_t trellis, const int32_t skip, const int32_t decode) {
    stream c = *given; /* copies whose addresses are not taken */
    lanes v = *rows;
    int64_t letter[LANES];
    alphabet *a[LANES];
    uint32_t size[LANES], level[LANES];
    integers pair = {ZERO, ZERO, ZERO, ZERO};
    int64_t gap = skip ? v.column[0] : 0, place = gap % places, last = 0;
    const meaning *first = &s->of[0][0];
    if (gap) leap(s, &first, gap);
    UNROLL
    for (int64_t l = 0; l < active; l++) v.seen[l] = first;
    predict(s, &v, 0, place, level);
    for (int64_t t = 0; t < columns; t++) {
        const int64_t at = skip ? v.column[t] : t;
        UNROLL
        for (int64_t l = 0; l < active; l++) {
            a[l] = (alphabet *)((char *)s->at + ((int64_t)level[l] + v.seen[l]->offset - FIRST * (int64_t)sizeof s->at[0]));
            KEEP(a[l]);
            if (!decode) {
                int32_t value = v.line[l][at];
                size[l] = (uint32_t)(value < 0 ? -value : value);
                if (trellis) size[l] = (size[l] + (v.seen[l]->path / sizeof s->of[0] & 1)) >> 1;
                letter[l] = letter_of(size[l]);
            } else {
                letter[l] = find(a[l]->end, (int32_t)((uint32_t)v.state[l] | -(uint32_t)WHOLE));
                KEEP(letter[l]);
            }
        }
        if (t) learn(s, &v, t - 1, last, pair, active);
        last = place;
        gap = skip ? v.column[t + 1] - at - 1 : 0;
        place = RARE(gap) ? v.column[t + 1] % places : place + 1 == places ? 0 : place + 1;
        predict(s, &v, t + 1, place, level);
        int64_t large = 0;
        UNROLL
        for (int64_t l = 0; l < active; l++) {
            const int16_t *end = a[l]->end + letter[l];
            int32_t start = end[-1];
            uint32_t share = (uint32_t)(end[0] - start);
            if (decode) {
                int32_t slot = (int32_t)((uint32_t)v.state[l] | -(uint32_t)WHOLE);
                v.state[l] = moved(&c, v.state[l], share, (uint32_t)(slot - start));
            } else {
                list(&c, (uint32_t)(start + WHOLE), share, l);
            }
            v.seen[l] = (const meaning *)((const char *)s->of + v.seen[l]->path) + letter[l];
            int32_t both;
            memcpy(&both, v.seen[l], sizeof both);
            pair[l] = both;
            large |= letter[l];
        }
        if (decode) {
#ifdef VECTORS
            integers found = pair >> 16;
#else
            integers found;
            for (int32_t l = 0; l < LANES; l++) found[l] = pair[l] >> 16;
#endif
            UNROLL
            for (int64_t l = 0; l < active; l++) v.line[l][at] = found[l];
        }
        if (RARE(large >= EXACT)) {
            lanes lent = v; /* copies whose addresses are taken, so that the others can stay in registers */
            stream rest = c;
            int64_t letters[LANES];
            for (int64_t l = 0; l < active; l++) letters[l] = letter[l];
            code_large(&rest, s, &lent, letters, size, active, t, trellis, decode);
            v = lent;
            c = rest;
        }
        UNROLL
        for (int64_t l = 0; l < active; l++)
            if (RARE(++a[l]->fresh[letter[l]] == 0))
                renew(s, a[l]);
        if (RARE(gap))
            for (int64_t l = 0; l < active; l++) leap(s, &v.seen[l], gap);
    }
    learn(s, &v, columns - 1, last, pair, active);
    *given = c;
    *rows = v;
}

INLINE int64_t lanes_of(const terse_model *m) {
    return m->rows < LANES || m->columns < LANES || m->rows * m->columns < SMALL ? 1 : LANES;
}

/* Values that lie a step apart: places in the rows, and from bit 32 in `around`. */
typedef struct {
    uint64_t first, step;
    int64_t count;
} run;

INLINE uint64_t both(int64_t place, int64_t around) {
    return (uint64_t)place | (uint64_t)around << 32;
}

/* The signs of those of a run that are not zero, by turns of the lanes; returns whose turn is next. */
INLINE int64_t code_run(stream *c, uint64_t *states, int64_t turn, const run *r, int32_t *values, uint8_t *around, int64_t wide,
                        const int64_t *split, int64_t turns, const int32_t decode) {
    uint64_t place[CHUNK + 1], at = r->first;
    int64_t n = 0;
    for (int64_t k = 0; k < r->count; k++, at += r->step) {
        place[n] = at;
        n += values[(uint32_t)at] != 0;
    }
    for (int64_t k = 0; k < n && !around; k += BITS, turn = (turn + 1) & turns) { /* either sign is as likely */
        uint32_t few = (uint32_t)(n - k < BITS ? n - k : BITS), minus = 0;
        for (uint32_t j = 0; j < few && !decode; j++) minus |= (uint32_t)(values[(uint32_t)place[k + j]] < 0) << j;
        minus = code_bits(c, &states[turn], turn, minus, few, decode);
        for (uint32_t j = 0; j < few && decode; j++) {
            int32_t *value = values + (uint32_t)place[k + j], sign = -(int32_t)(minus >> j & 1);
            *value = (*value ^ sign) - sign;
        }
    }
    for (int64_t k = 0; k < n && around; k++, turn = (turn + 1) & turns) {
        int32_t *value = values + (uint32_t)place[k];
        uint8_t *own = around + (place[k] >> 32);
        int64_t share = split[own[-1] << 2 | own[-wide]], minus = -(int64_t)(*value < 0);
        if (decode) {
            uint64_t state = states[turn];
            int64_t slot = (int64_t)(state & (WHOLE - 1));
            minus = (slot - share) >> 63;
            KEEP(minus);
            uint64_t part = (uint64_t)(WHOLE - share + ((2 * share - WHOLE) & minus));
            states[turn] = moved(c, state, part, (uint64_t)(slot - (share & ~minus)));
            *value = (int32_t)((*value ^ minus) - minus);
        } else {
            list(c, minus ? 0 : (uint64_t)share, (uint64_t)(minus ? share : WHOLE - share), turn);
        }
        *own = (uint8_t)(1 - minus);
    }
    return turn;
}

/* The signs of `active` rows. Kernels lie in `around` one after the other, with an empty row above and an empty column to the
 * left of each, so that every value has neighbours; the row above a matrix that is one kernel is that before these. Where
 * there are many kernels, they come in blocks, and in a block the same place in all of them, so that a sign does not wait
 * for the one before it. */
static void code_signs(stream *given, const terse_model *m, int32_t *values, int64_t active, uint64_t *states, uint8_t *around,
                       const int32_t decode) {
    const int64_t matrix = around && m->kernel_columns == m->width, plain = !around, n = active * m->width;
    const int64_t high = plain ? 1 : matrix ? active : m->kernel_rows, wide = plain ? n : m->kernel_columns;
    const int64_t size = high * wide, all = n / size, many = all >= MANY, across = wide + 1, padded = (high + 1) * across;
    int64_t split[11] = {8, m->signs >> 4 & 15, 0, 0, m->signs & 15, m->signs >> 8 & 15, m->signs >> 12 & 15}, turn = 0;
    stream c = *given;
    uint64_t w[LANES];
    memcpy(w, states, sizeof w);
    split[2] = 16 - split[1], split[8] = 16 - split[4], split[9] = 16 - split[6], split[10] = 16 - split[5];
    for (int32_t k = 0; k < 11; k++) split[k] *= WHOLE / 16;
    for (int64_t first = 0; first < all; first += many ? CHUNK : 1) {
        if (matrix) memset(around + across, 0, (size_t)(high * across));
        else if (around) memset(around, 0, (size_t)(padded * (many && all > CHUNK ? CHUNK : many ? all : 1)));
        for (int64_t y = 0; y < high; y++) {
            for (int64_t x = 0; x < wide; x += many ? 1 : CHUNK) {
                run r = {both(first * size + y * wide + x, (y + 1) * across + x + 1),
                         both(many ? size : 1, many ? padded : 1), many ? all - first : wide - x};
                if (r.count > CHUNK) r.count = CHUNK;
                turn = code_run(&c, w, turn, &r, values, around, across, split, lanes_of(m) - 1, decode);
            }
        }
    }
    if (matrix) memcpy(around, around + high * across, (size_t)across);
    *given = c;
    memcpy(states, w, sizeof w);
}

/* Where decoded rows go: integers of so many bytes, the levels times `sign` and from `origin` on; or to who takes them. */
typedef struct {
    void *out;
    int32_t bytes, sign;
    int64_t origin;
    terse_take *take;
} target;

/* Writes decoded values down; whether all lie between the lowest and the highest. */
static int32_t write_down(const target *to, const terse_model *m, const int32_t *values, int64_t first, int64_t n) {
    const int32_t sign = to->sign < 0 ? -1 : 0, origin = (int32_t)to->origin, low = m->low, high = m->high;
    int32_t outside = 0; /* its sign */
    for (int64_t k = 0; k < n; k++) outside |= (values[k] - low) | (high - values[k]);
    if (to->take) {
        to->take(to->out, values, n, to->sign, to->origin);
    } else if (to->bytes == 1) {
        int8_t *restrict out = (int8_t *)to->out + first;
        for (int64_t k = 0; k < n; k++) out[k] = (int8_t)((values[k] ^ sign) - sign + origin);
    } else if (to->bytes == 2) {
        int16_t *restrict out = (int16_t *)to->out + first;
        for (int64_t k = 0; k < n; k++) out[k] = (int16_t)((values[k] ^ sign) - sign + origin);
    } else if (to->bytes == 4) {
        int32_t *restrict out = (int32_t *)to->out + first;
        for (int64_t k = 0; k < n; k++) out[k] = (int32_t)((uint32_t)((values[k] ^ sign) - sign) + (uint32_t)origin);
    } else {
        int64_t *restrict out = (int64_t *)to->out + first;
        for (int64_t k = 0; k < n; k++) out[k] = (int64_t)((values[k] ^ sign) - sign) + origin;
    }
    return outside >= 0;
}

/* The rows, a few at a time: magnitudes, then signs. When decoding, `values` has room for so many rows, and zeros in it. */
INLINE int64_t code_matrix(stream *given, estimates *s, const terse_model *m, int32_t *values, uint64_t *states, float *mean,
                           uint8_t *around, const target *to, const int32_t trellis, const int32_t decode) {
    float start[PLACES], blend = (float)m->blend / 16; /* where a row's means begin: where those of rows before have come to */
    lanes v = {.column = m->column, .mean = mean, .by_column = blend, .by_row = 1 - blend, .memory = 1 / (float)(1 << m->memory)};
    for (int32_t k = 0; k < PLACES; k++) start[k] = UNIT;
    for (int64_t j = 0; j <= m->columns; j++) mean[j] = UNIT;
    if (around && m->kernel_columns == m->width) memset(around, 0, (size_t)(m->width + 1));
    memcpy(v.state, states, sizeof v.state);
    for (int64_t i = 0, active; i < m->rows; i += active) {
        active = m->rows - i < lanes_of(m) ? m->rows - i : lanes_of(m);
        float settle = 1 / (float)(i + 1 + active), least = 1 / (float)(1 << m->settle);
        v.settle = settle > least ? settle : least;
        int32_t *group = decode ? values : values + i * m->width;
        for (int64_t l = 0; l < active; l++) v.line[l] = group + l * m->width;
#ifdef VECTORS
        for (int32_t k = 0; k < m->places; k++) s->row[k] = (floats){start[k], start[k], start[k], start[k]};
#else
        for (int32_t k = 0; k < m->places * LANES; k++) s->row[k / LANES][k % LANES] = start[k / LANES];
#endif
        if (active == LANES && m->columns == m->width) code_rows(given, s, &v, m->columns, m->places, LANES, trellis, 0, decode);
        else if (active == LANES) code_rows(given, s, &v, m->columns, m->places, LANES, trellis, 1, decode);
        else code_rows(given, s, &v, m->columns, m->places, active, trellis, 1, decode);
        for (int64_t l = 0; l < active; l++) {
            for (int32_t k = 0; k < m->places; k++) start[k] = (3 * start[k] + s->row[k][l]) * 0.25f;
        }
        if (m->low < 0) code_signs(given, m, group, active, v.state, around, decode);
        if (decode && !write_down(to, m, group, i * m->width, active * m->width)) return TERSE_EDATA;
    }
    memcpy(states, v.state, sizeof v.state);
    return 0;
}

static int64_t checked(const terse_model *m) {
    if (m->rows < 1 || m->columns < 1 || m->low > 0 || m->high < 0 || m->low < -(1 << 30) || m->high > 1 << 30 ||
        m->kernel_rows < 1 || m->kernel_columns < 1 || m->places < 1 || m->places > PLACES || m->blend < 0 ||
        m->blend > 16 || m->slow < 4 || m->slow > 12 || m->memory < 0 || m->memory > 15 || m->settle < 1 || m->settle > 8 ||
        m->width < m->columns || m->width > INT32_MAX - 1 || m->rows > INT32_MAX / 4 / m->width ||
        m->rows * m->width % (m->kernel_rows * m->kernel_columns) ||
        (m->kernel_columns != m->width && m->width % (m->kernel_rows * m->kernel_columns)))
        return TERSE_EARGUMENT;
    for (int32_t k = 0; k < 16 && m->signs; k += 4)
        if ((m->signs >> k & 15) == 0) return TERSE_EARGUMENT;
    for (int64_t j = 0; j <= m->columns; j++)
        if (m->column[j] < j || m->column[j] > m->width || (j && m->column[j] <= m->column[j - 1])) return TERSE_EARGUMENT;
    return m->column[m->columns] == m->width ? 0 : TERSE_EARGUMENT;
}

int64_t terse_context_encode(const int32_t *in, const terse_model *m, uint64_t *listed, int64_t room, uint8_t *out,
                             int64_t capacity, float *mean, uint8_t *around) {
    estimates s;
    uint64_t states[LANES] = {0};
    int64_t error = checked(m), at, count = lanes_of(m);
    if (error) return error;
    if (terse_abi() == 0) return TERSE_EBUILD;
    begin(&s, m);
    stream c = {.list = listed, .capacity = room};
    if (m->trellis) code_matrix(&c, &s, m, (int32_t *)in, states, mean, around, 0, 1, 0);
    else code_matrix(&c, &s, m, (int32_t *)in, states, mean, around, 0, 0, 0);
    if (c.listed > room) return TERSE_ERANGE;
    /* States begin at 0, which costs least. But where one lane sends its first word while another has not come to 32 bits,
     * the decoder would take that word for the other: such a lane begins at 2^32. */
    uint64_t first[LANES] = {0};
again:
    at = capacity;
    memcpy(states, first, sizeof first);
    for (int64_t k = c.listed - 1; k >= 0; k--) {
        uint64_t start = listed[k] & 0xffff, share = listed[k] >> 16 & 0xffff, *x = &states[listed[k] >> 32];
        if (*x >> (64 - BITS) >= share) {
            int32_t low = 0;
            for (int64_t l = 0; l < count && at == capacity; l++)
                if (states[l] >> 32 == 0) first[l] = (uint64_t)1 << 32, low = 1;
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
        while (bytes < 8 && states[l] >> 8 * bytes) bytes++;
        for (uint32_t b = bytes; b-- > 0;) out[--at] = (uint8_t)(states[l] >> 8 * b);
        lengths |= bytes << 4 * l;
    }
    if (count > 1) out[--at] = (uint8_t)(lengths >> 8), out[--at] = (uint8_t)lengths;
    memmove(out, out + at, (size_t)(capacity - at));
    return capacity - at;
}

int64_t terse_context_size(const int32_t *in, const terse_model *m, uint64_t *listed, int64_t room, float *mean) {
    estimates s;
    uint64_t states[LANES] = {0};
    int64_t bits = 0, error = checked(m);
    if (error) return error;
    if (m->low || m->signs) return TERSE_EARGUMENT;
    if (terse_abi() == 0) return TERSE_EBUILD;
    begin(&s, m);
    stream c = {.list = listed, .capacity = room};
    if (m->trellis) code_matrix(&c, &s, m, (int32_t *)in, states, mean, 0, 0, 1, 0);
    else code_matrix(&c, &s, m, (int32_t *)in, states, mean, 0, 0, 0, 0);
    if (c.listed > room) return TERSE_ERANGE;
    double product[4] = {1, 1, 1, 1}; /* of shares: the exponents are the bits, so there is no logarithm that machines differ in */
    for (int64_t k = 0; k < c.listed; k += 256) {
        const int64_t end = k + 256 < c.listed ? k + 256 : c.listed;
        for (int64_t j = k; j < end; j++) product[j & 3] *= (double)(listed[j] >> 16 & 0xffff);
        for (int32_t l = 0; l < 4; l++) {
            uint64_t word;
            memcpy(&word, &product[l], sizeof word);
            bits -= (int64_t)(word >> 52) - 1023;
            word = (word & (((uint64_t)1 << 52) - 1)) | (uint64_t)1023 << 52;
            memcpy(&product[l], &word, sizeof word);
        }
    }
    return BITS * c.listed + bits;
}

/* A number of seven bits a byte, in its shortest form and under `limit`; -1 where there is none. */
static int64_t number(const uint8_t **in, const uint8_t *end, int64_t limit) {
    uint64_t value = 0;
    for (int32_t shift = 0; shift < 35 && *in < end; shift += 7) {
        uint8_t byte = *(*in)++;
        value |= (uint64_t)(byte & 127) << shift;
        if (byte < 128) return value >= (uint64_t)limit || (byte == 0 && shift) ? -1 : (int64_t)value;
    }
    return -1;
}

/* The rANS stream of an array of which all is known but the values. */
static int64_t decode_values(const uint8_t *in, int64_t length, estimates *s, const terse_model *m, int32_t *values, float *mean,
                             uint8_t *around, const target *to) {
    uint64_t states[LANES] = {0};
    int64_t error = checked(m), count = lanes_of(m), at = 0;
    if (error) return error;
    begin(s, m);
    uint32_t lengths = (uint32_t)(length <= 8 ? length : 5 + (length - 5) % 4);
    if (count > 1) {
        if (length < 2) return TERSE_EDATA;
        lengths = in[0] | (uint32_t)in[1] << 8;
        at = 2;
    }
    for (int64_t l = 0; l < count; l++) {
        int64_t bytes = lengths >> 4 * l & 15;
        if (bytes > 8 || bytes > length - at || (bytes && in[at + bytes - 1] == 0)) return TERSE_EDATA;
        for (int64_t b = 0; b < bytes; b++) states[l] |= (uint64_t)in[at++] << 8 * b;
    }
    if ((length - at) % 4) return TERSE_EDATA;
    stream c = {.in = in + at, .end = in + length};
    memset(values, 0, (size_t)(count * m->width) * sizeof *values);
    if (m->trellis) error = code_matrix(&c, s, m, values, states, mean, m->signs ? around : 0, to, 1, 1);
    else error = code_matrix(&c, s, m, values, states, mean, m->signs ? around : 0, to, 0, 1);
    for (int64_t l = 0; l < count; l++)
        if (states[l] && (count == 1 || states[l] != (uint64_t)1 << 32)) return TERSE_EDATA;
    return error ? error : c.in == c.end ? m->rows * m->width : TERSE_EDATA;
}

/* What a setting may be, the usual one first; the model's number counts them in this order. */
static const int32_t SLOW[] = {7, 6, 9, 11}, BLEND[] = {8, 4, 12, 0, 16}, MEMORY[] = {3, 2, 4, 5}, SETTLE[] = {4, 3, 6, 8};

static int64_t decode_array(const uint8_t *in, const terse_array *array, const float *prior, void *out, terse_take *take,
                            void *room, int64_t capacity) {
    const int64_t width = array->width, high = array->kernel_rows, wide = array->kernel_columns, length = array->length;
    const uint8_t *end = in + length;
    if (length < 1 || array->rows < 1 || width < 1 || high < 1 || wide < 1 || width > INT32_MAX / 4) return TERSE_EARGUMENT;
    const int64_t held = array->rows < 2 ? 2 : array->rows < LANES ? array->rows : LANES; /* rows; the names take two */
    const int64_t kernels = wide == width ? 1 : LANES * width / (high * wide);
    const int64_t cells = (wide == width ? LANES + 1 : high + 1) * (wide + 1) *
                          (kernels < MANY ? 1 : kernels < CHUNK ? kernels : CHUNK);
    if (capacity < (int64_t)sizeof(int32_t) * (held * width + 2 * (width + 1)) + cells) return TERSE_EARGUMENT;
    int32_t *values = room, *column = values + held * width;
    float *mean = (float *)(column + width + 1);
    uint8_t *around = (uint8_t *)(mean + width + 1);
    const int64_t origin = number(&in, end, (int64_t)1 << 32), below = number(&in, end, 1 << 24);
    const int64_t above = number(&in, end, 1 << 24);
    int64_t choice = number(&in, end, 2 * 4 * 5 * 4 * 4 * 2 * 2 * 2);
    if (origin < 0 || below < 0 || above < 0 || choice < 0) return TERSE_EDATA;
    target to = {out, (int32_t)array->bytes, 1, origin & 1 ? -(origin + 1) / 2 : origin / 2, take};
    if (to.origin - below < array->least || to.origin + above > array->most || to.origin + above >= 1 << 30) return TERSE_ETYPE;
    terse_model m = {.rows = array->rows, .width = width, .columns = width, .column = column, .kernel_rows = high,
                     .kernel_columns = wide, .low = (int32_t)-below, .high = (int32_t)above, .prior = prior};
    m.places = choice % 2 ? (int32_t)array->places : 1, choice /= 2;
    m.slow = SLOW[choice % 4], choice /= 4;
    m.blend = BLEND[choice % 5], choice /= 5;
    m.memory = MEMORY[choice % 4], choice /= 4;
    m.settle = SETTLE[choice % 4], choice /= 4;
    const int64_t signs = choice % 2, skip = choice / 4;
    m.trellis = (int32_t)(choice / 2 % 2);
    if (below && !above) to.sign = -1, m.low = 0, m.high = (int32_t)below;
    estimates s;
    for (int64_t j = 0; j <= width; j++) column[j] = (int32_t)j;
    if (skip) { /* the names of the columns that are coded: one row, which is not skipped */
        const int64_t names = number(&in, end, length);
        if (names < 0 || names > end - in) return TERSE_EDATA;
        terse_model plain = {.rows = 1, .width = width, .columns = width, .column = column, .kernel_rows = 1,
                             .kernel_columns = width, .places = 1, .high = 1, .slow = SLOW[0], .memory = MEMORY[0],
                             .settle = SETTLE[0], .prior = prior};
        const target used = {values + width, 4, 1, 0, 0};
        const int64_t done = decode_values(in, names, &s, &plain, values, mean, 0, &used);
        if (done < 0) return done;
        for (int64_t j = m.columns = 0; j < width; j++)
            if (values[width + j]) column[m.columns++] = (int32_t)j;
        if (m.columns == 0) return TERSE_EDATA;
        column[m.columns] = (int32_t)width;
        in += names;
    }
    if (m.low && signs) {
        if (end - in < 2) return TERSE_EDATA;
        m.signs = in[0] | in[1] << 8;
        in += 2;
        for (int32_t k = 0; k < 16; k += 4)
            if ((m.signs >> k & 15) == 0) return TERSE_EDATA;
    }
    return decode_values(in, end - in, &s, &m, values, mean, around, &to);
}

int64_t terse_context_decode(const uint8_t *in, terse_array *arrays, int64_t count, int32_t *next, const float *prior,
                             uint8_t *out, void *room, int64_t capacity) {
    int64_t at, done = 0;
    if (terse_abi() == 0) return TERSE_EBUILD;
    while ((at = TAKE(next)) < count) {
        terse_array *array = &arrays[at];
        array->done = decode_array(in + array->in, array, prior, out + array->out, 0, room, capacity);
        done++;
    }
    return done;
}

int64_t terse_context_rows(const uint8_t *in, const terse_array *array, const float *prior, terse_take *take, void *to,
                           void *room, int64_t capacity) {
    return terse_abi() == 0 ? TERSE_EBUILD : decode_array(in + array->in, array, prior, to, take, room, capacity);
}

#include "terse.h"

#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* A value is one letter of an adaptive alphabet of 16 (magnitudes 0..7, then half octaves, then "128 and more") with its
 * sign, and even bits for what the letter leaves open. Two alphabets, chosen by what lies around the value, are mixed.
 * One comparison of all ends finds the letter, so that nothing has to be guessed and the processor never starts again;
 * what is left is waiting for one result after the other, so two streams are decoded in turns.
 * The entropy coder is rANS: a 64-bit state, 32-bit words, shares in 1/65536. It codes backwards what was modelled
 * forwards, so the encoder lists (start, share) first. */

#define LEVELS 24 /* contexts of predicted magnitude */
#define LEFTS 4   /* contexts of the left neighbour's magnitude: 0, 1, 2, 3 and more */
#define LETTERS 16
#define EXACT 8  /* letters below stand for one magnitude */
#define TAIL 128 /* the last letter stands for magnitudes from here */
#define COUNTS 512 /* after so many symbols the rate stays */
#define PEAK 255 /* magnitudes above count as this much in the predictions */

#define INLINE static inline __attribute__((always_inline)) /* else the state lives in memory, at half the speed */

typedef struct {
    _Alignas(32) int16_t share[LETTERS]; /* of all letters up to this one, in 1/32768; that of the last is 32767 */
    int32_t count;
} alphabet;

typedef struct {
    uint64_t state;
    const uint8_t *in, *end;
    uint32_t *list; /* encoder: start in the low half, share in the high half */
    int64_t listed, capacity;
} coder;

/* The least magnitude of each letter. */
static const uint8_t FLOOR[LETTERS] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, TAIL};

static int32_t letter_of(uint32_t size) {
    if (size < EXACT) return (int32_t)size;
    if (size >= TAIL) return LETTERS - 1;
    int32_t letter = EXACT;
    while (size >= FLOOR[letter + 1]) letter++;
    return letter;
}

INLINE void list(coder *c, uint32_t start, uint32_t share) {
    if (c->listed < c->capacity) c->list[c->listed] = start | share << 16;
    c->listed++;
}

INLINE void narrow(coder *c, uint32_t slot, uint32_t start, uint32_t share) {
    c->state = share * (c->state >> 16) + slot - start;
    /* A word is taken up rarely, so the branch is mostly guessed right. Without words the state runs down to 0. */
    if (__builtin_expect(c->state >> 32 == 0, 0) && c->in != c->end) {
        c->state = c->state << 32 | (uint32_t)c->in[0] | (uint32_t)c->in[1] << 8 | (uint32_t)c->in[2] << 16 |
                   (uint32_t)c->in[3] << 24;
        c->in += 4;
    }
}

INLINE uint32_t code_bits(coder *c, uint32_t value, uint32_t bits, const int32_t decode) {
    if (bits == 0) return 0;
    uint32_t share = 1u << (16 - bits), slot = (uint32_t)(c->state & 0xffff);
    if (decode) {
        value = slot >> (16 - bits);
        narrow(c, slot, value * share, share);
    } else {
        list(c, value * share, share);
    }
    return value;
}

/* The value above TAIL: the length of value + 1 in five bits, then its lower bits. */
static __attribute__((noinline)) uint32_t code_tail(coder *c, uint32_t value, const int32_t decode) {
    uint32_t bits = decode ? 0 : 31 - (uint32_t)__builtin_clz(value + 1);
    bits = code_bits(c, bits, 5, decode);
    if (bits > 29) return 1u << 30; /* over every limit */
    uint32_t high = bits > 15 ? bits - 15 : 0, top = 0, low;
    top = code_bits(c, (value + 1) >> 15 & ((1u << high) - 1), high, decode);
    low = code_bits(c, (value + 1) & ((1u << (bits - high)) - 1), bits - high, decode);
    return (1u << bits | top << 15 | low) - 1;
}

typedef struct {
    alphabet near[LEVELS][LEFTS], far[LEVELS];
    int32_t sign[9]; /* share of "negative" in 1/65536 */
    int16_t rate[COUNTS]; /* in 1/32768, after so many symbols */
    uint16_t next[COUNTS];
    uint8_t open[LETTERS];  /* even bits that tell a letter's magnitudes apart */
    int32_t both[LETTERS], minus[LETTERS]; /* all ones where the letter occurs with either sign; only with minus */
} estimates;

/* Fills ends[0..15] with what the letters' parts end at, less one, in 1/32768; ends[-1] is -1. Returns the letter that slot falls in. */
INLINE int32_t mix(const alphabet *a, const alphabet *b, int32_t slot, int16_t *ends) {
#if defined(__AVX2__)
    const __m256i place = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m256i last = _mm256_setr_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32767);
    __m256i sum = _mm256_add_epi16(_mm256_load_si256((const __m256i *)a->share), _mm256_load_si256((const __m256i *)b->share));
    sum = _mm256_add_epi16(_mm256_mulhi_epu16(sum, _mm256_set1_epi16(32768 - LETTERS)), place);
    sum = _mm256_or_si256(sum, last);
    _mm256_store_si256((__m256i *)ends, sum);
    __m256i below = _mm256_cmpgt_epi16(_mm256_set1_epi16((int16_t)slot), sum);
    return (int32_t)((uint32_t)__builtin_ctz(~(uint32_t)_mm256_movemask_epi8(below)) >> 1);
#else
    int32_t letter = 0;
    for (int32_t k = 0; k < LETTERS; k++) {
        ends[k] = (int16_t)(((uint32_t)(a->share[k] + b->share[k]) * (32768 - LETTERS) >> 16) + (uint32_t)k);
        if (k == LETTERS - 1) ends[k] = 32767;
        letter += slot > ends[k];
    }
    return letter;
#endif
}

/* Moves every share by rate / 32768 of its way, rounded: to 32767 from the letter on, to 0 before it. */
INLINE void learn(alphabet *a, int32_t letter, const estimates *s) {
#if defined(__AVX2__)
    const __m256i place = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m256i share = _mm256_load_si256((const __m256i *)a->share), before = _mm256_cmpgt_epi16(_mm256_set1_epi16((int16_t)letter), place);
    __m256i way = _mm256_sub_epi16(_mm256_andnot_si256(before, _mm256_set1_epi16(32767)), share);
    way = _mm256_mulhrs_epi16(way, _mm256_set1_epi16(s->rate[a->count]));
    _mm256_store_si256((__m256i *)a->share, _mm256_add_epi16(share, way));
#else
    for (int32_t k = 0; k < LETTERS; k++)
        a->share[k] = (int16_t)(a->share[k] + ((((k >= letter ? 32767 : 0) - a->share[k]) * s->rate[a->count] + 16384) >> 15));
#endif
    a->count = s->next[a->count];
}

static void begin(estimates *s, const terse_model *m) {
    int32_t most = m->high > -m->low ? m->high : -m->low, last = letter_of((uint32_t)most), least = 32768 >> m->slow;
    for (int32_t k = 0; k < LETTERS; k++) {
        s->both[k] = -(k > 0 && FLOOR[k] <= m->high && FLOOR[k] <= -m->low);
        s->minus[k] = -(FLOOR[k] > m->high);
        int32_t end = k == last ? most + 1 : k + 1 < LETTERS ? FLOOR[k + 1] : 0;
        s->open[k] = 0;
        while (FLOOR[k] + (1 << s->open[k]) < end) s->open[k]++;
    }
    for (int32_t k = 0; k < LEVELS; k++) {
        for (int32_t i = 0; i < LETTERS; i++)
            s->far[k].share[i] = i < last ? (int16_t)m->prior[LETTERS * k + i] : 32767;
        s->far[k].count = 0;
        for (int32_t l = 0; l < LEFTS; l++) s->near[k][l] = s->far[k];
    }
    for (int32_t k = 0; k < 9; k++) s->sign[k] = 32768;
    for (int32_t n = 0; n < COUNTS; n++) {
        int32_t rate = 32768 / (n + 16);
        s->rate[n] = (int16_t)(rate > least ? rate : least);
        s->next[n] = (uint16_t)(n + (n < COUNTS - 1));
    }
}

/* One stream on its way: the matrix that it fills, where it is, and what predicts the next value. */
typedef struct {
    coder c;
    estimates *s;
    terse_model m;
    int32_t *values, *line, *column; /* line: the row that is being filled; column: mean magnitudes of earlier rows */
    int32_t *above;                  /* of the row above and, where this row has been, of this row: -1, 0, 1 */
    int64_t i, j;
    /* Mean magnitude along the row, 16 fractional bits; the predicted level sees it without the left neighbour
     * (`older`), which chooses among the alphabets of that level instead. */
    int32_t row, older, settle, left, beside;
} lane;

INLINE void begin_row(lane *v) {
    int32_t least = 65536 >> v->m.settle, settle = (int32_t)(v->i < 65536 ? 65536 / (v->i + 2) : 0);
    v->settle = settle > least ? settle : least;
    v->line = v->values + v->i * v->m.columns;
    v->j = 0;
    v->left = v->beside = 0;
}

static int64_t begin_lane(lane *v, coder c, estimates *s, const terse_model *m, int32_t *values, int32_t *work) {
    if (m->rows < 1 || m->columns < 1 || m->low > 0 || m->high < 0 || m->low < -(1 << 30) || m->high > 1 << 30 ||
        m->blend < 0 || m->blend > 16 || m->slow < 4 || m->slow > 9 || m->memory < 0 || m->memory > 15 ||
        m->settle < 0 || m->settle > 15)
        return TERSE_EARGUMENT;
    *v = (lane){.c = c, .s = s, .m = *m, .values = values, .column = work, .row = 32768, .older = 32768};
    v->above = work + m->columns;
    for (int64_t j = 0; j < m->columns; j++) {
        work[j] = 32768;
        work[m->columns + j] = 0;
    }
    begin(s, m);
    begin_row(v);
    return 0;
}

/* One value on its way through the three parts of a step. */
typedef struct {
    alphabet *far, *near;
    int32_t *sign, mean, letter, value, size, minus; /* minus: all ones if the value is negative, else 0 */
} coding;

INLINE coding predict(const lane *v, const int32_t decode) {
    const terse_model *m = &v->m;
    int32_t mean = v->column[v->j];
    int32_t predicted = (m->blend * mean + (16 - m->blend) * v->older) >> 12;
    int32_t level = m->level[predicted < 4095 ? predicted : 4095];
    coding o = {.far = &v->s->far[level], .near = &v->s->near[level][v->beside], .mean = mean};
    o.sign = &v->s->sign[3 * v->left + v->above[v->j] + 4];
    if (!decode) {
        o.value = v->line[v->j];
        o.minus = -(o.value < 0);
        o.size = (o.value ^ o.minus) - o.minus;
        o.letter = letter_of((uint32_t)o.size);
    }
    return o;
}

/* The letter with its sign. Nothing here depends on a guess. */
INLINE void code_letter(lane *v, coding *o, int16_t *ends, const int32_t decode) {
    uint32_t slot = (uint32_t)(v->c.state & 0xffff);
    int32_t found = mix(o->far, o->near, (int32_t)(slot >> 1), ends);
    if (decode) o->letter = found;
    uint32_t start = 2 * (uint32_t)(ends[o->letter - 1] + 1);
    uint32_t share = 2 * (uint32_t)(ends[o->letter] - ends[o->letter - 1]);
    uint32_t split = (((share - 2) * (uint32_t)*o->sign >> 16) + 1) & (uint32_t)v->s->both[o->letter];
    int32_t minus = decode ? -(slot - start < split) : o->minus & v->s->both[o->letter];
    start += split & ~(uint32_t)minus;
    share = minus ? split : share - split;
    if (decode) {
        narrow(&v->c, slot, start, share);
        o->minus = minus | v->s->minus[o->letter];
    } else {
        list(&v->c, start, share);
    }
}

/* What the letter leaves open of the magnitude; then everything learns. */
INLINE void learn_value(lane *v, coding *o, const int32_t decode) {
    const terse_model *m = &v->m;
    int32_t both = v->s->both[o->letter], found = o->letter;
    learn(o->far, o->letter, v->s);
    learn(o->near, o->letter, v->s);
    *o->sign += (((o->minus & 65535) - *o->sign) >> 6) & both;
    if (__builtin_expect(o->letter >= EXACT, 0)) {
        uint32_t rest = (uint32_t)o->size - FLOOR[o->letter];
        if (o->letter == LETTERS - 1) {
            coder lent = v->c; /* a copy whose address is taken, so that v->c need not live in memory */
            rest = code_tail(&lent, rest, decode);
            v->c = lent;
        } else {
            rest = code_bits(&v->c, rest, v->s->open[o->letter], decode);
        }
        found = FLOOR[o->letter] + (int32_t)rest;
    }
    if (decode) {
        o->size = found;
        o->value = (found ^ o->minus) - o->minus; /* without a branch, which would be guessed wrong */
        v->line[v->j] = o->value;
    }
    int32_t seen = (o->size < PEAK ? o->size : PEAK) << 16;
    v->column[v->j] = o->mean + (int32_t)((int64_t)(seen - o->mean) * v->settle >> 16);
    v->older = v->row;
    v->row += (seen - v->row) >> m->memory;
    v->left = v->above[v->j] = (o->minus | 1) & -(o->letter > 0);
    v->beside = o->size < LEFTS - 1 ? o->size : LEFTS - 1;
    if (++v->j == m->columns) {
        v->i++;
        begin_row(v);
    }
}

/* To the end of the lane's matrix. */
static void run_one(lane *a, const int32_t decode) {
    lane x = *a;
    _Alignas(32) int16_t ends[2 * LETTERS];
    ends[LETTERS - 1] = -1;
    while (x.i < x.m.rows) {
        coding p = predict(&x, decode);
        code_letter(&x, &p, ends + LETTERS, decode);
        learn_value(&x, &p, decode);
    }
    *a = x;
}

/* To the end of the shorter one. The order lets the processor work on both values at once. */
static void run_two(lane *a, lane *b) {
    lane x = *a, y = *b;
    _Alignas(32) int16_t ends[4 * LETTERS];
    ends[LETTERS - 1] = ends[3 * LETTERS - 1] = -1;
    while (x.i < x.m.rows && y.i < y.m.rows) {
        coding p = predict(&x, 1), q = predict(&y, 1);
        code_letter(&x, &p, ends + LETTERS, 1);
        code_letter(&y, &q, ends + 3 * LETTERS, 1);
        learn_value(&x, &p, 1);
        learn_value(&y, &q, 1);
    }
    *a = x;
    *b = y;
}

/* This file is compiled twice where the processor may have AVX2: once plain, once as context_avx2.c. */
int64_t terse_context_encode_avx2(const int32_t *in, const terse_model *model, uint32_t *list, int64_t listed,
                                  uint8_t *out, int64_t capacity, int32_t *work);
int64_t terse_context_decode_avx2(const terse_context_job *jobs, int64_t count);

#if defined(__AVX2__)
#define PATH(name) name##_avx2
#else
#define PATH(name) name##_portable
#endif

int64_t PATH(terse_context_encode)(const int32_t *in, const terse_model *model, uint32_t *list, int64_t listed,
                                   uint8_t *out, int64_t capacity, int32_t *work) {
    estimates s;
    lane v;
    int64_t error = begin_lane(&v, (coder){.list = list, .capacity = listed}, &s, model, (int32_t *)in, work);
    if (error) return error;
    run_one(&v, 0);
    if (v.c.listed > listed) return TERSE_ERANGE;
    int64_t at = capacity;
    uint64_t x = 0;
    for (int64_t k = v.c.listed - 1; k >= 0; k--) {
        uint32_t start = list[k] & 0xffff, share = list[k] >> 16;
        if (x >> 48 >= share) {
            if (at < 4) return TERSE_ERANGE;
            at -= 4;
            for (int32_t b = 0; b < 4; b++) out[at + b] = (uint8_t)(x >> 8 * b);
            x >>= 32;
        }
        x = (x / share << 16) + x % share + start;
    }
    if (at < 8) return TERSE_ERANGE;
    int32_t bytes = 0; /* the state as it is: five to eight bytes if words follow, which the length tells */
    while (bytes < 8 && x >> 8 * bytes) bytes++;
    for (int32_t b = bytes; b-- > 0;) out[--at] = (uint8_t)(x >> 8 * b);
    memmove(out, out + at, (size_t)(capacity - at));
    return capacity - at;
}

static int64_t begin_job(lane *v, estimates *s, const terse_context_job *job) {
    int64_t head = job->length <= 8 ? job->length : 5 + (job->length - 5) % 4;
    coder c = {.in = job->in + head, .end = job->in + job->length};
    for (int64_t b = 0; b < head; b++) c.state |= (uint64_t)job->in[b] << 8 * b;
    if (head && job->in[head - 1] == 0) return TERSE_EDATA;
    return begin_lane(v, c, s, &job->model, job->out, job->work);
}

/* 0 while there is more to decode, 1 when all is well and done, or a negative error. */
static int64_t ended(const lane *v) {
    if (v->i < v->m.rows) return 0;
    int32_t low = 0, high = 0;
    for (int64_t k = 0; k < v->m.rows * v->m.columns; k++) {
        low = v->values[k] < low ? v->values[k] : low;
        high = v->values[k] > high ? v->values[k] : high;
    }
    return low >= v->m.low && high <= v->m.high && v->c.state == 0 && v->c.in == v->c.end ? 1 : TERSE_EDATA;
}

int64_t PATH(terse_context_decode)(const terse_context_job *jobs, int64_t count) {
    estimates s[2];
    lane v[2];
    int64_t begun = 0, active = 0;
    for (;;) {
        while (active < 2 && begun < count) {
            int64_t error = begin_job(&v[active], &s[active], &jobs[begun++]);
            if (error) return error;
            active++;
        }
        if (active == 0) return count;
        if (active == 2) {
            run_two(&v[0], &v[1]);
        } else {
            run_one(&v[0], 1);
        }
        for (int64_t k = active; k-- > 0;) {
            int64_t end = ended(&v[k]);
            if (end < 0) return end;
            if (end && k < --active) { /* the other lane moves down, with its estimates */
                s[0] = s[1];
                v[0] = v[1];
                v[0].s = &s[0];
            }
        }
    }
}

#if !defined(__AVX2__)
int64_t terse_context_encode(const int32_t *in, const terse_model *model, uint32_t *list, int64_t listed, uint8_t *out,
                             int64_t capacity, int32_t *work, int32_t simd) {
#ifdef TERSE_AVX2
    if (simd) return terse_context_encode_avx2(in, model, list, listed, out, capacity, work);
#endif
    (void)simd;
    return terse_context_encode_portable(in, model, list, listed, out, capacity, work);
}

int64_t terse_context_decode(const terse_context_job *jobs, int64_t count, int32_t simd) {
#ifdef TERSE_AVX2
    if (simd) return terse_context_decode_avx2(jobs, count);
#endif
    (void)simd;
    return terse_context_decode_portable(jobs, count);
}
#endif

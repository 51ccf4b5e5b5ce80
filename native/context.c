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
#define PEAK 15 /* magnitudes above count as this much in the predictions */
#define WHOLE 32768
#define LEAST 3 /* every letter's share tends to this much of WHOLE at least, and never falls under 2 */

#define INLINE static inline __attribute__((always_inline)) /* else the state lives in memory, at half the speed */

typedef struct {
    _Alignas(64) int16_t end[LETTERS]; /* shares of all letters up to this one in 1/WHOLE, less WHOLE; the last is 0 */
    int32_t count;
    int16_t unused[13], before; /* -WHOLE: what the alphabet that follows finds at end[-1] */
} alphabet;

/* What is known of a letter. */
typedef struct {
    _Alignas(64) int16_t target[LETTERS]; /* what an alphabet's ends move towards after it */
    int32_t both, minus;                  /* all ones where it occurs with either sign; only with minus */
    uint32_t open;                        /* even bits that tell its magnitudes apart */
} letter_facts;

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

/* Takes up a word when the state has run low. Without words it runs down to 0. */
INLINE void refill(coder *c) {
    if (__builtin_expect(c->state >> 32 == 0, 0) && c->in != c->end) {
        c->state = c->state << 32 | (uint32_t)c->in[0] | (uint32_t)c->in[1] << 8 | (uint32_t)c->in[2] << 16 |
                   (uint32_t)c->in[3] << 24;
        c->in += 4;
    }
}

INLINE uint32_t code_bits(coder *c, uint32_t value, uint32_t bits, const int32_t decode) {
    if (bits == 0) return 0;
    uint32_t share = 1u << (16 - bits);
    if (decode) {
        uint32_t slot = (uint32_t)((c->state & (WHOLE - 1)) << 1 | (c->state >> 15 & 1));
        value = slot >> (16 - bits);
        c->state = share * (c->state >> 16) + slot - value * share;
        refill(c);
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
    alphabet first;
    struct {
        alphabet near[LEFTS], far; /* for each magnitude of the left neighbour, and for all */
    } at[LEVELS];
    letter_facts letter[LETTERS];
    int32_t sign[9];      /* share of "negative" in 1/65536, for each left and upper neighbour: 0, 1 plus, 2 minus */
    int16_t rate[COUNTS]; /* in 1/32768, after so many symbols */
    uint16_t next[COUNTS];
} estimates;

/* The letter that `slot`, less WHOLE, falls in where two alphabets' ends are averaged. */
INLINE int64_t find(const alphabet *a, const alphabet *b, int32_t slot) {
#if defined(__AVX2__)
    __m256i end = _mm256_avg_epu16(_mm256_load_si256((const __m256i *)a->end), _mm256_load_si256((const __m256i *)b->end));
    __m256i over = _mm256_cmpgt_epi16(end, _mm256_set1_epi16((int16_t)slot));
    return (int64_t)((uint32_t)__builtin_ctz((uint32_t)_mm256_movemask_epi8(over)) >> 1);
#else
    int64_t letter = 0;
    for (int32_t k = 0; k < LETTERS; k++) letter += (a->end[k] + b->end[k] + 1) >> 1 <= slot;
    return letter;
#endif
}

/* Moves every end by rate / 32768 of its way to the target, rounded. */
INLINE void learn(alphabet *a, const int16_t *target, const estimates *s) {
#if defined(__AVX2__)
    __m256i end = _mm256_load_si256((const __m256i *)a->end);
    __m256i way = _mm256_sub_epi16(_mm256_load_si256((const __m256i *)target), end);
    way = _mm256_mulhrs_epi16(way, _mm256_set1_epi16(s->rate[a->count]));
    _mm256_store_si256((__m256i *)a->end, _mm256_add_epi16(end, way));
#else
    for (int32_t k = 0; k < LETTERS; k++)
        a->end[k] = (int16_t)(a->end[k] + (((target[k] - a->end[k]) * s->rate[a->count] + 16384) >> 15));
#endif
    a->count = s->next[a->count];
}

static void begin(estimates *s, const terse_model *m) {
    int32_t most = m->high > -m->low ? m->high : -m->low, last = letter_of((uint32_t)most), least = 32768 >> m->slow;
    if (last == 0) last = 1; /* no share may be the whole, which takes 17 bits */
    for (int32_t k = 0; k < LETTERS; k++) {
        letter_facts *l = &s->letter[k];
        l->both = -(k > 0 && FLOOR[k] <= m->high && FLOOR[k] <= -m->low);
        l->minus = -(FLOOR[k] > m->high);
        int32_t end = k == last && most ? most + 1 : k + 1 < LETTERS ? FLOOR[k + 1] : 0;
        l->open = 0;
        while (FLOOR[k] + (1 << l->open) < end) l->open++;
        for (int32_t i = 0; i < LETTERS; i++)
            l->target[i] = (int16_t)(i >= last ? 0 : i < k ? LEAST * (i + 1) - WHOLE : LEAST * (i - last));
    }
    s->first.before = -WHOLE;
    for (int32_t k = 0; k < LEVELS; k++) {
        alphabet *far = &s->at[k].far;
        for (int32_t i = 0; i < LETTERS; i++) far->end[i] = i < last ? m->prior[LETTERS * k + i] : 0;
        far->count = 0;
        far->before = -WHOLE;
        for (int32_t l = 0; l < LEFTS; l++) s->at[k].near[l] = *far;
    }
    for (int32_t k = 0; k < 9; k++) s->sign[k] = 32768;
    for (int32_t n = 0; n < COUNTS; n++) {
        int32_t rate = 32768 / (n + 16);
        s->rate[n] = (int16_t)(rate > least ? rate : least);
        s->next[n] = (uint16_t)(n + (n < COUNTS - 1));
    }
}

/* What is known of a column: its mean magnitude in the rows above, 16 fractional bits, and the sign above. */
typedef struct {
    int32_t mean, sign;
} cell;

/* One stream on its way: the matrix that it fills, where it is, and what predicts the next value. */
typedef struct {
    coder c;
    estimates *s;
    terse_model m;
    int32_t *values, *line; /* line: the end of the row that is being filled */
    cell *cells;            /* their end */
    int64_t i, j;           /* the row; the place in it, counted from -columns up to 0 */
    /* Mean magnitude along the row, 16 fractional bits; the predicted level sees it without the left neighbour
     * (`older`), which chooses among the alphabets of that level instead. left: three times its sign. */
    int64_t row, older, settle, left, beside;
} lane;

INLINE void begin_row(lane *v) {
    int64_t least = 65536 >> v->m.settle, settle = v->i < 65536 ? 65536 / (v->i + 2) : 0;
    v->settle = settle > least ? settle : least;
    v->line = v->values + (v->i + 1) * v->m.columns;
    v->j = -v->m.columns;
    v->left = v->beside = 0;
}

static int64_t begin_lane(lane *v, coder c, estimates *s, const terse_model *m, int32_t *values, int32_t *work) {
    if (m->rows < 1 || m->columns < 1 || m->low > 0 || m->high < 0 || m->low < -(1 << 30) || m->high > 1 << 30 ||
        m->blend < 0 || m->blend > 16 || m->slow < 4 || m->slow > 9 || m->memory < 0 || m->memory > 15 ||
        m->settle < 0 || m->settle > 15)
        return TERSE_EARGUMENT;
    cell *cells = (cell *)work;
    *v = (lane){.c = c, .s = s, .m = *m, .values = values, .cells = cells + m->columns, .row = 32768, .older = 32768};
    for (int64_t j = 0; j < m->columns; j++) cells[j] = (cell){32768, 0};
    begin(s, m);
    begin_row(v);
    return 0;
}

/* One value on its way through the three parts of a step. */
typedef struct {
    alphabet *far, *near;
    const letter_facts *facts;
    int32_t *sign;
    int64_t letter, mean;
    int32_t value, minus; /* minus: all ones if the value is negative, else 0 */
    uint32_t size;
} coding;

#define KEEP(pointer) __asm__("" : "+r"(pointer)) /* in a register: the compiler would work it out again and again */

INLINE coding predict(const lane *v, const int32_t decode) {
    const cell *above = v->cells + v->j;
    coding o = {.mean = above->mean};
    int64_t level = v->m.level[(v->older + ((o.mean - v->older) * v->m.blend >> 4)) >> 8];
    o.near = v->s->at[level].near;
    KEEP(o.near);
    o.far = o.near + LEFTS;
    o.near += v->beside;
    KEEP(o.near);
    o.sign = &v->s->sign[v->left + above->sign];
    if (!decode) {
        o.value = v->line[v->j];
        o.minus = -(o.value < 0);
        o.size = (uint32_t)((o.value ^ o.minus) - o.minus);
        o.letter = letter_of(o.size);
    }
    return o;
}

/* The letter with its sign. Nothing here depends on a guess. */
INLINE void code_letter(lane *v, coding *o, const int32_t decode) {
    uint64_t state = v->c.state;
    int32_t slot = (int16_t)(state | WHOLE);
    if (decode) o->letter = find(o->far, o->near, slot);
    const int16_t *a = o->far->end + o->letter, *b = o->near->end + o->letter;
    o->facts = &v->s->letter[o->letter];
    KEEP(o->facts);
    int32_t start = (a[-1] + b[-1] + 1) >> 1;
    uint32_t share = 2 * (uint32_t)(((a[0] + b[0] + 1) >> 1) - start), both = (uint32_t)o->facts->both;
    uint32_t split = (((share - 2) * (uint32_t)*o->sign >> 16) + 1) & both;
    if (decode) {
        uint32_t inside = 2 * (uint32_t)(slot - start) + (uint32_t)(state >> 15 & 1);
        o->minus = -(inside < split);
        inside -= split & ~(uint32_t)o->minus;
        share = o->minus ? split : share - split;
        v->c.state = share * (state >> 16) + inside;
        refill(&v->c);
    } else {
        uint32_t from = 2 * (uint32_t)(start + WHOLE);
        o->minus &= both;
        list(&v->c, o->minus ? from : from + split, o->minus ? split : share - split);
    }
}

/* Everything learns, and what the letter leaves open of the magnitude is coded. */
INLINE void learn_value(lane *v, const coding *o, const int32_t decode) {
    const letter_facts *facts = o->facts;
    cell *above = v->cells + v->j;
    int64_t seen = o->letter, found = seen, minus = o->minus | facts->minus;
    learn(o->far, facts->target, v->s);
    learn(o->near, facts->target, v->s);
    *o->sign += ((o->minus & 65535) - *o->sign) >> 6 & facts->both;
    v->beside = seen < LEFTS - 1 ? seen : LEFTS - 1;
    v->left = (seen > 0) - minus;
    above->sign = (int32_t)v->left;
    v->left *= 3;
    if (__builtin_expect(seen >= EXACT, 0)) {
        uint32_t rest = o->size - FLOOR[seen];
        if (seen == LETTERS - 1) {
            coder lent = v->c; /* a copy whose address is taken, so that v->c need not live in memory */
            rest = code_tail(&lent, rest, decode);
            v->c = lent;
        } else {
            rest = code_bits(&v->c, rest, facts->open, decode);
        }
        found = FLOOR[seen] + (int64_t)rest;
        seen = found < PEAK ? found : PEAK;
    }
    if (decode) v->line[v->j] = (int32_t)((found ^ minus) - minus);
    seen <<= 16;
    above->mean = (int32_t)(o->mean + ((seen - o->mean) * v->settle >> 16));
    v->older = v->row;
    v->row += (seen - v->row) >> v->m.memory;
    if (__builtin_expect(++v->j == 0, 0)) {
        v->i++;
        begin_row(v);
    }
}

INLINE int64_t left_of(const lane *v) {
    return (v->m.rows - v->i) * v->m.columns - v->m.columns - v->j;
}

/* To the end of the lane's matrix. */
static void run_one(lane *a, const int32_t decode) {
    lane x = *a;
    for (int64_t left = left_of(&x); left > 0; left--) {
        coding p = predict(&x, decode);
        code_letter(&x, &p, decode);
        learn_value(&x, &p, decode);
    }
    *a = x;
}

/* To the end of the shorter one. The order lets the processor work on both values at once. */
static void run_two(lane *a, lane *b) {
    lane x = *a, y = *b;
    int64_t m = left_of(&x), n = left_of(&y);
    for (int64_t left = m < n ? m : n; left > 0; left--) {
        coding p = predict(&x, 1), q = predict(&y, 1);
        code_letter(&x, &p, 1);
        code_letter(&y, &q, 1);
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
        uint64_t slot = x % share + start; /* its lowest bit goes on top, which saves the decoder a step */
        x = x / share << 16 | slot >> 1 | (slot & 1) << 15;
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

#include "compiler.h"
#include "terse.h"

#include <string.h>

/* Rows of numbers that are not zero. For one input each looks up what it multiplies; for many inputs, or places of an image,
 * each is multiplied by a window of them, whose sums are in registers. Columns have 16 bits, half of a float. */

#if defined(__x86_64__) && defined(VECTORS)
#define X86 1
#include <immintrin.h>
#define EACH _Pragma("GCC unroll 16") /* before arrays of registers are taken apart */
#endif

#define TILE 128 /* of a window, in registers of the widest kind */
#define INPUTS 8 /* of a mask at a time */

typedef struct {
    const float *values;     /* or NULL: then book[codes[i]] */
    const uint8_t *codes;
    const float *book;
} numbers;

INLINE float number(const numbers *v, int64_t i) {
    return v->values ? v->values[i] : v->book[v->codes[i]];
}

/* Taken one by one: faster than the gathers of AVX2 and AVX-512. */
INLINE float dot(const numbers *v, const uint16_t *columns, int64_t from, int64_t to, const float *x) {
    few a = NOUGHT, b = NOUGHT;
    int64_t i = from;
#define VALUE(k) number(v, k)
#define INPUT(k) x[columns[k]]
    for (; i + 2 * FEW <= to; i += 2 * FEW) {
        a += TAKEN(VALUE, i) * TAKEN(INPUT, i);
        b += TAKEN(VALUE, i + FEW) * TAKEN(INPUT, i + FEW);
    }
    a += b;
    float sum = ADDED(a);
    for (; i < to; i++) sum += number(v, i) * x[columns[i]];
    return sum;
}

/* `n` <= TILE sums: of each number times what lies at its column's place. */
INLINE void window(const numbers *v, const uint16_t *columns, int64_t from, int64_t to, const float *x, const int32_t *place,
                   int64_t n, float *sums) {
    for (int64_t i = from; i < to; i++) {
        const float *in = x + place[columns[i]], w = number(v, i);
        for (int64_t p = 0; p < n; p++) sums[p] += w * in[p];
    }
}

INLINE void masked(const float *values, const uint16_t *mask, int64_t words, const float *x, int64_t stride, int32_t inputs,
                   float *sums) {
    memset(sums, 0, (size_t)inputs * sizeof *sums);
    for (int64_t j = 0; j < words; j++)
        for (int32_t m = mask[j], l = 0; m; m >>= 1, l++) {
            if (!(m & 1)) continue;
            for (int32_t b = 0; b < inputs; b++) sums[b] += *values * x[b * stride + 16 * j + l];
            values++;
        }
}

#ifdef X86
#define AVX512 __attribute__((target("avx512f,avx512bw")))

#define STEP(load, apart)                                                                                     \
    EACH for (int32_t a = 0; a < apart; a++) {                                                                \
        const float *in = x + place[columns[i + a]];                                                          \
        __m512 w = _mm512_set1_ps(number(v, i + a));                                                          \
        EACH for (int32_t p = 0; p < parts; p++) s[a][p] = _mm512_fmadd_ps(w, load(p), s[a][p]);                   \
    }
#define WHOLE(p) _mm512_loadu_ps(in + 16 * (p))
#define MASKED(p) _mm512_maskz_loadu_ps((p) + 1 < parts ? 0xffff : last, in + 16 * (p))

__attribute__((target("avx512f,avx512bw"), always_inline)) static inline void
window_parts(const numbers *v, const uint16_t *columns, int64_t from, int64_t to, const float *x, const int32_t *place,
             __mmask16 last, const int32_t parts, float *sums) {
    const int32_t apart = parts >= 4 ? 2 : 8 / parts; /* sums that do not wait for each other */
    __m512 s[8][TILE / 16];
    int64_t i = from;
    EACH for (int32_t a = 0; a < apart; a++)
        EACH for (int32_t p = 0; p < parts; p++) s[a][p] = _mm512_setzero_ps();
    if (last == 0xffff)
        for (; i + apart <= to; i += apart) STEP(WHOLE, apart)
    for (; i + apart <= to; i += apart) STEP(MASKED, apart)
    for (; i < to; i++) STEP(MASKED, 1)
    EACH for (int32_t p = 0; p < parts; p++) {
        EACH for (int32_t a = 1; a < apart; a++) s[0][p] = _mm512_add_ps(s[0][p], s[a][p]);
        _mm512_mask_storeu_ps(sums + 16 * p, p + 1 < parts ? 0xffff : last, s[0][p]);
    }
}

AVX512 static void window_avx512(const numbers *v, const uint16_t *columns, int64_t from, int64_t to, const float *x,
                                 const int32_t *place, int64_t n, float *sums) {
    __mmask16 last = (__mmask16)(0xffff >> (-n & 15));
#define CASE(parts) case parts: window_parts(v, columns, from, to, x, place, last, parts, sums); break;
    switch ((n + 15) / 16) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) default: break; }
#undef CASE
}

__attribute__((target("avx512f,avx512bw,popcnt"), always_inline)) static inline void
masked_avx512(const float *values, const uint16_t *mask, int64_t words, const float *x, int64_t stride, const int32_t inputs,
              float *sums) {
    __m512 s[INPUTS][2];
    EACH for (int32_t b = 0; b < inputs; b++) s[b][0] = s[b][1] = _mm512_setzero_ps();
    for (int64_t j = 0; j < words; j++) {
        __m512 w = _mm512_maskz_expand_ps(mask[j], _mm512_loadu_ps(values));
        values += __builtin_popcount(mask[j]);
        EACH for (int32_t b = 0; b < inputs; b++)
            s[b][0] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + b * stride + 16 * j), s[b][0]);
        if (inputs < 4 && ++j < words) { /* else one sum waits for itself */
            w = _mm512_maskz_expand_ps(mask[j], _mm512_loadu_ps(values));
            values += __builtin_popcount(mask[j]);
            EACH for (int32_t b = 0; b < inputs; b++)
                s[b][1] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + b * stride + 16 * j), s[b][1]);
        }
    }
    EACH for (int32_t b = 0; b < inputs; b++) sums[b] = _mm512_reduce_add_ps(_mm512_add_ps(s[b][0], s[b][1]));
}

__attribute__((target("avx512f,avx512bw,popcnt"))) static void
masked_some(const float *values, const uint16_t *mask, int64_t words, const float *x, int64_t stride, int32_t inputs,
            float *sums) {
    if (inputs == 8) masked_avx512(values, mask, words, x, stride, 8, sums);
    else if (inputs == 4) masked_avx512(values, mask, words, x, stride, 4, sums);
    else if (inputs == 2) masked_avx512(values, mask, words, x, stride, 2, sums);
    else masked_avx512(values, mask, words, x, stride, 1, sums);
}
#endif

INLINE void dots(const numbers *v, const uint16_t *columns, const int64_t *starts, int64_t first, int64_t last, const float *x,
                 float *y) {
    for (int64_t r = first; r < last; r++) y[r] = dot(v, columns, starts[r], starts[r + 1], x);
}

/* Each a loop of its own. */
INLINE void either(const float *values, const uint8_t *codes, const float *book, const uint16_t *columns,
                   const int64_t *starts, int64_t first, int64_t last, const float *x, float *y) {
    const numbers plain = {values, 0, 0}, shared = {0, codes, book};
    if (values) dots(&plain, columns, starts, first, last, x, y);
    else dots(&shared, columns, starts, first, last, x, y);
}

#ifdef X86
__attribute__((target("avx2"))) static void either_avx2(const float *values, const uint8_t *codes, const float *book,
                                                        const uint16_t *columns, const int64_t *starts, int64_t first,
                                                        int64_t last, const float *x, float *y) {
    either(values, codes, book, columns, starts, first, last, x, y);
}
#endif

int64_t terse_sparse_dot(const float *values, const uint8_t *codes, const float *book, const uint16_t *columns,
                         const int64_t *starts, int64_t first, int64_t last, const float *x, float *y, int64_t simd) {
    if (first < 0 || last < first) return TERSE_EARGUMENT;
#ifdef X86
    if (simd) {
        either_avx2(values, codes, book, columns, starts, first, last, x, y);
        return last - first;
    }
#else
    (void)simd;
#endif
    either(values, codes, book, columns, starts, first, last, x, y);
    return last - first;
}

#define LINE 64
#define SOON 2 /* columns until one is added, when it is asked for: what is skipped ends what a processor foresees */

/* Numbers of a column lie in different rows, so that none waits for another. */
INLINE void column(const uint8_t *codes, const uint16_t *rows, int64_t from, int64_t to, const float *products, float *y) {
    int64_t i = from;
    for (; i + 4 <= to; i += 4) {
        const uint16_t *r = rows + i;
        const uint8_t *c = codes + i;
        float a = y[r[0]] + products[c[0]], b = y[r[1]] + products[c[1]];
        float d = y[r[2]] + products[c[2]], e = y[r[3]] + products[c[3]];
        y[r[0]] = a, y[r[1]] = b, y[r[2]] = d, y[r[3]] = e;
    }
    for (; i < to; i++) y[rows[i]] += products[codes[i]];
}

int64_t terse_sparse_columns(const uint8_t *codes, const float *book, int64_t size, const uint16_t *rows,
                             const int64_t *starts, int64_t columns, int64_t height, int64_t block, int64_t first,
                             int64_t last, const int64_t *kept, int64_t count, const float *x, float *y) {
    if (size < 0 || size > 256 || columns < 0 || height < 0 || block < 1 || count < 0 || first < 0 || last < first ||
        last > (height + block - 1) / block)
        return TERSE_EARGUMENT;
    for (int64_t b = first; b < last; b++) {
        const int64_t *own = starts + b * (columns + 1);
        float *out = y + b * block, products[256];
        memset(out, 0, (size_t)(height - b * block < block ? height - b * block : block) * sizeof *out);
        for (int64_t k = 0; k < count; k++) {
            if (k + SOON < count) {
                const int64_t *next = own + kept[k + SOON];
                for (int64_t i = next[0]; i < next[1]; i += LINE) FETCH(codes + i);
                for (int64_t i = next[0]; i < next[1]; i += LINE / 2) FETCH(rows + i);
            }
            for (int64_t i = 0; i < size; i++) products[i] = book[i] * x[kept[k]];
            column(codes, rows, own[kept[k]], own[kept[k] + 1], products, out);
        }
    }
    return last - first;
}

int64_t terse_sparse_windows(const float *values, const uint8_t *codes, const float *book, const uint16_t *columns,
                             const int64_t *starts, int64_t first, int64_t last, const float *x, const int32_t *place,
                             int64_t width, float *y, int64_t stride, int64_t simd) {
    const numbers v = {values, codes, book};
    if (first < 0 || last < first || width < 0) return TERSE_EARGUMENT;
    for (int64_t p = 0; p < width; p += TILE) {
        int64_t n = width - p < TILE ? width - p : TILE;
        for (int64_t r = first; r < last; r++) {
            float *out = y + r * stride + p;
#ifdef X86
            if (simd == 2) {
                window_avx512(&v, columns, starts[r], starts[r + 1], x + p, place, n, out);
                continue;
            }
#else
            (void)simd;
#endif
            memset(out, 0, (size_t)n * sizeof *out);
            window(&v, columns, starts[r], starts[r + 1], x + p, place, n, out);
        }
    }
    return last - first;
}

int64_t terse_masked_product(const float *values, const uint16_t *mask, int64_t rows, int64_t words, const int64_t *starts,
                             const float *x, int64_t stride, int64_t count, int64_t first, int64_t last, float *y,
                             int64_t simd) {
    if (rows < 0 || words < 0 || stride < 16 * words || count < 0 || first < 0 || last < first || last > rows)
        return TERSE_EARGUMENT;
    for (int64_t r = first; r < last; r++) {
        const uint16_t *own = mask + r * words;
        for (int64_t b = 0; b < count;) {
            int32_t inputs = count - b >= INPUTS ? INPUTS : count - b >= 4 ? 4 : count - b >= 2 ? 2 : 1;
            float sums[INPUTS];
#ifdef X86
            if (simd == 2) masked_some(values + starts[r], own, words, x + b * stride, stride, inputs, sums);
            else
#else
            (void)simd;
#endif
                masked(values + starts[r], own, words, x + b * stride, stride, inputs, sums);
            for (int32_t i = 0; i < inputs; i++, b++) y[b * rows + r] = sums[i];
        }
    }
    return last - first;
}

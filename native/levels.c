#include "compiler.h"
#include "terse.h"

#include <string.h>

/* Levels times inputs in integers. A row's levels are unsigned numbers of 8, 4 or 2 bits and an offset; an input is a sum of
 * signed digits to the base of 256, of which the products are exact. 16 rows lie side by side, four columns of each in 32
 * bits, so that one instruction multiplies 64 levels and nothing is added up across a vector. Floats come in once for a
 * group, in an order that all paths share: all say the same to the last bit. */

#if defined(__x86_64__) && defined(VECTORS)
#define X86 1
#include <immintrin.h>
#define EACH _Pragma("GCC unroll 16") /* before arrays of registers are taken apart */
#endif

#define ROWS TERSE_ROWS
#define COLUMNS TERSE_COLUMNS
#define PARTS (COLUMNS / 4)
#define MOST 3 /* digits */
#define WIDE 8 /* inputs at a time */

typedef struct {
    const uint8_t *weights; /* of these rows */
    const float *scale;     /* [groups][ROWS] */
    const int32_t *offset;  /* [groups][ROWS], or NULL: `shift` everywhere */
    int32_t shift;
    int64_t groups, width; /* columns of a group, a multiple of COLUMNS */
    const int8_t *digits;   /* [inputs][stride]: [groups * width / COLUMNS][planes][COLUMNS] */
    int64_t stride;
    const int32_t *sums;    /* [inputs][planes][groups] */
} block;

/* Rounds to the nearest integer, ties to even, without a library. */
INLINE int32_t rounded(double value) {
    int64_t bits;
    value += 6755399441055744.0; /* 1.5 * 2^52: the last bits of the sum are the integer */
    memcpy(&bits, &value, sizeof bits);
    return (int32_t)bits;
}

INLINE int32_t magnitude(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7fffffff;
}

int64_t terse_levels_digits(const float *x, const float *factor, int64_t count, int64_t n, int64_t group, int64_t width,
                            int64_t planes, int8_t *digits, int32_t *sums, double *steps) {
    static const double most[MOST] = {127, 32639, 8355711}; /* 127, and 127 in each digit behind it */
    if (count < 0 || n < 0 || group < 1 || width < group || width % COLUMNS || planes < 1 || planes > MOST)
        return TERSE_EARGUMENT;
    int64_t groups = (n + group - 1) / group;
    for (int64_t b = 0; b < count; b++, x += n, digits += TERSE_STRIDE(groups, width, planes), sums += planes * groups) {
        int32_t largest = 0; /* the bits of floats without their sign are in the floats' order, and may be compared in vectors */
        for (int64_t i = 0; i < n; i++) {
            int32_t size = magnitude(factor ? x[i] * factor[i] : x[i]);
            largest = size > largest ? size : largest;
        }
        const int32_t finite = largest < 0x7f800000;
        const uint64_t nan = (uint64_t)0x7ff8 << 48;
        float size;
        memcpy(&size, &largest, sizeof size);
        double step = finite ? size / most[planes - 1] : 0, inverse = step > 0 ? 1 / step : 0;
        steps[b] = step;
        if (!finite) memcpy(steps + b, &nan, sizeof nan);
        int8_t *at = digits;
        for (int64_t g = 0; g < groups; g++) {
            int64_t end = (g + 1) * group < n ? (g + 1) * group : n;
            int32_t sum[MOST] = {0};
            for (int64_t i = g * group; i < g * group + width; i += COLUMNS) {
                int32_t left[COLUMNS] = {0};
                for (int32_t j = 0; j < COLUMNS && i + j < end; j++)
                    left[j] = rounded((double)(factor ? x[i + j] * factor[i + j] : x[i + j]) * inverse);
                for (int64_t p = 0; p < planes; p++, at += COLUMNS)
                    for (int32_t j = 0; j < COLUMNS; j++) {
                        at[j] = (int8_t)(uint8_t)left[j];
                        sum[p] += at[j];
                        left[j] = (left[j] - at[j]) / 256;
                    }
            }
            for (int64_t p = 0; p < planes; p++) sums[p * groups + g] = sum[p];
        }
    }
    return count;
}

/* Sums of the scaled products [inputs][ROWS]. */
INLINE void plain(const block *k, const int32_t bits, const int32_t inputs, const int32_t planes, float *out) {
    for (int32_t b = 0; b < inputs; b++) {
        const uint8_t *w = k->weights;
        const int8_t *digits = k->digits + b * k->stride;
        float sum[ROWS] = {0};
        for (int64_t g = 0; g < k->groups; g++) {
            int32_t all[MOST][ROWS];
            for (int32_t p = 0; p < planes; p++)
                for (int32_t r = 0; r < ROWS; r++)
                    all[p][r] = (k->offset ? k->offset[g * ROWS + r] : k->shift) * k->sums[(b * planes + p) * k->groups + g];
            for (int64_t c = 0; c < k->width; c += COLUMNS, w += 2 * COLUMNS * bits, digits += COLUMNS * planes)
                for (int32_t part = 0; part < PARTS; part++) {
                    const uint8_t *in = w + part * bits / 8 * 4 * ROWS;
                    int32_t down = part * bits % 8;
                    for (int32_t p = 0; p < planes; p++) {
                        const int8_t *d = digits + COLUMNS * p + 4 * part;
                        for (int32_t r = 0; r < ROWS; r++)
                            for (int32_t j = 0; j < 4; j++)
                                all[p][r] += (in[4 * r + j] >> down & ((1 << bits) - 1)) * d[j];
                    }
                }
            for (int32_t r = 0; r < ROWS; r++) {
                float whole = (float)all[planes - 1][r];
                for (int32_t p = planes - 2; p >= 0; p--) whole = whole * 256 + (float)all[p][r];
                sum[r] += k->scale[g * ROWS + r] * whole;
            }
        }
        memcpy(out + b * ROWS, sum, sizeof sum);
    }
}

#ifdef X86
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define AVX2 __attribute__((target("avx2")))

INLINE int32_t four(const int8_t *digits) {
    int32_t value;
    memcpy(&value, digits, sizeof value);
    return value;
}

__attribute__((target("avx512f,avx512bw,avx512vnni"), always_inline)) static inline void
vnni(const block *k, const int32_t bits, const int32_t inputs, const int32_t planes, float *out) {
    const int32_t apart = inputs * planes >= PARTS ? 1 : PARTS / (inputs * planes); /* sums that do not wait for each other */
    const int8_t *digits = k->digits;
    const __m512i low = _mm512_set1_epi8((char)((1 << bits) - 1)), base = _mm512_set1_epi32(256);
    const __m512 radix = _mm512_cvtepi32_ps(base);
    const uint8_t *w = k->weights;
    __m512 sum[WIDE];
    EACH for (int32_t b = 0; b < inputs; b++) sum[b] = _mm512_setzero_ps();
    for (int64_t g = 0; g < k->groups; g++) {
        __m512i all[WIDE][MOST][PARTS];
        const __m512i shift = k->offset ? _mm512_loadu_si512(k->offset + g * ROWS) : _mm512_set1_epi32(k->shift);
        EACH for (int32_t b = 0; b < inputs; b++)
            EACH for (int32_t p = 0; p < planes; p++) {
                all[b][p][0] = _mm512_mullo_epi32(shift, _mm512_set1_epi32(k->sums[(b * planes + p) * k->groups + g]));
                EACH for (int32_t a = 1; a < apart; a++) all[b][p][a] = _mm512_setzero_si512();
            }
        for (int64_t c = 0; c < k->width; c += COLUMNS, w += 2 * COLUMNS * bits, digits += COLUMNS * planes) {
            __m512i u[PARTS];
            EACH for (int32_t part = 0; part < PARTS; part++) {
                __m512i v = _mm512_loadu_si512(w + part * bits / 8 * 4 * ROWS);
                u[part] = bits == 8 ? v : _mm512_and_si512(_mm512_srli_epi16(v, (unsigned)(part * bits % 8)), low);
            }
            EACH for (int32_t b = 0; b < inputs; b++)
                EACH for (int32_t p = 0; p < planes; p++) {
                    const int8_t *d = digits + b * k->stride + COLUMNS * p;
                    EACH for (int32_t part = 0; part < PARTS; part++)
                        all[b][p][part % apart] =
                            _mm512_dpbusd_epi32(all[b][p][part % apart], u[part], _mm512_set1_epi32(four(d + 4 * part)));
                }
        }
        EACH for (int32_t b = 0; b < inputs; b++) {
            __m512 whole = _mm512_setzero_ps();
            EACH for (int32_t p = planes - 1; p >= 0; p--) {
                EACH for (int32_t a = 1; a < apart; a++) all[b][p][0] = _mm512_add_epi32(all[b][p][0], all[b][p][a]);
                __m512 digit = _mm512_cvtepi32_ps(all[b][p][0]);
                whole = p == planes - 1 ? digit : _mm512_add_ps(_mm512_mul_ps(whole, radix), digit);
            }
            sum[b] = _mm512_add_ps(sum[b], _mm512_mul_ps(_mm512_loadu_ps(k->scale + g * ROWS), whole));
        }
    }
    EACH for (int32_t b = 0; b < inputs; b++) _mm512_storeu_ps(out + b * ROWS, sum[b]);
}

/* Products of pairs in 16 bits, which hold four of them where levels have at most four bits; of eight bits two halves are
 * taken, one after the other. */
__attribute__((target("avx2"), always_inline)) static inline void
avx2(const block *k, const int32_t bits, const int32_t inputs, const int32_t planes, float *out) {
    const __m256i low = _mm256_set1_epi8(bits == 2 ? 3 : 15), one = _mm256_set1_epi16(1), high = _mm256_set1_epi16(16);
    const __m256 radix = _mm256_set1_ps(256);
    for (int32_t half = 0; half < 2; half++)
        EACH for (int32_t b = 0; b < inputs; b++) {
            const uint8_t *w = k->weights + 32 * half;
            const int8_t *digits = k->digits + b * k->stride;
            __m256 sum = _mm256_setzero_ps();
            for (int64_t g = 0; g < k->groups; g++) {
                __m256i all[MOST];
                const int64_t at = g * ROWS + 8 * half;
                const __m256i shift = k->offset ? _mm256_loadu_si256((const __m256i *)(k->offset + at))
                                                : _mm256_set1_epi32(k->shift);
                EACH for (int32_t p = 0; p < planes; p++)
                    all[p] = _mm256_mullo_epi32(shift, _mm256_set1_epi32(k->sums[(b * planes + p) * k->groups + g]));
                for (int64_t c = 0; c < k->width; c += COLUMNS, w += 2 * COLUMNS * bits, digits += COLUMNS * planes) {
                    __m256i u[PARTS], upper[PARTS];
                    EACH for (int32_t part = 0; part < PARTS; part++) {
                        __m256i v = _mm256_loadu_si256((const __m256i *)(w + part * bits / 8 * 4 * ROWS));
                        u[part] = _mm256_and_si256(_mm256_srli_epi16(v, part * bits % 8), low);
                        upper[part] = bits == 8 ? _mm256_and_si256(_mm256_srli_epi16(v, 4), low) : u[part];
                    }
                    EACH for (int32_t p = 0; p < planes; p++) {
                        const int8_t *d = digits + COLUMNS * p;
                        __m256i pairs = _mm256_setzero_si256(), above = pairs;
                        EACH for (int32_t part = 0; part < PARTS; part++) {
                            __m256i input = _mm256_set1_epi32(four(d + 4 * part));
                            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(u[part], input));
                            if (bits == 8) above = _mm256_add_epi16(above, _mm256_maddubs_epi16(upper[part], input));
                        }
                        all[p] = _mm256_add_epi32(all[p], _mm256_madd_epi16(pairs, one));
                        if (bits == 8) all[p] = _mm256_add_epi32(all[p], _mm256_madd_epi16(above, high));
                    }
                }
                __m256 whole = _mm256_cvtepi32_ps(all[planes - 1]);
                EACH for (int32_t p = planes - 2; p >= 0; p--)
                    whole = _mm256_add_ps(_mm256_mul_ps(whole, radix), _mm256_cvtepi32_ps(all[p]));
                sum = _mm256_add_ps(sum, _mm256_mul_ps(_mm256_loadu_ps(k->scale + at), whole));
            }
            _mm256_storeu_ps(out + b * ROWS + 8 * half, sum);
        }
}

#define PLANES(f, bits, inputs)                                        \
    {                                                                  \
        if (planes == 1) f(k, bits, inputs, 1, out);                   \
        else if (planes == 2) f(k, bits, inputs, 2, out);              \
        else f(k, bits, inputs, 3, out);                               \
    }
#define INPUTS(f, bits)                                                \
    {                                                                  \
        if (inputs == 8) {                                             \
            if (planes == 1) f(k, bits, 8, 1, out);                    \
            else f(k, bits, 8, 2, out);                                \
        }                                                              \
        else if (inputs == 4) PLANES(f, bits, 4)                       \
        else if (inputs == 2) PLANES(f, bits, 2)                       \
        else PLANES(f, bits, 1)                                        \
    }

VNNI static void vnni_block(const block *k, int32_t bits, int32_t inputs, int32_t planes, float *out) {
    if (bits == 8) INPUTS(vnni, 8)
    else if (bits == 4) INPUTS(vnni, 4)
    else INPUTS(vnni, 2)
}

AVX2 static void avx2_block(const block *k, int32_t bits, int32_t inputs, int32_t planes, float *out) {
    if (bits == 8) PLANES(avx2, 8, inputs)
    else if (bits == 4) PLANES(avx2, 4, inputs)
    else PLANES(avx2, 2, inputs)
}
#endif

int64_t terse_levels_product(const uint8_t *weights, int64_t bits, int64_t rows, int64_t groups, int64_t width,
                             const float *scale, const int32_t *offset, int64_t shift, const int8_t *digits,
                             const int32_t *sums, const double *steps, int64_t count, int64_t planes, int64_t first,
                             int64_t last, float *y, int64_t simd) {
    if ((bits != 8 && bits != 4 && bits != 2) || rows < 0 || groups < 0 || width < 0 || width % COLUMNS || count < 0 ||
        planes < 1 || planes > MOST || first < 0 || last < first || last > (rows + ROWS - 1) / ROWS)
        return TERSE_EARGUMENT;
    const int64_t bytes = groups * width * ROWS * bits / 8, stride = TERSE_STRIDE(groups, width, planes);
    for (int64_t r = first; r < last; r++) {
        for (int64_t b = 0; b < count;) {
            int32_t inputs = count - b >= WIDE && planes < MOST ? WIDE : count - b >= 4 ? 4 : count - b >= 2 ? 2 : 1;
            float out[WIDE * ROWS];
            block k = {weights + r * bytes, scale + r * groups * ROWS, offset ? offset + r * groups * ROWS : 0, (int32_t)shift,
                       groups, width, digits + b * stride, stride, sums + b * planes * groups};
#ifdef X86
            if (simd == 2 && terse_simd() & 4) vnni_block(&k, (int32_t)bits, inputs, (int32_t)planes, out);
            else if (simd) avx2_block(&k, (int32_t)bits, inputs, (int32_t)planes, out);
            else
#else
            (void)simd;
#endif
                plain(&k, (int32_t)bits, inputs, (int32_t)planes, out);
            for (int32_t i = 0; i < inputs; i++, b++)
                for (int64_t row = r * ROWS; row < (r + 1) * ROWS && row < rows; row++)
                    y[b * rows + row] = (float)(out[i * ROWS + row % ROWS] * steps[b]);
        }
    }
    return last - first;
}

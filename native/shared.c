#include "compiler.h"
#include "terse.h"

#include <string.h>

/* Shared values. Of a codebook of floats, numbers of 4 or 8 bits are looked up in registers: 16 rows lie side by side, so many
 * columns of each in 32 bits as fit. Of vectors (product quantization) all codewords are multiplied by their part of the
 * input once, and rows add up what they find. */

#if defined(__x86_64__) && defined(VECTORS)
#define X86 1
#include <immintrin.h>
#define EACH _Pragma("GCC unroll 16") /* before arrays of registers are taken apart */
#endif

#define ROWS TERSE_ROWS
#define BLOCKS (TERSE_ROOM / 256)
#define MOST 8 /* inputs at a time */

typedef struct {
    const uint32_t *codes; /* of these rows: [words][ROWS] */
    const float *book;     /* [256] */
    int64_t words;
    const float *x; /* [inputs][stride] */
    int64_t stride;
} block;

INLINE void plain(const block *k, const int32_t bits, const int32_t inputs, float *out) {
    const int32_t each = 32 / bits;
    memset(out, 0, (size_t)inputs * ROWS * sizeof *out);
    for (int64_t j = 0; j < k->words; j++)
        for (int32_t t = 0; t < each; t++) {
            float w[ROWS];
            for (int32_t r = 0; r < ROWS; r++) w[r] = k->book[k->codes[j * ROWS + r] >> (bits * t) & ((1u << bits) - 1)];
            for (int32_t b = 0; b < inputs; b++)
                for (int32_t r = 0; r < ROWS; r++) out[b * ROWS + r] += w[r] * k->x[b * k->stride + j * each + t];
        }
}

#ifdef X86
#define AVX512 __attribute__((target("avx512f,avx512bw")))

/* `parts` registers of 16 codewords. */
__attribute__((target("avx512f,avx512bw"), always_inline)) static inline void
registers(const block *k, const int32_t bits, const int32_t parts, const int32_t inputs, float *out) {
    const int32_t each = 32 / bits;
    __m512 book[16], sum[MOST][2];
    EACH for (int32_t p = 0; p < parts; p++) book[p] = _mm512_loadu_ps(k->book + 16 * p);
    const int32_t apart = inputs < 4 ? 2 : 1; /* sums that do not wait for each other */
    EACH for (int32_t b = 0; b < inputs; b++) sum[b][0] = sum[b][1] = _mm512_setzero_ps();
    for (int64_t j = 0; j < k->words; j++) {
        __m512i codes = _mm512_loadu_si512(k->codes + j * ROWS);
        const float *x = k->x + j * each;
        EACH for (int32_t t = 0; t < each; t++) {
            __m512i code = _mm512_srli_epi32(codes, (unsigned)(bits * t));
            __m512 w = parts == 1 ? _mm512_permutexvar_ps(code, book[0]) : _mm512_permutex2var_ps(book[0], code, book[1]);
            if (parts > 2) { /* bit 5 */
                __mmask16 above = _mm512_test_epi32_mask(code, _mm512_set1_epi32(32));
                w = _mm512_mask_mov_ps(w, above, _mm512_permutex2var_ps(book[2], code, book[3]));
            }
            if (parts > 4) {
                __mmask16 five = _mm512_test_epi32_mask(code, _mm512_set1_epi32(32));
                __mmask16 six = _mm512_test_epi32_mask(code, _mm512_set1_epi32(64));
                __m512 high = _mm512_permutex2var_ps(book[4], code, book[5]);
                high = _mm512_mask_mov_ps(high, five, _mm512_permutex2var_ps(book[6], code, book[7]));
                w = _mm512_mask_mov_ps(w, six, high);
            }
            EACH for (int32_t b = 0; b < inputs; b++)
                sum[b][t % apart] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[b * k->stride + t]), sum[b][t % apart]);
        }
    }
    EACH for (int32_t b = 0; b < inputs; b++) _mm512_storeu_ps(out + b * ROWS, _mm512_add_ps(sum[b][0], sum[b][1]));
}

#define INPUTS(bits, parts)                                                                   \
    {                                                                                         \
        if (inputs == 8) registers(k, bits, parts, 8, out);                                   \
        else if (inputs == 4) registers(k, bits, parts, 4, out);                              \
        else if (inputs == 2) registers(k, bits, parts, 2, out);                              \
        else registers(k, bits, parts, 1, out);                                               \
    }

AVX512 static void registers_block(const block *k, int32_t bits, int64_t size, int32_t inputs, float *out) {
    if (bits == 4) INPUTS(4, 1)
    else if (size <= 32) INPUTS(8, 2)
    else if (size <= 64) INPUTS(8, 4)
    else INPUTS(8, 8)
}
#endif

int64_t terse_codes_product(const uint32_t *codes, int64_t bits, int64_t rows, int64_t words, const float *book, int64_t size,
                            const float *x, int64_t stride, int64_t count, int64_t first, int64_t last, float *y,
                            int64_t simd) {
    if ((bits != 4 && bits != 8) || rows < 0 || words < 0 || size < 0 || size > 1 << bits || count < 0 || first < 0 ||
        last < first || last > (rows + ROWS - 1) / ROWS || stride < words * (32 / bits))
        return TERSE_EARGUMENT;
    for (int64_t r = first; r < last; r++)
        for (int64_t b = 0; b < count;) {
            int32_t inputs = count - b >= MOST ? MOST : count - b >= 4 ? 4 : count - b >= 2 ? 2 : 1;
            float out[MOST * ROWS];
            block k = {codes + r * words * ROWS, book, words, x + b * stride, stride};
#ifdef X86
            if (simd == 2 && size <= 128) registers_block(&k, (int32_t)bits, size, inputs, out);
            else
#else
            (void)simd;
#endif
                plain(&k, (int32_t)bits, inputs, out);
            for (int32_t i = 0; i < inputs; i++, b++)
                for (int64_t row = r * ROWS; row < (r + 1) * ROWS && row < rows; row++)
                    y[b * rows + row] = out[i * ROWS + row % ROWS];
        }
    return last - first;
}

int64_t terse_blocks_product(const uint8_t *index, int64_t rows, int64_t blocks, const float *book, int64_t size, int64_t d,
                             const float *x, int64_t first, int64_t last, float *y, float *room) {
    if (rows < 0 || blocks < 0 || size < 0 || size > 256 || d < 1 || first < 0 || last < first || last > rows)
        return TERSE_EARGUMENT;
    memset(y + first, 0, (size_t)(last - first) * sizeof *y);
    for (int64_t from = 0; from < blocks; from += BLOCKS, index += rows * BLOCKS) {
        memset(room, 0, TERSE_ROOM * sizeof *room);
        for (int64_t j = from; j < from + BLOCKS && j < blocks; j++)
            for (int64_t i = 0; i < d; i++)
                for (int64_t c = 0; c < size; c++) room[(j - from) * 256 + c] += book[i * size + c] * x[j * d + i];
        for (int64_t r = first; r < last; r++) {
            const uint8_t *own = index + r * BLOCKS;
            few a = NOUGHT, b = NOUGHT;
#define FOUND(j) room[(j) * 256 + own[j]]
            for (int64_t j = 0; j < BLOCKS; j += 2 * FEW) {
                a += TAKEN(FOUND, j);
                b += TAKEN(FOUND, j + FEW);
            }
            a += b;
            y[r] += ADDED(a);
        }
    }
    return last - first;
}

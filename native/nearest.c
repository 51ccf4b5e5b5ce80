#include "compiler.h"
#include "terse.h"

#define WIDE TERSE_NEAREST

/* |x - c|^2 / 2 without the part that all codewords share. Each lane keeps its best, so that no instruction waits for a
 * comparison; sums go through the dimensions in their order, whatever the instructions. */
#ifdef VECTORS
#define PARTS 4
typedef float lanes __attribute__((vector_size(4 * WIDE / PARTS), aligned(4), may_alias));
typedef int32_t marks __attribute__((vector_size(4 * WIDE / PARTS), aligned(4), may_alias));
#else
#define PARTS WIDE
typedef float lanes;
typedef int32_t marks;
#endif

INLINE void nearest(const float *vectors, int64_t n, int32_t d, const float *codewords, int32_t blocks, int32_t *index) {
    for (int64_t i = 0; i < n; i++) {
        const lanes *c = (const lanes *)codewords;
        const float *x = vectors + i * d;
        lanes best[PARTS];
        marks block[PARTS];
        for (int32_t b = 0; b < blocks; b++) {
            lanes sum[PARTS];
            for (int32_t l = 0; l < PARTS; l++) sum[l] = *c++;
            for (int32_t j = 0; j < d; j++)
                for (int32_t l = 0; l < PARTS; l++) sum[l] -= x[j] * *c++;
            for (int32_t l = 0; l < PARTS; l++) {
#ifdef VECTORS
                marks less = b ? sum[l] < best[l] : (marks){0} == 0;
                block[l] = (less & b) | (~less & block[l]);
                best[l] = (lanes)((less & (marks)sum[l]) | (~less & (marks)best[l]));
#else
                if (!b || sum[l] < best[l]) best[l] = sum[l], block[l] = b;
#endif
            }
        }
        const float *least = (const float *)best;
        const int32_t *in = (const int32_t *)block;
        int32_t found = 0;
        for (int32_t l = 1; l < WIDE; l++)
            if (least[l] < least[found] || (least[l] == least[found] && in[l] < in[found])) found = l;
        index[i] = in[found] * WIDE + found;
    }
}

#if defined(__x86_64__) && defined(VECTORS)
__attribute__((target("avx2"))) static void nearest_avx2(const float *vectors, int64_t n, int32_t d, const float *codewords,
                                                         int32_t blocks, int32_t *index) {
    nearest(vectors, n, d, codewords, blocks, index);
}
#endif

int64_t terse_nearest(const float *vectors, int64_t n, int32_t d, const float *codewords, int32_t blocks, int32_t *index) {
    if (n < 0 || d < 1 || blocks < 1 || blocks > INT32_MAX / WIDE) return TERSE_EARGUMENT;
#if defined(__x86_64__) && defined(VECTORS)
    if (terse_simd() & 1) {
        nearest_avx2(vectors, n, d, codewords, blocks, index);
        return n;
    }
#endif
    nearest(vectors, n, d, codewords, blocks, index);
    return n;
}

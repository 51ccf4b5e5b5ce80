#include "compiler.h"
#include "terse.h"

#include <string.h>

#if defined(__x86_64__) && defined(VECTORS)
#define TERSE_X86 1
#include <immintrin.h>
#endif

int32_t terse_simd(void) {
#ifdef TERSE_X86
    __builtin_cpu_init();
    int32_t avx2 = __builtin_cpu_supports("avx2") ? 1 : 0;
    int32_t avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") ? 2 : 0;
    int32_t vnni = avx512 && __builtin_cpu_supports("avx512vnni") ? 4 : 0;
    return avx2 | avx512 | vnni;
#else
    return 0;
#endif
}

/* ------------------------------------------------------------------ bits */

static int64_t bytes_for(int64_t n, int32_t width) {
    return n > (INT64_MAX - 7) / 64 ? -1 : (n * width + 7) / 8;
}

/* An integer goes in parts of at most 32 bits, so that with the bits that wait for a whole byte it fits into 64. */
int64_t terse_bits_encode(const uint64_t *in, int64_t n, int32_t width, uint8_t *out, int64_t capacity) {
    if (n < 0 || width < 0 || width > 64) return TERSE_EARGUMENT;
    int64_t need = bytes_for(n, width);
    if (need < 0 || need > capacity) return TERSE_ERANGE;
    const int32_t low = width < 32 ? width : 32, high = width - low;
    const uint64_t low_mask = ((uint64_t)1 << low) - 1, high_mask = ((uint64_t)1 << high) - 1;
    uint64_t held = 0;
    int32_t count = 0;
    uint8_t *p = out;
    for (int64_t i = 0; i < n; i++) {
        held |= (in[i] & low_mask) << count;
        for (count += low; count >= 8; count -= 8, held >>= 8) *p++ = (uint8_t)held;
        if (high == 0) continue;
        held |= (in[i] >> 32 & high_mask) << count;
        for (count += high; count >= 8; count -= 8, held >>= 8) *p++ = (uint8_t)held;
    }
    if (count > 0) *p++ = (uint8_t)held;
    return p - out;
}

int64_t terse_bits_decode(const uint8_t *in, int64_t length, int64_t n, int32_t width, uint64_t *out) {
    if (n < 0 || width < 0 || width > 64) return TERSE_EARGUMENT;
    if (bytes_for(n, width) != length) return TERSE_EDATA;
    const int32_t low = width < 32 ? width : 32, high = width - low;
    const uint64_t low_mask = ((uint64_t)1 << low) - 1, high_mask = ((uint64_t)1 << high) - 1;
    uint64_t held = 0;
    int32_t count = 0;
    const uint8_t *p = in;
    for (int64_t i = 0; i < n; i++) {
        for (; count < low; count += 8) held |= (uint64_t)*p++ << count;
        out[i] = held & low_mask;
        held >>= low;
        count -= low;
        if (high == 0) continue;
        for (; count < high; count += 8) held |= (uint64_t)*p++ << count;
        out[i] |= (held & high_mask) << 32;
        held >>= high;
        count -= high;
    }
    return held ? TERSE_EDATA : n; /* padding must be zero: one canonical form */
}

int64_t terse_trits_encode(const uint8_t *in, int64_t n, uint8_t *out, int64_t capacity) {
    if (n < 0 || (n + 4) / 5 > capacity) return TERSE_ERANGE;
    for (int64_t i = 0; i < n; i += 5) {
        int32_t byte = 0;
        for (int64_t j = (i + 5 < n ? i + 5 : n) - 1; j >= i; j--) byte = 3 * byte + in[j];
        out[i / 5] = (uint8_t)byte;
    }
    return (n + 4) / 5;
}

int64_t terse_trits_decode(const uint8_t *in, int64_t length, int64_t n, uint8_t *out) {
    if (n < 0 || (n + 4) / 5 != length) return TERSE_EDATA;
    for (int64_t i = 0; i < n; i += 5) {
        int32_t byte = in[i / 5];
        for (int64_t j = i; j < i + 5 && j < n; j++, byte /= 3) out[j] = (uint8_t)(byte % 3);
        if (byte) return TERSE_EDATA;
    }
    return n;
}

/* --------------------------------------------------------------- filters */

int64_t terse_gaps_encode(const int32_t *in, int64_t n, int32_t limit, int32_t *out, int64_t capacity) {
    if (limit < 1) return TERSE_EARGUMENT;
    int64_t written = 0;
    int32_t gap = 0;
    for (int64_t i = 0; i < n; i++) {
        if (in[i] == 0) {
            gap++;
            continue;
        }
        for (; gap >= limit; gap -= limit) {
            if (written == capacity) return TERSE_ERANGE;
            out[written++] = limit;
        }
        if (written == capacity) return TERSE_ERANGE;
        out[written++] = gap;
        gap = 0;
    }
    return written;
}

int64_t terse_gaps_decode(const int32_t *in, int64_t count, int32_t limit, int64_t *positions, int64_t capacity,
                          int64_t n) {
    if (limit < 1) return TERSE_EARGUMENT;
    int64_t at = 0, written = 0;
    for (int64_t i = 0; i < count; i++) {
        if (in[i] < 0 || in[i] > limit) return TERSE_EDATA;
        at += in[i];
        if (in[i] == limit) {
            if (at >= n) return TERSE_EDATA;
            continue;
        }
        if (at >= n || written == capacity) return TERSE_EDATA;
        positions[written++] = at++;
    }
    return count && in[count - 1] == limit ? TERSE_EDATA : written;
}

int64_t terse_runs_encode(const int32_t *in, int64_t n, int32_t *out, int64_t capacity) {
    int64_t written = 0;
    for (int64_t i = 0; i < n;) {
        int64_t run = 0;
        while (i < n && in[i] == 0) run++, i++;
        for (; run > 0; run = (run - 1) / 2) {
            if (written == capacity) return TERSE_ERANGE;
            out[written++] = run % 2 ? 0 : 1;
        }
        if (i == n) break;
        if (written == capacity) return TERSE_ERANGE;
        out[written++] = in[i++] + 1;
    }
    return written;
}

int64_t terse_runs_decode(const int32_t *in, int64_t count, int32_t *out, int64_t n) {
    int64_t at = 0, weight = 1;
    for (int64_t i = 0; i < count; i++) {
        if (in[i] < 0) return TERSE_EDATA;
        if (in[i] > 1) {
            if (at == n) return TERSE_EDATA;
            out[at++] = in[i] - 1;
            weight = 1;
            continue;
        }
        int64_t run = weight * (in[i] + 1);
        if (run > n - at) return TERSE_EDATA;
        memset(out + at, 0, (size_t)run * sizeof *out);
        at += run;
        weight *= 2;
    }
    return at == n ? n : TERSE_EDATA;
}

/* --------------------------------------------------------------- huffman */

#define WINDOW 12 /* bits that index the decode table; an entry holds up to three symbols below 256 */

int64_t terse_huffman_encode(const int32_t *in, int64_t n, const uint32_t *codes, const uint8_t *lengths, uint8_t *out,
                             int64_t capacity) {
    uint64_t held = 0;
    int32_t count = 0;
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        held |= (uint64_t)codes[in[i]] << count;
        count += lengths[in[i]];
        for (; count >= 8; count -= 8, held >>= 8) {
            if (at == capacity) return TERSE_ERANGE;
            out[at++] = (uint8_t)held;
        }
    }
    if (count > 0) {
        if (at == capacity) return TERSE_ERANGE;
        out[at++] = (uint8_t)held;
    }
    return at;
}

/* The caller has checked that the code is complete (Kraft sum exactly 1), so every bit pattern means something. */
int64_t terse_huffman_decode(const uint8_t *in, int64_t length, const uint32_t *codes, const uint8_t *lengths,
                             int32_t symbols, int32_t *out, int64_t n) {
    struct { uint8_t used, symbols, value[3]; } table[1 << WINDOW];
    int16_t single[1 << 15]; /* the longest code has 15 bits */
    memset(single, 0xff, sizeof single);
    for (int32_t s = 0; s < symbols; s++) {
        if (lengths[s] == 0) continue;
        if (lengths[s] > 15 || codes[s] >> lengths[s]) return TERSE_EARGUMENT;
        for (uint32_t c = codes[s]; c < 1u << 15; c += 1u << lengths[s]) single[c] = (int16_t)s;
    }
    for (uint32_t w = 0; w < 1u << WINDOW; w++) {
        uint32_t used = 0, found = 0;
        while (found < 3) {
            int16_t s = single[w >> used];
            if (s < 0 || s > 255 || used + lengths[s] > WINDOW) break;
            table[w].value[found++] = (uint8_t)s;
            used += lengths[s];
        }
        table[w].used = (uint8_t)used;
        table[w].symbols = (uint8_t)found;
    }
    uint64_t held = 0;
    int32_t count = 0;
    int64_t at = 0, i = 0;
    while (i < n) {
        for (; count <= 48 && at < length; count += 8) held |= (uint64_t)in[at++] << count;
        uint32_t w = (uint32_t)held & ((1 << WINDOW) - 1);
        int32_t used = table[w].used, found = table[w].symbols;
        if (found && used <= count && i + 3 <= n) {
            out[i] = table[w].value[0];
            out[i + 1] = table[w].value[1];
            out[i + 2] = table[w].value[2];
            i += found;
        } else {
            int16_t s = single[held & 0x7fff];
            if (s < 0 || lengths[s] > count) return TERSE_EDATA;
            used = lengths[s];
            out[i++] = s;
        }
        held >>= used;
        count -= used;
    }
    return at == length && count < 8 && held == 0 ? n : TERSE_EDATA;
}

/* ------------------------------------------------------------------ rans */

#define SCALE 12
#define SLOTS (1 << SCALE)

static int32_t rans_starts(const uint16_t *frequency, uint16_t *start) {
    int32_t total = 0;
    for (int32_t s = 0; s < 256; s++) {
        start[s] = (uint16_t)total;
        total += frequency[s];
        if (frequency[s] >= SLOTS || total > SLOTS) return TERSE_EARGUMENT;
    }
    return total == SLOTS ? 0 : TERSE_EARGUMENT;
}

int64_t terse_rans_encode(const uint8_t *in, int64_t n, const uint16_t *frequency, int32_t lanes, uint8_t *out,
                          int64_t capacity) {
    uint16_t start[256];
    uint32_t x[32];
    if (lanes < 1 || lanes > 32 || rans_starts(frequency, start)) return TERSE_EARGUMENT;
    for (int32_t l = 0; l < lanes; l++) x[l] = 1u << 16;
    int64_t at = capacity; /* written backwards, since decoding reads forwards what encoding made last */
    for (int64_t i = n - 1; i >= 0; i--) {
        uint32_t *state = &x[i % lanes], f = frequency[in[i]];
        if (f == 0) return TERSE_EARGUMENT;
        if (*state >= f << (32 - SCALE)) {
            if (at < 2) return TERSE_ERANGE;
            at -= 2;
            out[at] = (uint8_t)*state;
            out[at + 1] = (uint8_t)(*state >> 8);
            *state >>= 16;
        }
        *state = (*state / f << SCALE) + *state % f + start[in[i]];
    }
    if (at < 4 * lanes) return TERSE_ERANGE;
    at -= 4 * lanes;
    for (int32_t l = 0; l < lanes; l++)
        for (int32_t b = 0; b < 4; b++) out[at + 4 * l + b] = (uint8_t)(x[l] >> 8 * b);
    memmove(out, out + at, (size_t)(capacity - at));
    return capacity - at;
}

/* An entry packs the symbol (bits 0-7), its frequency (8-19) and the slot's offset in it (20-31). */
static inline int32_t rans_step(uint32_t *state, const uint32_t *table, const uint8_t **p, const uint8_t *end) {
    uint32_t x = *state, e = table[x & (SLOTS - 1)];
    x = (e >> 8 & 0xfff) * (x >> SCALE) + (e >> 20);
    if (x < 1u << 16) {
        if (end - *p < 2) return -1;
        x = x << 16 | (uint32_t)(*p)[0] | (uint32_t)(*p)[1] << 8;
        *p += 2;
    }
    *state = x;
    return (int32_t)(e & 0xff);
}

#ifdef TERSE_X86
/* Both paths decode whole rounds of 32 symbols while a full round of words (64 bytes) is left; the rest is portable. */
__attribute__((target("avx512f,avx512bw"))) static int64_t rans_avx512(uint32_t *x, const uint32_t *table,
                                                                       const uint8_t **in, const uint8_t *end,
                                                                       uint8_t *out, int64_t n) {
    const __m512i slots = _mm512_set1_epi32(SLOTS - 1), twelve = _mm512_set1_epi32(0xfff);
    const __m512i floor = _mm512_set1_epi32(1 << 16);
    __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + 16);
    const uint8_t *p = *in;
    int64_t i = 0;
#define STEP(v, at)                                                                                             \
    {                                                                                                           \
        __m512i e = _mm512_i32gather_epi32(_mm512_and_si512(v, slots), (const int *)table, 4);                  \
        _mm_storeu_si128((__m128i *)(out + i + at), _mm512_cvtepi32_epi8(e));                                   \
        v = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_and_si512(_mm512_srli_epi32(e, 8), twelve),              \
                                                _mm512_srli_epi32(v, SCALE)),                                   \
                             _mm512_srli_epi32(e, 20));                                                         \
        __mmask16 low = _mm512_cmplt_epu32_mask(v, floor);                                                      \
        __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));                          \
        v = _mm512_mask_or_epi32(v, low, _mm512_slli_epi32(v, 16), _mm512_maskz_expand_epi32(low, words));      \
        p += 2 * __builtin_popcount(low);                                                                       \
    }
    for (; i + 32 <= n && end - p >= 64; i += 32) {
        STEP(a, 0)
        STEP(b, 16)
    }
#undef STEP
    _mm512_storeu_si512(x, a);
    _mm512_storeu_si512(x + 16, b);
    *in = p;
    return i;
}

__attribute__((target("avx2,popcnt"))) static int64_t rans_avx2(uint32_t *x, const uint32_t *table, const uint8_t **in,
                                                         const uint8_t *end, uint8_t *out, int64_t n) {
    uint32_t spread[256][8]; /* for each mask of lanes that renormalise: which of the next words each lane takes */
    for (int32_t m = 0; m < 256; m++)
        for (int32_t l = 0, k = 0; l < 8; l++) spread[m][l] = m >> l & 1 ? (uint32_t)k++ : 0;
    const __m256i slots = _mm256_set1_epi32(SLOTS - 1), twelve = _mm256_set1_epi32(0xfff);
    const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                                           -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    __m256i v[4];
    for (int32_t k = 0; k < 4; k++) v[k] = _mm256_loadu_si256((const __m256i *)(x + 8 * k));
    const uint8_t *p = *in;
    int64_t i = 0;
    for (; i + 32 <= n && end - p >= 64; i += 32) {
#pragma GCC unroll 4
        for (int32_t k = 0; k < 4; k++) {
            __m256i e = _mm256_i32gather_epi32((const int *)table, _mm256_and_si256(v[k], slots), 4);
            __m256i packed = _mm256_shuffle_epi8(e, bytes);
            uint32_t first = (uint32_t)_mm256_extract_epi32(packed, 0), last = (uint32_t)_mm256_extract_epi32(packed, 4);
            memcpy(out + i + 8 * k, &first, 4);
            memcpy(out + i + 8 * k + 4, &last, 4);
            __m256i y = _mm256_add_epi32(_mm256_mullo_epi32(_mm256_and_si256(_mm256_srli_epi32(e, 8), twelve),
                                                            _mm256_srli_epi32(v[k], SCALE)),
                                         _mm256_srli_epi32(e, 20));
            __m256i low = _mm256_cmpeq_epi32(_mm256_srli_epi32(y, 16), _mm256_setzero_si256());
            uint32_t mask = (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(low));
            __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
            words = _mm256_permutevar8x32_epi32(words, _mm256_loadu_si256((const __m256i *)spread[mask]));
            __m256i renewed = _mm256_or_si256(_mm256_slli_epi32(y, 16), words);
            v[k] = _mm256_blendv_epi8(y, renewed, low);
            p += 2 * __builtin_popcount(mask);
        }
    }
    for (int32_t k = 0; k < 4; k++) _mm256_storeu_si256((__m256i *)(x + 8 * k), v[k]);
    *in = p;
    return i;
}
#endif

int64_t terse_rans_decode(const uint8_t *in, int64_t length, const uint16_t *frequency, int32_t lanes, int32_t simd,
                          uint8_t *out, int64_t n) {
    uint16_t start[256];
    uint32_t table[SLOTS], x[32];
    if (lanes < 1 || lanes > 32 || n < 0 || rans_starts(frequency, start)) return TERSE_EARGUMENT;
    if (length < 4 * lanes) return TERSE_EDATA;
    for (uint32_t s = 0; s < 256; s++)
        for (uint32_t k = 0; k < frequency[s]; k++) table[start[s] + k] = s | (uint32_t)frequency[s] << 8 | k << 20;
    for (int32_t l = 0; l < lanes; l++) {
        x[l] = (uint32_t)in[4 * l] | (uint32_t)in[4 * l + 1] << 8 | (uint32_t)in[4 * l + 2] << 16 |
               (uint32_t)in[4 * l + 3] << 24;
        if (x[l] < 1u << 16) return TERSE_EDATA;
    }
    const uint8_t *p = in + 4 * lanes, *end = in + length;
    int64_t i = 0;
#ifdef TERSE_X86
    if (lanes == 32 && simd == 2) i = rans_avx512(x, table, &p, end, out, n);
    if (lanes == 32 && simd == 1) i = rans_avx2(x, table, &p, end, out, n);
#else
    (void)simd;
#endif
    for (; i < n; i++) {
        int32_t s = rans_step(&x[i % lanes], table, &p, end);
        if (s < 0) return TERSE_EDATA;
        out[i] = (uint8_t)s;
    }
    for (int32_t l = 0; l < lanes; l++)
        if (x[l] != 1u << 16) return TERSE_EDATA;
    return p == end ? n : TERSE_EDATA;
}

int64_t terse_rans_split(const uint8_t *in, int64_t n, uint8_t *out) {
    for (int64_t i = 0; i < n; i++) {
        out[2 * i] = in[i] & 15;
        out[2 * i + 1] = in[i] >> 4;
    }
    return 2 * n;
}

#include <string.h>

#include "compiler.h"
#include "terse.h"

#define AHEAD 32

/* Three cells of a key lie in three neighbouring segments of equal length (Dietzfelbinger and Walzer 2019; with one window
 * the three blocks of older filters). Numbers come from splitmix64. */

INLINE uint64_t mixed(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

INLINE uint32_t below(uint64_t bits, uint64_t n) {
    return (uint32_t)((bits & 0xFFFFFFFFu) * n >> 32);
}

/* Cells of a key in its window's order; returns the bits of its mask. */
INLINE uint32_t cells_of(uint64_t key, uint64_t seed, uint64_t length, uint64_t windows, uint32_t cell[3]) {
    uint64_t a = mixed(key ^ seed), b = mixed(a), begin = below(a >> 32, windows) * length;
    cell[0] = (uint32_t)(begin + below(a, length));
    cell[1] = (uint32_t)(begin + length + below(b >> 32, length));
    cell[2] = (uint32_t)(begin + 2 * length + below(b, length));
    return (uint32_t)mixed(b);
}

static int64_t wrong(int64_t n, int64_t length, int64_t windows, int32_t bits) {
    return n < 0 || n > INT32_MAX || length < 1 || windows < 1 || length > INT32_MAX / (windows + 2) || bits < 1 || bits > 16;
}

int64_t terse_bloomier_build(const int64_t *keys, const uint16_t *values, int64_t n, int64_t seed, int64_t length,
                             int64_t windows, int32_t bits, uint16_t *cells, uint32_t *degree, uint32_t *alone, uint32_t *queue) {
    if (wrong(n, length, windows, bits)) return TERSE_EARGUMENT;
    const int64_t count = (windows + 2) * length;
    const uint64_t salt = mixed((uint64_t)seed);
    int64_t ends = 0, done = 0;
    uint32_t cell[3];
    memset(degree, 0, (size_t)count * sizeof *degree);
    memset(alone, 0, (size_t)count * sizeof *alone); /* the XOR of the numbers of the keys that want a cell */
    for (int64_t i = 0; i < n; i++) {
        cells_of((uint64_t)keys[i], salt, (uint64_t)length, (uint64_t)windows, cell);
        for (int32_t k = 0; k < 3; k++) degree[cell[k]]++, alone[cell[k]] ^= (uint32_t)i;
    }
    for (int64_t c = 0; c < count; c++)
        if (degree[c] == 1) queue[ends++] = (uint32_t)c;
    for (int64_t head = 0; head < ends; head++) {
        uint32_t own = queue[head], key = alone[own];
        if (degree[own] != 1) continue;
        queue[done++] = own; /* from here on its key is the last that needs it */
        cells_of((uint64_t)keys[key], salt, (uint64_t)length, (uint64_t)windows, cell);
        for (int32_t k = 0; k < 3; k++) {
            if (--degree[cell[k]] == 1) queue[ends++] = cell[k];
            if (cell[k] != own) alone[cell[k]] ^= key;
        }
    }
    if (done < n) return TERSE_EDATA;
    memset(cells, 0, (size_t)count * sizeof *cells);
    while (done-- > 0) {
        uint32_t own = queue[done], key = alone[own];
        uint32_t mask = cells_of((uint64_t)keys[key], salt, (uint64_t)length, (uint64_t)windows, cell);
        uint32_t value = values[key] ^ mask ^ cells[cell[0]] ^ cells[cell[1]] ^ cells[cell[2]];
        cells[own] = (uint16_t)(value & ((1u << bits) - 1));
    }
    return n;
}

int64_t terse_bloomier_query(const uint16_t *cells, int64_t first, int64_t n, int64_t seed, int64_t length, int64_t windows,
                             int32_t bits, uint16_t *out) {
    if (wrong(n, length, windows, bits) || first < 0) return TERSE_EARGUMENT;
    const uint64_t salt = mixed((uint64_t)seed);
    const uint32_t all = (1u << bits) - 1;
    uint32_t cell[AHEAD][3], mask[AHEAD];
    for (int64_t i = 0; i < n; i += AHEAD) { /* many keys' cells at a time, since most are far away */
        const int64_t some = n - i < AHEAD ? n - i : AHEAD;
        for (int64_t k = 0; k < some; k++) {
            mask[k] = cells_of((uint64_t)(first + i + k), salt, (uint64_t)length, (uint64_t)windows, cell[k]);
            for (int32_t c = 0; c < 3; c++) FETCH(cells + cell[k][c]);
        }
        for (int64_t k = 0; k < some; k++)
            out[i + k] = (uint16_t)((mask[k] ^ cells[cell[k][0]] ^ cells[cell[k][1]] ^ cells[cell[k][2]]) & all);
    }
    return n;
}

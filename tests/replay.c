/* Makes calls that were recorded on another machine (test_core.py) and names the first that ends otherwise here.
 *
 * On the standard input, all in 64-bit words: a function's number, what it returned, how many arguments; for each a kind
 * (0 NULL, 1 integer or the bits of a double, 2 bytes before and after the call, 3 room), its value or number of bytes, and
 * those bytes. */
#include "../native/terse.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#include <malloc.h>
#define aligned_alloc(alignment, size) _aligned_malloc(size, alignment)
#define free _aligned_free
#endif

static struct {
    int64_t kind, value;
    void *bytes, *after;
} a[24];

static int64_t word(void) {
    int64_t value;
    if (fread(&value, sizeof value, 1, stdin) != 1) exit(2);
    return value;
}

static void *block(int64_t n, int64_t read) {
    void *bytes = aligned_alloc(16, (size_t)(n / 16 + 1) * 16);
    if (!bytes || (read && fread(bytes, 1, (size_t)n, stdin) != (size_t)n)) exit(2);
    return bytes;
}

#define P(k) a[k].bytes
#define I(k) a[k].value
#define W(k) (int32_t)a[k].value

static int64_t call(int64_t function) {
    terse_model m = {I(1), I(2), I(3), P(4), I(5), I(6), W(7), W(8), W(9), W(10), W(11), W(12), W(13), W(14), W(15), P(16)};
    terse_feedback_steps f = {I(3), I(4), I(5), I(6), P(7), P(8), P(9), P(10), P(11), W(12), 0, P(14), P(15)};
    memcpy(&f.highest, &a[13].value, sizeof f.highest);
    switch (function) {
    case 0: return terse_bits_encode(P(0), I(1), W(2), P(3), I(4));
    case 1: return terse_bits_decode(P(0), I(1), I(2), W(3), P(4));
    case 2: return terse_trits_encode(P(0), I(1), P(2), I(3));
    case 3: return terse_trits_decode(P(0), I(1), I(2), P(3));
    case 4: return terse_gaps_encode(P(0), I(1), W(2), P(3), I(4));
    case 5: return terse_gaps_decode(P(0), I(1), W(2), P(3), I(4), I(5));
    case 6: return terse_runs_encode(P(0), I(1), P(2), I(3));
    case 7: return terse_runs_decode(P(0), I(1), P(2), I(3));
    case 8: return terse_huffman_encode(P(0), I(1), P(2), P(3), P(4), I(5));
    case 9: return terse_huffman_decode(P(0), I(1), P(2), P(3), W(4), P(5), I(6));
    case 10: return terse_rans_encode(P(0), I(1), P(2), W(3), P(4), I(5));
    case 11: return terse_rans_decode(P(0), I(1), P(2), W(3), W(4), P(5), I(6));
    case 12: return terse_rans_split(P(0), I(1), P(2));
    case 13: return terse_context_encode(P(0), &m, P(17), I(18), P(19), I(20), P(21), P(22));
    case 14: return terse_context_decode(P(0), P(1), I(2), P(3), P(4), P(5), P(6), I(7));
    case 15: return terse_feedback(P(0), P(1), P(2), &f, P(16), P(17), P(18));
    case 16: return terse_surgeon(P(0), P(1), I(2), I(3), P(4), P(5));
    case 17: return terse_context_size(P(0), &m, P(17), I(18), P(19));
    case 18: return terse_literals_encode(P(0), I(1), W(2), P(3), I(4));
    case 19: return terse_threelc_encode(P(0), P(1), I(2), P(3), P(4), I(5));
    case 20: return terse_threelc_decode(P(0), I(1), P(2), I(3), P(4));
    case 21: return terse_nearest(P(0), I(1), W(2), P(3), W(4), P(5));
    case 22: return terse_bloomier_build(P(0), P(1), I(2), I(3), I(4), I(5), W(6), P(7), P(8), P(9), P(10));
    case 23: return terse_bloomier_query(P(0), I(1), I(2), I(3), I(4), I(5), W(6), P(7));
    case 24: return terse_levels_digits(P(0), P(1), I(2), I(3), I(4), I(5), I(6), P(7), P(8), P(9));
    case 25:
        return terse_levels_product(P(0), I(1), I(2), I(3), I(4), P(5), P(6), I(7), P(8), P(9), P(10), I(11), I(12), I(13),
                                    I(14), P(15), I(16));
    }
    exit(2);
}

int main(void) {
    int64_t function, calls = 0;
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY);
#endif
    if (terse_abi() != TERSE_ABI) return printf("terse_abi() is %d\n", (int)terse_abi()), 1;
    for (; fread(&function, sizeof function, 1, stdin) == 1; calls++) {
        int64_t expected = word(), count = word();
        for (int64_t k = 0; k < count; k++) {
            a[k].kind = word();
            a[k].value = word();
            a[k].bytes = a[k].kind < 2 ? NULL : block(a[k].value, a[k].kind == 2);
            a[k].after = a[k].kind == 2 ? block(a[k].value, 1) : NULL;
        }
        int64_t found = call(function);
        if (found != expected) return printf("call %d of function %d returned %d\n", (int)calls, (int)function, (int)found), 1;
        for (int64_t k = 0; k < count; k++) {
            if (a[k].kind == 2 && memcmp(a[k].bytes, a[k].after, (size_t)a[k].value))
                return printf("call %d of function %d: argument %d\n", (int)calls, (int)function, (int)k), 1;
            free(a[k].bytes);
            free(a[k].after);
        }
    }
    return printf("%d calls\n", (int)calls), 0;
}

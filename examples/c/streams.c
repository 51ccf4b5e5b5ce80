/* The streams of arrays: integers, which are put down in as few bits each as the stream says they need, and the bytes of
 * floats, plane by plane. docs/format.md says what they hold. */
#include "../../native/compiler.h" /* first: what the prior is made of must be rounded as everywhere */
#include "../../native/rows.h"
#include "../../native/terse.h"
#include "decoder.h"

#include <math.h>
#include <string.h>

#define MOST_SYMBOLS 4096

enum { BITS, TRITS, HUFFMAN, GAPS, RUNS, RANS, RANS_PAIRS, CONTEXT, DEFLATE, BZIP2, LZMA };

/* Where decoded integers go: of `count` in the stream those from `first` on that are the array's. */
typedef struct {
    device_file *f;
    device_item *array;
    uint32_t count, first, at; /* a float's bytes: of each plane */
    uint32_t width;            /* bytes of a float, 0 for integers */
    int32_t least, most;       /* what the type holds */
    int32_t bad;
} sink;

static uint32_t width_of(int64_t most) {
    uint32_t bits = 0;
    while (most >> bits) bits++;
    return bits;
}

/* Makes room for the array, whose integers the stream says to lie from `low` to `high`. */
static int32_t begin(sink *s, int64_t low, int64_t high) {
    device_item *a = s->array;
    if (s->width) {
        a->floats = device_lend(s->f, (size_t)a->size * sizeof *a->floats);
        return s->f->error;
    }
    if (a->format == FORMAT_BOOL) low = 0, high = 1; /* a bit each, whatever the stream says that it could hold */
    if (low < INT32_MIN || high > INT32_MAX || high - low > INT32_MAX) return device_fail(s->f, DEVICE_UNSUPPORTED);
    a->low = (int32_t)low;
    a->bits = width_of(high - low);
    a->packed = device_lend(s->f, ((size_t)a->size * a->bits + 7) / 8);
    return s->f->error;
}

static void put(sink *s, int64_t value) {
    device_item *a = s->array;
    const uint32_t all = s->count / (s->width ? s->width : 1), at = s->at++;
    const uint32_t place = (s->width ? at % all : at) - s->first; /* huge before the first */
    s->bad |= at >= s->count || value < s->least || value > s->most;
    if (s->bad || place >= a->size) return;
    if (s->width) {
        ((uint8_t *)a->floats)[(size_t)place * s->width + at / all] = (uint8_t)value;
        return;
    }
    uint64_t part = (uint64_t)(value - a->low);
    s->bad |= value < a->low || part >> a->bits;
    if (s->bad) return;
    size_t bit = (size_t)place * a->bits;
    for (part <<= bit & 7; part; part >>= 8, bit += 8) a->packed[bit >> 3] |= (uint8_t)part;
}

int32_t device_at(const device_item *a, uint32_t place) {
    const size_t bit = (size_t)place * a->bits;
    uint64_t part = 0;
    for (uint32_t k = 0; 8 * k < (bit & 7) + a->bits; k++) part |= (uint64_t)a->packed[(bit >> 3) + k] << 8 * k;
    return a->low + (int32_t)(part >> (bit & 7) & (((uint64_t)1 << a->bits) - 1));
}

/* ------------------------------------------------------------------ Huffman codes */

/* The code lengths at 4 bits each, and how many symbols they are for. */
static uint32_t take_lengths(device_cursor *in, const uint8_t **lengths) {
    const uint32_t size = (uint32_t)device_number(in, MOST_SYMBOLS + 1);
    *lengths = device_bytes(in, (size + 1) / 2);
    if (!in->bad && size % 2 && (*lengths)[size / 2] >> 4) in->bad = 1;
    return size;
}

static int32_t make_code(device_file *f, device_code *code, const uint8_t *lengths, uint32_t size) {
    uint8_t *each = device_lend(f, size);
    code->symbol = device_lend(f, size * sizeof *code->symbol);
    if (f->error) return f->error;
    for (uint32_t s = 0; s < size; s++) each[s] = lengths[s / 2] >> s % 2 * 4 & 15;
    const int32_t left = device_codes(code, each, size);
    /* complete, or one symbol of one bit */
    if (left && (left < 0 || code->count[1] != 1 || left != 1 << 14)) return device_fail(f, DEVICE_DAMAGED);
    return 0;
}

static int32_t huffman(device_file *f, device_cursor *in, sink *s) {
    const uint8_t *lengths;
    const int64_t low = device_signed(in, (uint64_t)1 << 32);
    const uint32_t size = take_lengths(in, &lengths);
    device_code code;
    if (in->bad || size == 0 || begin(s, low, low + size - 1) || make_code(f, &code, lengths, size)) return -1;
    device_bits bits = {.in = *in};
    for (uint32_t k = 0; k < s->count && !bits.in.bad; k++) {
        const int32_t symbol = device_symbol(&bits, &code);
        if (symbol < 0) return -1;
        put(s, low + symbol);
    }
    return device_ended(&bits) ? 0 : -1;
}

static int32_t gaps(device_file *f, device_cursor *in, sink *s) {
    const uint8_t *lengths = 0, *value_lengths = 0;
    const uint32_t valued = device_byte(in);
    uint64_t left = device_number(in, (uint64_t)s->count + 1);
    const uint32_t limit = (uint32_t)device_number(in, 256);
    const uint64_t entries = device_number(in, 2 * (uint64_t)s->count + 1), length = device_number(in, (uint64_t)1 << 32);
    const uint8_t *coded = device_bytes(in, length);
    if (in->bad || limit < 1 || valued > 1 || (entries == 0 && length)) return -1;
    device_bits bits = {.in = {coded, coded + length, 0}}, values = {.in = *in};
    int64_t low = 1, high = 1;
    uint32_t size = 0, value_size = 0;
    if (entries) size = take_lengths(&bits.in, &lengths);
    if (valued) {
        low = device_signed(&values.in, (uint64_t)1 << 32);
        value_size = take_lengths(&values.in, &value_lengths);
        high = low + value_size - 1;
    }
    device_code code, value_code;
    if (bits.in.bad || values.in.bad || begin(s, low < 0 ? low : 0, high > 0 ? high : 0)) return -1;
    if (entries && make_code(f, &code, lengths, size)) return -1;
    if (valued && make_code(f, &value_code, value_lengths, value_size)) return -1;
    int32_t gap = 0;
    for (uint64_t k = 0; k < entries; k++) {
        gap = device_symbol(&bits, &code);
        if (gap < 0 || gap > (int32_t)limit || (uint32_t)gap > s->count - s->at) return -1;
        for (int32_t zero = 0; zero < gap; zero++) put(s, 0);
        if (gap == (int32_t)limit) continue;
        const int32_t value = valued ? device_symbol(&values, &value_code) : 0;
        if (value < 0 || left-- == 0) return -1;
        put(s, low + value);
    }
    if (left || (entries && gap == (int32_t)limit) || s->bad) return -1;
    while (s->at < s->count) put(s, 0);
    return device_ended(&bits) && device_ended(&values) ? 0 : -1;
}

static int32_t runs(device_file *f, device_cursor *in, sink *s) {
    const uint64_t tokens = device_number(in, 2 * (uint64_t)s->count + 1);
    const uint8_t *lengths;
    const int64_t size = take_lengths(in, &lengths);
    device_code code;
    if (in->bad || begin(s, size > 2 ? -((size - 1) / 2) : 0, size > 2 ? (size - 2) / 2 : 0)) return -1;
    if (make_code(f, &code, lengths, (uint32_t)size)) return -1;
    device_bits bits = {.in = *in};
    uint64_t weight = 1;
    for (uint64_t k = 0; k < tokens; k++) {
        const int32_t token = device_symbol(&bits, &code);
        if (token < 0 || s->bad) return -1;
        if (token > 1) {
            put(s, (token - 1) & 1 ? -(token / 2) : (token - 1) / 2);
            weight = 1;
            continue;
        }
        if (weight * ((uint64_t)token + 1) > s->count - s->at) return -1;
        for (uint64_t zero = weight * ((uint64_t)token + 1); zero; zero--) put(s, 0);
        weight *= 2;
    }
    return device_ended(&bits) ? 0 : -1;
}

/* ------------------------------------------------------------------ rANS */

/* Frequencies plus one in Elias gamma code, the highest bit of a byte first; they sum to 4096. */
static int32_t take_frequencies(device_cursor *in, uint16_t *frequency, uint32_t size) {
    uint32_t held = 0, left = 0, sum = 0;
    for (uint32_t k = 0; k < size; k++) {
        uint32_t zeros = 0, more = 0, value = 0;
        do {
            if (left-- == 0) held = device_byte(in), left = 7;
            const uint32_t bit = held >> left & 1;
            if (more) value = value << 1 | bit, more--;
            else if (bit) value = 1, more = zeros;
            else if (++zeros > 12) return -1;
        } while (!value || more);
        if (value - 1 > 4095 || in->bad) return -1;
        frequency[k] = (uint16_t)(value - 1);
        sum += value - 1;
    }
    return sum != 4096 || frequency[size - 1] == 0 || (held & ((1u << left) - 1)) ? -1 : 0;
}

static int32_t rans(device_file *f, device_cursor *in, sink *s, uint32_t pairs) {
    const int64_t low = device_signed(in, (uint64_t)1 << 32);
    const uint32_t size = device_byte(in) + 1, count = pairs ? s->count / 2 + s->count % 2 : s->count;
    const uint32_t lanes = count >= 1 << 15 ? 32 : count >= 1 << 11 ? 4 : 1;
    uint16_t frequency[256], start[256];
    uint32_t state[32] = {0};
    if (in->bad || begin(s, low, low + (pairs ? 15 : size - 1)) || take_frequencies(in, frequency, size)) return -1;
    uint8_t *symbol = device_lend(f, 4096); /* of each slot */
    if (!symbol) return -1;
    for (uint32_t k = 0, sum = 0; k < size; sum += frequency[k++]) {
        start[k] = (uint16_t)sum;
        memset(symbol + sum, (int)k, frequency[k]);
    }
    for (uint32_t l = 0; l < lanes; l++) {
        for (uint32_t b = 0; b < 4; b++) state[l] |= device_byte(in) << 8 * b;
        if (state[l] < 1u << 16) return -1;
    }
    uint32_t found = 0;
    for (uint32_t k = 0; k < count && !in->bad; k++) {
        uint32_t *x = &state[k % lanes];
        const uint32_t slot = *x & 4095;
        found = symbol[slot];
        *x = frequency[found] * (*x >> 12) + slot - start[found];
        if (*x < 1u << 16) {
            const uint32_t lower = device_byte(in);
            *x = *x << 16 | device_byte(in) << 8 | lower;
        }
        put(s, low + (pairs ? found & 15 : found));
        if (pairs && s->at < s->count) put(s, low + (found >> 4));
    }
    if (pairs && s->count % 2 && (found & 15) != found >> 4) return -1; /* the last twice */
    for (uint32_t l = 0; l < lanes; l++)
        if (state[l] != 1u << 16) return -1;
    return in->bad || in->at != in->end ? -1 : 0;
}

/* ------------------------------------------------------------------ the context codec */

/* What letters are worth before any was counted, from the means of the page. */
static int32_t make_prior(float *prior) {
    static const uint8_t least[15] = {1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 128};
    uint32_t check = 0xffffffff;
    for (uint32_t k = 0; k < 50; k++, prior += 16) {
        const double m = exp2(((double)(k % 25) - 0.5) / 2) / 256, a = (sqrt(1 + 4 * m * m) - 1) / (2 * m);
        double d = a * a;
        d = d < 0.1 ? 0.1 : d > 0.97 ? 0.97 : d;
        double t = k < 25 ? a : sqrt(a), power = 1;
        for (uint32_t i = 0, at = 2; i < 15; i++) {
            if (i) {
                for (; at < least[i]; at++) power *= d;
                t = (k < 25 ? a * d : a * sqrt(d)) * power;
            }
            const uint32_t end = (uint32_t)(32704 * (1 - t)) + 4 * (i + 1);
            prior[i] = (float)end;
            for (uint32_t b = 0; b < 16; b++) check = check >> 1 ^ (((end >> b ^ check) & 1) ? 0xedb88320 : 0);
        }
        prior[15] = 32768;
    }
    return (check ^ 0xffffffff) == 0xd89b7cab ? 0 : -1;
}

static void take_rows(void *to, const int32_t *levels, int64_t count, int32_t sign, int64_t origin) {
    for (int64_t k = 0; k < count; k++) put(to, sign * (int64_t)levels[k] + origin);
}

/* Rows, width, last two axes and places of the matrix that an array is coded as. */
static void walk_of(const uint32_t *extent, uint32_t rank, terse_array *a) {
    int64_t axis[DEVICE_AXES] = {0}, size = 1, places = 1;
    uint32_t axes = 0;
    for (uint32_t k = 0; k < rank; k++) {
        size *= extent[k];
        if (extent[k] != 1) axis[axes++] = extent[k];
    }
    if (axes < 2) axis[0] = size % 1024 ? 1 : size / 1024, axis[1] = size / axis[0], axes = 2;
    for (uint32_t k = 2; k < axes; k++) places *= axis[k];
    a->rows = axis[0], a->width = size / axis[0];
    a->kernel_rows = axis[axes - 2], a->kernel_columns = axis[axes - 1];
    a->places = places <= 64 ? places : 1;
}

static int32_t context(device_file *f, device_cursor *in, sink *s, const uint32_t *extent, uint32_t rank) {
    device_cursor head = *in;
    if (s->count == 0) return -1;
    const int64_t origin = device_signed(&head, (uint64_t)1 << 32), below = (int64_t)device_number(&head, 1 << 24);
    const int64_t above = (int64_t)device_number(&head, 1 << 24);
    if (head.bad || begin(s, origin - below, origin + above)) return -1;
    terse_array a = {.length = in->end - in->at, .bytes = 4, .least = s->least, .most = s->most};
    walk_of(extent, rank, &a);
    const int64_t held = a.rows < 2 ? 2 : a.rows < 4 ? a.rows : 4, whole = a.kernel_columns == a.width;
    const int64_t kernels = whole ? 1 : 4 * a.width / (a.kernel_rows * a.kernel_columns);
    const int64_t cells = (whole ? 5 : a.kernel_rows + 1) * (a.kernel_columns + 1);
    const int64_t room = 4 * (held * a.width + 2 * (a.width + 1)) + cells * (kernels < 16 ? 1 : kernels < 256 ? kernels : 256);
    if (room > INT32_MAX) return device_fail(f, DEVICE_MEMORY);
    float *prior = device_lend(f, 50 * 16 * sizeof *prior);
    void *rest = device_lend(f, (size_t)room);
    if (f->error) return -1;
    if (make_prior(prior)) return device_fail(f, DEVICE_UNSUPPORTED); /* this machine's double precision is none */
    const int64_t done = terse_context_rows(in->at, &a, prior, take_rows, s, rest, room);
    if (done == TERSE_EBUILD) return device_fail(f, DEVICE_UNSUPPORTED);
    return done == s->count ? 0 : -1;
}

/* ------------------------------------------------------------------ all of them */

static int32_t fixed(device_cursor *in, sink *s, uint32_t trits) {
    const int64_t low = device_signed(in, trits ? (uint64_t)1 << 32 : (uint64_t)1 << 62);
    const uint32_t width = trits ? 2 : device_byte(in);
    if (in->bad || width > 64) return -1;
    if (width > 31) return device_fail(s->f, DEVICE_UNSUPPORTED);
    if (begin(s, low, low + (trits ? 2 : ((int64_t)1 << width) - 1))) return -1;
    device_bits bits = {.in = *in};
    uint32_t byte = 0;
    for (uint32_t k = 0; k < s->count && !bits.in.bad && !s->bad; k++) {
        if (trits && k % 5 == 0) byte = device_take(&bits, 8);
        put(s, low + (trits ? byte % 3 : device_take(&bits, width)));
        byte /= 3;
        if (trits && byte && (k % 5 == 4 || k + 1 == s->count)) return -1;
    }
    return device_ended(&bits) ? 0 : -1;
}

/* Bytes, or nibbles, that a general compressor made smaller. */
static int32_t general(device_file *f, device_cursor *in, sink *s, uint32_t codec) {
    const int64_t low = device_signed(in, (uint64_t)1 << 32);
    const uint32_t width = device_byte(in), length = (uint32_t)(in->end - in->at), count = s->count;
    if (in->bad || width > 4) return -1;
    if (width == 4 && !s->width) return device_fail(f, DEVICE_UNSUPPORTED);
    if (begin(s, low, low + (width ? ((int64_t)1 << 8 * width) - 1 : 15))) return -1;
    const uint64_t size = width ? (uint64_t)count * width : ((uint64_t)count + 1) / 2;
    if (size > INT32_MAX) return device_fail(f, DEVICE_MEMORY);
    uint8_t *out = device_lend(f, (size_t)size);
    uint16_t *shares = codec == LZMA ? device_lend(f, LZMA_SHARES * sizeof *shares) : 0;
    if (f->error) return -1;
    if (codec == LZMA ? device_unlzma(in->at, length, out, (uint32_t)size, shares) != 0
                      : device_inflate(in->at, length, out, (size_t)size, 0) != (int64_t)size)
        return -1;
    for (uint32_t k = 0; k < count; k++) {
        int64_t value = width ? 0 : out[k / 2] >> k % 2 * 4 & 15;
        for (uint32_t plane = 0; plane < width; plane++) value = value << 8 | out[(size_t)plane * count + k];
        put(s, low + value);
    }
    return width == 0 && count % 2 && out[count / 2] >> 4 ? -1 : 0;
}

/* The bytes of floats become float32 in their place, from the last on. */
static void widen(device_item *a, uint32_t width) {
    uint8_t *bytes = (uint8_t *)a->floats;
    for (uint32_t k = a->size; k-- > 0;) {
        uint32_t word = 0;
        for (uint32_t b = 0; b < width; b++) word |= (uint32_t)bytes[(size_t)k * width + b] << 8 * b;
        if (a->format == 13) word <<= 16; /* bfloat16 */
        if (width == 2 && a->format != 13) { /* half precision; a subnormal one is a fraction of 2^-14 */
            const uint32_t sign = word >> 15 << 31, fraction = word & 1023, exponent = word >> 10 & 31;
            const float small = (float)fraction / (1 << 24);
            if (exponent == 0) memcpy(&word, &small, sizeof word);
            else word = (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
            word |= sign;
        }
        memcpy(&a->floats[k], &word, sizeof word);
    }
}

/* Floats that never fall, from how far the bits of each, in the order of floats, are from those of the last. */
static int32_t rise(device_item *a) {
    uint64_t sum = 0;
    for (uint32_t k = 0; k < a->size; k++) {
        uint32_t word;
        memcpy(&word, &a->floats[k], sizeof word);
        sum += word;
        if (sum >> 32) return -1;
        word = (uint32_t)sum >> 31 ? (uint32_t)sum ^ 1u << 31 : ~(uint32_t)sum;
        memcpy(&a->floats[k], &word, sizeof word);
    }
    return 0;
}

int32_t device_decode(device_file *f, device_item *a) {
    static const int32_t ends[][2] = {{0, 1}, {0, 255}, {-128, 127}, {0, 65535}, {-32768, 32767}, {0, INT32_MAX},
                                      {INT32_MIN, INT32_MAX}, {0, INT32_MAX}, {INT32_MIN, INT32_MAX}};
    const uint32_t pooled = a->codec == POOLED, count = pooled ? f->pools[a->format].count : a->size;
    const uint32_t codec = pooled ? f->pools[a->format].codec : a->codec;
    const uint8_t *stream = f->bytes + (pooled ? f->pools[a->format].offset : a->offset);
    device_cursor in = {stream, stream + (pooled ? f->pools[a->format].length : a->length), 0};
    sink s = {.f = f, .array = a, .count = count, .first = pooled ? a->offset : 0, .most = 255};
    uint32_t extent[DEVICE_AXES] = {count}, rank = 1;
    if (a->format < FORMAT_FLOATS) {
        s.least = ends[a->format][0], s.most = ends[a->format][1];
        if (!pooled) memcpy(extent, a->extent, sizeof extent), rank = a->rank;
    } else {
        if (a->format == 11 || a->format == 14) return device_fail(f, DEVICE_UNSUPPORTED); /* double precision */
        s.width = a->format == 10 || a->format == 15 ? 4 : 2;
        if (count > UINT32_MAX / 4) return device_fail(f, DEVICE_UNSUPPORTED);
        s.count = extent[0] = count * s.width;
    }
    const size_t before = f->high;
    int32_t wrong;
    if (codec == BITS || codec == TRITS) wrong = fixed(&in, &s, codec == TRITS);
    else if (codec == HUFFMAN) wrong = huffman(f, &in, &s);
    else if (codec == GAPS) wrong = gaps(f, &in, &s);
    else if (codec == RUNS) wrong = runs(f, &in, &s);
    else if (codec == RANS || codec == RANS_PAIRS) wrong = rans(f, &in, &s, codec == RANS_PAIRS);
    else if (codec == CONTEXT) wrong = context(f, &in, &s, extent, rank);
    else if (codec == DEFLATE || codec == LZMA) wrong = general(f, &in, &s, codec);
    else return device_fail(f, DEVICE_UNSUPPORTED);
    if (wrong || s.bad || s.at != s.count) return device_fail(f, DEVICE_DAMAGED);
    if (s.width) widen(a, s.width);
    if (a->format == 15 && rise(a)) return device_fail(f, DEVICE_DAMAGED);
    /* What is kept was lent first: all behind it goes back. */
    f->high = before + ((s.width ? (size_t)a->size * sizeof *a->floats : ((size_t)a->size * a->bits + 7) / 8) + 15) / 16 * 16;
    return f->error;
}

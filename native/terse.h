/* The C core of tersenet: integer streams to bytes and back.
 *
 * Plain C11, no allocation that outlives a call, no global state. The caller owns every buffer. A function returns a
 * count (bytes written, symbols decoded) or a negative TERSE_E... code; it never reads or writes outside the lengths
 * that it was given, whatever the bytes hold. Each function has a NumPy twin in src/tersenet/codecs that makes the same
 * bytes. The decoders alone need nothing but <stdint.h> and <string.h> and build for a device without malloc:
 * cc -std=c11 -O3 -ffp-contract=off -c abi.c codec.c context.c
 */
#ifndef TERSE_H
#define TERSE_H
#include <stdint.h>

#if defined(_WIN32)
#define TERSE_API __declspec(dllexport)
#elif defined(__GNUC__)
#define TERSE_API __attribute__((visibility("default")))
#else
#define TERSE_API
#endif

#define TERSE_ERANGE -1  /* the output buffer is too small */
#define TERSE_EDATA -2   /* the stream is damaged: it ends early, is too long, or says what cannot be */
#define TERSE_EARGUMENT -3
#define TERSE_ETYPE -4
#define TERSE_EBUILD -5 /* terse_abi() is 0 */

/* Goes up with every change of what stands here, so that nobody calls a library that another header belongs to. */
#define TERSE_ABI 6

/* TERSE_ABI; or 0 where this build would code otherwise than all others: where a product is not rounded before anything is
 * added to it (compile with -ffp-contract=off, on 32-bit x86 with -msse2 -mfpmath=sse), or the highest byte lies first. */
TERSE_API int32_t terse_abi(void);

/* The bytes of terse_model, terse_array and terse_feedback_steps. */
TERSE_API void terse_sizes(int64_t *sizes);

/* What this build and this machine can run: bit 0 AVX2, bit 1 AVX-512, bit 2 its VNNI. */
TERSE_API int32_t terse_simd(void);

/* bits.py: n integers of `width` (0..64) bits, least significant bit first. */
TERSE_API int64_t terse_bits_encode(const uint64_t *in, int64_t n, int32_t width, uint8_t *out, int64_t capacity);
TERSE_API int64_t terse_bits_decode(const uint8_t *in, int64_t length, int64_t n, int32_t width, uint64_t *out);

/* bits.py: n digits 0..2, five to a byte: byte = d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4. */
TERSE_API int64_t terse_trits_encode(const uint8_t *in, int64_t n, uint8_t *out, int64_t capacity);
TERSE_API int64_t terse_trits_decode(const uint8_t *in, int64_t length, int64_t n, uint8_t *out);

/* filters.py: positions of the non-zeros of n integers as gaps 0..limit-1, `limit` meaning "limit zeros and go on". */
TERSE_API int64_t terse_gaps_encode(const int32_t *in, int64_t n, int32_t limit, int32_t *out, int64_t capacity);
TERSE_API int64_t terse_gaps_decode(const int32_t *in, int64_t count, int32_t limit, int64_t *positions, int64_t capacity,
                                    int64_t n);

/* filters.py: runs of zeros in bijective base 2 (symbols 0 and 1), a non-zero v as v + 1. */
TERSE_API int64_t terse_runs_encode(const int32_t *in, int64_t n, int32_t *out, int64_t capacity);
TERSE_API int64_t terse_runs_decode(const int32_t *in, int64_t count, int32_t *out, int64_t n);

/* huffman.py: symbols through a canonical code; codes are bit-reversed so that the stream is read from bit 0. */
TERSE_API int64_t terse_huffman_encode(const int32_t *in, int64_t n, const uint32_t *codes, const uint8_t *lengths,
                                       uint8_t *out, int64_t capacity);
TERSE_API int64_t terse_huffman_decode(const uint8_t *in, int64_t length, const uint32_t *codes, const uint8_t *lengths,
                                       int32_t symbols, int32_t *out, int64_t n);

/* rans.py: static range asymmetric numeral systems, `lanes` (1..32) interleaved 32-bit states, 16-bit words, 12-bit
 * frequencies. Decodes bytes; simd 0 is the portable path, 1 AVX2, 2 AVX-512. */
TERSE_API int64_t terse_rans_encode(const uint8_t *in, int64_t n, const uint16_t *frequency, int32_t lanes, uint8_t *out,
                                    int64_t capacity);
TERSE_API int64_t terse_rans_decode(const uint8_t *in, int64_t length, const uint16_t *frequency, int32_t lanes,
                                    int32_t simd, uint8_t *out, int64_t n);

/* rans.py: n bytes to 2 n nibbles, the low one first. */
TERSE_API int64_t terse_rans_split(const uint8_t *in, int64_t n, uint8_t *out);

/* literals.py: n bytes as a raw LZMA2 stream of literals alone, with `context` (0..4) bits of the byte before, and of stored
 * bytes where they look like noise. Needs room for 7 bytes more for each 1024, and 8. */
TERSE_API int64_t terse_literals_encode(const uint8_t *in, int64_t n, int32_t context, uint8_t *out, int64_t capacity);

/* Trellis-coded quantization (Marcellin and Fischer 1990) in the form of dependent quantization: a state that is even holds
 * an even level, one that is odd an odd level or zero. A level's number is half of its size, rounded up; whether that is
 * even or odd leads to the next state. A line begins in state 0. */
#define TERSE_STATES 8
#define TERSE_NEXT {{0, 2}, {5, 7}, {1, 3}, {6, 4}, {2, 0}, {4, 6}, {3, 1}, {7, 5}}

/* context.py: adaptive coding of a matrix of integers with rANS, row by row. The last two axes of the array that it was
 * made of are the kernel: signs look at their neighbours there. `prior` is aligned to 16 bytes: [50][16] first shares of the
 * letters up to each, in 1/32768; from 25 on for odd levels. */
typedef struct {
    int64_t rows, columns, width; /* columns that are coded, and all */
    const int32_t *column;        /* [columns + 1]: which, ascending, and `width`; the others are zero */
    int64_t kernel_rows, kernel_columns;
    int32_t places;       /* so many columns in turn have means of their own along the row, 1..64 */
    int32_t low, high;    /* every value lies in low..high; low <= 0 <= high */
    int32_t slow;         /* counts are halved from 2^(slow + 1) on, 4..12 */
    int32_t blend;        /* weight of the column's mean magnitude, 0..16; the row's has 16 - blend */
    int32_t memory;       /* the row's mean forgets with 2^-memory, the column's with 2^-settle, 1..8 */
    int32_t settle;
    int32_t signs;        /* where they have contexts, their shares of "negative" in 1/16, of four bits each: by the left
                           * and the upper neighbour in the kernel (+, 0), (0, +), (+, +), (+, -); the others mirror these */
    int32_t trellis;      /* 1 where levels follow the trellis along the rows: numbers are coded, by the state's alphabets */
    const float *prior;
} terse_model;

/* `list` has room for a word for each coding step: one for each value, one more for each sign, for each magnitude from 8
 * up, and two more from 128. `mean` has room for each column and one more; `around` for four rows of kernels, each with a row
 * and a column more, of which it holds one, or where there are 16 and more at most 256; or for a matrix that is one kernel,
 * five rows with a column more; NULL where signs have no contexts. Returns the bytes written, or an error. */
TERSE_API int64_t terse_context_encode(const int32_t *in, const terse_model *model, uint64_t *list, int64_t listed,
                                       uint8_t *out, int64_t capacity, float *mean, uint8_t *around);

/* About how many bits the stream of an array takes that holds magnitudes alone (low = 0). `list` and `mean` as above. */
TERSE_API int64_t terse_context_size(const int32_t *in, const terse_model *model, uint64_t *list, int64_t listed,
                                     float *mean);

/* A stream at `in` and where its array belongs, both from the beginning of what all share; the integers' bytes, 1, 2, 4 or
 * 8; how the array is walked; and what its type can hold. `places` is how many lie in a kernel, or 1 if that is over 64.
 * `done` becomes the number of integers, or an error; TERSE_ETYPE where the type cannot hold the values. */
typedef struct {
    int64_t in, length, out, bytes;
    int64_t rows, width, kernel_rows, kernel_columns, places, least, most;
    int64_t done;
} terse_array;

/* Whole streams, with their settings, to integers: `*next` is the first that nobody has taken yet, so that any number of
 * threads may share the work. `room` belongs to one thread and is for four rows of the widest array in 32-bit integers (two
 * if there is one), two with an integer more, and `around`. Returns how many this thread decoded. */
TERSE_API int64_t terse_context_decode(const uint8_t *in, terse_array *arrays, int64_t count, int32_t *next,
                                       const float *prior, uint8_t *out, void *room, int64_t capacity);

/* feedback.py: levels for `whitened` [lines][values], which is used up, from the Cholesky factor of one side and that of the
 * other with each column divided by its diagonal; NULL for a diagonal one. A factor of n coordinates is [n][width]: blocks of
 * `width` columns along its diagonal, row i from column i / width * width on. */
typedef struct {
    int64_t lines, values;
    int64_t line_width, value_width;
    const double *line, *value;    /* the step of (j, i) is line[j] * value[i] */
    const double *edge, *profile;  /* a value takes context k where the line's mean size times its profile is under edge[k] */
    const double *bits;            /* [contexts][8] what bits are worth. With `weight` of the numbers 0, 1, 2 and for each
                                      from there on, for even levels, then odd; else how far above k - 1/2 a size is
                                      rounded to k - 1, for k = 1 and for k > 1 */
    int32_t contexts;
    double highest;
    const uint8_t *kept;           /* [lines][values], or NULL: levels elsewhere are 0; without `weight` alone */
    const double *weight;          /* what a squared step of error costs for each value, in a trellis; NULL: no trellis */
} terse_feedback_steps;

/* `carried` and `context` have room for a line. */
TERSE_API int64_t terse_feedback(double *whitened, const double *lines, const double *values,
                                 const terse_feedback_steps *steps, int32_t *levels, double *carried, int32_t *context);

/* surgeon.py: removes `count` of n weights one by one, the cheapest first, from w and the inverse moment [n][n], both of
 * which are used up. */
TERSE_API int64_t terse_surgeon(double *w, double *inverse, int64_t n, int64_t count, int32_t *order, double *costs);

/* product.py: for each of n vectors [n][d] the number of its nearest codeword, the first among equals. Codewords lie in blocks
 * of TERSE_NEAREST, [blocks][1 + d][TERSE_NEAREST]: half of each one's squared length, which is infinite behind the last, and
 * its values. */
#define TERSE_NEAREST 32
TERSE_API int64_t terse_nearest(const float *vectors, int64_t n, int32_t d, const float *codewords, int32_t blocks,
                                int32_t *index);

/* bloomier.py: a Bloomier filter of (windows + 2) * length cells of `bits` (1..16), whose three cells for a key lie in three
 * segments in a row. Building needs room for three numbers a cell, and fails with TERSE_EDATA where another seed is needed;
 * a query gives the values of the keys from `first` on, those of keys that were not given too. */
TERSE_API int64_t terse_bloomier_build(const int64_t *keys, const uint16_t *values, int64_t n, int64_t seed, int64_t length,
                                       int64_t windows, int32_t bits, uint16_t *cells, uint32_t *degree, uint32_t *alone,
                                       uint32_t *queue);
TERSE_API int64_t terse_bloomier_query(const uint16_t *cells, int64_t first, int64_t n, int64_t seed, int64_t length,
                                       int64_t windows, int32_t bits, uint16_t *out);

/* ternary.py: 3LC (Lim, Andersen, Kaminsky 2019): B = values + residual to three values, quartic and zero-run encoding.
 * `*scale` is the sparsity multiplier, 1 <= s < 2, and becomes M = s max|B|, or 0 where nothing was sent. The residual becomes
 * B - M q, exactly. TERSE_ETYPE where B is not finite or M would not be; the residual is then as it was. `out` has room for
 * (n + 4) / 5 bytes. */
TERSE_API int64_t terse_threelc_encode(const float *values, float *residual, int64_t n, float *scale, uint8_t *out,
                                       int64_t capacity);
TERSE_API int64_t terse_threelc_decode(const uint8_t *in, int64_t length, const float *scale, int64_t n, float *out);

/* Products of packed weights with inputs (runtime/kernels.py). `first` to `last` are rows, or blocks of TERSE_ROWS rows, so that
 * any number of threads may share a product; `simd` as above. What indexes something is the caller's to have checked: columns
 * and codes are never compared with anything here. No buffer is aligned. */
#define TERSE_ROWS 16
#define TERSE_COLUMNS 16

/* sparse.c: rows of numbers that are not zero, row r from starts[r] on: `values`, or where that is NULL book[codes[i]], at
 * `columns`. `dot` is y = W x; `windows` gives each row [width] sums of its numbers times what lies at their columns' places
 * and behind. */
TERSE_API int64_t terse_sparse_dot(const float *values, const uint8_t *codes, const float *book, const uint16_t *columns,
                                   const int64_t *starts, int64_t first, int64_t last, const float *x, float *y,
                                   int64_t simd);
TERSE_API int64_t terse_sparse_windows(const float *values, const uint8_t *codes, const float *book, const uint16_t *columns,
                                       const int64_t *starts, int64_t first, int64_t last, const float *x,
                                       const int32_t *place, int64_t width, float *y, int64_t stride, int64_t simd);

/* The same numbers by column, in blocks of so many rows, the rows of a block counted from its first: column c of block b from
 * starts[b * (columns + 1) + c] on. y = W x of the `kept` columns alone; first to last are blocks. */
TERSE_API int64_t terse_sparse_columns(const uint8_t *codes, const float *book, int64_t size, const uint16_t *rows,
                                       const int64_t *starts, int64_t columns, int64_t height, int64_t block, int64_t first,
                                       int64_t last, const int64_t *kept, int64_t count, const float *x, float *y);

/* y [count][rows] of the same with a bit for each column, `mask` [rows][words] of 16; behind the last value there is room for
 * 16, and x [count][stride] holds 16 * words. */
TERSE_API int64_t terse_masked_product(const float *values, const uint16_t *mask, int64_t rows, int64_t words,
                                       const int64_t *starts, const float *x, int64_t stride, int64_t count, int64_t first,
                                       int64_t last, float *y, int64_t simd);

/* levels.c: inputs [count][n], times `factor` [n] or NULL, as signed digits to the base of 256, the last first: `digits`
 * [count][TERSE_STRIDE] of [groups * width / 16][planes][16], groups of `group` columns and zeros up to `width`; their sums by
 * group, `sums` [count][planes][groups]; and the value of the last digit's one, NaN where an input is not finite. */
#define TERSE_STRIDE(groups, width, planes) ((groups) * (width) * (planes) + 64) /* inputs of 4096 columns share no cache line's set */
TERSE_API int64_t terse_levels_digits(const float *x, const float *factor, int64_t count, int64_t n, int64_t group,
                                      int64_t width, int64_t planes, int8_t *digits, int32_t *sums, double *steps);

/* y [count][rows]: scale * (level + offset) times these inputs, exact in integers within a group of at most 16,384 columns.
 * Levels have 8, 4 or 2 bits: [blocks][groups][width / 16][bits / 2][ROWS][4], in each byte the lowest bits belong to the
 * first columns. `scale` and `offset` are [blocks][groups][ROWS]; where that is NULL all offsets are `shift`, and none is
 * over 255 or under -255. */
TERSE_API int64_t terse_levels_product(const uint8_t *weights, int64_t bits, int64_t rows, int64_t groups, int64_t width,
                                       const float *scale, const int32_t *offset, int64_t shift, const int8_t *digits,
                                       const int32_t *sums, const double *steps, int64_t count, int64_t planes,
                                       int64_t first, int64_t last, float *y, int64_t simd);

/* shared.c: y [count][rows] = book[codes] x of `size` codewords, whose numbers have 4 or 8 bits: [blocks][words][ROWS], of a row
 * 32 / bits columns in a word, the first in the lowest bits. `book` has room for 256; x [count][stride] is zero behind the last
 * column. */
TERSE_API int64_t terse_codes_product(const uint32_t *codes, int64_t bits, int64_t rows, int64_t words, const float *book,
                                      int64_t size, const float *x, int64_t stride, int64_t count, int64_t first,
                                      int64_t last, float *y, int64_t simd);

/* y [rows] of codewords that are vectors: `index` [(blocks + 15) / 16][rows][16], `book` [d][size], at most 256; `room` has
 * TERSE_ROOM floats. */
#define TERSE_ROOM 4096
TERSE_API int64_t terse_blocks_product(const uint8_t *index, int64_t rows, int64_t blocks, const float *book, int64_t size,
                                       int64_t d, const float *x, int64_t first, int64_t last, float *y, float *room);
#endif

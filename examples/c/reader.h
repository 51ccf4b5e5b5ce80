/* A reader of .terse files for small devices: no malloc, nothing but the memory that the caller gives.
 *
 * The file stays where it is (flash, or a mapped file) and is checked whole when it is opened. A weight is decoded once, into
 * a form that products run on: the places of what is not zero as gaps of a byte, and values as codes of a byte where there
 * are at most 255. docs/format.md is the format. What the reader lacks it refuses: bzip2 and Zstandard streams, nodes but
 * Uniform, Codebook, Sparse, Sliced, Transformed and Reshaped, 64-bit floats, packed weights of other types than float32. */
#ifndef READER_H
#define READER_H
#include <stddef.h>
#include <stdint.h>

enum {
    DEVICE_DAMAGED = 1, /* the file is damaged, truncated or has bytes added */
    DEVICE_UNSUPPORTED, /* the small decoder lacks a codec, node or type of it */
    DEVICE_MEMORY,      /* the memory given is too small */
    DEVICE_MISSING      /* there is no such tensor, or not of that shape */
};

#define DEVICE_FORMATS 16
#define DEVICE_AXES 8

typedef struct {
    const uint8_t *bytes;
    uint32_t size;
    uint8_t *memory;              /* what is kept lies at its beginning, what is on loan at its end */
    size_t room, low, high, peak; /* bytes: all, kept, on loan, the most at a time of both */
    struct device_tensor *tensors;
    struct device_item *arrays; /* all of the file, in the order of its header */
    struct {
        uint32_t codec, offset, length, count;
    } pools[DEVICE_FORMATS];
    int32_t error; /* the first since a call began */
} device_file;

/* A weight of any shape as a matrix [rows][columns], the columns being all axes but the first. Values of the entries, in
 * order: table[code], or value, times by_row and by_column, each where there is one. */
typedef struct {
    uint32_t rows, columns, rank, extent[DEVICE_AXES];
    uint32_t entries;   /* bytes of `gap`; without gaps all places */
    const uint8_t *gap; /* zeros before a value; 255: so many zeros and no value. NULL: every place has a value */
    const uint8_t *code;
    const float *table, *value, *by_row, *by_column;
} device_layer;

/* Checks every byte of a file and reads its header. `memory` must last as long as what is loaded. */
int32_t device_open(device_file *file, const uint8_t *bytes, size_t size, void *memory, size_t room);

/* The weight of that name, which has one axis or more. */
int32_t device_load(device_file *file, const char *name, device_layer *layer);

/* The `count` floats of a small tensor, as a bias. */
int32_t device_floats(device_file *file, const char *name, uint32_t count, const float **floats);

/* y[rows] = layer x + bias. */
void device_product(const device_layer *layer, const float *bias, const float *x, float *y);

/* A convolution of stride 1 without padding, its bias, and the highest of each two by two places: x[inputs][height][width]
 * to y[rows][(height - kernel height + 1) / 2][...]. `plane` has room for one channel before that. */
void device_convolve(const device_layer *layer, const float *bias, const float *x, uint32_t height, uint32_t width,
                     float *plane, float *y);

#endif

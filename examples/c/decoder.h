/* What the files of the small decoder share. */
#ifndef DECODER_H
#define DECODER_H
#include "reader.h"

#define TAG_NONE 0
#define TAG_NUMBER 1
#define TAG_TEXT 2
#define TAG_TUPLE 3
#define TAG_ARRAY 4
#define TAG_NODE 5
enum { UNIFORM = TAG_NODE, CODEBOOK, SPARSE, SLICED, FACTORED, TRANSFORMED, RESHAPED, BLOOMIER, LATTICE, HASHED, TAGS };
#define TAG_SHARED 255
#define POOLED 127

#define FORMAT_BOOL 0
#define FORMAT_FLOATS 9 /* f16, f32, f64, then f32 held as f16 and as bf16, f64 held as f32, f32 that rise */

/* A value of the header: a number, a tuple, an array, a node. */
typedef struct device_item {
    struct device_item *first, *next; /* fields or members, each with the next of its own parent */
    struct device_item *described;    /* arrays: the next of the file; one that is shared: the array itself */
    int64_t number;
    uint32_t tag, format, codec;
    uint32_t offset, length; /* the stream's place in the file; of a pooled array its first value's in the pool */
    uint32_t rank, extent[DEVICE_AXES], size;
    /* On loan while the tensor is loaded: */
    int32_t low;
    uint32_t bits;         /* integers lie `bits` apart, less `low` */
    uint8_t *packed;
    float *floats;         /* of float arrays; of Transformed the matrices of both axes */
    uint32_t *index;       /* of Sparse how many ones lie before each 256 places, of Sliced each place in the child, plus 1 */
} device_item;

typedef struct device_tensor {
    struct device_tensor *next;
    const uint8_t *name;
    uint32_t length, type;
    device_item *tree;
} device_tensor;

typedef struct {
    const uint8_t *at, *end;
    int32_t bad; /* read past the end, or a number out of its range; then all is 0 */
} device_cursor;

typedef struct {
    device_cursor in;
    uint64_t held;
    uint32_t left;
} device_bits;

/* A canonical Huffman code of at most 15 bits: how many symbols have each length, and the symbols by length. */
typedef struct {
    uint16_t count[16];
    uint16_t *symbol;
} device_code;

int32_t device_fail(device_file *f, int32_t error);
/* Zeroed memory, kept for good or on loan until `high` is set back; NULL where there is none left. */
void *device_keep(device_file *f, size_t size);
void *device_lend(device_file *f, size_t size);

uint32_t device_byte(device_cursor *c);
uint64_t device_number(device_cursor *c, uint64_t limit); /* below the limit */
int64_t device_signed(device_cursor *c, uint64_t limit);
const uint8_t *device_bytes(device_cursor *c, uint64_t count);

uint32_t device_take(device_bits *b, uint32_t count); /* 0 to 32 bits, the first the lowest */
int32_t device_symbol(device_bits *b, const device_code *code); /* -1 where the bits mean none */
int32_t device_ended(const device_bits *b);                     /* whether nothing is left but zeros up to a whole byte */
/* Codes for the lengths of `count` symbols, which lie in `symbol`; what is left of 2^15, negative for too many. */
int32_t device_codes(device_code *code, const uint8_t *lengths, uint32_t count);

/* Raw deflate to `out`, of which `before` bytes stand before it; how many, -1 for a damaged one, -2 where
 * there is too little room. */
int64_t device_inflate(const uint8_t *in, uint32_t length, uint8_t *out, size_t room, uint32_t before);

/* A raw LZMA2 stream to exactly `size` bytes; `share` has room for LZMA_SHARES. 0, or -1 for a damaged one. */
#define LZMA_SHARES (1847 + (768 << 4))
int32_t device_unlzma(const uint8_t *in, uint32_t length, uint8_t *out, uint32_t size, uint16_t *share);

/* Decodes an array of the header into its `packed` or `floats`, on loan. */
int32_t device_decode(device_file *f, device_item *array);
int32_t device_at(const device_item *array, uint32_t place);

/* Decodes all arrays of a tree, gives its nodes their shapes, and checks that all fits together. */
int32_t device_bind(device_file *f, device_item *tree);
float device_value(const device_item *tree, uint32_t place);
uint32_t device_spread(const device_item *part, const device_item *against, uint32_t place);
float device_step(const device_item *exponents, uint32_t place);
device_item *device_field(const device_item *node, uint32_t number);
#endif

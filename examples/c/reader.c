/* Opens a .terse file: its checksums, its header, and where the bytes of each array lie. */
#include "reader.h"

#include "decoder.h"

#include <string.h>

#include "dictionary.h"

#define MAGIC 5
#define SMALL (1 << 16)
#define HEADER_CAP (1 << 24)
#define NAME_CAP 1024
#define NOTES_CAP (1 << 16)
#define DEEPEST 6
#define CODECS 12
#define NOTES 15
#define TYPES 18
#define TIED 255

_Static_assert(sizeof(device_item) <= 128 && sizeof(device_tensor) <= 32, "export.py goes by these");

int32_t device_fail(device_file *f, int32_t error) {
    if (!f->error) f->error = error;
    return f->error;
}

static size_t rounded(size_t size) { return (size + 15) / 16 * 16; }

static void *room_for(device_file *f, size_t size, size_t *used) {
    if (size > f->room || rounded(size) > f->room - f->low - f->high) return device_fail(f, DEVICE_MEMORY), (void *)0;
    *used += rounded(size);
    if (f->low + f->high > f->peak) f->peak = f->low + f->high;
    return memset(f->memory + (used == &f->high ? f->room - f->high : f->low - rounded(size)), 0, size);
}

void *device_keep(device_file *f, size_t size) { return room_for(f, size, &f->low); }
void *device_lend(device_file *f, size_t size) { return room_for(f, size, &f->high); }

/* zlib's, of more bytes after those whose checksum is `check`. */
static uint32_t crc(uint32_t check, const uint8_t *bytes, size_t count) {
    static const uint32_t table[16] = {0,          0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4,
                                       0x4db26158, 0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
                                       0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
    check = ~check;
    for (; count; count--) {
        check ^= *bytes++;
        check = check >> 4 ^ table[check & 15];
        check = check >> 4 ^ table[check & 15];
    }
    return ~check;
}

static uint32_t word(const uint8_t *at) {
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

/* What is read of a header, and how far the streams reach that it told of. */
typedef struct {
    device_file *f;
    device_cursor in;
    uint32_t streams, small, arrays, pooled[DEVICE_FORMATS]; /* whether there are small arrays of that format */
    device_item *last; /* array */
} parser;

static void damaged(parser *p) { device_fail(p->f, DEVICE_DAMAGED); }

/* The place of a stream of that length, behind those before. */
static uint32_t stream(parser *p, uint32_t *length) {
    const uint32_t at = p->streams;
    *length = (uint32_t)device_number(&p->in, p->f->size - at + 1);
    p->streams += *length;
    return at;
}

/* A checksum of the bytes from `begin` on; a small file has none, for it is checked as a whole. */
static void check(parser *p, uint32_t begin) {
    if (p->small) return;
    const uint8_t *told = device_bytes(&p->in, 4);
    if (p->in.bad || word(told) != crc(0, p->f->bytes + begin, p->streams - begin)) damaged(p);
}

static void array(parser *p, device_item *a) {
    uint64_t size = 1;
    a->format = device_byte(&p->in);
    a->rank = device_byte(&p->in);
    if (p->in.bad || a->format >= DEVICE_FORMATS || a->rank > DEVICE_AXES) {
        damaged(p);
        return;
    }
    for (uint32_t k = 0; k < a->rank; k++) {
        a->extent[k] = (uint32_t)device_number(&p->in, (uint64_t)1 << 32);
        size *= a->extent[k];
        if (size >> 31) size = INT32_MAX; /* too many for this decoder: device_decode refuses it */
    }
    a->size = (uint32_t)size;
    a->codec = (uint32_t)device_number(&p->in, 128);
    if (a->codec >= CODECS && a->codec != POOLED) {
        damaged(p);
        return;
    }
    if (a->codec == POOLED) {
        a->offset = p->f->pools[a->format].count;
        if (a->size > INT32_MAX - a->offset) {
            damaged(p);
            return;
        }
        p->f->pools[a->format].count += a->size;
        p->pooled[a->format] = 1;
    } else {
        a->offset = stream(p, &a->length);
    }
    if (p->last) p->last->described = a;
    else p->f->arrays = a;
    p->last = a;
    p->arrays++;
}

/* Whether a tensor of that type may be this: a node of floats, or a bare array of the type itself, of f32 for bf16, of u8 for
 * 8-bit floats. */
static int32_t fits(uint32_t type, const device_item *tree) {
    const uint32_t narrow[4] = {10, 10, 11, 10};
    if (tree->tag >= TAG_NODE) return type >= 9 && type <= 12;
    return tree->tag == TAG_ARRAY &&
           (tree->format < 12 ? tree->format : narrow[tree->format - 12]) == (type < 12 ? type : type == 12 ? 10 : 1);
}

static device_item *value(parser *p, uint32_t depth, uint32_t nodes) {
    static const uint8_t fields[] = {4, 2, 2, 4, 3, 1, 4, 6, 5, 3};
    device_item *v = device_keep(p->f, sizeof *v);
    if (!v) return 0;
    v->tag = device_byte(&p->in);
    uint32_t count = 0;
    if (p->in.bad || (v->tag >= TAGS && v->tag != TAG_SHARED)) return damaged(p), v;
    if (v->tag == TAG_NUMBER) v->number = device_signed(&p->in, (uint64_t)1 << 62);
    else if (v->tag == TAG_TEXT) device_bytes(&p->in, device_number(&p->in, 1 << 10));
    else if (v->tag == TAG_ARRAY) array(p, v);
    else if (v->tag == TAG_TUPLE) count = (uint32_t)device_number(&p->in, 256);
    else if (v->tag == TAG_SHARED) {
        device_item *other = p->f->arrays;
        for (uint64_t k = device_number(&p->in, p->arrays); k && other; k--) other = other->described;
        if (p->in.bad || !other) return damaged(p), v;
        *v = *other;
        v->next = 0;
    } else if (v->tag >= TAG_NODE) {
        count = fields[v->tag - TAG_NODE];
        if (nodes++ == DEEPEST) damaged(p);
    }
    if (depth > 8 + DEEPEST) damaged(p);
    device_item **next = &v->first;
    for (; count && !p->f->error && !p->in.bad; count--, next = &(*next)->next) *next = value(p, depth + 1, nodes);
    return v;
}

static void tensors(parser *p) {
    device_file *f = p->f;
    const uint64_t count = device_number(&p->in, (uint64_t)(p->in.end - p->in.at) + 1);
    device_tensor **next = &f->tensors;
    const uint8_t *before = 0;
    for (uint32_t length = 0, k = 0; k < count && !f->error && !p->in.bad; k++) {
        const uint32_t shared = (uint32_t)device_number(&p->in, length + 1);
        const uint32_t more = (uint32_t)device_number(&p->in, NAME_CAP + 1 - shared);
        const uint8_t *rest = device_bytes(&p->in, more);
        device_tensor *t = device_keep(f, sizeof *t);
        uint8_t *name = device_keep(f, shared + more);
        if (f->error || p->in.bad) break;
        if (shared) memcpy(name, before, shared);
        memcpy(name + shared, rest, more);
        length = shared + more;
        *t = (device_tensor){.name = name, .length = length, .type = device_byte(&p->in)};
        before = name;
        if (t->type == TIED) {
            const device_tensor *other = f->tensors;
            for (uint64_t at = device_number(&p->in, k); at && other; at--) other = other->next;
            if (p->in.bad || !other) {
                damaged(p);
                return;
            }
            t->type = other->type, t->tree = other->tree;
        } else {
            const uint32_t begin = p->streams, note = device_byte(&p->in);
            device_bytes(&p->in, 2); /* the error against the original */
            if (t->type >= TYPES || note >= NOTES) {
                damaged(p);
                return;
            }
            t->tree = value(p, 0, 0);
            if (!f->error && !fits(t->type, t->tree)) damaged(p);
            if (p->streams > begin) check(p, begin);
        }
        *next = t;
        next = &t->next;
    }
}

static void pools(parser *p) {
    device_file *f = p->f;
    const uint32_t begin = p->streams;
    uint32_t any = 0;
    for (uint32_t k = 0; k < DEVICE_FORMATS; k++) {
        if (!p->pooled[k]) continue;
        any = 1;
        f->pools[k].codec = device_byte(&p->in);
        f->pools[k].offset = stream(p, &f->pools[k].length);
        if (f->pools[k].codec >= CODECS) damaged(p);
    }
    if (any) check(p, begin);
}

/* Sections are left alone, but for those that a reader must know. */
static void sections(parser *p) {
    const uint64_t count = device_number(&p->in, 65);
    if (count == 0) damaged(p);
    for (uint64_t k = 0; k < count && !p->f->error && !p->in.bad; k++) {
        device_bytes(&p->in, device_number(&p->in, NAME_CAP));
        const uint32_t flags = device_byte(&p->in), begin = p->streams;
        uint32_t length;
        const uint64_t plain = device_number(&p->in, (uint64_t)1 << 62);
        stream(p, &length);
        check(p, begin);
        if (flags > 3 || (!(flags & 2) && plain != length)) damaged(p);
        if (flags & 1) device_fail(p->f, DEVICE_UNSUPPORTED);
    }
}

/* Inflates the header to the free memory, where it is lent then. */
static device_cursor inflated(device_file *f, const uint8_t *in, uint32_t length, uint32_t dictionary) {
    const size_t free = f->room - f->low - f->high;
    const uint64_t most = (uint64_t)32 * length + (1 << 16);
    uint8_t *out = f->memory + f->low + dictionary;
    if (free < dictionary) return device_fail(f, DEVICE_MEMORY), (device_cursor){0};
    const size_t left = free - dictionary, cap = most < HEADER_CAP ? (size_t)most : HEADER_CAP;
    memcpy(f->memory + f->low, DICTIONARY, dictionary);
    const int64_t plain = device_inflate(in, length, out, left < cap ? left : cap, dictionary);
    if (plain < 0) return device_fail(f, plain == -2 && left < cap ? DEVICE_MEMORY : DEVICE_DAMAGED), (device_cursor){0};
    if (f->low + dictionary + (size_t)plain > f->peak) f->peak = f->low + dictionary + (size_t)plain;
    if (rounded((size_t)plain) > free) return device_fail(f, DEVICE_MEMORY), (device_cursor){0};
    f->high += rounded((size_t)plain);
    uint8_t *to = memmove(f->memory + f->room - f->high, out, (size_t)plain);
    if (f->low + f->high > f->peak) f->peak = f->low + f->high;
    return (device_cursor){to, to + plain, 0};
}

static device_cursor header(parser *p) {
    device_file *f = p->f;
    const uint8_t *bytes = f->bytes;
    const uint32_t size = f->size;
    p->small = bytes[MAGIC] == 2;
    if (p->small) {
        if (size > SMALL || word(bytes + size - 4) != crc(0, bytes, size - 4)) damaged(p);
        device_cursor in = {bytes + MAGIC + 1, bytes + size - 4, 0};
        const uint32_t length = (uint32_t)device_number(&in, size);
        const uint8_t *coded = device_bytes(&in, length);
        if (in.bad) damaged(p);
        p->streams = (uint32_t)(in.at - bytes);
        return f->error ? in : inflated(f, coded, length, sizeof DICTIONARY);
    }
    const uint32_t length = word(bytes + MAGIC + 1);
    if (bytes[MAGIC] != 1 || size < 27 || length < 1 || length > HEADER_CAP || length > size - 26)
        return damaged(p), (device_cursor){0};
    device_cursor in = {bytes + 15, bytes + 14 + length, 0};
    const uint32_t sum = crc(crc(0, bytes, 10), bytes + 14, length);
    if (word(bytes + 10) != sum || word(bytes + size - 4) != crc(0, bytes, size - 4)) damaged(p);
    if (word(bytes + size - 12) != size || word(bytes + size - 8) || bytes[14] > 1) damaged(p);
    p->streams = 14 + length;
    return f->error || bytes[14] == 0 ? in : inflated(f, in.at, length - 1, 0);
}

int32_t device_open(device_file *f, const uint8_t *bytes, size_t size, void *memory, size_t room) {
    const size_t off = (size_t)(-(uintptr_t)memory & 15);
    *f = (device_file){.bytes = bytes, .size = (uint32_t)size, .memory = (uint8_t *)memory + off};
    if (room < off) return device_fail(f, DEVICE_MEMORY);
    f->room = (room - off) / 16 * 16;
    if (size < 11 || size > INT32_MAX || memcmp(bytes, "TERSE", MAGIC)) return device_fail(f, DEVICE_DAMAGED);
    parser p = {.f = f};
    p.in = header(&p);
    if (!f->error) tensors(&p);
    if (!f->error) pools(&p);
    if (!f->error) device_bytes(&p.in, device_number(&p.in, NOTES_CAP));
    if (!f->error && !p.in.bad && p.in.at != p.in.end) sections(&p);
    if (p.in.bad || p.in.at != p.in.end || p.streams + (p.small ? 4 : 12) != f->size) damaged(&p);
    f->high = 0;
    return f->error;
}

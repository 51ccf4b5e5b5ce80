/* The values of packed weights: the nodes of a tree, checked once and then asked place by place. */
#include "decoder.h"

#include <math.h>
#include <string.h>

#define MOST_VALUES (1 << 24)
#define STEPS 4
#define BLOCK 256 /* places of a mask from one count to the next */

device_item *device_field(const device_item *node, uint32_t number) {
    device_item *field = node->first;
    for (; number && field; number--) field = field->next;
    return field;
}

static int32_t damaged(device_file *f) { return device_fail(f, DEVICE_DAMAGED); }

static int32_t is_integers(const device_item *v) { return v->tag == TAG_ARRAY && v->format < FORMAT_FLOATS; }
static int32_t is_mask(const device_item *v) { return v->tag == TAG_ARRAY && v->format == FORMAT_BOOL; }
static int32_t is_tree(const device_item *v) {
    return v->tag >= TAG_NODE || (v->tag == TAG_ARRAY && v->format >= FORMAT_FLOATS);
}

static uint32_t members(const device_item *tuple) {
    uint32_t count = 0;
    for (const device_item *v = tuple->first; v; v = v->next) count++;
    return count;
}

/* A tuple of extents whose product is `size`, to `extent`; their number, or -1. */
static int32_t shape(const device_item *tuple, uint32_t size, uint32_t *extent) {
    uint64_t product = 1;
    uint32_t rank = 0;
    if (tuple->tag != TAG_TUPLE || members(tuple) > DEVICE_AXES) return -1;
    for (const device_item *v = tuple->first; v; v = v->next) {
        if (v->tag != TAG_NUMBER || v->number < 0 || v->number > MOST_VALUES) return -1;
        extent[rank++] = (uint32_t)v->number;
        product *= (uint64_t)v->number;
        if (product > MOST_VALUES) return -1;
    }
    return product == size ? (int32_t)rank : -1;
}

static void take_shape(device_item *v, const device_item *of) {
    v->rank = of->rank, v->size = of->size;
    memcpy(v->extent, of->extent, sizeof v->extent);
}

/* Whether a part says something for every place of the levels: by place, by group, or for all at once. */
static int32_t spreads(const device_item *part, const device_item *against) {
    if (part->rank > against->rank) return 0;
    for (uint32_t k = 0; k < part->rank; k++) {
        const uint32_t own = part->extent[k], n = against->extent[k + against->rank - part->rank];
        if (own != 1 && (own == 0 ? n != 0 : n % own != 0)) return 0;
    }
    return 1;
}

uint32_t device_spread(const device_item *part, const device_item *against, uint32_t place) {
    uint32_t at = 0, stride = 1;
    for (uint32_t k = 0; k < part->rank; k++) {
        const uint32_t n = against->extent[against->rank - 1 - k], own = part->extent[part->rank - 1 - k];
        at += place % n / (n / own) * stride;
        stride *= own;
        place /= n;
    }
    return at;
}

float device_step(const device_item *exponents, uint32_t place) {
    const int32_t e = device_at(exponents, place);
    return ldexpf(e & 1 ? 1.41421356f : 1, (e - (e & 1)) / 2);
}

static int32_t bind_uniform(device_file *f, device_item *v) {
    const device_item *q = device_field(v, 0), *scale = device_field(v, 1), *zero = device_field(v, 2);
    const device_item *steps = device_field(v, 3);
    if (!is_integers(q) || !is_tree(scale) || !spreads(scale, q) || steps->tag != TAG_TUPLE) return damaged(f);
    if (zero->tag != TAG_NONE && (!is_integers(zero) || !spreads(zero, q))) return damaged(f);
    for (const device_item *step = steps->first; step; step = step->next)
        if (step->tag != TAG_ARRAY || step->format != 2 || !spreads(step, q)) return damaged(f);
    take_shape(v, q);
    return members(steps) > STEPS ? device_fail(f, DEVICE_UNSUPPORTED) : 0;
}

static int32_t bind_codebook(device_file *f, device_item *v) {
    const device_item *index = device_field(v, 0), *words = device_field(v, 1);
    if (!is_integers(index) || !is_tree(words) || index->rank < 1 || words->rank != 2) return damaged(f);
    for (uint32_t k = 0; k < index->size; k++)
        if (device_at(index, k) < 0 || (uint32_t)device_at(index, k) >= words->extent[0]) return damaged(f);
    const uint64_t size = (uint64_t)index->size * words->extent[1];
    if (size > MOST_VALUES) return device_fail(f, DEVICE_UNSUPPORTED);
    take_shape(v, index);
    v->extent[v->rank - 1] *= words->extent[1];
    v->size = (uint32_t)size;
    return 0;
}

static int32_t bind_sparse(device_file *f, device_item *v) {
    const device_item *mask = device_field(v, 0), *values = device_field(v, 1);
    if (!is_mask(mask) || !is_tree(values) || values->rank != 1) return damaged(f);
    v->index = device_lend(f, (mask->size / BLOCK + 1) * sizeof *v->index);
    if (f->error) return f->error;
    uint32_t ones = 0;
    for (uint32_t k = 0; k < mask->size; k++) {
        if (k % BLOCK == 0) v->index[k / BLOCK] = ones;
        ones += (uint32_t)device_at(mask, k);
    }
    take_shape(v, mask);
    return ones == values->size ? 0 : damaged(f);
}

static int32_t bind_sliced(device_file *f, device_item *v) {
    const device_item *kept = device_field(v, 0), *child = device_field(v, 1);
    const int64_t axis = device_field(v, 2)->number, size = device_field(v, 3)->number;
    if (device_field(v, 2)->tag != TAG_NUMBER || device_field(v, 3)->tag != TAG_NUMBER) return damaged(f);
    if (!is_integers(kept) || kept->rank != 1 || !is_tree(child) || axis < 0 || axis >= child->rank) return damaged(f);
    const uint32_t n = child->extent[axis];
    if (size < n || kept->size != (is_mask(kept) ? size : n)) return damaged(f);
    const uint64_t whole = n ? (uint64_t)child->size / n * (uint64_t)size : 0;
    if (size > MOST_VALUES || whole > MOST_VALUES || n == 0) return device_fail(f, DEVICE_UNSUPPORTED);
    take_shape(v, child);
    v->extent[axis] = (uint32_t)size;
    v->size = (uint32_t)whole;
    v->number = axis;
    v->index = device_lend(f, (size_t)size * sizeof *v->index);
    if (f->error) return f->error;
    uint32_t found = 0;
    for (uint32_t k = 0; k < kept->size; k++) {
        const int32_t at = is_mask(kept) ? (int32_t)k : device_at(kept, k);
        if (is_mask(kept) && !device_at(kept, k)) continue;
        if (at < 0 || at >= size || (!is_mask(kept) && k && at <= device_at(kept, k - 1))) return damaged(f);
        v->index[at] = ++found;
    }
    return found == n ? 0 : damaged(f);
}

static int32_t bind_transformed(device_file *f, device_item *v) {
    const device_item *child = device_field(v, 0);
    if (!is_tree(child) || child->rank < 2) return damaged(f);
    take_shape(v, child);
    const uint32_t *sides = v->extent + v->rank - 2;
    if (sides[0] < 1 || sides[0] > 64 || sides[1] < 1 || sides[1] > 64) return damaged(f);
    float *matrix = v->floats = device_lend(f, (sides[0] * sides[0] + sides[1] * sides[1]) * sizeof *matrix);
    if (f->error) return f->error;
    for (uint32_t axis = 0; axis < 2; axis++) /* the orthonormal DCT-II, a row for each frequency */
        for (uint32_t k = 0, n = sides[axis]; k < n * n; k++) {
            const double wave = cos(3.14159265358979323846 * (k / n) * (2 * (k % n) + 1) / (2 * n));
            *matrix++ = (float)(wave * sqrt((k < n ? 1.0 : 2.0) / n));
        }
    return 0;
}

static int32_t bind_reshaped(device_file *f, device_item *v) {
    const device_item *child = device_field(v, 0), *axes = device_field(v, 2);
    uint32_t seen = 0, split[DEVICE_AXES];
    if (!is_tree(child) || axes->tag != TAG_TUPLE) return damaged(f);
    const int32_t rank = shape(device_field(v, 1), child->size, split), own = shape(device_field(v, 3), child->size, v->extent);
    if (rank < 0 || own < 0 || members(axes) != (uint32_t)rank) return damaged(f);
    for (const device_item *a = axes->first; a; a = a->next) {
        if (a->tag != TAG_NUMBER || a->number < 0 || a->number >= rank || seen >> a->number & 1) return damaged(f);
        seen |= 1u << a->number;
    }
    v->rank = (uint32_t)own, v->size = child->size;
    return 0;
}

int32_t device_bind(device_file *f, device_item *v) {
    for (device_item *part = v->first; part && !f->error; part = part->next) device_bind(f, part);
    if (f->error) return f->error;
    if (v->tag == TAG_ARRAY) return v->size > MOST_VALUES ? device_fail(f, DEVICE_UNSUPPORTED) : device_decode(f, v);
    if (v->tag == UNIFORM) return bind_uniform(f, v);
    if (v->tag == CODEBOOK) return bind_codebook(f, v);
    if (v->tag == SPARSE) return bind_sparse(f, v);
    if (v->tag == SLICED) return bind_sliced(f, v);
    if (v->tag == TRANSFORMED) return bind_transformed(f, v);
    if (v->tag == RESHAPED) return bind_reshaped(f, v);
    return v->tag < TAG_NODE ? 0 : device_fail(f, DEVICE_UNSUPPORTED);
}

static float of_uniform(const device_item *v, uint32_t place) {
    const device_item *q = device_field(v, 0), *scale = device_field(v, 1), *zero = device_field(v, 2);
    float value = (float)device_at(q, place);
    if (zero->tag == TAG_ARRAY) value += (float)device_at(zero, device_spread(zero, q, place));
    value *= device_value(scale, device_spread(scale, q, place));
    for (const device_item *step = device_field(v, 3)->first; step; step = step->next)
        value *= device_step(step, device_spread(step, q, place));
    return value;
}

static float of_sparse(const device_item *v, uint32_t place) {
    const device_item *mask = device_field(v, 0);
    if (!device_at(mask, place)) return 0;
    uint32_t rank = v->index[place / BLOCK]; /* a mask has a bit for each place */
    for (uint32_t k = place / BLOCK * BLOCK / 8; k < place / 8; k++)
        for (uint32_t bits = mask->packed[k]; bits; bits &= bits - 1) rank++;
    for (uint32_t bits = mask->packed[place / 8] & ((1u << place % 8) - 1); bits; bits &= bits - 1) rank++;
    return device_value(device_field(v, 1), rank);
}

static float of_sliced(const device_item *v, uint32_t place) {
    const device_item *child = device_field(v, 1);
    uint32_t behind = 1; /* places for each of the axis */
    for (uint32_t k = (uint32_t)v->number + 1; k < v->rank; k++) behind *= v->extent[k];
    const uint32_t n = v->extent[v->number], at = v->index[place / behind % n];
    if (at == 0) return 0;
    return device_value(child, (place / behind / n * child->extent[v->number] + at - 1) * behind + place % behind);
}

static float of_transformed(const device_item *v, uint32_t place) {
    const uint32_t high = v->extent[v->rank - 2], wide = v->extent[v->rank - 1], first = place / (high * wide) * high * wide;
    const uint32_t y = place / wide % high, x = place % wide;
    float sum = 0;
    for (uint32_t k = 0; k < high * wide; k++) {
        const float part = device_value(device_field(v, 0), first + k);
        if (part != 0) sum += part * v->floats[k / wide * high + y] * v->floats[high * high + k % wide * wide + x];
    }
    return sum;
}

static float of_reshaped(const device_item *v, uint32_t place) {
    uint32_t extent[DEVICE_AXES], at[DEVICE_AXES], rank = 0, child = 0;
    for (const device_item *n = device_field(v, 1)->first; n; n = n->next) extent[rank++] = (uint32_t)n->number;
    for (uint32_t k = rank; k-- > 0; place /= extent[k]) at[k] = place % extent[k];
    for (const device_item *a = device_field(v, 2)->first; a; a = a->next) child = child * extent[a->number] + at[a->number];
    return device_value(device_field(v, 0), child);
}

float device_value(const device_item *v, uint32_t place) {
    if (v->tag == TAG_ARRAY) return v->floats[place];
    if (v->tag == UNIFORM) return of_uniform(v, place);
    if (v->tag == SPARSE) return of_sparse(v, place);
    if (v->tag == SLICED) return of_sliced(v, place);
    if (v->tag == TRANSFORMED) return of_transformed(v, place);
    if (v->tag == RESHAPED) return of_reshaped(v, place);
    const device_item *words = device_field(v, 1); /* a codebook */
    const uint32_t d = words->extent[1];
    return device_value(words, (uint32_t)device_at(device_field(v, 0), place / d) * d + place % d);
}

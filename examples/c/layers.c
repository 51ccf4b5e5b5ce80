/* Weights as they are run: made once from their trees, and products with them. */
#include "decoder.h"

#include <string.h>

#define CODES 256
#define SKIP 255 /* a gap that says: so many zeros, and no value yet */
#define FLOAT32 10

/* How a Uniform's parts come apart: by row and by column, the levels being what is left. */
typedef struct {
    const device_item *tree;
    float *by_row, *by_column;
    int32_t apart, zero;
} source;

static float value_of(const source *s, uint32_t place) {
    if (s->apart) return (float)device_at(device_field(s->tree, 0), place) + (float)s->zero;
    return device_value(s->tree, place);
}

static int32_t by_row_alone(const device_item *part, const device_item *q) {
    return part->rank == q->rank && part->extent[0] == part->size;
}

static int32_t by_column_alone(const device_item *part, const device_item *q) {
    return part->rank < q->rank || part->extent[0] == 1;
}

/* Takes a Uniform apart, where each of its parts goes by row or by column alone. */
static int32_t take_apart(device_file *f, source *s, uint32_t rows, uint32_t columns) {
    const device_item *q = device_field(s->tree, 0), *scale = device_field(s->tree, 1), *zero = device_field(s->tree, 2);
    const device_item *steps = device_field(s->tree, 3)->first, *step;
    if (zero->tag == TAG_ARRAY && zero->size != 1) return 0;
    if (!by_row_alone(scale, q) && !by_column_alone(scale, q)) return 0;
    for (step = steps; step; step = step->next)
        if (!by_row_alone(step, q) && !by_column_alone(step, q)) return 0;
    s->by_row = device_keep(f, rows * sizeof *s->by_row);
    s->by_column = device_keep(f, columns * sizeof *s->by_column);
    if (f->error) return f->error;
    s->apart = 1;
    s->zero = zero->tag == TAG_ARRAY ? device_at(zero, 0) : 0;
    for (uint32_t k = 0; k < rows; k++) s->by_row[k] = 1;
    for (uint32_t k = 0; k < columns; k++) s->by_column[k] = 1;
    const int32_t scale_rows = by_row_alone(scale, q);
    float *to = scale_rows ? s->by_row : s->by_column;
    for (uint32_t k = 0; k < (scale_rows ? rows : columns); k++)
        to[k] = device_value(scale, device_spread(scale, q, scale_rows ? k * columns : k));
    for (step = steps; step; step = step->next) {
        const int32_t of_rows = by_row_alone(step, q);
        to = of_rows ? s->by_row : s->by_column;
        for (uint32_t k = 0; k < (of_rows ? rows : columns); k++)
            to[k] *= device_step(step, device_spread(step, q, of_rows ? k * columns : k));
    }
    return 0;
}

/* The number of a value among those seen, which are none at first but zero; CODES where there are too many. */
static uint32_t number_of(float *table, uint32_t *seen, float value) {
    uint32_t k = 0;
    while (k < *seen && memcmp(&table[k], &value, sizeof value)) k++;
    if (k == *seen && k < CODES) table[(*seen)++] = value;
    return k;
}

/* What is not zero, counted first and then put down. */
static int32_t make(device_file *f, device_layer *l, const source *s) {
    const uint32_t size = l->rows * l->columns;
    uint32_t values = 0, entries = 0, seen = 1, many = 0;
    float *table = device_lend(f, CODES * sizeof *table);
    if (f->error) return f->error;
    for (uint32_t place = 0, gap = 0; place < size; place++, gap++) {
        const float value = value_of(s, place);
        if (value == 0) continue;
        values++;
        entries += gap / SKIP + 1;
        gap = UINT32_MAX;
        if (!many) many = number_of(table, &seen, value) == CODES;
    }
    const uint32_t width = many ? sizeof(float) : 1, sparse = entries + (uint64_t)values * width < (uint64_t)size * width;
    uint8_t *gaps = sparse ? device_keep(f, entries) : 0, *code = many ? 0 : device_keep(f, sparse ? values : size);
    float *value = many ? device_keep(f, (sparse ? values : size) * sizeof *value) : 0;
    float *kept = many ? 0 : device_keep(f, seen * sizeof *kept);
    if (f->error) return f->error;
    if (kept) memcpy(kept, table, seen * sizeof *kept);
    l->entries = sparse ? entries : size;
    l->gap = gaps, l->code = code, l->value = value, l->table = kept;
    for (uint32_t place = 0, gap = 0; place < size; place++) {
        const float one = value_of(s, place);
        if (sparse && one == 0) {
            gap++;
            continue;
        }
        for (; sparse && gap >= SKIP; gap -= SKIP) *gaps++ = SKIP;
        if (sparse) *gaps++ = (uint8_t)gap;
        gap = 0;
        if (many) *value++ = one;
        else *code++ = one == 0 ? 0 : (uint8_t)number_of(table, &seen, one);
    }
    return 0;
}

/* The tensor of that name with its arrays decoded; what it lends is to be given back. */
static const device_item *bound(device_file *f, const char *name) {
    const size_t length = strlen(name);
    const device_tensor *t = f->tensors;
    f->error = 0;
    while (t && (t->length != length || memcmp(t->name, name, length))) t = t->next;
    if (!t) return device_fail(f, DEVICE_MISSING), (void *)0;
    if (t->tree->tag < TAG_ARRAY || (t->tree->tag == TAG_ARRAY && t->tree->format < FORMAT_FLOATS))
        return device_fail(f, DEVICE_UNSUPPORTED), (void *)0;
    if (t->tree->tag >= TAG_NODE && t->type != FLOAT32) return device_fail(f, DEVICE_UNSUPPORTED), (void *)0;
    return device_bind(f, t->tree) ? 0 : t->tree;
}

/* Gives back what is on loan, and what was kept too after an error. */
static int32_t done(device_file *f, size_t low) {
    f->high = 0;
    if (f->error) f->low = low;
    return f->error;
}

int32_t device_load(device_file *f, const char *name, device_layer *l) {
    const size_t low = f->low;
    source s = {.tree = bound(f, name)};
    if (!s.tree) return done(f, low);
    if (s.tree->rank < 1 || s.tree->size == 0) return device_fail(f, DEVICE_MISSING), done(f, low);
    *l = (device_layer){.rows = s.tree->extent[0], .rank = s.tree->rank};
    memcpy(l->extent, s.tree->extent, sizeof l->extent);
    l->columns = s.tree->size / l->rows;
    if (s.tree->tag == UNIFORM) take_apart(f, &s, l->rows, l->columns);
    l->by_row = s.by_row, l->by_column = s.by_column;
    if (!f->error) make(f, l, &s);
    return done(f, low);
}

int32_t device_floats(device_file *f, const char *name, uint32_t count, const float **floats) {
    const size_t low = f->low;
    const device_item *tree = bound(f, name);
    if (tree && tree->size != count) device_fail(f, DEVICE_MISSING);
    float *to = f->error ? 0 : device_keep(f, count * sizeof *to);
    for (uint32_t k = 0; to && k < count; k++) to[k] = device_value(tree, k);
    *floats = to;
    return done(f, low);
}

/* ------------------------------------------------------------------ products */

/* The next entry of a layer, from row 0 on. */
typedef struct {
    uint32_t entry, at, row, column;
    float value;
} step;

static inline int32_t next(const device_layer *l, step *s) {
    uint32_t gap = SKIP;
    if (s->at) s->column++; /* behind the value before */
    while (l->gap && gap == SKIP) {
        if (s->entry == l->entries) return 0;
        gap = l->gap[s->entry++];
        s->column += gap;
    }
    if (!l->gap && s->entry++ == l->entries) return 0;
    for (; s->column >= l->columns; s->column -= l->columns) s->row++;
    s->value = l->code ? l->table[l->code[s->at]] : l->value[s->at];
    s->at++;
    if (l->by_column) s->value *= l->by_column[s->column];
    return 1;
}

void device_product(const device_layer *l, const float *bias, const float *x, float *y) {
    memset(y, 0, l->rows * sizeof *y);
    for (step s = {0}; next(l, &s);) y[s.row] += s.value * x[s.column];
    for (uint32_t k = 0; k < l->rows; k++) y[k] = bias[k] + (l->by_row ? l->by_row[k] * y[k] : y[k]);
}

void device_convolve(const device_layer *l, const float *bias, const float *x, uint32_t height, uint32_t width,
                     float *plane, float *y) {
    const uint32_t high = l->extent[2], wide = l->extent[3], down = height - high + 1, across = width - wide + 1;
    step s = {0};
    int32_t more = next(l, &s);
    for (uint32_t row = 0; row < l->rows; row++) {
        memset(plane, 0, (size_t)down * across * sizeof *plane);
        for (; more && s.row == row; more = next(l, &s)) {
            const float *from = x + s.column / (high * wide) * height * width + s.column / wide % high * width + s.column % wide;
            for (uint32_t i = 0; i < down; i++)
                for (uint32_t j = 0; j < across; j++) plane[i * across + j] += s.value * from[i * width + j];
        }
        const float factor = l->by_row ? l->by_row[row] : 1;
        for (uint32_t i = 0; i + 1 < down; i += 2)
            for (uint32_t j = 0; j + 1 < across; j += 2) {
                float most = factor * plane[i * across + j];
                for (uint32_t k = 1; k < 4; k++) {
                    const float other = factor * plane[(i + k / 2) * across + j + k % 2];
                    if (other > most) most = other;
                }
                *y++ = most + bias[row];
            }
    }
}

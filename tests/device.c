/* What the small decoder of examples/c makes of files on the standard input, each behind its length in 32 bits.
 *
 * device ROOM          how much memory the decoder gets
 *
 * For each file: its code, and how many tensors follow (none after an error). For each of these: the code, the number of
 * values and the values as device_floats gives them; then the same as device_load and the form that products run on do. */
#include "../examples/c/decoder.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void tell(uint32_t word) { fwrite(&word, sizeof word, 1, stdout); }

/* The values of a layer, from its entries. */
static void unrolled(const device_layer *l, float *to) {
    uint32_t place = 0, at = 0;
    memset(to, 0, (size_t)l->rows * l->columns * sizeof *to);
    for (uint32_t k = 0; k < l->entries; k++) {
        place += l->gap ? l->gap[k] : 0;
        if (l->gap && l->gap[k] == 255) continue;
        float value = l->code ? l->table[l->code[at]] : l->value[at];
        if (l->by_row) value *= l->by_row[place / l->columns];
        if (l->by_column) value *= l->by_column[place % l->columns];
        to[place] = value;
        at++, place++;
    }
}

int main(int count, char **given) {
    const size_t room = count > 1 ? (size_t)atol(given[1]) : 0;
    uint32_t size;
    while (fread(&size, sizeof size, 1, stdin) == 1) {
        uint8_t *file = malloc(size), *memory = malloc(room); /* of their exact sizes, so that a sanitizer sees their ends */
        if (fread(file, 1, size, stdin) != size) return 2;
        device_file f;
        const int32_t wrong = device_open(&f, file, size, memory, room);
        uint32_t tensors = 0;
        for (device_tensor *t = f.tensors; !wrong && t; t = t->next) tensors++;
        tell((uint32_t)wrong);
        tell(tensors);
        for (device_tensor *t = f.tensors; !wrong && t; t = t->next) {
            char name[1025] = {0};
            memcpy(name, t->name, t->length);
            const size_t low = f.low;
            const float *floats;
            device_layer l;
            uint32_t values = t->tree->tag == TAG_ARRAY ? t->tree->size : 0;
            if (device_floats(&f, name, values, &floats) == DEVICE_MISSING) { /* of a tree it is told first */
                values = t->tree->size;
                device_floats(&f, name, values, &floats);
            }
            tell((uint32_t)f.error);
            tell(f.error ? 0 : values);
            if (!f.error) fwrite(floats, sizeof *floats, values, stdout);
            device_load(&f, name, &l);
            tell((uint32_t)f.error);
            tell(f.error ? 0 : l.rows * l.columns);
            if (!f.error) {
                float *all = malloc((size_t)l.rows * l.columns * sizeof *all);
                unrolled(&l, all);
                fwrite(all, sizeof *all, (size_t)l.rows * l.columns, stdout);
                free(all);
            }
            f.low = low;
        }
        free(file);
        free(memory);
    }
    return 0;
}

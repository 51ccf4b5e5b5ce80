/* Tells MNIST digits apart with LeNet-300-100 or LeNet-5, straight from packed weights.
 *
 * digits FILE IMAGES          IMAGES holds 784 bytes for each digit; a line for each: the class, and the ten outputs
 * digits IMAGES               where the network was built in, as `terse export lenet5.terse -o lenet5.h` wrote it:
 *                             cc -DMODEL='"lenet5.h"' -DNAME=model_lenet5 */
#include "reader.h"

#include <stdio.h>
#include <time.h>

#define SIDE 28
#define CLASSES 10

#ifdef MODEL
#include MODEL
#define PASTED(name, part) name##part
#define OF(name, part) PASTED(name, part)
#define FILE_BYTES OF(NAME, )
enum { ROOM = OF(NAME, _arena) };
#else
#define FILE_BYTES file_bytes
enum { ROOM = 4 << 20 };
static uint8_t file_bytes[1 << 20];
#endif

static _Alignas(16) uint8_t memory[ROOM];
static float first[SIDE * SIDE], second[20 * 12 * 12], third[50 * 4 * 4], plane[24 * 24]; /* what flows through the layers */

typedef struct {
    device_layer weight;
    const float *bias;
} layer;

static int32_t load(device_file *f, const char *weight, const char *bias, uint32_t rows, uint32_t columns, layer *to) {
    if (device_load(f, weight, &to->weight)) return f->error;
    if (to->weight.rows != rows || to->weight.columns != columns) return DEVICE_MISSING;
    return device_floats(f, bias, rows, &to->bias);
}

static void relu(float *x, uint32_t n) {
    for (uint32_t k = 0; k < n; k++)
        if (x[k] < 0) x[k] = 0;
}

static void dense(const layer *l, const float *x, float *y) { device_product(&l->weight, l->bias, x, y); }

/* The ten outputs for an image in `first`; of LeNet-5 where there are four layers. */
static void run(const layer *net, uint32_t layers, float *out) {
    const layer *next = net;
    float *hidden = second, *x = first;
    if (layers == 4) {
        device_convolve(&net[0].weight, net[0].bias, first, SIDE, SIDE, plane, second);
        device_convolve(&net[1].weight, net[1].bias, second, 12, 12, plane, third);
        next += 2, x = third;
    }
    for (; next != net + layers - 1; next++) {
        dense(next, x, hidden);
        relu(hidden, next->weight.rows);
        x = hidden;
        hidden = hidden == second ? third : second;
    }
    dense(next, x, out);
}

static int32_t open_network(device_file *f, size_t size, layer *net, uint32_t *layers) {
    int32_t wrong = device_open(f, FILE_BYTES, size, memory, sizeof memory);
    if (wrong) return wrong;
    wrong = load(f, "conv1.weight", "conv1.bias", 20, 25, &net[0]);
    *layers = wrong == DEVICE_MISSING ? 3 : 4;
    if (wrong && wrong != DEVICE_MISSING) return wrong;
    if (*layers == 4) {
        if (net[0].weight.rank != 4 || net[0].weight.extent[2] != 5) return DEVICE_MISSING;
        if ((wrong = load(f, "conv2.weight", "conv2.bias", 50, 500, &net[1]))) return wrong;
        if (net[1].weight.rank != 4 || net[1].weight.extent[2] != 5) return DEVICE_MISSING;
        if ((wrong = load(f, "fc1.weight", "fc1.bias", 500, 800, &net[2]))) return wrong;
        return load(f, "fc2.weight", "fc2.bias", CLASSES, 500, &net[3]);
    }
    if ((wrong = load(f, "fc1.weight", "fc1.bias", 300, SIDE * SIDE, &net[0]))) return wrong;
    if ((wrong = load(f, "fc2.weight", "fc2.bias", 100, 300, &net[1]))) return wrong;
    return load(f, "fc3.weight", "fc3.bias", CLASSES, 100, &net[2]);
}

static double ms(clock_t from) { return 1e3 * (double)(clock() - from) / CLOCKS_PER_SEC; }

int main(int count, char **given) {
    static const char *const why[] = {"", "the file is damaged", "the small decoder lacks a codec, node or type of the file",
                                      "the memory is too small", "the file holds no LeNet"};
#ifdef MODEL
    const size_t size = sizeof FILE_BYTES;
    const int images_at = 1;
#else
    const int images_at = 2;
    FILE *file = count > 1 ? fopen(given[1], "rb") : 0;
    const size_t size = file ? fread(file_bytes, 1, sizeof file_bytes, file) : 0;
    if (file) fclose(file);
#endif
    FILE *images = count > images_at ? fopen(given[images_at], "rb") : 0;
    if (!images) return fprintf(stderr, "digits: give a file that can be read\n"), 10;
    device_file f;
    layer net[4];
    uint32_t layers, digits = 0;
    const clock_t begun = clock();
    const int32_t wrong = open_network(&f, size, net, &layers);
    const double loaded = ms(begun);
    if (wrong) return fprintf(stderr, "digits: %s\n", why[wrong]), wrong;
    double spent = 0;
    for (uint8_t image[SIDE * SIDE]; fread(image, 1, sizeof image, images) == sizeof image; digits++) {
        float out[CLASSES];
        uint32_t best = 0;
        for (uint32_t k = 0; k < sizeof image; k++) first[k] = (float)image[k] / 256;
        const clock_t from = clock();
        run(net, layers, out);
        spent += ms(from);
        for (uint32_t k = 1; k < CLASSES; k++)
            if (out[k] > out[best]) best = k;
        printf("%u", (unsigned)best);
        for (uint32_t k = 0; k < CLASSES; k++) printf(" %.9g", (double)out[k]);
        printf("\n");
    }
    fprintf(stderr, "%lu bytes of memory at most, %lu once loaded; loaded in %.2f ms, %.4f ms a digit\n",
            (unsigned long)f.peak, (unsigned long)f.low, loaded, digits ? spent / digits : 0);
    return 0;
}

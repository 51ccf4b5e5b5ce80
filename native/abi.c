#include "compiler.h"
#include "terse.h"

int32_t terse_abi(void) {
    const uint16_t number = 1;
    volatile float x = 1 + 1.0f / 4096, square = 1 + 1.0f / 2048; /* rounded, and the compiler may not know */
    return *(const uint8_t *)&number == 1 && x * x - square == 0 ? TERSE_ABI : 0;
}

void terse_sizes(int64_t *sizes) {
    sizes[0] = sizeof(terse_model);
    sizes[1] = sizeof(terse_array);
    sizes[2] = sizeof(terse_feedback_steps);
}
